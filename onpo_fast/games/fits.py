"""One argmin over the comparisons of a step, in a table of logits: with exact expectations, or over sampled pairs.

``Exact`` and ``Sampled`` are the same game to an algorithm: ``compare(policy)`` makes D_t, and ``fit(anchor, D_t)`` is
the policy of least loss, as log-probs (B, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, lambertw, logsumexp

from ..objectives import Dpo, Objective
from ..pairing import PAIRINGS, pair
from .solution import rewards

NEWTON_STEPS = 100
CONVERGED = 1e-12  # of a mean derivative, in units of probability
LONGEST_STEP = 4.0  # of a logit, nats: where the logistic curve is flat, Newton's own would overshoot


def log_normalised(logits: np.ndarray) -> np.ndarray:
    """(…, n) log-probs of the distribution in proportion to exp(logits)."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------------------
# Exact expectations
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewards:
    """All that a squared loss needs of pairs from π: r(y) = P(y ≻ opponent); and π, which others weigh the pairs by."""

    reward: np.ndarray  # (B, n)
    log_policy: np.ndarray  # (B, n)


@dataclass(frozen=True)
class Exact:
    P: np.ndarray  # (B, n, n)
    objective: Objective
    eta: float
    tau: float

    def compare(
        self, log_policy: np.ndarray, opponent: np.ndarray | None = None, reward: np.ndarray | None = None
    ) -> Rewards:
        """Responses of the policy, with each other or with the opponent's; ``reward`` if it is known already."""
        if reward is None:
            reward = rewards(self.P, np.exp(log_policy if opponent is None else opponent))
        return Rewards(reward, log_policy)

    def fit(self, anchor: np.ndarray, compared: Rewards) -> np.ndarray:
        if isinstance(self.objective, Dpo):
            step = bradley_terry_scores(self.P, np.exp(compared.log_policy)) / self.objective.beta
        else:
            step = self.eta * compared.reward
        return log_normalised(anchor + step)


