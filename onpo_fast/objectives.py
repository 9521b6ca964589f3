"""Objectives: from a pair's margin to its loss, and nothing more.

Write D(π) = log π(y_w) − log π(y_l), log-probs summed over the response's tokens (nats). The *margin* of a pair is
g = D(π) − D(anchor), and the label p = P(y_w ≻ y_l) is 1 for a hard label. An objective says, elementwise over pairs,

- ``target(p)``: the margin at which the loss is least, in nats;
- ``loss(g, p)``: the loss of the pair;
- ``derivative(g, p)``: d loss / d g, which is all that a backward pass needs.

The arguments are tensors of any one shape and dtype; so are the results. How many fits an iteration takes, and what
they are measured from, is the algorithm's (``algorithms``).

To add an objective: write the class here and give it a name in ``OBJECTIVES``. Its constructor arguments are taken
from the trainer's options of the same names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What every objective shares. Parameters must be positive and finite, and the squared target of a sure label too
    where the loss is a square (``ValueError`` otherwise)."""

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

    @property
    def normaliser(self) -> float:
        """What to divide the loss by so that runs with different parameters compare."""
        return 1.0


class _Squared(Objective):
    """(g − target)²: a least-squares fit of the margin."""

    def loss(self, margin: Tensor, preference: Tensor) -> Tensor:
        return (margin - self.target(preference)).square()

    def derivative(self, margin: Tensor, preference: Tensor) -> Tensor:
        return 2 * (margin - self.target(preference))

    @property
    def normaliser(self) -> float:
        # (2·target(1))², so that the loss of a hard label starts at ¼ when g = 0: (g/η − ½)² for ONPO
        return float((2 * self.target(torch.ones((), dtype=torch.float64))).square())


@dataclass(frozen=True)
class Onpo(_Squared):
    """(g − η/2)², soft labels (g − η(p − ½))². arXiv 2502.16852, Algorithm 1.

    The anchor is π′_t for the first fit of an iteration and π′_{t+1} for the second.
    """

    eta: float  # step size of mirror descent; the target is η/2 nats

    def target(self, preference: Tensor) -> Tensor:
        return self.eta * (preference - 0.5)


@dataclass(frozen=True)
class Omd(_Squared):
    """(g − η/2)² against π_t: plain online mirror descent, which is INPO with τ = 0. arXiv 2502.16852, section 3."""

    eta: float  # step size of mirror descent

    def target(self, preference: Tensor) -> Tensor:
        return self.eta * (preference - 0.5)


@dataclass(frozen=True)
class Inpo(_Squared):
    """(D(π) − (τ/η) D(π_1) − (1 − τ/η) D(π_t) − 1/(2η))². arXiv 2407.00617 (INPO).

    Its η is the inverse of ONPO's. The two anchors fold into one column of log-probs, since D is linear in them.
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


@dataclass(frozen=True)
class Ipo(_Squared):
    """(g − 1/(2τ))² against π_1, soft labels (g − (2p − 1)/(2τ))². arXiv 2310.12036, equation 17."""

    tau: float  # strength of the pull towards π_1

    def target(self, preference: Tensor) -> Tensor:
        return (2 * preference - 1) / (2 * self.tau)


@dataclass(frozen=True)
class Sppo(_Squared):
    """(log π(y)/π_t(y) − η(p − ½))², p = P(y ≻ π_t): each response by itself. arXiv 2405.00675, equation 3.5.

    The margin is a response's log-ratio, that is, the pair's loser is an empty response, whose log-prob is 0.
    """

    eta: float  # step size of mirror descent

    def target(self, preference: Tensor) -> Tensor:
        return self.eta * (preference - 0.5)


@dataclass(frozen=True)
class Dpo(Objective):
    """−p·log σ(βg) − (1 − p)·log σ(−βg) against π_t: iterative DPO. arXiv 2305.18290, equation 7.

    A soft label is what conservative DPO calls label smoothing. With a hard label the target is infinite.
    """

    beta: float  # inverse temperature of the Bradley-Terry reward

    def target(self, preference: Tensor) -> Tensor:
        return torch.logit(preference) / self.beta

    def loss(self, margin: Tensor, preference: Tensor) -> Tensor:
        z = self.beta * margin
        return preference * F.softplus(-z) + (1 - preference) * F.softplus(z)

    def derivative(self, margin: Tensor, preference: Tensor) -> Tensor:
        return self.beta * (torch.sigmoid(self.beta * margin) - preference)


OBJECTIVES: dict[str, type[Objective]] = {
    "onpo": Onpo,
    "omd": Omd,
    "inpo": Inpo,
    "ipo": Ipo,
    "sppo": Sppo,
    "dpo": Dpo,
}
