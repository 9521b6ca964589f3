"""The matrix product of a tile of logits, shared by all variants of the exponentials kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import load_tile, matmul_step


@triton.jit
def logits_tile(
    hidden, weight, bias, first_row, first_column, rows, vocabulary, inner, hidden_stride, weight_stride,
    FEATURES: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return h·w + b, or its tanh with a softcap: (ROWS, COLUMNS) float32. Times ``outer`` it is the logit in bits."""
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, FEATURES, DEPTH):
        h = load_tile(hidden, first_row, depth, rows, FEATURES, hidden_stride, ROWS, DEPTH, DESCRIPTORS)
        w = load_tile(weight, first_column, depth, vocabulary, FEATURES, weight_stride, COLUMNS, DEPTH, DESCRIPTORS)
        logits = matmul_step(h, w.T, logits, PRECISION, INTERPRET)
    if BIAS:
        column = first_column + tl.arange(0, COLUMNS)
        logits += tl.load(bias + column, mask=column < vocabulary, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        logits = 1 - 2 / (tl.exp2(logits * inner) + 1)
    return logits
