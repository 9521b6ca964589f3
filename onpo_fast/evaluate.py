"""Every policy of a run against every other, on held-out prompts, under the run's oracle.

    python -m onpo_fast.evaluate DIR

writes ``DIR/evaluation.json`` and ``DIR/evaluation_responses.jsonl``. Responses of different policies are independent
draws, as the win rate J(π, π′) = E[P(y ≻ y′)] needs. Intervals treat a prompt as the unit: samples of one prompt are
not independent of each other. The *restricted* duality gap of π_t asks what the best of the run's own policies gains
against it, max_s J(π_s, π_t) − min_s J(π_t, π_s) = 2·max_s J(π_s, π_t) − 1; the gap over all policies is larger.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from . import config as configuration
from . import oracles
from .checkpoint import Journal, atomic_write_text, checksum, locked, write_jsonl
from .config import Config
from .conversations import columns_of
from .data import Group, Messages, of_iterations, read_prompts
from .errors import CommandParser, UserError, command
from .fingerprint import changes
from .policy import kl_estimate, load, score
from .sampling import TruncationWarning, make_sampler
from .tracking import Tracker, console, progress

CONFIDENCE = 0.95
ASKS = tuple(name for name in configuration.ASKS if name != "report_to")  # numbers stay in the directory
HELD_OUT = "heldout.jsonl"  # the prompts, in the run's directory: what was held out does not change with the source


def evaluate(
    directory: Path, config: Config, tracker: Tracker | None = None, truncation: TruncationWarning | None = None
) -> dict:
    """Samples from every policy of the run, judges them all together, and writes and returns the evaluation.

    Args:
        truncation: warns where all responses of a policy are cut off; default one that has not warned yet.

    Raises:
        UserError: if the run has no finished iteration.
    """
    start = time.perf_counter()
    sources = {"π_1": initial_policy(directory, config), **finished_policies(directory)}
    if len(sources) < 2:
        raise UserError(f"{directory} has no finished iteration to evaluate")
    prompts = read_prompts(directory / HELD_OUT)
    samples: dict[str, list[Group]] = {}
    truncation = truncation or TruncationWarning()
    for index, (name, source) in enumerate(sources.items()):
        samples[name] = _sample(name, source, prompts, [config.seed, 1, index], config, truncation)
    # π_1's log-probs last, when the other models are gone
    initial = load(sources["π_1"], config)
    later = list(samples.values())[1:]
    kl = [0.0, *(kl_estimate(groups, score(initial, groups, config.tokens_per_microbatch)) for groups in later)]

    del initial  # at most one model is in memory, and the oracle may be one

    names = list(sources)
    oracle = oracles.load(config.oracle, config, directory)

    try:
        matrices = _judge(samples, prompts, oracle, config)
    except Exception:
        if tracker is not None and (spent := oracles.take_counters(oracle)):
            tracker.log("evaluate", 0, seconds=time.perf_counter() - start, stopped=True, **spent)
        raise
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
        tracker.log("evaluate", 0, seconds=time.perf_counter() - start, **oracles.take_counters(oracle))
    return result


def initial_policy(directory: Path, config: Config) -> str | Path:
    """Where π_1 is: in the run if it had to be converted, else where the configuration says."""
    converted = directory / "initial"
    return converted if converted.exists() else config.model


def finished_policies(directory: Path) -> dict[str, Path]:
    """π_2, π_3, … of a run, by name."""
    return {f"π_{t + 1}": path for t, path in of_iterations(directory, "policy").items()}


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


def _sample(
    name: str, source: str | Path, prompts: Sequence[Messages], seed: list[int], config: Config,
    truncation: TruncationWarning,
) -> list[Group]:  # fmt: skip
    policy = load(source, config)
    sampler = make_sampler(policy, config)
    with progress(f"evaluate: sample {name}", len(prompts) * config.eval_samples) as done:
        groups = sampler(prompts, config.eval_samples, seed, done)
    truncation(f"{name} in the evaluation", policy, groups, config.max_new_tokens)
    return groups


def _judge(
    samples: dict[str, list[Group]], prompts: Sequence[Messages], oracle: oracles.Oracle, config: Config
) -> list[np.ndarray]:
    """A matrix a prompt over the responses of all policies, policy by policy."""
    joined = [
        Group(prompt, [], [r for groups in samples.values() for r in groups[p].responses])
        for p, prompt in enumerate(prompts)
    ]
    with progress("evaluate: judge", len(joined)) as done:
        return oracles.judge(oracle, joined, config.oracle, done)


def _blocks(matrix: np.ndarray, policies: int) -> np.ndarray:
    """Means over the samples of each policy pair; a policy against itself is ½ by symmetry."""
    samples = len(matrix) // policies
    return matrix.reshape(policies, samples, policies, samples).mean(axis=(1, 3))


def _intervals(wins: np.ndarray) -> np.ndarray:
    """(prompts, M, M) -> (M, M, 2): Student's t over prompts and two imagined ones, a win and a loss.

    The two are what Agresti and Coull add to a proportion: with few prompts that all agree, the spread among them
    would claim a certainty that they cannot give. A policy against itself is ½ exactly.
    """
    zeros, ones = np.zeros_like(wins[:1]), np.ones_like(wins[:1])
    widened = np.concatenate([wins, zeros, ones])
    count = len(widened)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * widened.std(0, ddof=1) / np.sqrt(count)
    intervals = np.clip(np.stack([widened.mean(0) - half, widened.mean(0) + half], axis=-1), 0, 1)
    intervals[np.diag_indices(wins.shape[1])] = 0.5
    return intervals


def _response_records(
    samples: dict[str, list[Group]], prompts: Sequence[Messages], matrices: list[np.ndarray], config: Config
) -> Iterator[dict]:
    last = (len(samples) - 1) * config.eval_samples
    for p, (prompt, matrix) in enumerate(zip(prompts, matrices)):
        texts = {name: [r.text for r in groups[p].responses] for name, groups in samples.items()}
        yield {**columns_of(prompt), "responses": texts, "preference": float(matrix[last, 0])}


def check_oracle(directory: Path, config: Config) -> None:
    """Tries the oracle before anything is sampled, and says so if it is not the one that the run was judged by.

    That is no error: the win rates are those of the oracle as it is now, all of one.
    """
    oracle = oracles.load(config.oracle, config, directory)
    now = oracles.fingerprint(oracle, config.oracle, functools.cache(checksum))
    if changed := changes(Journal(directory).note("oracle") or now, now):
        console.print(
            f"{oracles.title(config)} is not what {directory} began with: {', '.join(changed)} changed. The evaluation "
            "is under the oracle as it is now"
        )
    kinds = list(oracles.shortest_by_kind(read_prompts(directory / HELD_OUT)).values())
    oracles.probe(oracle, config.oracle, kinds, in_directory=False)
    oracles.probe(oracle, config.oracle, [min(kinds, key=oracles.length)], in_directory=True)


@command
def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog="python -m onpo_fast.evaluate", description="Evaluate the policies of a run.", epilog=configuration.TRUST
    )
    parser.add_argument("directory", type=Path, help="the run's output directory")
    configuration.add_options(parser, ASKS)
    options = parser.parse_args(argv)
    directory = options.directory
    config = configuration.read(directory, configuration.given_flags(options, ASKS), ASKS)
    with locked(directory):
        check_oracle(directory, config)
        tracker = Tracker(directory, "none" if config.report_to == "none" else "tensorboard")
        tracker.begin("evaluation.json", keep=lambda record: True)  # the judge was asked then too
        try:
            console.print(summary(evaluate(directory, config, tracker)))
        finally:
            tracker.close()


if __name__ == "__main__":
    main()
