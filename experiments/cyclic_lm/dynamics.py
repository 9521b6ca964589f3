"""What an arm would do if every fit were exact, and how far class shares moved beside that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from onpo_fast.algorithms import named
from onpo_fast.games import matrix as matrix_game
from onpo_fast.games.solution import duality_gap

from .recipe import ARMS, OPTIONS_OF_ORACLE
from .results import Run

# log π_{t+1} − log π_t is η times so many r_t, less so many r_{t−1} (ONPO: 2 r_t − r_{t−1}, with r_0 = 0), and has the
# errors of so many fits in it (ONPO: π′_{t+1}, π_{t+1} and, in log π_t, π_t)
STEPS = {"onpo": (2, 1, 3), "omd": (1, 0, 1), "omd_two_fits": (2, 0, 2)}
NOISY_RUNS = 300
LEAST_RESPONSES = 5  # of each class in half of the responses, or the logarithm of its share is not used


def initial_shares(runs: Sequence[Run]) -> np.ndarray:
    """Returns the class shares of π_1, (C+1,), which is the same in all runs, from its held-out responses.

    They are the same in all runs of a seed, and count once.
    """
    return np.mean([*{run.seed: run.shares[0] for run in runs}.values()], axis=0)


def exact_gaps(arm: str, eta: float, matrix: np.ndarray, start: np.ndarray, policies: int) -> np.ndarray | None:
    """Returns the gaps of π_1, π_2, … if every fit reached its minimum with exact preferences.

    The algorithm plays the game between the classes that π_1 has, as if all prompts had the same shares of them.

    Args:
        matrix: (C+1, C+1) preferences between classes.
        start: (C+1,) class shares of π_1.
        policies: the number of policies, T + 1.

    Returns:
        (T + 1,) gaps; None for an arm whose pairs are chosen by the oracle.
    """
    if ARMS[arm].options:
        return None
    played = np.flatnonzero(start)
    algorithm = ARMS[arm].objective
    tau = 1 / (3 * eta) if named(algorithm).mixes else 0.0  # the trainer's default: a third of π_1
    game = matrix[np.ix_(played, played)]
    trace = matrix_game.run(game, algorithm, eta, policies, start[played], tau=tau, keep_policies=True)
    found = np.zeros((policies, len(start)))
    found[:, played] = trace.policies
    return np.array([duality_gap(matrix, policy) for policy in found])


def noisy_gaps(
    arm: str, eta: float, matrix: np.ndarray, start: np.ndarray, policies: int, share: float, noise: float
) -> np.ndarray:
    """Returns the mean gaps of π_1, π_2, … if every fit took a share of its exact step and made errors.

    Fits of ONPO, mirror descent and mirror descent with two fits, in the game between classes.

    Args:
        matrix: (C+1, C+1) preferences between classes; the last, "none of them", is left out.
        start: (C+1,) class shares of π_1.
        policies: the number of policies, T + 1.
        share: of the exact step.
        noise: standard deviation of the errors in the logarithm of a class's share, nats. They are normal and
            independent for each class and fit.

    Returns:
        (T + 1,) means over ``NOISY_RUNS``.
    """
    P, rng = matrix[:-1, :-1], np.random.default_rng(0)
    with np.errstate(divide="ignore"):  # a class that π_1 lacks stays away
        policy = np.log(np.tile(start[:-1], (NOISY_RUNS, 1)))  # π_t, up to a constant
    auxiliary = policy  # π′_t

    def fit(anchor: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        return anchor + share * eta * rewards + noise * rng.standard_normal(anchor.shape)

    found = np.empty(policies)
    for t in range(policies):
        shares = softmax(policy, axis=1)
        rewards = shares @ P.T  # P(c ≻ π_t)
        found[t] = 2 * rewards.max(1).mean() - 1
        if arm == "onpo":
            auxiliary = fit(auxiliary, rewards)
            policy = fit(auxiliary, rewards)
        else:
            for _ in range(STEPS[arm][2]):
                policy = fit(policy, rewards)
    return found


@dataclass(frozen=True)
class Movement:
    """How class shares moved on held-out prompts, beside exact steps, over the iterations of some runs.

    Attributes:
        share: of the exact step; 1 if fits carry over to held-out prompts in full. A lower estimate: iterations after
            which a class is rare are left out, and those moved far. In simulations a share of 1 is found as 0.85 to 1.
        error: standard error of ``share`` over runs, by the jackknife; None with one run or very little movement.
        noise: standard deviation of the rest, a class and fit, nats. 0 if no rest is found.
        iterations: their number.
    """

    share: float
    error: float | None
    noise: float
    iterations: int


def movement(runs: Sequence[Run]) -> Movement | None:
    """Returns the movement of an arm's runs.

    None for other algorithms than ONPO and mirror descent, and where too little moves to say anything.

    Movements log π̂_{t+1} − log π̂_t are regressed on exact steps, both up to a constant of each iteration. Shares come
    from samples, so each is taken twice, from two halves of the responses, whose errors are independent: products of
    one half's with the other's have no sampling error in expectation (instrumental variables, derived here).
    """
    halves = [one for run in runs if (one := _halves(run)) is not None]
    share = _slope(halves)
    if share is None:
        return None
    rest = [moved - share * exact for moved, exact in halves]
    variance = sum((a * b).sum() for a, b in rest) / sum(a.size - len(a) for a, _ in rest)  # means were subtracted
    fits = STEPS[runs[0].arm][2]
    left_out = [_slope([*halves[:i], *halves[i + 1 :]]) for i in range(len(halves))]
    error = None if None in left_out else float(np.sqrt((len(halves) - 1) * np.var(left_out)))
    return Movement(share, error, float(np.sqrt(max(variance, 0) / fits)), sum(len(a) for a, _ in rest))


def _slope(halves: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    across = sum((moved[0] * exact[1]).sum() + (moved[1] * exact[0]).sum() for moved, exact in halves)
    exact = sum(2 * (exact[0] * exact[1]).sum() for _, exact in halves)
    return float(across / exact) if exact > 0 else None


def _halves(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the movements and the exact steps from each half of a run's held-out responses, (2, n, C) each, n > 0."""
    if run.arm not in STEPS or run.raw["oracle"] in OPTIONS_OF_ORACLE:
        return None
    C = len(run.matrix) - 1
    counts = np.array([[_counts(policy, half, C) for policy in run.raw["heldout"]] for half in (0, 1)])
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    now, before, _ = STEPS[run.arm]
    rewards = shares @ run.matrix[:C, :C].T
    earlier = np.concatenate([np.zeros_like(rewards[:, :1]), rewards[:, :-1]], axis=1)
    exact = run.eta * (now * rewards - before * earlier)[:, :-1]
    moved = np.diff(np.log(counts + 0.5), axis=1)  # + 0.5 takes most of the bias of a logarithm of a count
    usable = (counts >= LEAST_RESPONSES).all((0, 2))
    kept = usable[1:] & usable[:-1]
    moved, exact = (one[:, kept] - one[:, kept].mean(-1, keepdims=True) for one in (moved, exact))
    return (moved, exact) if kept.any() else None


def _counts(policy: list[list[int]], half: int, classes: int) -> np.ndarray:
    """Returns how often each class is among every other response to each prompt."""
    own = [one for prompt in policy for one in prompt[half::2]]
    return np.bincount(own, minlength=classes + 1)[:classes].astype(float)
