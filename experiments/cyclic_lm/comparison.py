"""Arms compared over paired seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from onpo_fast.games.solution import duality_gap, nash

from .dynamics import STEPS, Movement, exact_gaps, initial_shares, movement, noisy_gaps
from .measures import gaps
from .recipe import ARMS, BASELINE, OPTIONS_OF_ORACLE, ORACLE, TUNING_ETAS, TUNING_SEEDS
from .results import Game, Run

CONFIDENCE = 0.95
FLOOR_DRAWS = 2000
MOST_ETAS = 6  # steps that are tried for an arm
EXACT_ARMS = ("onpo", "omd", "omd_two_fits", "inpo")
EXACT_ITERATIONS = (10, 20, 40)
EXACT_ETAS = np.geomspace(0.02, 10, 120)


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


def tried_etas(runs: Iterable[Run], arm: str, game: Game) -> dict[float, float]:
    """Returns the mean gap of the last policies on the tuning seeds for each step that has run on all of them."""
    last = {(run.eta, run.seed): run.last(run.gap) for run in runs if run.arm == arm and run.game == game}
    etas = sorted({eta for eta, _ in last})
    done = [eta for eta in etas if all((eta, seed) in last for seed in TUNING_SEEDS)]
    return {eta: float(np.mean([last[eta, seed] for seed in TUNING_SEEDS])) for eta in done}


def etas_to_try(runs: Iterable[Run], arm: str, game: Game) -> tuple[float, ...]:
    """Returns the steps that tuning runs next: those of ``TUNING_ETAS``, then, while the best is an end, one beyond it.

    Up to ``MOST_ETAS``.
    """
    tried = tried_etas(runs, arm, game)
    if missing := tuple(eta for eta in TUNING_ETAS if eta not in tried):
        return missing
    best, ends = min(tried, key=tried.get), (min(tried), max(tried))
    if len(tried) >= MOST_ETAS or best not in ends:
        return ()
    return (best / 2,) if best == ends[0] else (best * 2,)


def chosen_eta(runs: Iterable[Run], arm: str, game: Game) -> float:
    """Returns the step with which an arm has the smallest mean gap of the last policies on the tuning seeds.

    All steps of ``TUNING_ETAS`` must be there, for this game or else for the one of ``ORACLE``; otherwise it is that of
    the recipe.
    """
    runs = list(runs)
    for candidate in (game, (ORACLE, game[1])):
        tried = tried_etas(runs, arm, candidate)
        if all(eta in tried for eta in TUNING_ETAS):
            return min(tried, key=tried.get)
    return ARMS[arm].eta


def control_eta(runs: Sequence[Run], own: Iterable[Run]) -> float | None:
    """Returns the step of the control that arms are compared with, among the reported runs ``own`` of a game.

    That with most seeds, of several the chosen one; None if there are none, or several others.
    """
    own = [run for run in own if run.arm == BASELINE]
    if not own:
        return None
    seeds = Counter(run.eta for run in own)
    most = [eta for eta, count in seeds.items() if count == max(seeds.values())]
    chosen = chosen_eta(runs, BASELINE, own[0].game)
    return chosen if chosen in most else most[0] if len(most) == 1 else None


@dataclass(frozen=True)
class Tuning:
    """The choice of an arm's step in a game: the mean gap of the last policies for each step, and which was taken."""

    label: str
    game: Game
    gaps: dict[float, float]
    chosen: float


def tuning(runs: Sequence[Run]) -> list[Tuning]:
    """Returns the choices for which there are runs on the tuning seeds."""
    groups = dict.fromkeys((run.game, run.arm) for run in runs if run.seed in TUNING_SEEDS)
    tried = ((game, arm, tried_etas(runs, arm, game)) for game, arm in groups)
    return [Tuning(ARMS[arm].label, game, gaps, chosen_eta(runs, arm, game)) for game, arm, gaps in tried]


def exact_gaps_by_length(own: Sequence[Run]) -> dict[str, list[tuple[float, float]]]:
    """Returns what exact fits would reach in ``EXACT_ITERATIONS`` with the best of ``EXACT_ETAS`` and that η, by label.

    Each is the mean gap of the last policies, from the class shares of π_1 in these runs of a game. {} for one of
    several turns, where a step depends on the turn's state.
    """
    if own[0].raw["oracle"] in OPTIONS_OF_ORACLE:
        return {}
    start, matrix = initial_shares(own), own[0].matrix
    return _best_steps(own[0], EXACT_ARMS, lambda arm, eta, policies: exact_gaps(arm, eta, matrix, start, policies))


def noisy_gaps_by_length(own: Sequence[Run]) -> dict[str, list[tuple[float, float]]]:
    """Returns what fits as they were measured for ONPO would reach; see ``exact_gaps_by_length`` and ``noisy_gaps``.

    {} where they were not measured.
    """
    of_fits = movement([run for run in own if run.arm == "onpo"])
    if of_fits is None:
        return {}
    start, matrix = initial_shares(own), own[0].matrix

    def gaps_of(arm: str, eta: float, policies: int) -> np.ndarray:
        return noisy_gaps(arm, eta, matrix, start, policies, of_fits.share, of_fits.noise)

    return _best_steps(own[0], STEPS, gaps_of)


