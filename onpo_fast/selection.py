"""Which pairs an oracle is asked about, where its answers cost money.

N pairs of an iteration are drawn with replacement, pair k of n with a probability q_k > 0, and each draw counts
1/(n q_k) in the loss: the mean over draws is an unbiased estimate of the mean over all pairs, whatever q is. So the
step is that of all pairs, with noise that depends on q:

- ``uniform``: every pair alike.
- ``variance``: q ∝ √(p̂(1 − p̂))·‖x‖. The target of a sampled label has the standard deviation η√(p(1 − p)), and x, the
  difference of the responses' features, stands for the gradient of the margin; where the margins are those of the exact
  step, this q minimises the variance of the gradient among all q, as importance sampling does (derived here). Before
  that, and with soft labels, the distance to the target counts too, and it is a guess. p̂ comes from labels of earlier
  iterations.
- ``dopt``: a D-optimal design, which maximises log det Σ q_k x_k x_kᵀ: with it a linear model of rewards, fitted to
  labels of equal variance, is known best. After ADPO (arXiv 2503.01076), which chooses greedily; here q is the optimal
  design itself, so that draws can be weighted.

A part of every q is uniform, which bounds the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from .data import Group

UNIFORM_SHARE = 0.1  # of every q: a draw counts at most 1 / UNIFORM_SHARE
DESIGN_STEPS = 200  # of the multiplicative algorithm
RIDGE = 1e-6  # of the design's matrix, relative to its mean diagonal
PREDICTOR_RIDGE = 1.0  # of the logistic regression, in units of one label
NEWTON_STEPS = 20

Triple = tuple[int, int, int]  # a group, and two of its responses, the first with the lower index


@dataclass(frozen=True)
class Selected:
    """The pairs that were drawn.

    Attributes:
        pairs: each once.
        counts: how often each was drawn; their sum is N.
        importance: 1/(n q) of each.
    """

    pairs: list[Triple]
    counts: list[int]
    importance: list[float]

    def by_group(self, groups: int) -> list[list[tuple[int, int]]]:
        """Returns the pairs of each group's responses."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(groups)]
        for g, i, j in self.pairs:
            found[g].append((i, j))
        return found


def candidates(groups: Sequence[Group]) -> list[Triple]:
    """Returns all pairs of different responses; those with the same tokens have no gradient."""
    return [
        (g, i, j)
        for g, group in enumerate(groups)
        for i in range(len(group.responses))
        for j in range(i + 1, len(group.responses))
        if group.responses[i].tokens != group.responses[j].tokens
    ]


def select(q: np.ndarray, pairs: Sequence[Triple], draws: int, rng: np.random.Generator) -> Selected:
    """Draws pairs with replacement.

    Args:
        q: (n,) probabilities of the pairs, all positive.
        draws: N.
    """
    counts = rng.multinomial(draws, q)
    chosen = np.flatnonzero(counts)
    return Selected([pairs[k] for k in chosen], counts[chosen].tolist(), (1 / (len(pairs) * q[chosen])).tolist())


def uniform(x: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return np.full(len(x), 1 / len(x))


def variance(x: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return _mixed(np.sqrt(predicted * (1 - predicted)) * np.linalg.norm(x, axis=1))


def dopt(x: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns a D-optimal design by the multiplicative algorithm, q ← q·xᵀM(q)⁻¹x / d, which never lowers det M(q).

    Source: Silvey, Titterington and Torsney, "An algorithm for optimal designs on a design space" (1978).
    """
    n, d = x.shape
    q = np.full(n, 1 / n)
    for _ in range(DESIGN_STEPS):
        M = (x * q[:, None]).T @ x
        M += RIDGE * (np.trace(M) / d + np.finfo(float).tiny) * np.eye(d)
        leverage = np.einsum("kd,kd->k", x, np.linalg.solve(M, x.T).T)
        q = q * leverage
        q /= q.sum()
    return _mixed(q)


def _mixed(q: np.ndarray) -> np.ndarray:
    """Returns q, normalised, with the uniform share; uniform if q is 0 everywhere."""
    total = q.sum()
    if not (np.isfinite(total) and total > 0):
        return np.full(len(q), 1 / len(q))
    return (1 - UNIFORM_SHARE) * q / total + UNIFORM_SHARE / len(q)


Selection = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (n, d) features and (n,) predictions -> (n,) probabilities
SELECTIONS: dict[str, Selection] = {"uniform": uniform, "variance": variance, "dopt": dopt}


class Predictor:
    """P(first ≻ second) from the difference of features: logistic regression on the labels of earlier iterations.

    Attributes:
        weights: (d,); 0 before any label, which predicts ½.
    """

    def __init__(self, features: int) -> None:
        self.weights = np.zeros(features)

    def fit(self, x: np.ndarray, labels: np.ndarray) -> None:
        """Fits to labels P(first ≻ second), by Newton's method with a ridge."""
        w = np.zeros(x.shape[1])
        for _ in range(NEWTON_STEPS):
            p = expit(x @ w)
            gradient = x.T @ (p - labels) + PREDICTOR_RIDGE * w
            hessian = (x * (p * (1 - p))[:, None]).T @ x + PREDICTOR_RIDGE * np.eye(len(w))
            w = w - np.linalg.solve(hessian, gradient)
        self.weights = w

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Returns (n,) probabilities."""
        return expit(x @ self.weights)
