"""The definition of the loss: float64, all logits at once, gradients by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .groups import PairLayout
from .head import Head
from .problem import Gradients, NeedsGradient, PairProblem, PairResult, TokenProblem


def pair_loss(problem: PairProblem) -> PairResult:
    """Compute the weighted mean loss over pairs (0 without pairs) and its gradients."""
    layout = problem.layout
    ref_logps = problem.ref_logps
    if ref_logps is None:
        ref_logps = sum_over_responses(log_softmax(problem.ref_hidden, problem.head, problem.targets), layout)
    with torch.enable_grad():
        hidden, head, leaves = _leaves(problem.hidden, problem.head, problem.needs_gradient)
        logps = sum_over_responses(log_softmax(hidden, head, problem.targets), layout)
        ratio = logps - ref_logps
        winner, loser = layout.pairs.to(hidden.device).T
        margins = ratio[winner] - ratio[loser]
        losses = problem.objective.loss(margins, problem.preference) * problem.pair_weight
        loss = losses.sum() / problem.pair_weight.sum() if len(losses) else losses.sum()
        gradients = _gradients(loss, leaves, None)
    return PairResult(loss.detach(), logps.detach(), ref_logps, margins.detach(), gradients)


def scale_in_place(gradients: Gradients, factor: Tensor) -> None:
    """Multiply the gradients of ``pair_loss`` by a scalar."""
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)


def token_logps(problem: TokenProblem) -> Tensor:
    """Compute the log-prob of every target: (N,) float64."""
    return log_softmax(problem.hidden, problem.head, problem.targets)


def token_gradients(problem: TokenProblem, logps: Tensor, upstream: Tensor) -> Gradients:
    """Compute the gradients of Σ upstream·logps, with ``upstream`` (N,). Computes ``logps`` again."""
    with torch.enable_grad():
        hidden, head, leaves = _leaves(problem.hidden, problem.head, problem.needs_gradient)
        return _gradients(log_softmax(hidden, head, problem.targets), leaves, upstream.double())


def response_logps(problem: TokenProblem, layout: PairLayout) -> Tensor:
    """Compute the log-probs summed over each response: (S,) float64. The workspace is not limited."""
    return sum_over_responses(token_logps(problem), layout)


def log_softmax(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Compute log softmax(logits)[target] of every row: (N, H), (N,) -> (N,) float64, differentiable."""
    double = head._replace(weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())
    return double.logits(hidden.double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def sum_over_responses(logps: Tensor, layout: PairLayout) -> Tensor:
    """(N,) -> (S,), differentiable. An empty response has 0."""
    sums = [logps[a:b].sum() for a, b in pairwise(layout.edges)]
    return torch.stack(sums) if sums else logps.new_zeros(0)


def _leaves(
    hidden: Tensor, head: Head, needs_gradient: NeedsGradient
) -> tuple[Tensor, Head, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return hidden states and head in float64, and the leaves of the graph: those that need a gradient."""
    doubles = [x if x is None else x.detach().double() for x in (hidden, head.weight, head.bias)]
    leaves = tuple(x.requires_grad_() if needed else None for x, needed in zip(doubles, needs_gradient))
    return doubles[0], head._replace(weight=doubles[1], bias=doubles[2]), leaves


def _gradients(output: Tensor, leaves: tuple[Tensor | None, ...], upstream: Tensor | None) -> Gradients:
    """Return the gradient of each leaf, float64; zeros if ``output`` does not depend on any (no rows, or no pairs)."""
    asked = [x for x in leaves if x is not None]
    found = iter(())
    if asked:
        found = iter(torch.autograd.grad(output, asked, upstream, materialize_grads=True))
    return tuple(None if x is None else next(found) for x in leaves)
