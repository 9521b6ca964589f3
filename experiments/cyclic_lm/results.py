"""The files of results, and what is computed from them. All gaps are in [0, 1], float64."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onpo_fast.algorithms import named
from onpo_fast.errors import UserError
from onpo_fast.games import matrix as matrix_game
from onpo_fast.games.solution import duality_gap

from .measures import average_gaps, gaps, gaps_by_prompt, reached, shares
from .recipe import ARMS, LAST

# log π_{t+1} − log π_t is η times so many r_t, less so many r_{t−1} (ONPO: 2 r_t − r_{t−1}, with r_0 = 0), and has the
# errors of so many fits in it (ONPO: π′_{t+1}, π_{t+1} and, in log π_t, π_t)
STEPS = {"onpo": (2, 1, 3), "omd": (1, 0, 1), "omd_two_fits": (2, 0, 2)}
LEAST_RESPONSES = 10  # of each class, or the logarithm of its share is not used

Game = tuple[str, int]  # what makes runs comparable: the oracle, and the number of iterations


@dataclass(frozen=True)
class BestOfNash:
    """Best of Nash over one draw of responses of π_1 to the held-out prompts.

    Attributes:
        samples: responses that it chooses from, for each prompt.
        prompts: their number.
        gap: against opponents that ignore the prompt, from its class shares over all prompts.
        prompt_gap: against opponents that see the prompt, the mean over prompts. Given the draw both are exact: the
            policy is its weights.
    """

    samples: int
    prompts: int
    gap: float
    prompt_gap: float

    @property
    def comparisons(self) -> int:
        """What it asks of the oracle for one answer."""
        return self.samples * (self.samples - 1) // 2


class Moves(NamedTuple):
    """Movements of class shares on held-out prompts over n iterations, in nats; up to a constant of each iteration.

    Attributes:
        measured: log π̂_{t+1} − log π̂_t, (n, C).
        exact: the step of mirror descent from the measured shares, (n, C).
        sampling: (n,) variance of ``measured`` from the number of responses alone, a class.
        fits: the number of fits whose errors are in ``measured``.
    """

    measured: np.ndarray
    exact: np.ndarray
    sampling: np.ndarray
    fits: int


@dataclass(frozen=True)
class Run:
    """The results of a run, with what is computed from them."""

    raw: dict
    best_response: float | None = None  # how often one that was trained against π_{T+1} wins
    best_of_nash: BestOfNash | None = None  # over responses of this run's π_1

    @property
    def arm(self) -> str:
        return self.raw["arm"]

    @property
    def eta(self) -> float:
        return self.raw["eta"]

    @property
    def seed(self) -> int:
        return self.raw["seed"]

    @property
    def game(self) -> Game:
        return self.raw["oracle"], self.raw["iterations"]

    @cached_property
    def matrix(self) -> np.ndarray:
        """(C+1, C+1) preferences between classes; the last is "none of them"."""
        return np.array(self.raw["matrix"])

    @cached_property
    def shares(self) -> np.ndarray:
        """(T+1, C+1) class shares of π_1 … π_{T+1} on held-out prompts."""
        return np.array([shares(policy, len(self.matrix)) for policy in self.raw["heldout"]])

    @cached_property
    def gap(self) -> np.ndarray:
        """(T+1,) gaps against opponents that ignore the prompt."""
        return gaps(self.matrix, self.raw["heldout"])

    @cached_property
    def prompt_gap(self) -> np.ndarray:
        """(T+1,) lower estimates of the gaps against opponents that see the prompt."""
        return gaps_by_prompt(self.matrix, self.raw["heldout"])

    @cached_property
    def average_gap(self) -> np.ndarray:
        """(T+1,) gaps of the means of π_1 … π_t, against opponents that ignore the prompt."""
        return average_gaps(self.matrix, self.raw["heldout"])

    @cached_property
    def exact_gap(self) -> np.ndarray | None:
        """(T+1,) gaps if every fit had reached its minimum with exact preferences; None where pairs are chosen.

        The same algorithm plays the game between the classes that π_1 has, from its shares of them.
        """
        if ARMS[self.arm].options:
            return None
        played = np.flatnonzero(self.shares[0])
        algorithm = ARMS[self.arm].objective
        tau = 1 / (3 * self.eta) if named(algorithm).mixes else 0.0  # the trainer's default: a third of π_1
        start, game = self.shares[0][played], self.matrix[np.ix_(played, played)]
        trace = matrix_game.run(game, algorithm, self.eta, len(self.gap), start, tau=tau, keep_policies=True)
        policies = np.zeros_like(self.shares)
        policies[:, played] = trace.policies
        return np.array([duality_gap(self.matrix, policy) for policy in policies])

    @cached_property
    def moves(self) -> Moves | None:
        """How class shares moved, beside exact steps; None for other algorithms than ONPO and mirror descent."""
        if self.arm not in STEPS:
            return None
        C = len(self.matrix) - 1
        counts = self.shares[:, :C] * sum(map(len, self.raw["heldout"][0]))
        usable = (counts >= LEAST_RESPONSES).all(1)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        now, before, fits = STEPS[self.arm]
        rewards = shares @ self.matrix[:C, :C].T
        earlier = np.vstack([np.zeros(C), rewards[:-1]])
        exact = self.eta * (now * rewards - before * earlier)[:-1]
        logs = np.log(np.maximum(shares, 1e-9))
        kept = usable[1:] & usable[:-1]
        noise = ((1 - shares) / np.maximum(counts, 1)).mean(1)  # variance of the logarithm of a sampled share
        return Moves((logs[1:] - logs[:-1])[kept], exact[kept], (noise[1:] + noise[:-1])[kept], fits)

    @cached_property
    def reached(self) -> float | None:
        """The mean margin at the end of the fits, as a share of that of exact ones."""
        return reached(self.raw["fits"])

    @property
    def optimizer_steps(self) -> int:
        """The optimizer steps of all fits."""
        return sum(fit["steps"] for fit in self.raw["fits"])

    def last(self, values: np.ndarray) -> float:
        """The mean over the last policies, by which arms are judged; π_1 is never one of them."""
        return float(values[1:][-LAST:].mean())


def read(folder: Path) -> list[Run]:
    """Reads all results of a folder, in the order of games, arms, steps and seeds.

    Raises:
        UserError: if a file is not one of results, or two runs of a game have different recipes; names the files.
    """
    runs: dict[Path, Run] = {}
    best_responses, best_of_nash = {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["kind"] == "best_response":
                best_responses[_key(raw)] = float(raw["win_rate"])
            elif raw["kind"] == "best_of_nash":
                best_of_nash[_key(raw)] = _best_of_nash(raw)
            else:
                runs[path] = _checked(Run(raw))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"{path} is not a file of results: remove it, and its run is done again") from None
    _check_recipes(runs)
    joined = [
        replace(run, best_response=best_responses.get(_key(run.raw)), best_of_nash=best_of_nash.get(_key(run.raw)))
        for run in runs.values()
    ]
    return sorted(joined, key=lambda run: (run.game, list(ARMS).index(run.arm), run.eta, run.seed))


def _key(raw: dict) -> tuple:
    return raw["arm"], raw["eta"], raw["seed"], raw["oracle"], raw["iterations"]


def _checked(run: Run) -> Run:
    """Returns the run if all that is shown of it can be computed."""
    if run.arm not in ARMS or len(run.gap) != run.raw["iterations"] + 1:
        raise ValueError(run.arm)
    _ = run.prompt_gap, run.average_gap, run.exact_gap, run.reached, run.optimizer_steps
    _ = run.raw["kl_to_initial"][-1], run.raw["win_rate"][-1][0], run.raw["cyclic_triples"], run.raw["environment"]
    _ = run.raw["recipe"], run.raw["classes"], run.seed
    return run


def _best_of_nash(raw: dict) -> BestOfNash:
    matrix, of_prompts = np.array(raw["matrix"]), np.array(raw["heldout_shares"])  # (prompts, C+1)
    pooled, by_prompt = duality_gap(matrix, of_prompts.mean(0)), duality_gap(matrix, of_prompts)
    return BestOfNash(raw["samples"], len(of_prompts), float(pooled), float(by_prompt.mean()))


def _check_recipes(runs: dict[Path, Run]) -> None:
    first: dict[Game, tuple[Path, Run]] = {}
    for path, run in runs.items():
        other, known = first.setdefault(run.game, (path, run))
        for name in ("recipe", "matrix", "classes"):
            if run.raw[name] != known.raw[name]:
                raise UserError(f"{path} and {other} differ in their {name}: they are not runs of the same game")
