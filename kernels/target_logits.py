"""The logits of the targets alone, summed in float64.

A response's log-prob is a sum over tokens. The rounding errors of the log-sum-exps average out in it, those of the
targets' logits add up. So the latter are computed separately, from one row of the head for each token. They are known
before the matrix product and serve as the shift of the exponentials. Like these, they are in bits.

This takes N·H products and reads of the head, 1/V of the matrix product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Head
from .launch import INTERPRETED


@triton.jit
def target_logits_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,), or anything without BIAS
    targets,  # (N,) int64
    logits,  # (N,) float64, bits
    hidden_stride,
    weight_stride,
    inner,
    outer,
    rows,
    vocabulary,
    FEATURES: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=0)
    known = inside & (target >= 0) & (target < vocabulary)  # only these are read; the others give NaN
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    h_row = hidden + row.to(tl.int64)[:, None] * hidden_stride
    w_row = weight + target[:, None] * weight_stride
    for start in range(0, FEATURES, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = known[:, None] & (column < FEATURES)
        h = tl.load(h_row + column, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
        w = tl.load(w_row + column, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
        total += h * w
    logit = tl.sum(total, 1)
    if BIAS:
        logit += tl.load(bias + target, mask=known, other=0.0).to(tl.float32).to(tl.float64)
    if SOFTCAP:
        logit = 1 - 2 / (tl.exp(logit * inner * 0.6931471805599453) + 1)  # tanh; there is no float64 exp2
    tl.store(logits + row, tl.where(known, outer * logit, float("nan")), mask=inside)


def target_logits(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Compute the logits of the targets: (N, H), (N,) -> (N,) float64, bits."""
    rows, features = hidden.shape
    logits = torch.empty(rows, dtype=torch.float64, device=hidden.device)
    if rows == 0:
        return logits
    block = 256 if INTERPRETED else 8  # rows
    target_logits_kernel[(triton.cdiv(rows, block),)](
        hidden, head.weight, logits if head.bias is None else head.bias, targets, logits,
        hidden.stride(0), head.weight.stride(0), *head.factors, rows, len(head.weight),
        FEATURES=features, BIAS=head.bias is not None, SOFTCAP=head.softcap is not None,
        ROWS=block, BLOCK=min(128, triton.next_power_of_2(max(features, 1))), num_warps=4,
    )  # fmt: skip
    return logits
