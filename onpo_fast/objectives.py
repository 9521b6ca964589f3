"""Objectives: from the margin of a pair to its loss.

Let D(π) = log π(y_w) − log π(y_l), with log-probs summed over the response's tokens, in nats. The *margin* of a pair
is g = D(π) − D(anchor), and its label p = P(y_w ≻ y_l) is 1 for a hard label. An objective has three elementwise
functions:

- ``target(p)``: the margin of least loss, in nats;
- ``loss(g, p)``: the loss of the pair;
- ``derivative(g, p)``: d loss / d g, which is all that the backward pass needs.

Arguments are tensors of one shape and dtype, and so are results. ``with_steps(k)`` is the objective whose target is k
times as large. How many fits an iteration has, and from which anchor margins are measured, is part of the algorithm
(``algorithms``).

To add an objective: write its class, and name the algorithm that uses it in ``algorithms.ALGORITHMS``. The arguments
of its constructor are read from the trainer's options of the same names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """Base class of objectives.

    Raises:
        ValueError: if a parameter is not positive and finite, or a squared loss has a hard label's target whose square
            is not positive and finite in float64.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive, finite number, not {value!r}")
        if not (math.isfinite(self.normaliser) and self.normaliser > 0):
            raise ValueError(f"{self} has a target whose square is {self.normaliser:g} in float64")

    def target(self, preference: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, margin: Tensor, preference: Tensor) -> Tensor:
        raise NotImplementedError

    def derivative(self, margin: Tensor, preference: Tensor) -> Tensor:
        raise NotImplementedError

    def with_steps(self, steps: int) -> Objective:
        """The objective whose target is ``steps`` times as large: as many steps of mirror descent in one fit."""
        raise NotImplementedError

    @property
    def normaliser(self) -> float:
        """What reported losses are divided by, so that runs with different parameters can be compared."""
        return 1.0


class _Squared(Objective):
    """(g − target)²: a least-squares fit of the margin."""

    def loss(self, margin: Tensor, preference: Tensor) -> Tensor:
        return (margin - self.target(preference)).square()

    def derivative(self, margin: Tensor, preference: Tensor) -> Tensor:
        return 2 * (margin - self.target(preference))

    @property
    def normaliser(self) -> float:
        # (2·target(1))², so that the normalised loss of a hard label is ¼ at g = 0: (g/η − ½)² for ONPO
        return float((2 * self.target(torch.ones((), dtype=torch.float64))).square())


@dataclass(frozen=True)
class _MirrorDescent(_Squared):
    """The target η(p − ½), of a step of mirror descent of size η."""

    eta: float

    def target(self, preference: Tensor) -> Tensor:
        return self.eta * (preference - 0.5)

    def with_steps(self, steps: int) -> Objective:
        return replace(self, eta=steps * self.eta)


@dataclass(frozen=True)
class Onpo(_MirrorDescent):
    """(g − η/2)², with soft labels (g − η(p − ½))². arXiv 2502.16852, Algorithm 1.

    The anchor is π′_t in the first fit of an iteration and π′_{t+1} in the second.
    """


@dataclass(frozen=True)
class Omd(_MirrorDescent):
    """(g − η/2)² against π_t: online mirror descent, which is INPO with τ = 0. arXiv 2502.16852, section 3."""


@dataclass(frozen=True)
class Inpo(_Squared):
    """(D(π) − (τ/η) D(π_1) − (1 − τ/η) D(π_t) − 1/(2η))². arXiv 2407.00617 (INPO).

    This η is the inverse of ONPO's. Both anchors are one column of log-probs, because D is linear in log-probs.
    """

    eta: float  # inverse step size: the target is 1/(2η) nats
    tau: float  # strength of the pull towards π_1; at most η

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau > self.eta:
            raise ValueError(f"tau must be at most eta: τ/η is the weight of π_1, not {self.tau / self.eta:g}")

    @property
    def initial_share(self) -> float:
        """The weight of π_1 in the mixture that margins are measured from; π_t has the rest."""
        return self.tau / self.eta

    def target(self, preference: Tensor) -> Tensor:
        return (2 * preference - 1) / (2 * self.eta)

    def with_steps(self, steps: int) -> Objective:
        return replace(self, eta=self.eta / steps, tau=self.tau / steps)  # τ/η stays


@dataclass(frozen=True)
class Ipo(_Squared):
    """(g − 1/(2τ))² against π_1, with soft labels (g − (2p − 1)/(2τ))². arXiv 2310.12036, equation 17."""

    tau: float  # strength of the pull towards π_1

    def target(self, preference: Tensor) -> Tensor:
        return (2 * preference - 1) / (2 * self.tau)

    def with_steps(self, steps: int) -> Objective:
        return replace(self, tau=self.tau / steps)


@dataclass(frozen=True)
class Sppo(_MirrorDescent):
    """(log π(y)/π_t(y) − η(p − ½))² of each response y, where p = P(y ≻ π_t). arXiv 2405.00675, section 4 (SPPO).

    A pair has no loser (``Pair.loser`` is None): its margin is the log-ratio of one response. ½ replaces the
    log-normaliser of the mirror-descent step, divided by η.
    """


@dataclass(frozen=True)
class Dpo(Objective):
    """−p·log σ(βg) − (1 − p)·log σ(−βg) against π_t: iterative DPO. arXiv 2305.18290, equation 7.

    A soft label is what conservative DPO calls label smoothing. The target of a hard label is infinite.
    """

    beta: float  # inverse temperature of the Bradley-Terry reward

    def target(self, preference: Tensor) -> Tensor:
        return torch.logit(preference) / self.beta

    def loss(self, margin: Tensor, preference: Tensor) -> Tensor:
        z = self.beta * margin
        return preference * F.softplus(-z) + (1 - preference) * F.softplus(z)

    def derivative(self, margin: Tensor, preference: Tensor) -> Tensor:
        return self.beta * (torch.sigmoid(self.beta * margin) - preference)

    def with_steps(self, steps: int) -> Objective:
        return replace(self, beta=self.beta / steps)
