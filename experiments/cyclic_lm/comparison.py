"""Arms compared over paired seeds, from the files of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from onpo_fast.algorithms import named
from onpo_fast.errors import UserError
from onpo_fast.games import matrix as matrix_game
from onpo_fast.games.solution import best_response, duality_gap

from .measures import average_gap, gaps, gaps_by_topic, reached, shares
from .recipe import ARMS, BASELINE, ETA, LAST, TUNING_SEEDS

CONFIDENCE = 0.95


@dataclass(frozen=True)
class BestOfNash:
    """Best of Nash over responses of π_1 to the held-out prompts.

    Attributes:
        samples: responses that it chooses from, for each prompt.
        prompts: their number.
        gap: from the class shares over all prompts.
        prompt_gap: mean over prompts of the gap against opponents that see the prompt. It is exact, not an estimate:
            the policy is its weights.
    """

    samples: int
    prompts: int
    gap: float
    prompt_gap: float

    @property
    def comparisons(self) -> int:
        """What it asks of the oracle for one answer."""
        return self.samples * (self.samples - 1) // 2


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
    best_response: float | None = None  # how often a best response that was trained against π_{T+1} wins
    best_of_nash: BestOfNash | None = None  # over responses of this run's π_1

    @property
    def game(self) -> tuple[str, int]:
        """What makes runs comparable: the oracle and the number of iterations."""
        return self.oracle, self.raw["iterations"]

    @property
    def last_gap(self) -> float:
        """The mean gap of the last policies, which arms are judged by."""
        return float(self.gap[-LAST:].mean())

    @property
    def exact_gaps(self) -> np.ndarray:
        """The gap of π_1 … π_{T+1} if every fit had reached its minimum with exact preferences, (T+1,).

        The same algorithm plays the game between the classes, from the class shares of π_1.
        """
        played = self.shares[0] > 0
        algorithm = ARMS[self.arm].objective
        tau = (
            1 / (3 * self.eta) if named(algorithm).mixes else 0.0
        )  # the trainer's default: π_1 has a weight of a third
        start, game = self.shares[0][played], self.matrix[np.ix_(played, played)]
        return matrix_game.run(game, algorithm, self.eta, len(self.gap), start, tau=tau).last_gap

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
    runs, best_responses, best_of_nash = [], {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["kind"] == "best_response":
                best_responses[_key(raw)] = float(raw["win_rate"])
            elif raw["kind"] == "best_of_nash":
                matrix, of_prompts = np.array(raw["matrix"]), np.array(raw["heldout_shares"])
                gaps_of = (
                    float(duality_gap(matrix, of_prompts.mean(0))),
                    float(duality_gap(matrix, of_prompts).mean()),
                )
                best_of_nash[_key(raw)] = BestOfNash(raw["samples"], len(of_prompts), *gaps_of)
            else:
                runs.append(_run(raw))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"{path} is not a file of results: remove it, and its run is done again") from None
    runs = [
        replace(run, best_response=best_responses.get(_key(run.raw)), best_of_nash=best_of_nash.get(_key(run.raw)))
        for run in runs
    ]
    return sorted(runs, key=lambda run: (run.game, list(ARMS).index(run.arm), run.eta, run.seed))


def _key(raw: dict) -> tuple:
    return raw["arm"], raw["eta"], raw["seed"], raw["oracle"], raw["iterations"]


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


def _best_of_nash(raw: dict) -> BestOfNash:
    matrix, shares_of = np.array(raw["matrix"]), np.array(raw["heldout_shares"])  # (prompts, C+1)
    pooled, of_prompts = duality_gap(matrix, shares_of.mean(0)), duality_gap(matrix, shares_of)
    return BestOfNash(raw["samples"], len(shares_of), float(pooled), float(of_prompts.mean()))


def games(runs: Iterable[Run]) -> dict[tuple[str, int], list[Run]]:
    """Returns the reported runs of each game: those with the step chosen for their arm, without the tuning seeds."""
    runs = list(runs)
    found: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if run.seed not in TUNING_SEEDS and run.eta == chosen_eta(runs, run.arm):
            found.setdefault(run.game, []).append(run)
    return found


def chosen_eta(runs: Iterable[Run], arm: str) -> float:
    """Returns an arm's step with the smallest mean gap of the last policies on tuning seeds; ``ETA`` without them."""
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
    """Compares two arms of one game on the seeds that both have; None if there is none."""
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
    """An arm of one game in the table."""

    arm: str
    label: str
    eta: float
    seeds: int
    gap: Summary  # of the last policies
    topic_gap: Summary
    average_gap: Summary
    exact_gap: float | None  # of the last policies if all fits were exact; None where pairs depend on the oracle
    kl: Summary  # of the last policy from π_1, nats
    win_rate: float  # of the last policy against π_1, median
    cyclic_triples: float  # share of the triples of responses in training that are cyclic, median
    reached: float | None
    steps: int  # optimizer steps of a run
    best_response: float | None  # how often one that was trained against the last policy wins
    paired: Paired | None


def table(runs: Sequence[Run]) -> list[Row]:
    """Returns a row for each arm, from the reported runs of one game."""
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
                None if ARMS[arm].options else float(np.median([run.exact_gaps[-LAST:].mean() for run in own])),
                summarise([run.raw["kl_to_initial"][-1] for run in own]),
                float(np.median([run.raw["win_rate"][-1][0] for run in own])),
                float(np.median([np.mean(run.raw["cyclic_triples"]) for run in own])),
                float(np.median(shares_reached)) if shares_reached else None,
                own[0].optimizer_steps,
                next((run.best_response for run in own if run.best_response is not None), None),
                paired(runs, arm),
            )
        )
    return rows
