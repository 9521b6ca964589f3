"""Self-play in a matrix game: every method as the few lines that it is, with exact expectations or sampled pairs.

π_1 is ``init``. In step t an algorithm compares responses of a policy, D_t, and fits the next policy to them. Where its
loss is squared and its pairs (y, y′) are independent draws from π_t, the minimiser over all policies is a step of
mirror descent, anchor·exp(η r_t) normalised, with r_t(y) = P(y ≻ π_t): a least-squares fit of differences sees of the
target η(P(y ≻ y′) − ½) only its mean over y′, which is η(r_t(y) − ½) (arXiv 2502.16852, section 4).

So ``eta`` is one thing for all: the step of mirror descent, at which a sure pair's target margin is η/2 nats. Where a
paper writes the inverse it is converted: INPO's η, IPO's τ and DPO's β are 1/eta here.

``tau`` is the strength of the pull towards π_1 in INPO, Nash-MD and EGPO (whose paper calls it β), and of the
regularised gap.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..objectives import Dpo, Inpo, Ipo, Objective, Omd, Onpo
from .arguments import at_least_zero, count, positive
from .fits import Comparisons, Exact, Sampled, log_normalised, sppo_fit
from .preferences import check, tolerance_of
from .solution import gap_of_rewards, regularised_gap_of_rewards, rewards

Game = Exact | Sampled
Policy = np.ndarray  # log-probs, (B, n) float64, nats
SelfPlay = Generator[Policy, Comparisons, None]  # yields π_t, is sent the comparisons of its own responses


def onpo(game: Game, start: Policy) -> SelfPlay:
    """π′_{t+1} ∝ π′_t·exp(η r_t), π_{t+1} ∝ π′_{t+1}·exp(η r_t). arXiv 2502.16852, Algorithm 1."""
    policy = auxiliary = start
    while True:
        compared = yield policy
        auxiliary = game.fit(auxiliary, compared)
        policy = game.fit(auxiliary, compared)


def omd(game: Game, start: Policy) -> SelfPlay:
    """π_{t+1} ∝ π_t·exp(η r_t): online mirror descent. arXiv 2502.16852, section 3."""
    policy = start
    while True:
        policy = game.fit(policy, (yield policy))


def inpo(game: Game, start: Policy) -> SelfPlay:
    """π_{t+1} ∝ π_1^{ητ}·π_t^{1−ητ}·exp(η r_t). arXiv 2407.00617 (INPO), with η the inverse of its own."""
    policy = start
    while True:
        compared = yield policy
        policy = game.fit(mixture(start, policy, game.tau * game.eta), compared)


def online_ipo(game: Game, start: Policy) -> SelfPlay:
    """π_{t+1} ∝ π_1·exp(η r_t): each step is IPO's minimum on pairs from π_t. arXiv 2403.08635, with η = 1/τ."""
    policy = start
    while True:
        compared = yield policy
        policy = game.fit(start, compared)


def nash_md(game: Game, start: Policy) -> SelfPlay:
    """m_t ∝ π_1^{ητ}·π_t^{1−ητ}, π_{t+1} ∝ m_t·exp(η P m_t): played against the mixture. arXiv 2312.00886 (Nash-MD)."""
    policy = start
    while True:
        yield policy
        mixed = mixture(start, policy, game.tau * game.eta)
        policy = game.fit(mixed, game.compare(mixed))


def egpo(game: Game, start: Policy) -> SelfPlay:
    """π_{t+½} ∝ m_t·exp(η P π_t), π_{t+1} ∝ m_t·exp(η P π_{t+½}), m_t as in Nash-MD. arXiv 2503.08942 (EGPO)."""
    policy = start
    while True:
        compared = yield policy
        mixed = mixture(start, policy, game.tau * game.eta)
        half = game.fit(mixed, compared)
        policy = game.fit(mixed, game.compare(policy, opponent=half))


def sppo(game: Game, start: Policy) -> SelfPlay:
    """argmin_π E_{y∼π_t} (log π(y)/π_t(y) − η(r_t(y) − ½))² over policies. arXiv 2405.00675 (SPPO).

    Its ½ stands for (log Σ π_t·exp(η r_t))/η, with which it would be ``omd`` exactly; ``sppo_fit`` has the minimum.
    """
    policy = start
    while True:
        compared = yield policy
        policy = sppo_fit(policy, compared, game.eta)


def iterative_dpo(game: Game, start: Policy) -> SelfPlay:
    """argmin_π of DPO's loss on pairs from π_t, against π_t: a step of mirror descent on the Bradley-Terry scores that
    fit P best, whatever P is. arXiv 2305.18290, equation 7, with β = 1/η.
    """
    policy = start
    while True:
        compared = yield policy
        policy = game.fit(policy, compared)


ALGORITHMS: dict[str, tuple[Callable[[Game, Policy], SelfPlay], Callable[[float, float], Objective]]] = {
    "onpo": (onpo, lambda eta, tau: Onpo(eta)),
    "omd": (omd, lambda eta, tau: Omd(eta)),
    "inpo": (inpo, lambda eta, tau: Inpo(1 / eta, tau) if tau else Omd(eta)),
    "online_ipo": (online_ipo, lambda eta, tau: Ipo(1 / eta)),
    "nash_md": (nash_md, lambda eta, tau: Omd(eta)),
    "egpo": (egpo, lambda eta, tau: Omd(eta)),
    "sppo": (sppo, lambda eta, tau: Omd(eta)),
    "iterative_dpo": (iterative_dpo, lambda eta, tau: Dpo(1 / eta)),
}
PULLED = ("inpo", "nash_md", "egpo")  # towards π_1, with a weight of ητ


