"""What a backend of the loss takes and returns: the same for all three.

A backend is a module with the functions of ``Backend``: ``fused`` (Triton), ``chunked`` (PyTorch) and ``reference``
(float64, all logits at once). ``onpo_fast/loss.py`` checks the arguments, chooses the backend and does autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .groups import PairLayout
from .head import Head

NeedsGradient = tuple[bool, bool, bool]  # whether hidden states, weight and bias need one
LeafDtypes = tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]  # of hidden states, weight and bias
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # (N, H), (V, H), (V,); None if not needed


@dataclass(frozen=True, eq=False)
class TokenProblem:
    """Log-probs of tokens. Hidden states and head are in the dtype of the matrix products."""

    hidden: Tensor  # (N, H)
    head: Head
    targets: Tensor  # (N,) int64, contiguous
    needs_gradient: NeedsGradient = (False, False, False)
    leaf_dtypes: LeafDtypes = (None, None, None)  # dtypes of the tensors that autograd asks gradients for
    workspace: int | None = None  # bytes beside inputs and gradients; None for the backend's default
    mode: str = "auto"  # as in ``PairProblem``, for log-probs that are to be those of a loss in this mode


@dataclass(frozen=True, eq=False)
class PairProblem:
    """A pairwise loss and its gradients. Hidden states and head are in the dtype of the matrix products.

    The anchor is given either as ``ref_logps``, or as ``ref_hidden`` if it has the policy's head.
    """

    hidden: Tensor  # (N, H)
    head: Head
    targets: Tensor  # (N,) int64, contiguous
    layout: PairLayout
    objective: Any  # has loss(margins, preference) and derivative(margins, preference), elementwise
    ref_logps: Tensor | None  # (S,) float64: the anchor's summed log-probs
    ref_hidden: Tensor | None  # (N, H): the anchor's hidden states
    preference: Tensor  # (P,) float64
    pair_weight: Tensor  # (P,) float64
    needs_gradient: NeedsGradient
    leaf_dtypes: LeafDtypes  # dtypes of the tensors that autograd asks gradients for
    mode: str  # "auto", "fast" or "lean"
    workspace: int | None  # bytes beside inputs and gradients; None for the backend's default


@dataclass(frozen=True, eq=False)
class PairResult:
    """Loss, log-probs and margins in float64, nats; none of them carries an autograd graph."""

    loss: Tensor  # scalar
    logps: Tensor  # (S,)
    ref_logps: Tensor  # (S,)
    margins: Tensor  # (P,)
    gradients: Gradients  # of the loss, in a dtype at least as precise as the leaves'


class Backend(Protocol):
    """The functions of a backend module."""

    def pair_loss(self, problem: PairProblem) -> PairResult:
        """Compute the loss and the gradients that are needed."""

    def token_logps(self, problem: TokenProblem) -> Tensor:
        """Compute the log-prob of every target: (N,) float64, nats."""

    def token_gradients(self, problem: TokenProblem, logps: Tensor, upstream: Tensor) -> Gradients:
        """Compute the gradients of Σ upstream·logps; ``logps`` is what ``token_logps`` returned, ``upstream`` (N,)."""

    def response_logps(self, problem: TokenProblem, layout: PairLayout) -> Tensor:
        """Compute the log-probs summed over each response: (S,) float64, nats. An empty response has 0."""

    def scale_in_place(self, gradients: Gradients, factor: Tensor) -> None:
        """Multiply the gradients of ``pair_loss`` by a scalar, without host synchronisation."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of ``dtype`` are summed, which is also that of the results."""
    return torch.float64 if dtype == torch.float64 else torch.float32
