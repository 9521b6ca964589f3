"""Arms compared over paired seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from onpo_fast.games.solution import nash

from .measures import gaps
from .recipe import ARMS, BASELINE, ETA, ORACLE, TUNING_ETAS, TUNING_SEEDS
from .results import Game, Run

CONFIDENCE = 0.95
FLOOR_DRAWS = 2000


def games(runs: Iterable[Run]) -> dict[Game, list[Run]]:
    """Returns the runs of each game whose seeds did not choose a step."""
    found: dict[Game, list[Run]] = {}
    for run in runs:
        if run.seed not in TUNING_SEEDS:
            found.setdefault(run.game, []).append(run)
    return found


def by_arm_and_step(runs: Iterable[Run]) -> dict[tuple[str, float], list[Run]]:
    """Returns the runs of each arm and step, in the order in which they occur."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run.arm, run.eta), []).append(run)
    return found


def chosen_eta(runs: Iterable[Run], arm: str, game: Game) -> float:
    """Returns the step with which an arm has the smallest mean gap of the last policies on the tuning seeds.

    All steps of ``TUNING_ETAS`` must be there, for this game or else for the one of ``ORACLE``; otherwise it is
    ``ETA``.
    """
    runs = list(runs)
    for candidate in (game, (ORACLE, game[1])):
        tuning = {(run.eta, run.seed): run.last(run.gap) for run in runs if run.arm == arm and run.game == candidate}
        if all((eta, seed) in tuning for eta in TUNING_ETAS for seed in TUNING_SEEDS):
            means = {eta: np.mean([tuning[eta, seed] for seed in TUNING_SEEDS]) for eta in TUNING_ETAS}
            return min(means, key=means.get)
    return ETA


def noise_floor(run: Run) -> float:
    """Returns the gap that a Nash policy would be measured to have, from as many responses as this run's policies.

    The largest of noisy class shares exceeds their mean; every measured gap is too large by up to this.
    """
    rng = np.random.default_rng(0)
    responses = sum(map(len, run.raw["heldout"][0]))
    draws = rng.choice(len(run.matrix), size=(FLOOR_DRAWS, 1, responses), p=nash(run.matrix))
    return float(gaps(run.matrix, draws.tolist()).mean())


@dataclass(frozen=True)
class Summary:
    """A number over seeds: its median, and an interval that needs no assumption but independent seeds.

    Attributes:
        low, high: two order statistics, between which the median of the distribution lies with the probability
            ``coverage``, at least ``CONFIDENCE``; with fewer than six seeds the smallest and the largest.
        coverage: exact for a continuous distribution.
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


def paired(runs: Sequence[Run], own: Sequence[Run], baseline_eta: float) -> Paired | None:
    """Compares runs of an arm with those of the baseline at this step; None if they have no seed in common."""
    against = {run.seed: run.last(run.gap) for run in runs if run.arm == BASELINE and run.eta == baseline_eta}
    differences = np.array([run.last(run.gap) - against[run.seed] for run in own if run.seed in against])
    if not len(differences) or own[0].arm == BASELINE:
        return None
    wins, losses = int((differences < 0).sum()), int((differences > 0).sum())
    p = float(stats.binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0
    low = high = None
    if len(differences) > 1:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * stats.sem(differences)
        low, high = float(differences.mean() - half), float(differences.mean() + half)
    return Paired(summarise(differences.tolist()), float(differences.mean()), low, high, wins, p)


@dataclass(frozen=True)
class Movement:
    """How class shares moved on held-out prompts, beside exact steps, over the iterations of some runs.

    Attributes:
        share: the least-squares slope on exact steps: 1 if fits carry over to held-out prompts in full.
        noise: standard deviation of the rest, a class and fit, without what the number of responses explains, nats. 0
            if that explains it all.
        iterations: their number.
    """

    share: float
    noise: float
    iterations: int


def movement(runs: Sequence[Run]) -> Movement | None:
    """Returns the movement of an arm's runs; None if it is not known, or in fewer than two iterations."""
    moves = [run.moves for run in runs if run.moves is not None]
    if sum(len(one.measured) for one in moves) < 2:
        return None
    columns = ("measured", "exact", "sampling")
    measured, exact, sampling = (np.concatenate([getattr(one, name) for one in moves]) for name in columns)
    measured, exact = (one - one.mean(1, keepdims=True) for one in (measured, exact))
    share = (measured * exact).sum() / (exact * exact).sum()
    rest = measured - share * exact
    classes = rest.shape[1]
    variance = (rest**2).sum() / (len(rest) * (classes - 1)) - sampling.mean()  # means were subtracted
    return Movement(float(share), float(np.sqrt(max(variance, 0) / moves[0].fits)), len(rest))


@dataclass(frozen=True)
class Row:
    """An arm with a step, in one game. Gaps are those of the last policies, medians over seeds."""

    arm: str
    label: str
    eta: float
    seeds: int
    gap: Summary
    prompt_gap: Summary
    average_gap: Summary  # of the mean of all policies
    exact_gap: float | None  # if all fits were exact; None where pairs depend on the oracle
    kl: float  # of the last policy from π_1, nats
    win_rate: float  # of the last policy against π_1
    cyclic_triples: float  # share of the triples of responses in training that are cyclic
    reached: float | None  # margins at the end of the fits, as a share of exact ones
    movement: Movement | None
    steps: int  # optimizer steps of a run
    best_response: float | None  # how often one that was trained against the last policy wins
    paired: Paired | None


def table(runs: Sequence[Run], baseline_eta: float) -> list[Row]:
    """Returns a row for each arm and step, from the runs of one game."""
    return [_row(runs, own, baseline_eta) for own in by_arm_and_step(runs).values()]


def _row(runs: Sequence[Run], own: list[Run], baseline_eta: float) -> Row:
    exact = [run.last(run.exact_gap) for run in own if run.exact_gap is not None]
    known = [run.reached for run in own if run.reached is not None]
    return Row(
        arm=own[0].arm,
        label=ARMS[own[0].arm].label,
        eta=own[0].eta,
        seeds=len(own),
        gap=summarise([run.last(run.gap) for run in own]),
        prompt_gap=summarise([run.last(run.prompt_gap) for run in own]),
        average_gap=summarise([float(run.average_gap[-1]) for run in own]),
        exact_gap=float(np.median(exact)) if exact else None,
        kl=float(np.median([run.raw["kl_to_initial"][-1] for run in own])),
        win_rate=float(np.median([run.raw["win_rate"][-1][0] for run in own])),
        cyclic_triples=float(np.median([np.mean(run.raw["cyclic_triples"]) for run in own])),
        reached=float(np.median(known)) if known else None,
        movement=movement(own),
        steps=own[0].optimizer_steps,
        best_response=next((run.best_response for run in own if run.best_response is not None), None),
        paired=paired(runs, own, baseline_eta),
    )
