"""Solutions of a preference game: best responses, duality gaps, the Nash policy.

``P`` is (n, n) or (B, n, n), a policy (n,) or (B, n); the results lose the last axis of the policy. J(π, π′) = πᵀPπ′ is
the probability that π's action beats π′'s. float64 throughout.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.special import logsumexp, rel_entr

from .preferences import check


def rewards(P: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """Return r(y) = P(y ≻ π), the probability that each action beats the policy's, in the shape of the policy."""
    return (P @ policy[..., None])[..., 0]


def best_response(P: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """Return the action that beats the policy most often, (…) int64; the first if there are several."""
    return rewards(P, policy).argmax(-1)


def duality_gap(P: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """Return max_μ J(μ, π) − min_μ J(π, μ), which is 2·max_y P(y ≻ π) − 1, as J(π, μ) = 1 − J(μ, π).

    It is 0 at a Nash policy, and positive elsewhere.
    """
    return gap_of_rewards(rewards(P, policy))


def gap_of_rewards(reward: np.ndarray) -> np.ndarray:
    """Return the duality gap of a policy from the rewards of all actions against it."""
    return 2 * reward.max(-1) - 1


def regularised_gap(P: np.ndarray, policy: np.ndarray, reference: np.ndarray, tau: float) -> np.ndarray:
    """Return the duality gap of J(π, π′) − τ·KL(π ‖ ref) + τ·KL(π′ ‖ ref), the game that INPO, Nash-MD and EGPO solve.

    Its best response to π is ref·exp(r/τ), normalised, so the gap is 2·(τ·log Σ ref·exp(r/τ) + τ·KL(π ‖ ref)) − 1.
    This is the gap of arXiv 2503.08942 (EGPO), whose β is τ. It is infinite if π plays an action of
    probability 0 under the reference. With τ = 0 it is ``duality_gap``.
    """
    return regularised_gap_of_rewards(rewards(P, policy), policy, reference, tau)


def regularised_gap_of_rewards(reward: np.ndarray, policy: np.ndarray, reference: np.ndarray, tau: float) -> np.ndarray:
    """Return ``regularised_gap`` from the rewards of all actions against the policy."""
    if tau == 0:
        return gap_of_rewards(reward)
    best = tau * logsumexp(reward / tau, axis=-1, b=np.broadcast_to(reference, reward.shape))
    return 2 * (best + tau * rel_entr(policy, reference).sum(-1)) - 1


def nash(P: np.ndarray) -> np.ndarray:
    """Return a Nash policy, by linear programming: it maximises v with P(π ≻ y) ≥ v for every action y, and reaches ½.

    If there are several, a vertex of their set is returned, on which few actions have a probability: the same for the
    same matrix and release of scipy, but perhaps another one if the actions are in another order. Of actions with equal
    rows only the sum of the probabilities is determined; it may all be on one of them. Where all actions tie, every
    policy is a Nash policy, and one action may get all. Preferences of 0 and 1 are allowed.

    With the preferences between n responses to one prompt these are the weights of best of Nash (arXiv 2609.08082).

    Args:
        P: preferences, (n, n) or (B, n, n), n ≥ 1.

    Returns:
        Probabilities, (n,) or (B, n) float64, which sum to 1. Their gap is 0 to about 1e-9.

    Raises:
        ValueError: if P is not a preference matrix.
    """
    P = check(P)
    if P.ndim == 3:
        return np.stack([nash(game) for game in P])
    n = len(P)
    # minimise −v over (π, v) subject to v − (πᵀP)_y ≤ 0, Σπ = 1, π ≥ 0
    solved = linprog(
        c=np.append(np.zeros(n), -1.0),
        A_ub=np.column_stack([-P.T, np.ones(n)]),
        b_ub=np.zeros(n),
        A_eq=np.append(np.ones(n), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
    )
    if not solved.success:  # every matrix game has a solution, so the solver failed
        raise RuntimeError(f"the linear program was not solved: {solved.message}")
    policy = np.maximum(solved.x[:n], 0)
    return policy / policy.sum()
