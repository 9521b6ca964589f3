"""Matrix games that ``onpo_fast.algorithms`` can play: with exact expectations, or with sampled pairs.

``ExactGame`` and ``SampledGame`` implement ``algorithms.Game``. A policy is an array (B, n) of log-probs, float64,
nats: one row for each of B games. ``fit`` returns the policy of least loss over all policies, so ``warm_start`` and
``into``, which matter where a model is trained, have no effect here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, lambertw, logsumexp

from ..objectives import Dpo, Objective, Sppo
from ..pairing import PAIRINGS, pair
from .solution import rewards

NEWTON_STEPS = 100
CONVERGED = 1e-12  # largest mean derivative at a solution, in units of probability
LONGEST_STEP = 4.0  # largest change of a logit in one Newton step, nats: the logistic curve is flat beyond
LABELS = ("soft", "sampled")
LABEL_ALIASES = ("bits",)  # an old name of "sampled"


def log_normalised(logits: np.ndarray) -> np.ndarray:
    """Return the log-probs of the distribution proportional to exp(logits), (…, n)."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mixture(initial: np.ndarray, policy: np.ndarray, share: float) -> np.ndarray:
    """Return the log-probs of π_1^share · π^(1−share), normalised, (…, n).

    Shares of 0 and 1 return the policy itself: an action of probability 0 would otherwise give 0·log 0, a NaN.
    """
    if share in (0, 1):
        return initial if share else policy
    return log_normalised(share * initial + (1 - share) * policy)


def check_labels(labels: str) -> None:
    """Raise ``ValueError`` if there is no such kind of labels."""
    if labels not in (*LABELS, *LABEL_ALIASES):
        raise ValueError(f"labels must be {' or '.join(LABELS)}, not {labels!r}")


