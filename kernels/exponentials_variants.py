"""Variants of ``exponentials_kernel`` with the same arguments, for benchmarks (``variants.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import rounded, store_tile, tile_of
from .logits import logits_tile

NATS = tl.constexpr(0.6931471805599453)  # nats in a bit


@triton.jit
def masked_exponentials_kernel(
    hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
    rows, stored_rows, vocabulary, first_token, inner, outer, hidden_stride, weight_stride, stored_stride,
    FEATURES: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, SUMS: tl.constexpr,
    STORE: tl.constexpr, TARGET_VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TILE_GROUP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Test every element for target and padding; exponentiate with ``exp``, first relative to the tile's peak."""
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(vocabulary, COLUMNS), TILE_GROUP)
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = row < rows
    logits = logits_tile(
        hidden, weight, bias, first_row, first_column, rows, vocabulary, inner, hidden_stride, weight_stride,
        FEATURES, BIAS, SOFTCAP, ROWS, COLUMNS, DEPTH, PRECISION, DESCRIPTORS, INTERPRET,
    )  # fmt: skip
    target = (tl.load(targets + row, mask=inside, other=-1) - first_token).to(tl.int32)
    is_target = column[None, :] == target[:, None]
    others = tl.where(is_target | (column >= vocabulary)[None, :], float("-inf"), logits * outer)
    row_shift = tl.load(shift + row, mask=inside, other=0.0)
    if SUMS:
        peak = tl.max(others, 1)
        base = tl.where(peak == float("-inf"), 0.0, peak)  # a tile that has the target alone
        exponentials = tl.exp((others - base[:, None]) * NATS)
        factor = tl.where(peak == float("-inf"), 0.0, tl.exp2(base - row_shift))
        at = tl.cast(column_tile, tl.int64) * rows + row
        tl.store(peaks + at, peak, mask=inside)
        tl.store(sums + at, tl.sum(exponentials, 1) * factor, mask=inside)
        if STORE:
            exponentials *= factor[:, None]
    else:
        exponentials = tl.exp((others - row_shift[:, None]) * NATS)
    if STORE:  # noqa: SIM102 (the condition is the compiler's)
        if first_row < stored_rows:
            if TARGET_VALUES:
                value = tl.load(target_values + row, mask=inside, other=0.0)
                exponentials = tl.where(is_target, value[:, None], exponentials)
            if SOFTCAP:
                exponentials *= 1 - logits * logits
            store_tile(
                stored, rounded(exponentials, DTYPE, INTERPRET), first_row, first_column,
                stored_rows, vocabulary, stored_stride, ROWS, COLUMNS, DESCRIPTORS,
            )  # fmt: skip


@triton.jit
def persistent_exponentials_kernel(
    hidden, weight, stored,  # stored: tiles (ROWS, COLUMNS / 2)
    bias, targets, shift, target_values, peaks, sums,
    rows, stored_rows, vocabulary, first_token, inner, outer, hidden_stride, weight_stride, stored_stride,
    FEATURES: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, SUMS: tl.constexpr,
    STORE: tl.constexpr, TARGET_VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TILE_GROUP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Loop over tiles, so that the loads of the next tile overlap with the epilogue of this one.

    The compiler flattens the loops over tiles and over features into one. Nothing in it may branch on a scalar: every
    product would then wait for the one before.
    """
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(vocabulary, COLUMNS)
    half: tl.constexpr = COLUMNS // 2
    for program in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = tile_of(program, row_tiles, column_tiles, TILE_GROUP)
        first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
        logits = logits_tile(
            hidden, weight, bias, first_row, first_column, rows, vocabulary, inner, hidden_stride, weight_stride,
            FEATURES, BIAS, SOFTCAP, ROWS, COLUMNS, DEPTH, PRECISION, DESCRIPTORS, INTERPRET,
        )  # fmt: skip
        row = first_row + tl.arange(0, ROWS)
        inside = row < rows
        row_shift = tl.load(shift + row, mask=inside, other=0.0)
        target = (tl.load(targets + row, mask=inside, other=-1) - first_token - first_column).to(tl.int32)
        left, right = tl.split(tl.permute(tl.reshape(logits, (ROWS, 2, half)), (0, 2, 1)))
        peak, total = store_half(
            left, 0, stored, target, row_shift, target_values, row, first_row, first_column, rows, stored_rows,
            vocabulary, outer, stored_stride, SOFTCAP, NEGATIVE, STORE, TARGET_VALUES, ROWS, half, DTYPE, DESCRIPTORS,
            INTERPRET,
        )  # fmt: skip
        right_peak, right_total = store_half(
            right, half, stored, target, row_shift, target_values, row, first_row, first_column, rows, stored_rows,
            vocabulary, outer, stored_stride, SOFTCAP, NEGATIVE, STORE, TARGET_VALUES, ROWS, half, DTYPE, DESCRIPTORS,
            INTERPRET,
        )  # fmt: skip
        if SUMS:
            at = tl.cast(column_tile, tl.int64) * rows + row
            tl.store(peaks + at, tl.maximum(peak, right_peak), mask=inside)
            tl.store(sums + at, total + right_total, mask=inside)


@triton.jit
def store_half(
    logits, offset: tl.constexpr, stored, target, row_shift, target_values, row, first_row, first_column, rows,
    stored_rows, vocabulary, outer, stored_stride,
    SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, STORE: tl.constexpr, TARGET_VALUES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store E of half a tile, up to ``stored_rows``; return its peaks in bits and its sums, (ROWS,) each."""
    column = offset + tl.arange(0, COLUMNS)
    is_target = column[None, :] == target[:, None]
    nothing = is_target | (first_column + column >= vocabulary)[None, :]
    others = tl.where(nothing, float("inf") if NEGATIVE else float("-inf"), logits)
    peak = (tl.min(others, 1) if NEGATIVE else tl.max(others, 1)) * outer
    exponentials = tl.exp2(others * outer - row_shift[:, None])
    total = tl.sum(exponentials, 1)
    if STORE:
        if TARGET_VALUES:
            value = tl.load(target_values + row, mask=row < rows, other=0.0)
            exponentials = tl.where(is_target, value[:, None], exponentials)
        if SOFTCAP:
            exponentials *= 1 - logits * logits
        store_tile(
            stored, rounded(exponentials, DTYPE, INTERPRET), first_row, first_column + offset,
            stored_rows, vocabulary, stored_stride, ROWS, COLUMNS, DESCRIPTORS,
        )  # fmt: skip
    return peak, total
