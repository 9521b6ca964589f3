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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from scipy import stats
from torch import Tensor

from . import config as configuration
from . import oracles
from .config import Config, JudgeConfig, ModelConfig, OracleConfig
from .conversations import columns_of
from .data import (
    Group,
    Messages,
    check_tokens,
    of_iterations,
    read_groups,
    read_preferences,
    read_prompts,
    read_scores,
    write_groups,
    write_preferences,
    write_scores,
)
from .errors import CommandParser, UserError, command
from .files import atomic_write_text, checksum, write_jsonl
from .models.loading import load
from .models.policy import kl_estimate, score
from .run.fingerprint import changes
from .run.journal import Journal
from .run.lock import locked
from .run.parts import Parts
from .run.tracking import Tracker, progress, say
from .sampling import TruncationWarning, all_truncated, make_sampler

CONFIDENCE = 0.95
ASKS = tuple(name for name in configuration.ASKS if name not in ("report_to", "push_to_hub"))  # nothing is sent
ORACLE_OPTIONS = tuple(  # that can be given anew: all that say whom to ask, and how
    field.name for field in fields(Config) if field.name in ASKS or field.name.startswith(("judge_", "oracle_"))
)
INITIAL = "initial"  # the folder of π_1 in the run's directory, where it had to be converted
HELD_OUT = "heldout.jsonl"  # the prompts, in the run's directory: what was held out does not change with the source
RESULT, RESPONSES = "evaluation.json", "evaluation_responses.jsonl"
PARTS = "evaluation.parts"  # the folder of what has been done of one that is not whole