def mixture(start: Policy, policy: Policy, share: float) -> Policy:
    """π_1^share · π^{1−share}, normalised. At the ends 0·log 0 would be undefined."""
    if share in (0, 1):
        return start if share else policy
    return log_normalised(share * start + (1 - share) * policy)


@dataclass(frozen=True)
class GameTrace:
    """What a run went through; float64. A batch of games puts B first: (B, T), (B, n).

    Entry t − 1 of a gap is after t policies, π_1 … π_t: the first one is the initial policy's.
    """

    average_gap: np.ndarray  # (T,): of the mean of π_1 … π_t
    last_gap: np.ndarray  # (T,): of π_t
    average_regularised_gap: np.ndarray  # (T,): in the game with −τ KL(π ‖ π_1) and +τ KL(π′ ‖ π_1)
    last_regularised_gap: np.ndarray  # (T,)
    policy: np.ndarray  # (n,): π_T
    average_policy: np.ndarray  # (n,): the mean of π_1 … π_T
    policies: np.ndarray | None = None  # (T, n), if they were to be kept


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
    labels: Literal["soft", "bits"] = "soft",
    seed: int = 0,
    keep_policies: bool = False,
) -> GameTrace:
    """Plays a preference game, or a batch of them in one go, against itself.

    Args:
        P: (n, n) or (B, n, n): P[i, j] = P(action i ≻ action j).
        algorithm: a name in ``ALGORITHMS``.
        eta: step of mirror descent, > 0 (the module says what it is for each algorithm).
        T: policies, at least 1: π_1 and T − 1 updates.
        init: π_1, (n,) or (B, n); by default uniform. An action of probability 0 keeps it.
        tau: strength of the pull towards π_1 and of the regularised gap, ≥ 0. INPO, Nash-MD and EGPO need ητ ≤ 1.
        mode: "exact": expectations under the policies. "sampled": in every step ``groups`` times ``responses`` actions
            are drawn, compared, paired (``onpo_fast.pairing``) and fitted with the objective that trains language
            models (``onpo_fast.objectives``), in a table of logits.
        groups, responses, pairing, labels, seed: of "sampled"; ``pairing`` and ``labels`` as the trainer's options.
        keep_policies: also return every π_t.

    Raises:
        ValueError: if an argument cannot be; the message names it.
    """
    P = check(P)
    single = P.ndim == 2
    P = P[None] if single else P
    play, objective_of = _named(algorithm)
    eta, tau, T = positive("eta", eta), at_least_zero("tau", tau), count("T", T)
    if algorithm in PULLED and eta * tau > 1:
        raise ValueError(f"{algorithm} gives π_1 the weight eta·tau, which must be at most 1, not {eta * tau:g}")
    start = _distribution(init, P.shape[:2])
    objective = objective_of(eta, tau)
    if mode == "exact":
        game: Game = Exact(P, objective, eta, tau)
    elif mode == "sampled":
        if algorithm == "sppo":
            raise ValueError("sppo compares responses with a policy, not pairs: it has no mode='sampled'")
        game = Sampled(
            P, objective, eta, tau, count("groups", groups), count("responses", responses, 2), pairing, labels, seed
        )
    else:
        raise ValueError(f"mode must be 'exact' or 'sampled', not {mode!r}")

    gaps = np.empty((4, T, len(P)))
    policies = np.empty((T, *start.shape)) if keep_policies else None
    total_policy, total_reward = np.zeros_like(start), np.zeros_like(start)
    with np.errstate(divide="ignore"):
        self_play = play(game, np.log(start))
    log_policy = next(self_play)
    for t in range(T):
        policy = np.exp(log_policy)
        reward = rewards(P, policy)
        total_policy += policy
        total_reward += reward  # P times the averaged policy is the average of P times the policies
        average, average_reward = total_policy / (t + 1), total_reward / (t + 1)
        gaps[:, t] = (
            gap_of_rewards(average_reward),
            gap_of_rewards(reward),
            regularised_gap_of_rewards(average_reward, average, start, tau),
            regularised_gap_of_rewards(reward, policy, start, tau),
        )
        if policies is not None:
            policies[t] = policy
        if t + 1 < T:
            log_policy = self_play.send(game.compare(log_policy, reward=reward))
    gaps = gaps.swapaxes(1, 2)
    if policies is not None:
        policies = policies.swapaxes(0, 1)
    results = (*gaps, policy, average, *([] if policies is None else [policies]))
    return GameTrace(*(result[0] for result in results) if single else results)


def _named(algorithm: str):
    if algorithm not in ALGORITHMS:
        raise ValueError(f"there is no algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm]


def _distribution(init: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """(B, n) float64."""
    games, actions = shape
    if init is None:
        return np.full(shape, 1 / actions)
    given = np.asarray(init)
    start = given.astype(np.float64)
    if start.shape not in ((actions,), shape):
        raise ValueError(
            f"init must be a distribution over {actions} actions, of shape ({actions},) or ({games}, "
            f"{actions}), not {start.shape}"
        )
    if not (start >= 0).all():
        raise ValueError(f"init must be a distribution: it has the probability {start[~(start >= 0)][0]:g}")
    sums = start.sum(-1)
    worst = sums.flat[np.abs(sums - 1).argmax()]
    if not abs(worst - 1) <= tolerance_of(given):
        raise ValueError(f"init must be a distribution: its probabilities sum to {worst:.10g}")
    if given.dtype.kind == "f" and given.dtype.itemsize < 8:  # rounded
        start /= sums[..., None]
    return np.broadcast_to(start, shape).copy()