class MatrixGame:
    """What exact and sampled play have in common.

    Args:
        P: preferences, (B, n, n): P[b, i, j] = P(action i ≻ action j).
        objective: the loss of the fits.
        eta: step of mirror descent, which the objective's own parameters must agree with.
        tau: strength of the pull towards π_1. A mixture gives π_1 the weight eta·tau.
    """

    def __init__(self, P: np.ndarray, objective: Objective, eta: float, tau: float) -> None:
        self.P, self.objective, self.eta, self.tau = P, objective, eta, tau
        self._last: tuple[np.ndarray | None, np.ndarray | None] = None, None

    def rewards(self, log_policy: np.ndarray) -> np.ndarray:
        """Return r(y) = P(y ≻ π), (B, n). The last result is kept: the trace and the algorithm both need π_t's."""
        if self._last[0] is not log_policy:
            self._last = log_policy, rewards(self.P, np.exp(log_policy))
        return self._last[1]

    def mixture(self, initial: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """Return π_1^{ητ} · π^{1−ητ}, normalised."""
        return mixture(initial, policy, self.tau * self.eta)


# ---------------------------------------------------------------------------------------------------------------------
# ExactGame expectations
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewards:
    """Comparisons of two responses of π in expectation: all that a minimiser depends on."""

    reward: np.ndarray  # (B, n): P(y ≻ opponent), where the opponent is π itself by default
    log_policy: np.ndarray  # (B, n): π, nats


class ExactGame(MatrixGame):
    """A game whose fits are minimisers of the expected loss."""

    def compare(self, policy: np.ndarray, opponent: np.ndarray | None = None) -> Rewards:
        """Return the rewards of the policy's responses against the policy itself, or against ``opponent``."""
        return Rewards(self.rewards(policy if opponent is None else opponent), policy)

    def fit(
        self,
        anchor: np.ndarray,
        compared: Rewards,
        *,
        warm_start: np.ndarray | None = None,
        into: str = "policy",
        steps: int = 1,
    ) -> np.ndarray:
        """Return anchor·exp(steps·η·r), normalised; for SPPO and DPO the minimiser of their own loss.

        SPPO's anchor must be the policy whose responses were compared.

        Raises:
            ValueError: if the loss of SPPO or DPO has no minimum, or none was found.
        """
        if isinstance(self.objective, Sppo):
            return sppo_fit(anchor, compared, steps * self.eta)
        if isinstance(self.objective, Dpo):
            step = bradley_terry_scores(self.P, np.exp(compared.log_policy)) / self.objective.beta
        else:
            step = self.eta * compared.reward
        return log_normalised(anchor + steps * step)


def bradley_terry_scores(P: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """Return the scores z that minimise DPO's loss on pairs y, y′ ∼ π with soft labels, (B, n), with E_π z = 0.

    The derivative with respect to z_i is π_i·Σ_j π_j (σ(z_i − z_j) − P_ij). Newton's method finds its zero. Dividing by
    π_i keeps the equations well scaled for actions of small probability.

    Args:
        P: preferences, (B, n, n).
        policy: probabilities, (B, n).

    Raises:
        ValueError: if there is no minimum: some actions beat all others with probability 1, and the loss falls forever.
    """
    for game, weight in zip(P, policy):
        beats = (game > 0) & (weight > 0) & (weight > 0)[:, None]
        if connected_components(beats, directed=True, connection="strong")[0] > 1 + (weight == 0).sum():
            raise ValueError(
                "iterative_dpo has no minimum in this game: some actions beat all others with probability 1, which "
                "calls for an infinite difference of scores"
            )
    scores = np.zeros_like(policy)
    for _ in range(NEWTON_STEPS):
        wins = expit(scores[..., :, None] - scores[..., None, :])
        residual = ((wins - P) * policy[..., None, :]).sum(-1)
        if np.abs(residual[policy > 0]).max() < CONVERGED:
            return scores
        weights = wins * (1 - wins) * policy[..., None, :]
        # scores are determined up to a constant, so the Jacobian has the null vector 1; adding 1πᵀ keeps E_π z at 0
        jacobian = weights.sum(-1)[..., None] * np.eye(policy.shape[-1]) - weights + policy[..., None, :]
        step = np.linalg.solve(jacobian, residual[..., None])[..., 0]
        scores -= step * np.minimum(1, LONGEST_STEP / np.abs(step).max(-1, keepdims=True))
    raise ValueError(
        f"iterative_dpo's minimum was not found in {NEWTON_STEPS} Newton steps: a preference is too close to 0 or 1"
    )


def sppo_fit(log_policy: np.ndarray, compared: Rewards, eta: float) -> np.ndarray:
    """Return the policy that minimises E_{y∼π} (u(y) − a(y))², u = log π_new/π and a = η(r − ½): log-probs (B, n).

    With a multiplier λ for Σ π e^u = 1 the condition is u + λe^u = a, so u = a − W(λe^a), W being Lambert's function.
    As E_π a = 0, Jensen's inequality gives Σ π e^a ≥ 1, so λ ≥ 0. The sum falls with λ, which Newton's method finds.

    Raises:
        ValueError: if Newton's method does not converge.
    """
    a = eta * (compared.reward - 0.5)
    multiplier = np.zeros((*a.shape[:-1], 1))
    for _ in range(NEWTON_STEPS):
        w = lambertw(multiplier * np.exp(a)).real
        mass = np.exp(log_policy + a - w)
        excess = logsumexp(log_policy + a - w, axis=-1, keepdims=True)
        if np.abs(excess).max() < CONVERGED:
            return log_normalised(log_policy + a - w)
        # dw/dλ = e^a / (e^w (1 + w)), which also holds at λ = 0
        slope = -(mass * np.exp(a - w) / (1 + w)).sum(-1, keepdims=True) / mass.sum(-1, keepdims=True)
        multiplier = np.maximum(multiplier - excess / slope, 0)
    raise ValueError(f"sppo's minimum was not found in {NEWTON_STEPS} Newton steps: lower eta")


# ---------------------------------------------------------------------------------------------------------------------
# SampledGame pairs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampledPairs:
    """M sampled comparisons, those of all games in one list."""

    game: torch.Tensor  # (M,) int64: index of the game
    winner: torch.Tensor  # (M,) int64: action
    loser: torch.Tensor  # (M,) int64: action
    preference: torch.Tensor  # (M,) float64: label of the winner


class SampledGame(MatrixGame):
    """A game whose fits are minimisers over sampled pairs.

    In each comparison ``groups`` times ``responses`` actions are drawn from the policy, and paired by the code that
    trains language models. Draws are numbered, so the same seed gives the same run.

    Args:
        P, objective, eta, tau: as in ``MatrixGame``.
        groups: groups of responses in a comparison.
        responses: responses in a group, K.
        pairing: a name in ``pairing.PAIRINGS``.
        labels: "soft": P(winner ≻ loser); "sampled": a draw from it.
        seed: seed of all draws.

    Raises:
        ValueError: if there is no such pairing or kind of labels.
    """

    def __init__(
        self,
        P: np.ndarray,
        objective: Objective,
        eta: float,
        tau: float,
        groups: int,
        responses: int,
        pairing: str,
        labels: Literal["soft", "sampled"],
        seed: int,
    ) -> None:
        super().__init__(P, objective, eta, tau)
        if pairing not in PAIRINGS:
            raise ValueError(f"there is no pairing {pairing!r}; there are {', '.join(PAIRINGS)}")
        check_labels(labels)
        self.groups, self.responses, self.pairing, self.labels = groups, responses, pairing, labels
        self.rng = np.random.default_rng(seed)

    def compare(self, policy: np.ndarray, opponent: np.ndarray | None = None) -> SampledPairs:
        """Draw responses of the policy and compare them with each other, or with a response of ``opponent`` a group.

        Against an opponent's response y″ the label of a pair is ½ + P(y ≻ y″) − P(y′ ≻ y″), whose target is the
        difference of two rewards (EGPO's loss).
        """
        games = np.arange(len(self.P))[:, None, None]
        actions = self._draw(policy, self.responses)
        if opponent is None:
            preference = self.P[games[..., None], actions[..., :, None], actions[..., None, :]]
            labels = self.labels
        else:
            against = self.P[games, actions, self._draw(opponent, 1)]
            if self.labels != "soft":
                against = (self.rng.random(against.shape) < against).astype(np.float64)
            preference = 0.5 + against[..., :, None] - against[..., None, :]
            labels = "soft"  # the outcomes have been drawn
        in_groups = preference.reshape(-1, self.responses, self.responses)
        chosen = pair(in_groups, self.pairing, labels, [int(self.rng.integers(2**32))])
        group = np.array([p.group for p in chosen])
        taken = actions.reshape(-1, self.responses)
        return SampledPairs(
            torch.from_numpy(group // self.groups),
            torch.from_numpy(taken[group, [p.winner for p in chosen]]),
            torch.from_numpy(taken[group, [p.loser for p in chosen]]),
            torch.tensor([p.preference for p in chosen], dtype=torch.float64),
        )

    def fit(
        self,
        anchor: np.ndarray,
        compared: SampledPairs,
        *,
        warm_start: np.ndarray | None = None,
        into: str = "policy",
        steps: int = 1,
    ) -> np.ndarray:
        """Return the policy of least loss over the pairs, by Newton's method; a squared loss takes one step of it.

        Where the pairs leave a choice (actions that were not drawn, sets of actions that were not compared with each
        other) it is the solution nearest to the anchor.

        Raises:
            ValueError: if the loss falls forever: DPO where some actions win all their comparisons.
        """
        step = torch.zeros(anchor.shape, dtype=torch.float64)
        for _ in range(NEWTON_STEPS):
            margin = step[compared.game, compared.winner] - step[compared.game, compared.loser]
            margin.requires_grad_(True)
            slope = self.objective.derivative(margin, compared.preference)
            (curvature,) = torch.autograd.grad(slope.sum(), margin)
            gradient, hessian = self._derivatives(compared, slope.detach(), curvature)
            if gradient.abs().max() < CONVERGED * max(1, len(compared.game)):
                # the solution is proportional to the target, for every objective
                return log_normalised(anchor + steps * step.numpy())
            change = (torch.linalg.pinv(hessian, hermitian=True) @ gradient[..., None])[..., 0]
            if isinstance(self.objective, Dpo):
                change = change.clamp(-LONGEST_STEP / self.objective.beta, LONGEST_STEP / self.objective.beta)
            step = step - change
        raise ValueError(
            f"the fit of {type(self.objective).__name__} did not converge in {NEWTON_STEPS} Newton steps: where labels "
            "are 0 or 1, its loss may have no minimum; use labels='soft', or more groups"
        )

    def _draw(self, log_policy: np.ndarray, count: int) -> np.ndarray:
        """Return independent draws of actions, (B, groups, count) int64."""
        edges = np.exp(log_policy).cumsum(-1)
        uniform = self.rng.random((len(edges), self.groups * count)) * edges[:, -1:]
        actions = np.stack([edge.searchsorted(u, side="right") for edge, u in zip(edges, uniform)])
        return actions.reshape(len(edges), self.groups, count)

    def _derivatives(
        self, compared: SampledPairs, slope: torch.Tensor, curvature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient (B, n) and the Hessian (B, n, n), a graph's Laplacian, of the summed loss."""
        games, n = self.P.shape[:2]
        winner, loser = compared.game * n + compared.winner, compared.game * n + compared.loser
        gradient = torch.zeros(games * n, dtype=torch.float64)
        gradient.index_add_(0, winner, slope).index_add_(0, loser, -slope)
        hessian = torch.zeros(games * n * n, dtype=torch.float64)
        for row, column, sign in ((winner, winner, 1), (loser, loser, 1), (winner, loser, -1), (loser, winner, -1)):
            hessian.index_add_(0, row * n + column % n, sign * curvature)
        return gradient.view(games, n), hessian.view(games, n, n)
