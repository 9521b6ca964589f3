"""Arms compared over paired seeds, from the files of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from onpo_fast.errors import UserError
from onpo_fast.games.solution import best_response

from .measures import average_gap, gaps, gaps_by_topic, reached, shares
from .recipe import ARMS, BASELINE, ETA, LAST, TUNING_SEEDS

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Run:
    """The results of a job, with what is computed from them. All gaps are in [0, 1], float64."""

    arm: str
    eta: float
    seed: int
    oracle: str
    raw: dict
    matrix: np.ndarray  # (C+1, C+1) preferences between classes, "none of them" last
    gap: np.ndarray  # (T+1,): of π_1 … π_{T+1} on held-out prompts, from pooled class shares
    topic_gap: np.ndarray  # (T+1,): against opponents that see the topic
    average_gap: float  # of the mean of the policies
    shares: np.ndarray  # (T+1, C+1): class shares on held-out prompts
    reached: float | None  # mean margin of the fits, as a share of the exact one

    @property
    def last_gap(self) -> float:
        """The mean gap of the last policies, which arms are judged by."""
        return float(self.gap[-LAST:].mean())

    @property
    def optimizer_steps(self) -> int:
        """The optimizer steps of all fits."""
        return sum(fit["steps"] for fit in self.raw["fits"])

    @property
    def cyclic_classes(self) -> bool:
        """Whether no class beats all others."""
        return bool((self.matrix > 0.5).sum(1).max() < len(self.matrix) - 1)

    @property
    def best_class(self) -> str:
        """The class that gains most against the last policy."""
        names = [*self.raw["classes"], "none"]
        return names[int(best_response(self.matrix, self.shares[-1]))]


def read(folder: Path) -> list[Run]:
    """Reads all results of a folder, in the order of arms, steps and seeds.

    Raises:
        UserError: if a file is not one of results; names it.
    """
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(_run(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{path} is not a file of results: remove it, and its run is done again") from None
    order = list(ARMS)
    return sorted(runs, key=lambda run: (run.oracle, order.index(run.arm), run.eta, run.seed))


def _run(raw: dict) -> Run:
    matrix, policies = np.array(raw["matrix"]), raw["heldout"]
    if raw["arm"] not in ARMS:
        raise ValueError(raw["arm"])
    return Run(
        raw["arm"],
        raw["eta"],
        raw["seed"],
        raw["oracle"],
        raw,
        matrix,
        gaps(matrix, policies),
        gaps_by_topic(matrix, policies),
        average_gap(matrix, policies),
        np.array([shares(policy, len(matrix)) for policy in policies]),
        reached(raw["fits"]),
    )


def reported(runs: Iterable[Run]) -> list[Run]:
    """Returns the runs whose seeds did not choose a step, with the step that was chosen for their arm."""
    runs = list(runs)
    return [run for run in runs if run.seed not in TUNING_SEEDS and run.eta == chosen_eta(runs, run.arm)]


def chosen_eta(runs: Iterable[Run], arm: str) -> float:
    """Returns the step with the smallest mean gap of the last policies on the tuning seeds; ``ETA`` without them."""
    tuning: dict[float, list[float]] = {}
    for run in runs:
        if run.arm == arm and run.seed in TUNING_SEEDS:
            tuning.setdefault(run.eta, []).append(run.last_gap)
    return min(tuning, key=lambda eta: float(np.mean(tuning[eta]))) if tuning else ETA


@dataclass(frozen=True)
class Summary:
    """A number over seeds: its median, and an interval that needs no assumption but independent seeds.

    Attributes:
        low, high: two order statistics, between which the median of the distribution lies with at least the
            probability ``coverage``; the extremes if there are too few seeds for ``CONFIDENCE``.
        coverage: the probability, exact for a continuous distribution.
    """

    values: tuple[float, ...]
    median: float
    low: float
    high: float
    coverage: float


def summarise(values: Sequence[float]) -> Summary:
    """Returns the median of independent values with its distribution-free interval.

    The number of values below the true median is binomial with probability ½, so that it lies between the k-th smallest
    and the k-th largest of n with the probability 1 − 2·P(Bin(n, ½) < k).
    """
    ordered = sorted(values)
    n = len(ordered)
    k = 1
    while 2 * (k + 1) <= n and 1 - 2 * stats.binom.cdf(k, n, 0.5) >= CONFIDENCE:
        k += 1
    coverage = max(0.0, 1 - 2 * float(stats.binom.cdf(k - 1, n, 0.5)))
    return Summary(tuple(values), float(np.median(ordered)), ordered[k - 1], ordered[-k], coverage)


@dataclass(frozen=True)
class Paired:
    """An arm minus the baseline on the same seeds.

    Attributes:
        difference: of the mean gaps of the last policies; negative: the arm is nearer to Nash.
        mean, low, high: their mean with Student's interval of ``CONFIDENCE``; None with one seed.
        wins: seeds on which the arm has the smaller gap.
        p: of the two-sided sign test.
    """

    difference: Summary
    mean: float
    low: float | None
    high: float | None
    wins: int
    p: float


def paired(runs: Sequence[Run], arm: str, baseline: str = BASELINE) -> Paired | None:
    """Compares two arms of one oracle on the seeds that both have; None if there is none."""
    last = {(run.arm, run.seed): run.last_gap for run in runs}
    seeds = sorted(seed for name, seed in last if name == arm and (baseline, seed) in last)
    if not seeds or arm == baseline:
        return None
    differences = np.array([last[arm, seed] - last[baseline, seed] for seed in seeds])
    wins, losses = int((differences < 0).sum()), int((differences > 0).sum())
    p = float(stats.binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0
    low = high = None
    if len(seeds) > 1:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1) * differences.std(ddof=1) / np.sqrt(len(seeds))
        low, high = float(differences.mean() - half), float(differences.mean() + half)
    return Paired(summarise(differences.tolist()), float(differences.mean()), low, high, wins, p)


@dataclass(frozen=True)
class Row:
    """An arm of one oracle in the table."""

    arm: str
    label: str
    eta: float
    seeds: int
    gap: Summary  # of the last policies
    topic_gap: Summary
    average_gap: Summary
    kl: Summary  # of the last policy from π_1, nats
    reached: float | None
    steps: int  # optimizer steps of a run
    paired: Paired | None


def table(runs: Sequence[Run]) -> list[Row]:
    """Returns a row for each arm, from the runs of one oracle that are ``reported``."""
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        shares_reached = [run.reached for run in own if run.reached is not None]
        rows.append(
            Row(
                arm,
                ARMS[arm].label,
                own[0].eta,
                len(own),
                summarise([run.last_gap for run in own]),
                summarise([float(run.topic_gap[-LAST:].mean()) for run in own]),
                summarise([run.average_gap for run in own]),
                summarise([run.raw["kl_to_initial"][-1] for run in own]),
                float(np.median(shares_reached)) if shares_reached else None,
                own[0].optimizer_steps,
                paired(runs, arm),
            )
        )
    return rows
