"""The data of a run directory, and the numbers that a report takes from it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .reading import (
    STAGES,
    LineReader,
    parse_evaluation,
    read_config,
    read_evaluation_examples,
    read_json_object,
    read_records,
    read_training_examples,
)

MAX_ITERATIONS = 40  # in plots and tables
MAX_POLICIES = 20  # in the plot and the table of win rates
JUDGE_COUNTERS = ("requests", "failures", "prompt_tokens", "completion_tokens", "answered", "cached", "nonsense")


class FitHistory(NamedTuple):
    """The optimizer steps of one fit."""

    iteration: int
    name: str  # "auxiliary" or "policy"
    steps_before: int  # steps of all earlier fits
    rows: list[dict[str, Any]]  # records of metrics.jsonl, by step

    @property
    def skipped_steps(self) -> list[int]:
        """Steps that left the weights unchanged because the loss or the gradient was not finite."""
        return [row["step"] for row in self.rows if row.get("skipped")]


@dataclass(frozen=True)
class RunData:
    """The contents of a run directory; a file that is missing leaves its field empty.

    Attributes:
        records: records of metrics.jsonl, without numbers that are not finite.
        evaluation: evaluation.json.
        evaluation_examples: the first held-out prompts, each with a response of the first and the last policy.
        evaluation_prompt_count: number of rows in evaluation_responses.jsonl.
        newest_iteration: the newest iteration with responses to training prompts; 0 if there is none.
        training_examples: the first prompts of that iteration, each with two responses.
        damaged_lines: file name → number of lines that were skipped.
        truncated_files: files that are longer than what is read of them.
    """

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    evaluation: dict[str, Any]
    evaluation_examples: list[dict[str, Any]]
    evaluation_prompt_count: int
    newest_iteration: int
    training_examples: list[dict[str, Any]]
    damaged_lines: dict[str, int]
    truncated_files: list[str]

    @classmethod
    def read(cls, directory: Path, examples: bool = True, evaluated: bool = True) -> RunData:
        """Read a run directory.

        Args:
            examples: whether to read prompts and responses.
            evaluated: whether to read the evaluation.

        Raises:
            UserError: if there is no config.yaml, or a file is damaged as a whole.
        """
        config = directory / "config.yaml"
        if not config.exists():
            raise UserError(f"{directory} is not a run directory: it has no config.yaml")
        lines = LineReader(directory)
        evaluation = read_json_object(directory / "evaluation.json", parse_evaluation) if evaluated else {}
        newest, training = read_training_examples(directory, lines) if examples else (0, [])
        records = read_records(lines)
        shown, count = read_evaluation_examples(lines, evaluation.get("policies", [])) if examples else ([], 0)
        return cls(
            directory=directory,
            config=read_config(config),
            environment=read_json_object(directory / "environment.json"),
            records=records,
            evaluation=evaluation,
            evaluation_examples=shown,
            evaluation_prompt_count=count,
            newest_iteration=newest,
            training_examples=training,
            damaged_lines={name: count for name, count in sorted(lines.damaged_lines.items()) if count},
            truncated_files=lines.truncated_files,
        )

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def finished(self) -> bool:
        """Whether all policies, from π_1 to the last iteration's, have been evaluated."""
        return len(self.evaluation.get("policies", [])) > self.config.get("iterations", 0)

    @property
    def resume_command(self) -> str:
        return f"python -m onpo_fast.train --resume --out {shlex.quote(str(self.directory))}"

    @property
    def last_record(self) -> dict[str, Any] | None:
        """The last record of work done. The stage "prompts" does not count: a resumed run records it again."""
        return max(self.records[::-1], key=lambda row: row["stage"] != "prompts", default=None)

    # --- Iterations and policies that are shown -----------------------------------------------------------------------

    @cached_property
    def recorded_iterations(self) -> list[int]:
        return sorted({row["iteration"] for row in self.records if row["iteration"] > 0})

    @cached_property
    def shown_iterations(self) -> frozenset[int]:
        """Iterations in plots and tables, and 0, the iteration of records of the whole run."""
        return frozenset([0, *evenly_spaced(self.recorded_iterations, MAX_ITERATIONS)])

    @cached_property
    def shown_policies(self) -> list[int]:
        """Indices of the policies in the plot and the table of win rates."""
        return evenly_spaced(range(len(self.evaluation.get("policies", []))), MAX_POLICIES)

    # --- Records by stage ---------------------------------------------------------------------------------------------

    @cached_property
    def _last_rows(self) -> dict[str, dict[int, dict[str, dict[str, Any]]]]:
        """Stage → iteration → output → its last record: a resumed run may have repeated the stage."""
        rows: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
        for row in self.records:
            rows.setdefault(row["stage"], {}).setdefault(row["iteration"], {})[row.get("part") or ""] = row
        return {stage: dict(sorted(by_iteration.items())) for stage, by_iteration in rows.items()}

    def iterations(self, stage: str) -> dict[int, dict[str, Any]]:
        """Iteration → the record of a stage; where an algorithm compares twice, that of its own responses."""
        return {t: next(iter(outputs.values())) for t, outputs in self._last_rows.get(stage, {}).items()}

    def sum_up_to(self, iteration: int, stage: str, name: str) -> float:
        """The sum of a field over all outputs of a stage, up to an iteration."""
        rows = (
            row for t, outputs in self._last_rows.get(stage, {}).items() if t <= iteration for row in outputs.values()
        )
        return sum(row.get(name) or 0 for row in rows)

    def column(self, stage: str, name: str) -> dict[int, float | None]:
        """Shown iteration → one field of a stage's record."""
        return {t: row.get(name) for t, row in self.iterations(stage).items() if t in self.shown_iterations}

    def total(self, stage: str, name: str) -> float:
        """The sum of a field over all iterations."""
        return sum(row.get(name) or 0 for row in self.iterations(stage).values())

    @property
    def turns(self) -> list[dict[str, Any]]:
        """A row for each shown iteration and turn that the policy learned at, where there are several."""
        found: dict[tuple[int, float], dict[str, Any]] = {}
        for stage in ("sample", "environment"):
            for t, outputs in self._last_rows.get(stage, {}).items():
                for part, row in outputs.items():
                    learned = stage == "environment" or part.partition("/")[2].startswith("responses")
                    if t in self.shown_iterations and isinstance(row.get("turn"), (int, float)) and learned:
                        found.setdefault((t, row["turn"]), {}).update(row)
        return [row for _, row in sorted(found.items()) if "responses" in row]

    @property
    def triples(self) -> tuple[int, float]:
        """The triples of responses that the oracle has compared in all iterations, and the share that is cyclic."""
        counted = [
            (row.get("triples") or 0, row.get("cyclic_triples") or 0) for row in self.iterations("judge").values()
        ]
        total = sum(triples for triples, _ in counted)
        return total, sum(triples * share for triples, share in counted) / total if total else 0.0

    def by_stage(self, name: str, reduce: Callable[[list[float]], Any]) -> dict[str, dict[int, float]]:
        """Stage (each fit is one) → shown iteration → one field of all its records, reduced to a number."""
        values: dict[str, dict[int, list[float]]] = {}
        for row in self.records:
            stage = f"{row['stage']} {row.get('fit') or ''}".strip()
            if stage in STAGES and row.get(name) is not None and row["iteration"] in self.shown_iterations:
                values.setdefault(stage, {}).setdefault(row["iteration"], []).append(row[name])
        return {stage: {t: float(reduce(some)) for t, some in points.items()} for stage, points in values.items()}

    def judge_counters(self) -> dict[str, dict[str, int]]:
        """Counters of the judge for each shown iteration, for the evaluation and in all; empty without a judge.

        Stages that were stopped and repeated count too: their requests were paid for.
        """
        counters: dict[str, Counter[str]] = {}
        total: Counter[str] = Counter()
        for row in self.records:
            if row["stage"] in ("judge", "evaluate") and row.keys() & set(JUDGE_COUNTERS):
                label = f"iteration {row['iteration']}" if row["stage"] == "judge" else "evaluation"
                values = {name: row.get(name) or 0 for name in JUDGE_COUNTERS}
                total.update(values)
                if row["iteration"] in self.shown_iterations:
                    counters.setdefault(label, Counter()).update(values)
        return counters | {"in all": dict(total)} if total else {}

    @cached_property
    def seconds(self) -> dict[int, dict[str, float]]:
        """Shown iteration → stage → seconds; for an unfinished iteration, the stages recorded so far."""
        timed = [row for row in self.records if row.get("seconds") is not None]
        timed = [row for row in timed if row["iteration"] in self.shown_iterations]
        last = {tuple(map(row.get, ("iteration", "stage", "fit", "step", "part", "model"))): row for row in timed}
        so_far: dict[int, Counter[str]] = {}
        for (t, stage, fit, *_), row in last.items():
            if (name := f"{stage} {fit or ''}".strip()) in STAGES:
                so_far.setdefault(t, Counter())[name] += row["seconds"]
        return dict(sorted((so_far | self.column("iteration", "stage_seconds")).items()))

    # --- Fits and the evaluation --------------------------------------------------------------------------------------

    @cached_property
    def fits(self) -> list[FitHistory]:
        """All fits in the order in which they ran. The last record of a step counts: a resumed run repeats some."""
        steps: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
        for row in self.records:
            if row["stage"] == "fit":
                steps.setdefault((row["iteration"], row["fit"]), {})[row["step"]] = row
        fits: list[FitHistory] = []
        for (iteration, name), rows in sorted(steps.items()):  # "auxiliary" sorts, and comes, before "policy"
            steps_before = fits[-1].steps_before + fits[-1].rows[-1]["step"] if fits else 0
            fits.append(FitHistory(iteration, name, steps_before, [rows[step] for step in sorted(rows)]))
        return fits

    @property
    def shown_fits(self) -> list[FitHistory]:
        return [fit for fit in self.fits if fit.iteration in self.shown_iterations]

    def evaluated(self, name: str) -> dict[int, float | None]:
        """t of π_t → a column of evaluation.json, for at most ``MAX_ITERATIONS`` policies."""
        numbers = [int(policy.rpartition("_")[2]) for policy in self.evaluation.get("policies", [])]
        return dict(evenly_spaced(list(zip(numbers, self.evaluation.get(name) or [])), MAX_ITERATIONS))


def evenly_spaced(items: Sequence[Any], most: int) -> list[Any]:
    """All items, or ``most`` of them: the first, the last and evenly spaced ones between.

    >>> evenly_spaced(range(11), 3)
    [0, 5, 10]
    """
    if len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]