def _best_steps(
    run: Run, arms: Iterable[str], gaps_of: Callable[[str, float, int], np.ndarray]
) -> dict[str, list[tuple[float, float]]]:
    """For each arm's label, after each number of iterations, the least gap of the last policies, and its step.

    Args:
        gaps_of: given an arm, η and the number of policies, returns the gaps of π_1, π_2, ….
    """
    found = {}
    for arm in arms:
        paths = [(gaps_of(arm, eta, max(EXACT_ITERATIONS) + 1), eta) for eta in EXACT_ETAS]
        found[ARMS[arm].label] = [min((run.last(path[: n + 1]), eta) for path, eta in paths) for n in EXACT_ITERATIONS]
    return found


def noise_floor(run: Run) -> float:
    """Returns the gap that a Nash policy would be measured to have, from as many responses as this run's policies.

    The largest of noisy class shares exceeds their mean; every measured gap is too large by up to this.
    """
    rng = np.random.default_rng(0)
    draws = rng.choice(len(run.matrix), size=(FLOOR_DRAWS, 1, run.responses), p=nash(run.matrix))
    return float(gaps(run.matrix, draws.tolist()).mean())


@dataclass(frozen=True)
class Summary:
    """A number over seeds: its median, and an interval that needs no assumption but independent seeds.

    Attributes:
        low, high: two order statistics, between which the median of the distribution lies with a probability of at
            least ``CONFIDENCE``; with fewer than six seeds the smallest and the largest.
    """

    median: float
    low: float
    high: float


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
    return Summary(float(np.median(ordered)), ordered[k - 1], ordered[-k])


@dataclass(frozen=True)
class Difference:
    """An arm's mean gap of the last policies minus another number, for each seed; negative: the arm is nearer to Nash.

    Attributes:
        mean, low, high: with Student's interval of ``CONFIDENCE``; None with one seed.
        seeds: their number.
        below: seeds on which it is negative.
        p: of the two-sided sign test.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    below: int
    p: float


def difference(values: Sequence[float]) -> Difference | None:
    """Summarises differences, one for each seed; None if there are none."""
    if not values:
        return None
    n, mean = len(values), float(np.mean(values))
    below, above = sum(one < 0 for one in values), sum(one > 0 for one in values)
    p = float(stats.binomtest(below, below + above, 0.5).pvalue) if below + above else 1.0
    low = high = None
    if n > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * stats.sem(values))
        low, high = mean - half, mean + half
    return Difference(mean, low, high, n, below, p)


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
    exact_gap: float | None  # if all fits were exact; None where pairs depend on the oracle, and with several turns
    kl: float  # of the last policy from π_1, nats
    win_rate: float  # of the last policy against π_1
    cyclic_triples: float  # share of the triples of responses in training that are cyclic
    reached: float | None  # margins at the end of the fits, as a share of exact ones
    movement: Movement | None
    steps: float  # optimizer steps of a run
    best_response: float | None  # how often one that was trained against the last policy wins
    is_control: bool  # whether others are compared with it
    versus_control: Difference | None  # on the same seeds; None for the control itself
    versus_initial: Difference | None  # minus the gap of π_1, as measured on the same seed


def initial_gap(runs: Sequence[Run]) -> float:
    """Returns the gap of π_1, against opponents that ignore the prompt, from the held-out responses of all runs."""
    return float(duality_gap(runs[0].matrix, initial_shares(runs)))


def table(runs: Sequence[Run], own: Sequence[Run]) -> list[Row]:
    """Returns a row for each arm and step of a game.

    Args:
        runs: all, among which are those that chose the steps.
        own: the reported ones of the game.
    """
    control = control_eta(runs, own)
    against = {run.seed: run.last(run.gap) for run in own if run.arm == BASELINE and run.eta == control}
    return [_row(own, some, control, against) for some in by_arm_and_step(own).values()]


def _row(own: Sequence[Run], some: list[Run], control: float | None, against: dict[int, float]) -> Row:
    arm, eta, matrix = some[0].arm, some[0].eta, some[0].matrix
    last = {run.seed: run.last(run.gap) for run in some}
    is_control = arm == BASELINE and eta == control
    one_turn = some[0].raw["oracle"] not in OPTIONS_OF_ORACLE
    exact = exact_gaps(arm, eta, matrix, initial_shares(own), len(some[0].gap)) if one_turn else None
    known = [run.reached for run in some if run.reached is not None]
    return Row(
        arm=arm,
        label=ARMS[arm].label,
        eta=eta,
        seeds=len(some),
        gap=summarise(list(last.values())),
        prompt_gap=summarise([run.last(run.prompt_gap) for run in some]),
        average_gap=summarise([float(run.average_gap[-1]) for run in some]),
        exact_gap=None if exact is None else some[0].last(exact),
        kl=float(np.median([run.raw["kl_to_initial"][-1] for run in some])),
        win_rate=float(np.median([run.raw["win_rate"][-1][0] for run in some])),
        cyclic_triples=float(np.median([np.mean(run.raw["cyclic_triples"]) for run in some])),
        reached=float(np.median(known)) if known else None,
        movement=movement(some),
        steps=float(np.median([run.optimizer_steps for run in some])),
        best_response=next((run.best_response for run in some if run.best_response is not None), None),
        is_control=is_control,
        versus_control=None
        if is_control
        else difference([gap - against[seed] for seed, gap in last.items() if seed in against]),
        versus_initial=difference([run.last(run.gap) - float(run.gap[0]) for run in some]),
    )
