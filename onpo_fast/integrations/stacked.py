"""Padded batches as Liger and TRL have them, P chosen responses stacked on their P rejected ones, made the loss's own.

Labels lie beside the hidden states that predict them, here as in Liger: whoever has labels of the input shifts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """The positions of a (2P, T) batch that have a label, pair by pair: chosen, rejected, chosen, …

    In this order the pairs are neighbours, (0, 1), (2, 3), …, and the loss needs no copy to take one whole.
    """

    rows: Tensor  # (N,) int64 on the device: indices into 2P·T
    cu_seqlens: Tensor  # (2P+1,) int32 on the CPU: response boundaries in N

    @classmethod
    def of(cls, labels: Tensor, ignore_index: int, device: torch.device) -> Kept:
        """The work is planned on the host, so labels (2P, T) on a GPU cost one wait for it; on a CPU they cost none."""
        kept = _pair_by_pair((labels != ignore_index).cpu())
        rows = _pair_by_pair(torch.arange(labels.numel()).view(labels.shape))
        cu_seqlens = torch.zeros(len(labels) + 1, dtype=torch.int32)
        cu_seqlens[1:] = kept.sum(1).cumsum(0)
        return cls(rows[kept].to(device), cu_seqlens)

    @property
    def lengths(self) -> list[int]:
        """(2P) tokens."""
        return self.cu_seqlens.diff().tolist()

    def take(self, batch: Tensor) -> Tensor:
        """(2P, T, …) -> (N, …). Differentiable."""
        return batch.flatten(0, 1).index_select(0, self.rows)

    def sums(self, values: Tensor) -> Tensor:
        """(N,) -> (2P,) float64. Differentiable."""
        return torch.stack([part.sum() for part in values.double().split(self.lengths)])


def _pair_by_pair(batch: Tensor) -> Tensor:
    pairs = len(batch) // 2
    return batch.view(2, pairs, -1).transpose(0, 1).reshape(2 * pairs, -1)


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    """Mean over the vocabulary of logit_scale·(h·w + b): (…, H), (V, H), (V,) -> (…), without a logit.

    It is linear in w and b, so their means will do. Accumulated in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    mean = (hidden.to(dtype) * weight.mean(0, dtype=dtype)).sum(-1)  # not a product, which autocast would round
    return logit_scale * (mean if bias is None else mean + bias.mean(dtype=dtype))


def with_beta(name: str, own: float | None, beta: float | None, convert: Callable[[float], float]) -> float:
    """An objective's parameter, given under its own name or as ``beta``, what Liger and TRL call the pull towards the
    reference, 0.1 if neither is given. ``convert`` goes both ways.

    Raises:
        ValueError: if a value is not positive and finite, or the two disagree.
    """
    for parameter, value in ((name, own), ("beta", beta)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{parameter} must be a positive, finite number, not {value!r}")
    if own is None:
        return convert(0.1 if beta is None else beta)
    if beta is not None and not math.isclose(convert(own), beta, rel_tol=1e-6):
        raise ValueError(f"{name}={own:g} means beta={convert(own):g}, not {beta:g}: give one of the two")
    return own
