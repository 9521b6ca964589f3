"""What a finished run says: the class of every response, the gap, and whether fits reached their targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onpo_fast.files import read_jsonl
from onpo_fast.games.solution import duality_gap
from onpo_fast.multi_turn.conversation import Transcript
from onpo_fast.oracles.classes import ClassPreference

Classes = list[list[int]]  # of the responses to each prompt; the last class is "none of them"


def measure(run: Path, preference: ClassPreference, eta: float | None) -> dict:
    """Returns the raw results of a finished run, for its file.

    Args:
        run: the run directory.
        preference: the oracle of the run.
        eta: the step of mirror descent; None where the margins of exact fits are not known.

    Returns:
        ``heldout``: for each policy π_1 … π_{T+1} the classes of its responses to every held-out prompt; ``training``:
        those of the responses of π_1 … π_T that it was trained on; ``win_rate``: (T+1, T+1), rows over columns;
        ``kl_to_initial``: nats, T+1; ``cyclic_triples``: shares, T; ``fits``: for each iteration and fit the steps, the
        mean margin in the last quarter of them, and that of an exact fit (nats); ``seconds``.
    """
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    answers = list(read_jsonl(run / "evaluation_responses.jsonl"))
    names = evaluation["policies"]
    heldout = _heldout(answers, names, preference)
    training, triples, fits = [], [], []
    metrics = list(read_jsonl(run / "metrics.jsonl"))
    for t in range(1, len(names)):
        training.append(_sampled(run / f"iteration_{t:02d}", preference))
        own = [one for one in metrics if one["iteration"] == t]
        triples += [one["cyclic_triples"] for one in own if one["stage"] == "iteration"]
        exact = None if eta is None else exact_margin(preference.full_matrix, training[-1], eta)
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
    }


def measure_best_response(run: Path, preference: ClassPreference) -> dict:
    """Returns how often a best response that was trained against a frozen policy wins against it.

    Returns:
        ``win_rate``, with its ``interval`` of 95%; ``heldout``: classes of the responses of the frozen policy and of
        the best response to every held-out prompt.
    """
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    answers = list(read_jsonl(run / "evaluation_responses.jsonl"))
    return {
        "win_rate": evaluation["win_rate"][1][0],
        "interval": evaluation["interval"][1][0],
        "heldout": _heldout(answers, evaluation["policies"], preference),
    }


def measure_best_of_nash(run: Path, preference: ClassPreference) -> dict:
    """Returns the class shares of best of Nash, which are exact given the responses that it chooses from.

    Returns:
        ``samples``: the number of these, for each prompt; ``heldout_shares``: (C+1) for each held-out prompt;
        ``win_rate``: against each policy of the run.
    """
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["best_of_nash"]
    found = []
    for one in read_jsonl(run / "evaluation_responses.jsonl"):
        answers = one["best_of_nash"]
        own = classes(preference, one["prompt"], [answer["response"] for answer in answers])
        weights = [answer["weight"] for answer in answers]
        found.append(np.bincount(own, weights=weights, minlength=len(preference.full_matrix)).tolist())
    return {"samples": evaluation["samples"], "heldout_shares": found, "win_rate": evaluation["win_rate"]}


def _heldout(answers: Sequence[dict], policies: Sequence[str], preference: ClassPreference) -> list[Classes]:
    """The classes of every policy's responses, or conversations, to held-out prompts."""
    said = [one.get("conversations", one["responses"]) for one in answers]
    return [[classes(preference, one["prompt"], own[name]) for one, own in zip(answers, said)] for name in policies]


def _sampled(iteration: Path, preference: ClassPreference) -> Classes:
    """The classes of the responses, or conversations, that an iteration learned from."""
    conversations = iteration / "conversations.jsonl"
    rows = list(read_jsonl(conversations if conversations.exists() else iteration / "responses.jsonl"))
    return [classes(preference, one["prompt"], one.get("conversations", one["responses"])) for one in rows]


def classes(preference: ClassPreference, prompt: list[dict], responses: Sequence[str | list[dict]]) -> list[int]:
    """Returns the class of each response or conversation; the number of classes for one that is in none of them."""
    texts = [one if isinstance(one, str) else Transcript(one) for one in responses]
    return preference.indices(prompt, texts).tolist()


def shares(policy: Classes, size: int) -> np.ndarray:
    """Returns the share of each of ``size`` classes among all responses of a policy, (size,)."""
    counts = np.bincount([one for prompt in policy for one in prompt], minlength=size)
    return counts / counts.sum()


def exact_margin(matrix: np.ndarray, policy: Classes, eta: float) -> float:
    """Returns the mean margin of all pairs of a prompt under the exact step of mirror descent, in nats.

    The step multiplies π(y|x) by exp(η r(y)), with r(y) = P(y ≻ π | x), so that the margin of a pair is the difference
    of η r, here taken from the response that is more likely to win. The other responses to the prompt, independent
    draws from π, estimate r without bias.

    Args:
        policy: at least three responses to each prompt.
    """
    margins = []
    for prompt in policy:
        P = matrix[np.ix_(prompt, prompt)]
        wins = P.sum(1) - 0.5  # against all others
        first, second = np.triu_indices(len(prompt), 1)
        others = wins[first] - P[first, second] - (wins[second] - P[second, first])
        margins.append(eta * others / (len(prompt) - 2) * np.sign(P[first, second] - 0.5))
    return float(np.mean(margins))


def gaps(matrix: np.ndarray, policies: Sequence[Classes]) -> np.ndarray:
    """Returns the duality gap of each policy against opponents that ignore the prompt, (T+1,): max_c E_x (P π̂_x)_c.

    The shares are pooled over prompts before the best class is taken. It is at most the gap against all opponents,
    E_x max_c (P π̂_x)_c. The maximum of noisy shares makes it too large by up to ``comparison.noise_floor``.
    """
    return np.array([duality_gap(matrix, shares(policy, len(matrix))) for policy in policies])


def average_gaps(matrix: np.ndarray, policies: Sequence[Classes]) -> np.ndarray:
    """Returns the gap of the mean of the first t policies, for every t, against opponents that ignore the prompt."""
    played = np.array([shares(policy, len(matrix)) for policy in policies])
    means = played.cumsum(0) / np.arange(1, len(played) + 1)[:, None]
    return np.array([duality_gap(matrix, mean) for mean in means])


def gaps_by_prompt(matrix: np.ndarray, policies: Sequence[Classes]) -> np.ndarray:
    """Returns a lower estimate of the gap of each policy against all opponents, (T+1,): E_x max_c (P π̂_x)_c.

    For each response to a prompt, the others choose the class that beats them most often, the mean of the best ones if
    they tie, and the response says what it gains. The choice is not always the best one, so that the expectation is
    below the gap: the fewer responses there are, the more.

    Args:
        policies: at least two responses to each prompt.
    """
    found = []
    for policy in policies:
        gains = []
        for prompt in policy:
            won = matrix[:, prompt]  # (C+1, K): what each class gains against each response
            others = won.sum(1, keepdims=True) - won
            best = np.isclose(others, others.max(0))
            gains.append(((won * best).sum(0) / best.sum(0)).mean())
        found.append(2 * np.mean(gains) - 1)
    return np.array(found)


def reached(fits: Sequence[dict]) -> float | None:
    """Returns margins as a share of those of exact fits, by regression; None where exact ones are not known or 0."""
    known = [one for one in fits if one["exact"] is not None]
    exact = sum(one["exact"] ** 2 for one in known)
    return sum(one["margin"] * one["exact"] for one in known) / exact if exact else None
