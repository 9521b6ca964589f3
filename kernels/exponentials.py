"""Hidden states through the head, a tile at a time: the matrix product whose results are never written as logits.

A tile's logits stay in registers, fp32, as the tensor cores accumulated them. The epilogue makes of them

- for every row, the peak over the tile and the sum of exp(logit − peak), the target left out: what the log-sum-exp is
  merged from (``row_sums.py``);
- where the backward pass is to follow, E = exp(logit − shift) in the operands' dtype, times the slope of the softcap.
  The shift of a row is known beforehand: its target's logit, in the pass that nothing is recomputed after, or its
  log-sum-exp, in one that recomputes.

exp(logit − target's logit) overflows where the target is less likely than another token by a factor of e^88. A row
that comes near that is found when the sums are merged, given its peak for a shift, and its tiles computed again: the
second launch (``MOVED_ONLY``) ends at once in every other tile, so that no host has to look.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Head
from .launch import (
    GROUP,
    INTERPRETED,
    TRITON_DTYPES,
    dot_precision,
    load_tile,
    matmul_step,
    operand,
    rounded,
    store_tile,
    tile,
    tile_of,
)


@triton.jit
def exponentials_kernel(
    hidden,  # (rows, H), tiles (ROWS, DEPTH)
    weight,  # (V, H), tiles (COLUMNS, DEPTH)
    stored,  # (stored rows, V), tiles (ROWS, COLUMNS): E; not touched without STORE
    bias,  # (V,), or anything without BIAS
    targets,  # (rows,) int64
    target_logits,  # (rows,) float64
    shift,  # (rows,) float32; not read with SUMS alone
    target_values,  # (rows,) float32: what E has in the target's column; read with TARGET_VALUES
    peaks,  # (column tiles, rows) float32; written with SUMS
    sums,  # (column tiles, rows) float32; written with SUMS
    rows,
    stored_rows,
    vocabulary,
    first_token,  # of the vocabulary slice that weight is
    inner,
    outer,
    hidden_stride,
    weight_stride,
    stored_stride,
    FEATURES: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    SUMS: tl.constexpr,
    STORE: tl.constexpr,
    TARGET_VALUES: tl.constexpr,
    MOVED_ONLY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,  # of E
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(vocabulary, COLUMNS)
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP)
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = row < rows

    if MOVED_ONLY:
        own = tl.load(target_logits + row, mask=row < stored_rows, other=0.0).to(tl.float32)
        if tl.max((tl.load(shift + row, mask=row < stored_rows, other=0.0) != own).to(tl.int32)) == 0:
            return

    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, FEATURES, DEPTH):
        h = load_tile(hidden, first_row, depth, rows, FEATURES, hidden_stride, ROWS, DEPTH, DESCRIPTORS)
        w = load_tile(weight, first_column, depth, vocabulary, FEATURES, weight_stride, COLUMNS, DEPTH, DESCRIPTORS)
        logits = matmul_step(h, w.T, logits, PRECISION, INTERPRET)

    if BIAS:
        logits += tl.load(bias + column, mask=column < vocabulary, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        logits = 1 - 2 / (tl.exp(2 * inner * logits) + 1)  # tanh
    if SCALED:
        logits *= outer

    # padding and the target weigh nothing: the target is added when the sums are merged, exactly
    target = (tl.load(targets + row, mask=inside, other=-1) - first_token).to(tl.int32)
    is_target = column[None, :] == target[:, None]
    others = tl.where(is_target | (column >= vocabulary)[None, :], float("-inf"), logits)

    if SUMS:
        peak = tl.max(others, 1)
        base = tl.where(peak == float("-inf"), 0.0, peak)  # a tile of the target alone
        exponentials = tl.exp(others - base[:, None])
        at = column_tile.to(tl.int64) * rows + row
        tl.store(peaks + at, peak, mask=inside)
        tl.store(sums + at, tl.sum(exponentials, 1), mask=inside)
        if STORE:
            exponentials *= tl.exp(peak - tl.load(shift + row, mask=inside, other=0.0))[:, None]
    else:
        exponentials = tl.exp(others - tl.load(shift + row, mask=inside, other=0.0)[:, None])
    if STORE:  # noqa: SIM102 (the condition is the compiler's)
        if first_row < stored_rows:
            if TARGET_VALUES:
                value = tl.load(target_values + row, mask=inside, other=0.0)
                exponentials = tl.where(is_target, value[:, None], exponentials)
            if SOFTCAP:
                tanh = logits / outer
                exponentials *= 1 - tanh * tanh
            store_tile(
                stored, rounded(exponentials, DTYPE, INTERPRET), first_row, first_column,
                stored_rows, vocabulary, stored_stride, ROWS, COLUMNS, DESCRIPTORS,
            )  # fmt: skip


class PartialSums(NamedTuple):
    """A row's log-sum-exp in pieces, the target left out."""

    peaks: Tensor  # (column tiles, rows) float32
    sums: Tensor  # (column tiles, rows) float32: Σ exp(logit − peak)


def exponentials(
    hidden: Tensor,  # (rows, H)
    head: Head,  # or a slice of its vocabulary
    targets: Tensor,  # (rows,) int64
    target_logits: Tensor,  # (rows,) float64
    *,
    sums: bool = True,
    shift: Tensor | None = None,  # (rows,) float32
    store: Tensor | None = None,  # (stored rows ≤ rows, V): filled with E
    target_values: Tensor | None = None,  # (rows,) float32; without them the target's column gets 0
    first_token: int = 0,
    moved_only: bool = False,
) -> PartialSums | None:
    """One pass of rows through the head. Everything is asynchronous.

    ``sums`` asks for the log-sum-exp's pieces, ``store`` for E = slope·exp(logit − shift). ``moved_only`` fills E anew
    in the tiles where a row's shift is not its target's logit, and does nothing elsewhere.
    """
    rows, features = hidden.shape
    vocabulary = len(head.weight)
    shape = tile(hidden.dtype, (rows, vocabulary, features))
    if head.softcap is not None and shape.columns > 128:  # the cap's slope wants as many registers as the logits
        shape = shape._replace(columns=128)
    column_tiles = triton.cdiv(vocabulary, shape.columns)
    partial = None
    if sums:
        pieces = torch.empty(2, column_tiles, rows, dtype=torch.float32, device=hidden.device)
        partial = PartialSums(*pieces)
    inner, outer = head.factors
    unused = target_logits
    hidden_operand = operand(hidden, (shape.rows, shape.depth))
    exponentials_kernel[(triton.cdiv(rows, shape.rows) * column_tiles,)](
        hidden_operand,
        operand(head.weight, (shape.columns, shape.depth)),
        operand(hidden if store is None else store, (shape.rows, shape.columns)),
        unused if head.bias is None else head.bias,
        targets, target_logits,
        unused if shift is None else shift,
        unused if target_values is None else target_values,
        *(partial or (unused, unused)),
        rows, 0 if store is None else len(store), vocabulary, first_token,
        inner, outer, hidden.stride(0), head.weight.stride(0), 0 if store is None else store.stride(0),
        FEATURES=features, BIAS=head.bias is not None, SOFTCAP=head.softcap is not None, SCALED=outer != 1,
        SUMS=sums, STORE=store is not None, TARGET_VALUES=target_values is not None, MOVED_ONLY=moved_only,
        ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth, GROUP=GROUP,
        DTYPE=TRITON_DTYPES[hidden.dtype], PRECISION=dot_precision(hidden.dtype),
        DESCRIPTORS=not isinstance(hidden_operand, Tensor), INTERPRET=INTERPRETED,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return partial
