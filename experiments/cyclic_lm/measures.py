"""What a finished run says: the class of every response, the gap, and whether fits reached their targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from onpo_fast.games.solution import duality_gap, rewards
from onpo_fast.oracles.classes import ClassPreference

from .recipe import HELD_OUT_ADJECTIVES, Arm

Classes = list[list[int]]  # of the responses to each prompt; the last class is "none of them"


def measure(run: Path, preference: ClassPreference, arm: Arm, eta: float) -> dict:
    """Returns the raw results of a finished run, for its file.

    Args:
        run: the run directory.
        preference: the oracle of the run.
        eta: the step of mirror descent.

    Returns:
        ``heldout``: for each policy π_1 … π_{T+1} the classes of its responses to every held-out prompt; ``training``:
        those of the responses of π_1 … π_T that it was trained on; ``win_rate``: (T+1, T+1), rows over columns;
        ``kl_to_initial``: nats, T+1; ``cyclic_triples``: shares, T; ``fits``: for each iteration and fit the steps, the
        mean margin in the last quarter of them, and that of an exact fit (nats); ``seconds``.
    """
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    answers = _lines(run / "evaluation_responses.jsonl")
    names = evaluation["policies"]
    heldout = [[classes(preference, one["prompt"], one["responses"][name]) for one in answers] for name in names]
    training, triples, fits = [], [], []
    metrics = _lines(run / "metrics.jsonl")
    for t in range(1, len(names)):
        sampled = _lines(run / f"iteration_{t:02d}" / "responses.jsonl")
        training.append([classes(preference, one["prompt"], one["responses"]) for one in sampled])
        own = [one for one in metrics if one["iteration"] == t]
        triples += [one["cyclic_triples"] for one in own if one["stage"] == "iteration"]
        exact = exact_margin(preference.full_matrix, training[-1], eta) if arm.exact else None
        for name in ("auxiliary", "policy"):
            if steps := [one for one in own if one["stage"] == "fit" and one["fit"] == name]:
                last = steps[-max(1, len(steps) // 4) :]
                margin = float(np.mean([one["margin"] for one in last]))
                fits.append({"iteration": t, "fit": name, "steps": len(steps), "margin": margin, "exact": exact})
    return {
        "heldout": heldout,
        "training": training,
        "win_rate": evaluation["win_rate"],
        "kl_to_initial": evaluation["kl_to_initial"],
        "cyclic_triples": triples,
        "fits": fits,
        "seconds": sum(one["seconds"] for one in metrics if one["stage"] == "iteration"),
        "environment": json.loads((run / "environment.json").read_text(encoding="utf-8")),
    }


def measure_best_response(run: Path, preference: ClassPreference, arm: Arm, eta: float) -> dict:
    """Returns how often a best response that was trained against a frozen policy wins against it.

    Returns:
        ``win_rate``, with its ``interval`` of 95%; ``heldout``: classes of the responses of the frozen policy and of
        the best response to every held-out prompt.
    """
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    answers = _lines(run / "evaluation_responses.jsonl")
    return {
        "win_rate": evaluation["win_rate"][1][0],
        "interval": evaluation["interval"][1][0],
        "heldout": [
            [classes(preference, one["prompt"], one["responses"][name]) for one in answers]
            for name in evaluation["policies"]
        ],
    }


def measure_best_of_nash(run: Path, preference: ClassPreference, arm: Arm, eta: float) -> dict:
    """Returns the class shares of best of Nash, which are exact given the responses that it chooses from.

    Returns:
        ``samples``: the number of these, for each prompt; ``heldout_shares``: (C+1) for each held-out prompt;
        ``win_rate``: against each policy of the run.
    """
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["best_of_nash"]
    found = []
    for one in _lines(run / "evaluation_responses.jsonl"):
        answers = one["best_of_nash"]
        own = classes(preference, one["prompt"], [answer["response"] for answer in answers])
        weights = [answer["weight"] for answer in answers]
        found.append(np.bincount(own, weights=weights, minlength=len(preference.full_matrix)).tolist())
    return {"samples": evaluation["samples"], "heldout_shares": found, "win_rate": evaluation["win_rate"]}


def classes(preference: ClassPreference, prompt: list[dict], responses: Sequence[str]) -> list[int]:
    """Returns the class of each response; the number of classes for one that is in none of them."""
    return preference.indices(prompt, responses).tolist()


def shares(policy: Classes, size: int) -> np.ndarray:
    """Returns the share of each of ``size`` classes among all responses of a policy, (size,)."""
    counts = np.bincount([one for prompt in policy for one in prompt], minlength=size)
    return counts / counts.sum()


def exact_margin(matrix: np.ndarray, policy: Classes, eta: float) -> float:
    """Returns the mean margin of all pairs of a prompt under the exact step of mirror descent, in nats.

    The step multiplies π(y) by exp(η r(y)), with r(y) = P(y ≻ π): the margin of a pair is the difference of η r, taken
    from the response that is more likely to win.
    """
    reward = rewards(matrix, shares(policy, len(matrix)))
    pairs = [pair for prompt in policy for pair in combinations(prompt, 2)]
    return float(np.mean([eta * (reward[i] - reward[j]) * np.sign(matrix[i, j] - 0.5) for i, j in pairs]))


def gaps(matrix: np.ndarray, policies: Sequence[Classes]) -> np.ndarray:
    """Returns the duality gap of each policy from its class shares over all prompts, (T+1,).

    The shares are pooled before the best class is taken: the maximum of a noisy estimate for each prompt would be
    biased upwards. It is the gap against all policies that choose a class without regard to the prompt.
    """
    return np.array([duality_gap(matrix, shares(policy, len(matrix))) for policy in policies])


def average_gap(matrix: np.ndarray, policies: Sequence[Classes]) -> float:
    """Returns the duality gap of the mean of the policies."""
    return float(duality_gap(matrix, np.mean([shares(policy, len(matrix)) for policy in policies], axis=0)))


def gaps_by_topic(matrix: np.ndarray, policies: Sequence[Classes]) -> np.ndarray:
    """Returns the duality gap of each policy against opponents that see what a story is about, (T+1,).

    The prompts of a noun are taken together. Half of their responses choose the best class and the other half say what
    it gains, then the other way round, so that the estimate is not biased upwards.
    """
    found = []
    for policy in policies:
        gains = []
        for start in range(0, len(policy), HELD_OUT_ADJECTIVES):
            topic = policy[start : start + HELD_OUT_ADJECTIVES]
            halves = [[prompt[half::2] for prompt in topic] for half in (0, 1)]
            first, second = (rewards(matrix, shares(half, len(matrix))) for half in halves)
            gains += [second[first.argmax()], first[second.argmax()]]
        found.append(2 * np.mean(gains) - 1)
    return np.array(found)


def reached(fits: Sequence[dict]) -> float | None:
    """Returns the mean margin of the fits as a share of that of exact ones; None where that is not known."""
    known = [one for one in fits if one["exact"] is not None]
    return float(np.sum([one["margin"] for one in known]) / np.sum([one["exact"] for one in known])) if known else None


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
