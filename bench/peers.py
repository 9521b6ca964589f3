"""The same loss and gradients, computed in different ways: ours, and what a user would pick instead.

Each takes a problem and returns (loss, d loss / d hidden, d loss / d weight).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onpo_fast import fused_linear_pair_loss
from onpo_fast.objectives import Onpo

from .problems import ETA, Problem, squared_margin_loss

Result = tuple[Tensor, Tensor, Tensor]


def ours(problem: Problem) -> Result:
    """onpo_fast, backend "torch", reference in the same call."""
    hidden, weight = problem.leaves()
    loss = fused_linear_pair_loss(
        hidden, weight, problem.targets, problem.cu_seqlens, objective=Onpo(eta=ETA),
        ref_hidden=problem.ref_hidden, ref_weight=problem.ref_weight, backend="torch",
    ).loss  # fmt: skip
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def materialised(problem: Problem) -> Result:
    """PyTorch as one writes it first: all the logits, log_softmax, gather."""

    def token_logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.log_softmax(hidden @ weight.T, dim=-1).gather(1, problem.targets[:, None])[:, 0]

    return _from_token_logps(problem, token_logps)


def trl(problem: Problem) -> Result:
    """TRL's chunked per-token function, with the pairwise loss on top."""
    from trl.kernels import ChunkedLogProbFunction

    def token_logps(hidden: Tensor, weight: Tensor) -> Tensor:
        # bias, targets, temperature, chunk size (TRL's default), softcap, logit scale, extra outputs
        return ChunkedLogProbFunction.apply(hidden, weight, None, problem.targets, 1.0, 4096, None, 1.0, ())[0]

    return _from_token_logps(problem, token_logps)


def _from_token_logps(problem: Problem, token_logps: Callable[[Tensor, Tensor], Tensor]) -> Result:
    hidden, weight = problem.leaves()
    with torch.no_grad():
        reference = token_logps(problem.ref_hidden, problem.ref_weight)
    loss = squared_margin_loss(token_logps(hidden, weight), reference, problem.shape)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def bare_gemms(problem: Problem) -> None:
    """The floor: four products through the head in chunks, and nothing else. Not a loss."""
    rows = 512
    buffer = torch.empty(rows, problem.shape.vocabulary, dtype=problem.hidden.dtype)
    gradient = torch.zeros_like(problem.weight)
    for start in range(0, problem.shape.rows, rows):
        part = slice(start, start + rows)
        logits = buffer[: len(problem.hidden[part])]
        torch.mm(problem.ref_hidden[part], problem.ref_weight.T, out=logits)
        torch.mm(problem.hidden[part], problem.weight.T, out=logits)
        torch.mm(logits, problem.weight)
        gradient.addmm_(logits.T, problem.hidden[part])


PEERS = {"ours": ours, "materialised": materialised, "trl": trl}