def evaluate(
    directory: Path,
    config: Config,
    tracker: Tracker | None = None,
    journal: Journal | None = None,
    truncation: TruncationWarning | None = None,
    oracle_files: dict[str, str] | None = None,
) -> dict:
    """Samples from every policy of the run, judges them all together, and writes and returns the evaluation.

    Responses, π_1's scores and the judge's preferences are made in parts: one that was killed goes on with them.

    Args:
        directory: the run's.
        config: the run's.
        tracker: takes the time and what the oracle counts, over all processes that had a part in it.
        journal: the run's, in which the parts and both files are recorded.
        truncation: warns where all responses of a policy are cut off; default one that has not warned yet.
        oracle_files: ``oracles.fingerprint`` of the oracle, if it is known: files may take long to read.

    Raises:
        UserError: if the run has no finished iteration.
    """
    journal = journal or Journal(directory)
    sources = {"π_1": initial_policy(directory, config, journal), **finished_policies(directory, journal)}
    if len(sources) < 2:
        raise UserError(f"{directory} has no finished iteration to evaluate")
    prompts = read_prompts(directory / HELD_OUT)
    oracle = oracles.load(
        config.oracle,
        config.section(OracleConfig),
        config.section(JudgeConfig),
        config.section(ModelConfig),
        directory,
    )
    stages = _Stages(directory, config, journal, sources, truncation or TruncationWarning())
    samples = {
        name: stages.sample(name, source, prompts, index) for index, (name, source) in enumerate(sources.items())
    }
    # π_1's log-probs last, when the other models are gone
    kl = [0.0, *stages.divergences(sources["π_1"], list(samples.values())[1:])]
    names = list(sources)
    if oracle_files is None:
        oracle_files = oracles.fingerprint(oracle, config.oracle, functools.cache(checksum))
    matrices = stages.judge(samples, prompts, oracle, oracle_files, tracker)
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
        "response_tokens_mean": [
            float(np.mean([len(r.tokens) for g in s for r in g.responses])) for s in samples.values()
        ],
    }
    journal.forget_records(RESULT, RESPONSES)
    write_jsonl(directory / RESPONSES, _response_records(samples, prompts, matrices, config))
    atomic_write_text(directory / RESULT, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    if tracker is not None:
        tracker.log("evaluate", 0, **stages.spent)
    journal.record(RESPONSES)
    journal.record(RESULT)
    journal.forget_folder(PARTS)
    return result


def initial_policy(directory: Path, config: Config, journal: Journal) -> str | Path:
    """Where π_1 is: in the run if it was converted, and its journal says so; else where the configuration says.

    Raises:
        UserError: if the one in the run is not what it was.
    """
    return directory / INITIAL if _is_whole(directory, INITIAL, journal) else config.model


def finished_policies(directory: Path, journal: Journal) -> dict[str, Path]:
    """π_2, π_3, … of a run, by name: those that its journal has. Other folders may be anybody's.

    Raises:
        UserError: if one is not what it was.
    """
    found = of_iterations(directory, "policy")
    return {f"π_{t + 1}": path for t, path in found.items() if _is_whole(directory, _within(directory, path), journal)}


def _is_whole(directory: Path, name: str, journal: Journal) -> bool:
    """Whether the journal has an output; ``UserError`` if it has, and the output is not what it was."""
    if journal.damaged(name):
        raise UserError(f"{directory / name} is not what it was: train --resume makes it again")
    return journal.note(name) is not None


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


class _Stages:
    """The long stages of an evaluation, each made in parts.

    Attributes:
        spent: seconds and what the oracle counted, also in processes before this one.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        journal: Journal,
        sources: dict[str, str | Path],
        truncation: TruncationWarning,
    ) -> None:
        self.config, self.journal, self.truncation = config, journal, truncation
        self.spent: Counter[str] = Counter()
        options = {name: value for name, value in asdict(config).items() if name != "out"}
        recorded = {str(source): journal.entries.get(_within(directory, source)) for source in sources.values()}
        checksums = [entry and entry["checksum"] for entry in recorded.values()]
        self.made_by = (options, journal.note("model"), checksums)

    def parts(self, name: str, *made_by: object) -> Parts:
        return Parts(self.journal, f"{PARTS}/{name}", (*self.made_by, *made_by))

    def sample(self, name: str, source: str | Path, prompts: Sequence[Messages], index: int) -> list[Group]:
        """The responses of a policy, which is loaded if any are missing."""
        config, count = self.config, self.config.eval_samples
        policy = functools.cache(lambda: load(source, config))
        sampler = functools.cache(lambda: make_sampler(policy(), config))
        with progress(f"evaluate: sample {name}", len(prompts) * count) as done:
            groups, spent = self.parts(f"responses_{index:02d}").make(
                prompts,
                Parts.sampling_size(config.sampling_batch_size, count),
                lambda part, first: sampler()(part, count, [config.seed, 1, index], done, first),
                write_groups,
                lambda file, part: read_groups(file, part, count),
                lambda known: done(known * count),
            )
        self.spent.update(spent)
        if sampler.cache_info().currsize:
            self.truncation(f"{name} in the evaluation", policy(), groups, config.max_new_tokens)
        else:
            self.truncation.said |= all_truncated(groups)  # when they were sampled
        return groups

    def divergences(self, initial: str | Path, samples: Sequence[list[Group]]) -> list[float]:
        """KL(π ‖ π_1) in nats, for the responses of each later policy π."""
        config, kl = self.config, []
        policy = functools.cache(lambda: load(initial, config))
        for index, groups in enumerate(samples, 1):
            with progress(f"evaluate: score π_{index + 1}", len(groups)) as done:
                sampled = self.parts(f"responses_{index:02d}")

                def ask(part: Sequence[Group], first: int, sampled: Parts = sampled) -> list[Tensor]:
                    check_tokens(part, policy().vocabulary, sampled.folder)
                    return score(policy(), part, config.tokens_per_microbatch, done)

                scores, spent = self.parts(f"logps_{index:02d}").make(
                    groups,
                    Parts.judging_size(len(groups)),
                    ask,
                    write_scores,
                    read_scores,
                    done,
                )
            kl.append(kl_estimate(groups, scores))
            self.spent.update(spent)
        return kl

    def judge(
        self,
        samples: dict[str, list[Group]],
        prompts: Sequence[Messages],
        oracle: oracles.Oracle,
        oracle_files: dict[str, str],
        tracker: Tracker | None,
    ) -> list[np.ndarray]:
        """A matrix a prompt over the responses of all policies, policy by policy."""
        joined = [
            Group(prompt, [], [r for groups in samples.values() for r in groups[p].responses])
            for p, prompt in enumerate(prompts)
        ]
        parts = self.parts("preferences", oracle_files)  # another oracle under the same name judges all of it
        with progress("evaluate: judge", len(joined)) as done:
            try:
                matrices, spent = parts.make(
                    joined,
                    Parts.judging_size(len(joined)),
                    lambda part, first: oracles.judge(oracle, part, self.config.oracle, done, first),
                    write_preferences,
                    read_preferences,
                    done,
                    lambda: oracles.take_counters(oracle),
                )
            except Exception:
                if tracker is not None and any((spent := oracles.take_counters(oracle)).values()):
                    tracker.log("evaluate", 0, seconds=time.perf_counter() - parts.began, stopped=True, **spent)
                raise
        self.spent.update(spent)
        return matrices


def _within(directory: Path, source: str | Path) -> str:
    """The name of a policy's folder in the run directory, as the journal has it; else what it is called."""
    path = Path(source)
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else str(source)


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


def check_oracle(directory: Path, config: Config) -> dict[str, str]:
    """Tries the oracle before anything is sampled, and returns its fingerprint.

    If it is not the one that the run was judged by, it says so. That is no error: the win rates are those of the oracle
    as it is now, all of one.
    """
    oracle = oracles.load(
        config.oracle,
        config.section(OracleConfig),
        config.section(JudgeConfig),
        config.section(ModelConfig),
        directory,
    )
    now = oracles.fingerprint(oracle, config.oracle, functools.cache(checksum))
    if changed := changes(Journal(directory).note("oracle") or now, now):
        say(
            f"{oracles.title(config)} is not what {directory} began with: {', '.join(changed)} changed. The evaluation "
            "is under the oracle as it is now"
        )
    kinds = list(oracles.shortest_by_kind(read_prompts(directory / HELD_OUT)).values())
    oracles.probe(oracle, config.oracle, kinds, in_directory=False)
    oracles.probe(oracle, config.oracle, [min(kinds, key=oracles.length)], in_directory=True)
    return now


@command
def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog="python -m onpo_fast.evaluate", description="Evaluate the policies of a run.", epilog=configuration.TRUST
    )
    parser.add_argument("directory", type=Path, help="the run's output directory")
    configuration.add_options(parser, ORACLE_OPTIONS)
    options = parser.parse_args(argv)
    directory = options.directory
    config = configuration.read(directory, configuration.given_flags(options, ORACLE_OPTIONS), ASKS)
    with locked(directory) as lock:
        oracle_files = check_oracle(directory, config)
        journal = Journal(directory)
        tracker = Tracker(directory, "none" if config.report_to == "none" else "tensorboard")
        journal.before_record += [lock.check, tracker.sync]
        tracker.begin(RESULT, keep=lambda record: True)  # the judge was asked then too
        try:
            say(summary(evaluate(directory, config, tracker, journal, oracle_files=oracle_files)))
        finally:
            tracker.close()


if __name__ == "__main__":
    main()
