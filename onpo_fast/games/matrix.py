"""Self-play in a matrix game, with exact expectations or sampled pairs.

``eta`` is the step of mirror descent for every algorithm: the target margin of a pair whose winner is certain is η/2
nats. Where a paper writes the inverse it is converted: INPO's η, IPO's τ and DPO's β are 1/eta.

``tau`` is the strength of the pull towards π_1 in INPO, Nash-MD and EGPO (whose paper calls it β), and that of the
regularised gap.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import islice
from typing import Literal

import numpy as np

from ..algorithms import Play, named
from ..objectives import Dpo, Inpo, Ipo, Objective, Omd
from .arguments import non_negative, positive, whole_number
from .matrix_games import ExactGame, MatrixGame, SampledGame
from .preferences import check, tolerance_of
from .solution import gap_of_rewards, regularised_gap_of_rewards


@dataclass(frozen=True)
class GameTrace:
    """The gaps and policies of a run; float64. A batch of games puts B first: (B, T), (B, n).

    Entry t − 1 of a gap is after t policies, π_1 … π_t: the first one is the initial policy's.
    """

    average_gap: np.ndarray  # (T,): gap of the mean of π_1 … π_t
    last_gap: np.ndarray  # (T,): gap of π_t
    average_regularised_gap: np.ndarray  # (T,): as average_gap, with −τ KL(π ‖ π_1) and +τ KL(π′ ‖ π_1) in the game
    last_regularised_gap: np.ndarray  # (T,): as last_gap, in the same game
    policy: np.ndarray  # (n,): π_T
    average_policy: np.ndarray  # (n,): mean of π_1 … π_T
    policies: np.ndarray | None = None  # (T, n): π_1 … π_T, with ``keep_policies``


def run(
    P: np.ndarray,
    algorithm: str,
    eta: float,
    T: int,
    init: np.ndarray | None = None,
    *,
    tau: float = 0.1,
    mode: Literal["exact", "sampled"] = "exact",
    groups: int = 64,
    responses: int = 8,
    pairing: str = "all_pairs",
    labels: Literal["soft", "sampled"] = "soft",
    seed: int = 0,
    keep_policies: bool = False,
) -> GameTrace:
    """Play a preference game, or a batch of them at once, against itself.

    Args:
        P: preferences, (n, n) or (B, n, n): P[i, j] = P(action i ≻ action j).
        algorithm: a name in ``algorithms.ALGORITHMS``, or a short name of ``algorithms.ALIASES``.
        eta: step of mirror descent, > 0; the module's text gives its relation to each paper's parameter.
        T: number of policies, at least 1: π_1 and T − 1 updates.
        init: π_1, (n,) or (B, n); default uniform. An action of probability 0 keeps it.
        tau: strength of the pull towards π_1 and of the regularised gap, ≥ 0. INPO, Nash-MD and EGPO need ητ ≤ 1.
        mode: "exact": expectations under the policies. "sampled": in every comparison ``groups`` times ``responses``
            actions are drawn and paired (``onpo_fast.pairing``), and the policy is fitted to these pairs.
        groups, responses, pairing, labels, seed: how "sampled" draws; see ``matrix_games.SampledGame``.
        keep_policies: return every π_t as well.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    P = check(P)
    single = P.ndim == 2
    P = P[None] if single else P
    play = named(algorithm).play
    eta, tau, T = positive("eta", eta), non_negative("tau", tau), whole_number("T", T)
    check_mixture(algorithm, eta, tau)
    initial = _distribution(init, P.shape[:2])
    objective = objective_of(algorithm, eta, tau)
    if mode == "exact":
        game: ExactGame | SampledGame = ExactGame(P, objective, eta, tau)
    elif mode == "sampled":
        if algorithm == "sppo":
            raise ValueError("sppo compares responses with a policy, not in pairs: it has no mode='sampled'")
        groups, responses = whole_number("groups", groups), whole_number("responses", responses, 2)
        game = SampledGame(P, objective, eta, tau, groups, responses, pairing, labels, seed)
    else:
        raise ValueError(f"mode must be 'exact' or 'sampled', not {mode!r}")
    trace = _trace(game, play, initial, T, keep_policies)
    if not single:
        return trace
    values = [getattr(trace, field.name) for field in fields(trace)]
    return GameTrace(*(None if value is None else value[0] for value in values))


def objective_of(algorithm: str, eta: float, tau: float) -> Objective:
    """Return the loss of an algorithm's fits whose step of mirror descent is ``eta``.

    INPO without a pull (``tau`` of 0) is mirror descent.
    """
    kind = named(algorithm).objective
    if kind is Inpo:
        return Inpo(1 / eta, tau) if tau else Omd(eta)
    return kind(1 / eta) if kind in (Ipo, Dpo) else kind(eta)


def check_mixture(algorithm: str, eta: float, tau: float) -> None:
    """Raise ``ValueError`` if the algorithm mixes policies and the weight of π_1, eta·tau, exceeds 1."""
    if named(algorithm).mixes and eta * tau > 1:
        raise ValueError(f"{algorithm} gives π_1 the weight eta·tau, which must be at most 1, not {eta * tau:g}")


def _trace(game: MatrixGame, play: Play, initial: np.ndarray, T: int, keep_policies: bool) -> GameTrace:
    """Play T policies from ``initial``, (B, n) probabilities, and measure each of them."""
    gaps = np.empty((4, T, len(initial)))
    policies = np.empty((T, *initial.shape)) if keep_policies else None
    total_policy, total_reward = np.zeros_like(initial), np.zeros_like(initial)
    with np.errstate(divide="ignore"):
        log_initial = np.log(initial)
    for t, log_policy in enumerate(islice(play(game, log_initial), T)):
        policy = np.exp(log_policy)
        reward = game.rewards(log_policy)
        total_policy += policy
        total_reward += reward  # P times the averaged policy is the average of P times the policies
        average, average_reward = total_policy / (t + 1), total_reward / (t + 1)
        gaps[:, t] = (
            gap_of_rewards(average_reward),
            gap_of_rewards(reward),
            regularised_gap_of_rewards(average_reward, average, initial, game.tau),
            regularised_gap_of_rewards(reward, policy, initial, game.tau),
        )
        if policies is not None:
            policies[t] = policy
    if policies is not None:
        policies = policies.swapaxes(0, 1)
    return GameTrace(*gaps.swapaxes(1, 2), policy, average, policies)


def _distribution(init: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """Return ``init`` for every game, (B, n) float64; uniform if it is None.

    Raises:
        ValueError: if it does not hold distributions of this shape.
    """
    games, actions = shape
    if init is None:
        return np.full(shape, 1 / actions)
    given = np.asarray(init)
    initial = given.astype(np.float64)
    if initial.shape not in ((actions,), shape):
        raise ValueError(
            f"init must be a distribution over {actions} actions, of shape ({actions},) or ({games}, {actions}), not "
            f"{initial.shape}"
        )
    if not (initial >= 0).all():
        raise ValueError(f"init must be a distribution: it has the probability {initial[~(initial >= 0)][0]:g}")
    sums = initial.sum(-1)
    worst = sums.flat[np.abs(sums - 1).argmax()]
    if not abs(worst - 1) <= tolerance_of(given):
        raise ValueError(f"init must be a distribution: its probabilities sum to {worst:.10g}")
    if given.dtype.kind == "f" and given.dtype.itemsize < 8:  # its sum is 1 to the rounding of its own type
        initial /= sums[..., None]
    return np.broadcast_to(initial, shape).copy()