def bradley_terry_scores(P: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """(B, n) scores z that minimise DPO's loss on pairs y, y′ ∼ π with soft labels, E_π z = 0.

    The derivative to z_i is π_i times Σ_j π_j (σ(z_i − z_j) − P_ij), which is made 0 by Newton's method. Divided by π_i
    it stays well scaled for actions that are hardly ever played.

    Raises:
        ValueError: if there is no minimum: some actions beat all others for sure, so that the loss falls forever.
    """
    for game, weight in zip(P, policy):
        beats = (game > 0) & (weight > 0) & (weight > 0)[:, None]
        if connected_components(beats, directed=True, connection="strong")[0] > 1 + (weight == 0).sum():
            raise ValueError(
                "iterative_dpo has no minimum in this game: some actions beat all others for sure, which "
                "is an infinite difference of scores"
            )
    scores = np.zeros_like(policy)
    for _ in range(NEWTON_STEPS):
        wins = expit(scores[..., :, None] - scores[..., None, :])
        residual = ((wins - P) * policy[..., None, :]).sum(-1)
        if np.abs(residual[policy > 0]).max() < CONVERGED:
            return scores
        weights = wins * (1 - wins) * policy[..., None, :]
        # the Jacobian has the null vector 1, as scores have no origin; adding 1πᵀ keeps E_π z at 0
        jacobian = weights.sum(-1)[..., None] * np.eye(policy.shape[-1]) - weights + policy[..., None, :]
        step = np.linalg.solve(jacobian, residual[..., None])[..., 0]
        scores -= step * np.minimum(1, LONGEST_STEP / np.abs(step).max(-1, keepdims=True))
    raise ValueError(
        f"iterative_dpo's minimum was not found in {NEWTON_STEPS} steps: a preference is too close to sure"
    )


def sppo_fit(log_policy: np.ndarray, compared: Rewards, eta: float) -> np.ndarray:
    """argmin over policies of E_{y∼π} (u(y) − a(y))², u = log π_new/π and a = η(r − ½).

    With a multiplier for Σ π e^u = 1: u + λe^u = a, so u = a − W(λe^a), Lambert's W. As E_π a = 0, Jensen's inequality
    makes Σ π e^a ≥ 1, so λ ≥ 0; the sum falls with λ, which is found by Newton's method on its logarithm's slope.
    """
    a = eta * (compared.reward - 0.5)
    multiplier = np.zeros((*a.shape[:-1], 1))
    for _ in range(NEWTON_STEPS):
        w = lambertw(multiplier * np.exp(a)).real
        mass = np.exp(log_policy + a - w)
        excess = logsumexp(log_policy + a - w, axis=-1, keepdims=True)
        if np.abs(excess).max() < CONVERGED:
            return log_normalised(log_policy + a - w)
        # dw/dλ = e^a / (e^w (1 + w)), also at λ = 0
        slope = -(mass * np.exp(a - w) / (1 + w)).sum(-1, keepdims=True) / mass.sum(-1, keepdims=True)
        multiplier = np.maximum(multiplier - excess / slope, 0)
    raise ValueError(f"sppo's minimum was not found in {NEWTON_STEPS} steps; a smaller eta has one nearer by")


# ---------------------------------------------------------------------------------------------------------------------
# Sampled pairs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The comparisons of all games, one after the other: M in all."""

    game: torch.Tensor  # (M,) int64
    winner: torch.Tensor  # (M,) int64 actions
    loser: torch.Tensor  # (M,) int64
    preference: torch.Tensor  # (M,) float64: the winner's label


Comparisons = Rewards | Pairs


class Sampled:
    """``groups`` times K actions drawn from a policy, compared, and paired by the code that trains language models."""

    def __init__(
        self,
        P: np.ndarray,
        objective: Objective,
        eta: float,
        tau: float,
        groups: int,
        responses: int,
        pairing: str,
        labels: Literal["soft", "bits"],
        seed: int,
    ) -> None:
        if pairing not in PAIRINGS:
            raise ValueError(f"there is no pairing {pairing!r}; there are {', '.join(PAIRINGS)}")
        if labels not in ("soft", "bits"):
            raise ValueError(f"labels must be 'soft' or 'bits', not {labels!r}")
        self.P, self.objective, self.eta, self.tau = P, objective, eta, tau
        self.groups, self.responses, self.pairing, self.labels = groups, responses, pairing, labels
        self.rng = np.random.default_rng(seed)

    def compare(
        self, log_policy: np.ndarray, opponent: np.ndarray | None = None, reward: np.ndarray | None = None
    ) -> Pairs:
        """Responses of the policy with each other; or, if there is an ``opponent``, with one of its own a group.

        The latter's label is ½ + P(y ≻ y″) − P(y′ ≻ y″), whose target is the difference of rewards (EGPO's loss).
        """
        games = np.arange(len(self.P))[:, None, None]
        actions = self._draw(log_policy, self.responses)
        if opponent is None:
            preference = self.P[games[..., None], actions[..., :, None], actions[..., None, :]]
            labels = self.labels
        else:
            against = self.P[games, actions, self._draw(opponent, 1)]
            if self.labels == "bits":
                against = (self.rng.random(against.shape) < against).astype(np.float64)
            preference = 0.5 + against[..., :, None] - against[..., None, :]
            labels = "soft"  # the bits are drawn
        flat = preference.reshape(-1, self.responses, self.responses)
        chosen = pair(flat, self.pairing, labels, [int(self.rng.integers(2**32))])
        group = np.array([p.group for p in chosen])
        taken = actions.reshape(-1, self.responses)
        return Pairs(
            torch.from_numpy(group // self.groups),
            torch.from_numpy(taken[group, [p.winner for p in chosen]]),
            torch.from_numpy(taken[group, [p.loser for p in chosen]]),
            torch.tensor([p.preference for p in chosen], dtype=torch.float64),
        )

    def fit(self, anchor: np.ndarray, compared: Pairs) -> np.ndarray:
        """The least loss over the pairs, by Newton's method, which a squared loss ends in one step.

        Where the pairs leave a choice (actions that were not drawn, groups of actions that never met) it is the
        solution nearest to the anchor.

        Raises:
            ValueError: if the loss falls forever: DPO with labels that some actions win for sure.
        """
        step = torch.zeros(anchor.shape, dtype=torch.float64)
        for _ in range(NEWTON_STEPS):
            at = step[compared.game, compared.winner] - step[compared.game, compared.loser]
            at.requires_grad_(True)
            slope = self.objective.derivative(at, compared.preference)
            (curvature,) = torch.autograd.grad(slope.sum(), at)
            gradient, hessian = self._sums(compared, slope.detach(), curvature)
            if gradient.abs().max() < CONVERGED * max(1, len(compared.game)):
                return log_normalised(anchor + step.numpy())
            change = (torch.linalg.pinv(hessian, hermitian=True) @ gradient[..., None])[..., 0]
            if isinstance(self.objective, Dpo):
                change = change.clamp(-LONGEST_STEP / self.objective.beta, LONGEST_STEP / self.objective.beta)
            step = step - change
        raise ValueError(
            f"the fit of {type(self.objective).__name__} was not found in {NEWTON_STEPS} steps: with labels='bits', or "
            "sure preferences, its loss may fall forever"
        )

    def _draw(self, log_policy: np.ndarray, count: int) -> np.ndarray:
        """(B, groups, count) actions, independent draws."""
        edges = np.exp(log_policy).cumsum(-1)
        uniform = self.rng.random((len(edges), self.groups * count)) * edges[:, -1:]
        actions = np.stack([edge.searchsorted(u, side="right") for edge, u in zip(edges, uniform)])
        return actions.reshape(len(edges), self.groups, count)

    def _sums(self, compared: Pairs, slope: torch.Tensor, curvature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the summed loss: its gradient (B, n) and its Hessian (B, n, n), a graph's Laplacian."""
        games, n = self.P.shape[:2]
        winner, loser = compared.game * n + compared.winner, compared.game * n + compared.loser
        gradient = torch.zeros(games * n, dtype=torch.float64)
        gradient.index_add_(0, winner, slope).index_add_(0, loser, -slope)
        hessian = torch.zeros(games * n * n, dtype=torch.float64)
        for row, column, sign in ((winner, winner, 1), (loser, loser, 1), (winner, loser, -1), (loser, winner, -1)):
            hessian.index_add_(0, row * n + column % n, sign * curvature)
        return gradient.view(games, n), hessian.view(games, n, n)
