"""What a game compares."""

from __future__ import annotations

from dataclasses import dataclass

from .data import Group, Pair
from .models.resident import Source


@dataclass(frozen=True)
class Mixture:
    """π_1^share · π^(1−share), normalised: an anchor that pulls towards π_1."""

    initial: Source
    policy: Source
    share: float


@dataclass(frozen=True)
class Comparisons:
    """D_t: responses of a policy, and the pairs of them to learn from.

    Attributes:
        policy: whose responses they are.
        step: what the objective's step is multiplied by: where an opponent takes part, a label is ½ plus half the
            difference of two win rates, so that it stays between 0 and 1, and the step is twice as large.
        suffix: what tells the file of these responses from others of the iteration.
    """

    groups: list[Group]
    pairs: list[Pair]
    policy: Source | Mixture
    step: int
    suffix: str


def policy_of(anchor: Source | Mixture) -> Source | None:
    """The policy that an anchor is; None for a mixture of two."""
    if isinstance(anchor, Mixture):
        return anchor.policy if anchor.policy == anchor.initial else None
    return anchor


def weights_of(policy: Source | Mixture) -> Source:
    """The policy itself, or the one that a mixture pulls towards π_1."""
    return policy.policy if isinstance(policy, Mixture) else policy
