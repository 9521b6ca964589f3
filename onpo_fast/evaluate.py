"""Every policy of a run against every other, on held-out prompts, under the run's oracle.

    python -m onpo_fast.evaluate DIR

writes ``DIR/evaluation.json`` and ``DIR/evaluation_responses.jsonl``. Responses of different policies are independent
draws, as the win rate J(π, π′) = E[P(y ≻ y′)] needs. Intervals treat a prompt as the unit: samples of one prompt are
not independent of each other. The *restricted* duality gap of π_t asks what the best of the run's own policies gains
against it, max_s J(π_s, π_t) − min_s J(π_t, π_s) = 2·max_s J(π_s, π_t) − 1; the gap over all policies is larger.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from . import config as configuration
from . import oracles
from .checkpoint import atomic_write_text, write_jsonl
from .config import Config
from .data import Group, Messages, split_prompts
from .errors import UserError, command
from .policy import load, score
from .sampling import TransformersSampler
from .tracking import Tracker, console, progress

CONFIDENCE = 0.95


def evaluate(directory: Path, config: Config, tracker: Tracker | None = None) -> dict:
    """Samples from every policy of the run, judges them all together, and writes and returns the evaluation.

    Raises:
        UserError: if the run has no finished iteration.
    """
    start = time.perf_counter()
    sources = {"π_1": initial_policy(directory, config), **finished_policies(directory)}
    if len(sources) < 2:
        raise UserError(f"{directory} has no finished iteration to evaluate")
    _, prompts = split_prompts(config.prompts, config.eval_prompts, config.eval_fraction, config.seed)
    samples: dict[str, list[Group]] = {}
    for index, (name, source) in enumerate(sources.items()):
        samples[name] = _sample(name, source, prompts, [config.seed, 1, index], config)
    # π_1 last, when the other models are gone: its log-probs of the others' responses
    initial = load(sources["π_1"], config)
    kl = [None if name == "π_1" else _kl(groups, score(initial, groups, config.tokens_per_microbatch))
          for name, groups in samples.items()]  # fmt: skip
    kl[0] = 0.0

    names = list(sources)
    matrices = _judge(samples, prompts, config)
    wins = np.stack([_blocks(matrix, len(names)) for matrix in matrices])  # (prompts, policies, policies)
    result = {
        "policies": names,
        "prompts": len(prompts),
        "samples_per_prompt": config.eval_samples,
        "oracle": config.oracle,
        "confidence": CONFIDENCE,
        "win_rate": wins.mean(0).tolist(),
        "interval": _intervals(wins).tolist(),
        "duality_gap": restricted_gap(wins.mean(0)).tolist(),
        "kl_to_initial": kl,
        "response_tokens_mean": [float(np.mean([len(r.tokens) for g in s for r in g.responses]))
                                 for s in samples.values()],
    }  # fmt: skip
    write_jsonl(directory / "evaluation_responses.jsonl", _response_records(samples, prompts, matrices, config))
    atomic_write_text(directory / "evaluation.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    if tracker is not None:
        tracker.log("evaluate", 0, seconds=time.perf_counter() - start)
    return result


def initial_policy(directory: Path, config: Config) -> str | Path:
    """Where π_1 is: in the run if it had to be converted, else where the configuration says."""
    converted = directory / "initial"
    return converted if converted.exists() else config.model


def finished_policies(directory: Path) -> dict[str, Path]:
    """π_2, π_3, … of a run, by name."""
    saved = sorted(directory.glob("iteration_*/policy"))
    return {f"π_{int(path.parent.name.split('_')[1]) + 1}": path for path in saved}


def restricted_gap(win_rate: np.ndarray) -> np.ndarray:
    """(M, M) win rates of rows over columns -> (M,): max_s J(s, t) − min_s J(t, s), at least 0 as J(t, t) = ½."""
    return win_rate.max(0) - win_rate.min(1)


def summary(result: dict) -> str:
    """One sentence: the last policy against the first."""
    rate, (low, high) = result["win_rate"][-1][0], result["interval"][-1][0]
    return (
        f"{result['policies'][-1]} wins against π_1 in {rate:.1%} of comparisons on {result['prompts']} held-out "
        f"prompts under the oracle {result['oracle']} ({CONFIDENCE:.0%} interval {low:.1%} to {high:.1%})"
    )


def _sample(name: str, source: str | Path, prompts: Sequence[Messages], seed: list[int], config: Config) -> list[Group]:
    sampler = TransformersSampler(
        load(source, config), max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_p=config.top_p, batch_size=config.sampling_batch_size,
    )  # fmt: skip
    with progress(f"evaluate: sample {name}", len(prompts) * config.eval_samples) as done:
        return sampler(prompts, config.eval_samples, seed, done)


def _judge(samples: dict[str, list[Group]], prompts: Sequence[Messages], config: Config) -> list[np.ndarray]:
    """A matrix a prompt over the responses of all policies, policy by policy."""
    joined = [
        Group(prompt, [], [r for groups in samples.values() for r in groups[p].responses])
        for p, prompt in enumerate(prompts)
    ]
    with progress("evaluate: judge", len(joined)) as done:
        return oracles.judge(oracles.load(config.oracle), joined, config.oracle, done)


def _blocks(matrix: np.ndarray, policies: int) -> np.ndarray:
    """Means over the samples of each policy pair; a policy against itself is ½ by symmetry."""
    samples = len(matrix) // policies
    return matrix.reshape(policies, samples, policies, samples).mean(axis=(1, 3))


def _intervals(wins: np.ndarray) -> np.ndarray:
    """(prompts, M, M) -> (M, M, 2): Student's t over prompts, clipped to [0, 1]. One prompt says nothing: [0, 1]."""
    count = len(wins)
    if count < 2:
        return np.broadcast_to([0.0, 1.0], (*wins.shape[1:], 2))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * wins.std(0, ddof=1) / np.sqrt(count)
    return np.clip(np.stack([wins.mean(0) - half, wins.mean(0) + half], axis=-1), 0, 1)


def _kl(groups: Sequence[Group], initial: Sequence[torch.Tensor]) -> float:
    """KL(π‖π_1) in nats a response, from π's own responses."""
    return float(np.mean([r.logp - lp for g, lps in zip(groups, initial) for r, lp in zip(g.responses, lps.tolist())]))


def _response_records(samples: dict[str, list[Group]], prompts: Sequence[Messages], matrices: list[np.ndarray], config):
    last = (len(samples) - 1) * config.eval_samples
    for p, (prompt, matrix) in enumerate(zip(prompts, matrices)):
        texts = {name: [r.text for r in groups[p].responses] for name, groups in samples.items()}
        yield {"prompt": prompt, "responses": texts, "preference": float(matrix[last, 0])}


@command
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m onpo_fast.evaluate", description="Evaluate the policies of a run.")
    parser.add_argument("directory", type=Path, help="the run's output directory")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    directory = parser.parse_args(argv).directory
    console.print(summary(evaluate(directory, configuration.read(directory))))


if __name__ == "__main__":
    main()
