"""The gradient of the bias: each column of E summed with the row scales, in one read of E."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def bias_gradient_kernel(
    gradient,  # (V,) float32; the sums are added to it
    exponentials,  # (n, V)
    row_scale,  # (n,) float32
    tokens,
    vocabulary,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, tokens, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * stride + column[None, :]
        e = tl.load(exponentials + at, mask=(row < tokens)[:, None] & (column < vocabulary)[None, :], other=0.0)
        scale = tl.load(row_scale + row, mask=row < tokens, other=0.0)
        total += tl.sum(e.to(tl.float32) * scale[:, None], 0)
    inside = column < vocabulary
    tl.store(gradient + column, tl.load(gradient + column, mask=inside) + total, mask=inside)


def add_bias_gradient(gradient: Tensor, exponentials: Tensor, row_scale: Tensor) -> None:
    """(V,) float32 += (n, V)ᵀ (n,)."""
    tokens, vocabulary = exponentials.shape
    columns = 128
    bias_gradient_kernel[(triton.cdiv(vocabulary, columns),)](
        gradient, exponentials, row_scale, tokens, vocabulary, exponentials.stride(0), ROWS=32, COLUMNS=columns
    )
