"""The loss written as one would on a blackboard: float64, all logits at once, gradients by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .groups import Layout
from .head import Head


def token_logps(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] of every row: (N, H), (N,) -> (N,) float64, differentiable."""
    double = head._replace(weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())
    return double.logits(hidden.double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def response_logps(hidden: Tensor, head: Head, targets: Tensor, layout: Layout, workspace: int | None = None) -> Tensor:
    """(N, H), (N,) -> (S,) float64: summed over responses. An empty one sums to 0. Takes all the memory it wants."""
    logps = token_logps(hidden, head, targets)
    sums = [logps[a:b].sum() for a, b in pairwise(layout.edges)]
    return torch.stack(sums) if sums else logps.new_zeros(0)


def pair_loss(
    policy_logps: Tensor,  # (S,)
    reference_logps: Tensor,  # (S,)
    pairs: Tensor,  # (P, 2) int64
    objective,
    preference: Tensor,  # (P,)
    pair_weight: Tensor,  # (P,)
) -> tuple[Tensor, Tensor]:
    """The weighted mean loss over pairs (0 without pairs) and the margins (P,), in nats."""
    ratio = policy_logps - reference_logps
    margins = ratio[pairs[:, 0]] - ratio[pairs[:, 1]]
    losses = objective.loss(margins, preference) * pair_weight
    return (losses.sum() / pair_weight.sum() if len(pairs) else losses.sum()), margins
