"""Conversion of padded batches of Liger and TRL, P chosen responses stacked on P rejected ones, for the loss.

As in Liger, a label is at the position of the hidden state that predicts it: callers shift the labels of an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LabelledPositions(NamedTuple):
    """The positions of a (2P, T) batch that have a label, pair by pair: chosen, rejected, chosen, …

    In this order pairs are neighbours, (0, 1), (2, 3), …, so that the loss need not move rows.
    """

    rows: Tensor  # (N,) int64 on the device: indices into 2P·T
    cu_seqlens: Tensor  # (2P+1,) int32 on the CPU: response boundaries in N

    @classmethod
    def of(cls, labels: Tensor, ignore_index: int, device: torch.device) -> LabelledPositions:
        """Finds the positions on the host. Labels (2P, T) on a GPU cost a host synchronisation, on the CPU none."""
        kept = _pair_by_pair((labels != ignore_index).cpu())
        rows = _pair_by_pair(torch.arange(labels.numel()).view(labels.shape))
        cu_seqlens = torch.zeros(len(labels) + 1, dtype=torch.int32)
        cu_seqlens[1:] = kept.sum(1).cumsum(0)
        return cls(rows[kept].to(device), cu_seqlens)

    @property
    def lengths(self) -> list[int]:
        """The number of labels of each response, 2P."""
        return self.cu_seqlens.diff().tolist()

    def take(self, batch: Tensor) -> Tensor:
        """Selects the labelled positions: (2P, T, …) -> (N, …), differentiable."""
        return batch.flatten(0, 1).index_select(0, self.rows)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each response: (N,) -> (2P,) float64, differentiable."""
        return torch.stack([part.sum() for part in values.double().split(self.lengths)])


def _pair_by_pair(batch: Tensor) -> Tensor:
    """Reorders the rows of (2P, T) from stacked halves to pairs."""
    pairs = len(batch) // 2
    return batch.view(2, pairs, -1).transpose(0, 1).reshape(2 * pairs, -1)


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    """Returns the mean over the vocabulary of logit_scale·(h·w + b), without computing logits.

    The mean is linear in w and b, so that their means suffice. Accumulated in float32 (float64 for float64 inputs).

    Args:
        hidden: (…, H).
        weight: (V, H).
        bias: (V,).

    Returns:
        (…) mean logits.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    mean = (hidden.to(dtype) * weight.mean(0, dtype=dtype)).sum(-1)  # not a matrix product, which autocast would round
    return logit_scale * (mean if bias is None else mean + bias.mean(dtype=dtype))


def with_beta(name: str, own: float | None, beta: float | None, convert: Callable[[float], float]) -> float:
    """Returns an objective's parameter, by its own name or as ``beta``, the KL coefficient β of Liger and TRL.

    Args:
        name: the parameter's own name, for messages.
        own: the value by that name.
        beta: the value as β. If both are None, β is 0.1.
        convert: turns one into the other, in both directions.

    Raises:
        ValueError: if a value is not positive and finite, or the two do not agree.
    """
    for parameter, value in ((name, own), ("beta", beta)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{parameter} must be a positive, finite number, not {value!r}")
    if own is None:
        return convert(0.1 if beta is None else beta)
    if beta is not None and not math.isclose(convert(own), beta, rel_tol=1e-6):
        raise ValueError(f"{name}={own:g} means beta={convert(own):g}, not {beta:g}: give one of the two")
    return own
