"""Hidden states through the head, a tile at a time: the matrix product whose results are never written as logits.

A tile's logits stay in registers, fp32, as the tensor cores accumulated them; the factor that makes bits of them also
makes up for what the tensor cores lose of long sums (``launch.lost_share``). For every row, the epilogue makes of them

- the sum of exp(logit − shift) over the tile and the tile's peak, the target left out: what the log-sum-exp is put
  together from (``row_sums.py``);
- where the backward pass is to follow, E = exp(logit − shift) in the operands' dtype, times the slope of the softcap.

The shift of a row is known before the product: its target's logit, or its log-sum-exp where logits are computed a
second time. Logits are in bits, so that an exponential is one fused multiply-add and one ``exp2``. The target and the
padding are masked in a branch of the whole tile, since few tiles hold either.

exp(logit − target's logit) overflows where the target is less likely than another token by a factor of 2^128. Rows that
come near that are found from their peaks, given their peak for a shift, and their tiles computed again by
``recompute_moved``: a few programs look for such rows on the device, so that no host has to.

``exponentials_variants.py`` has other forms of the kernel, for comparison.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponentials_variants import masked_exponentials_kernel, persistent_exponentials_kernel
from .head import Head
from .launch import (
    GROUP,
    INTERPRETED,
    TRITON_DTYPES,
    Tile,
    dot_precision,
    lost_share,
    operand,
    rounded,
    store_tile,
    tile,
    tile_of,
)
from .logits import logits_tile
from .variants import current

ROWS_AT_A_GLANCE = tl.constexpr(2048)  # when rows are searched for moved ones


@triton.jit
def write_exponentials_tile(
    hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
    row_tile, column_tile, rows, stored_rows, vocabulary, first_token, inner, outer,
    hidden_stride, weight_stride, stored_stride,
    FEATURES: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, SUMS: tl.constexpr,
    STORE: tl.constexpr, TARGET_VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of ``exponentials_kernel``, whose arguments these are."""
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    own_shift = tl.load(shift + row, mask=inside, other=0.0)  # before the product, which hides how long it takes
    target = (tl.load(targets + row, mask=inside, other=-1) - first_token - first_column).to(tl.int32)
    has_target = tl.max(((target >= 0) & (target < COLUMNS)).to(tl.int32)) > 0
    special = has_target | (first_column + COLUMNS > vocabulary)

    logits = logits_tile(
        hidden, weight, bias, first_row, first_column, rows, vocabulary, inner, hidden_stride, weight_stride,
        FEATURES, BIAS, SOFTCAP, ROWS, COLUMNS, DEPTH, PRECISION, DESCRIPTORS, INTERPRET,
    )  # fmt: skip
    if SOFTCAP:
        slope = 1 - logits * logits
    if special:
        column = tl.arange(0, COLUMNS)
        nothing = (column[None, :] == target[:, None]) | (first_column + column >= vocabulary)[None, :]
        logits = tl.where(nothing, float("inf") if NEGATIVE else float("-inf"), logits)
    at = tl.cast(column_tile, tl.int64) * rows + row
    if SUMS:
        peak = (tl.min(logits, 1) if NEGATIVE else tl.max(logits, 1)) * outer
        tl.store(peaks + at, peak, mask=inside)
    exponentials = tl.exp2(logits * outer - own_shift[:, None])
    if SUMS:
        tl.store(sums + at, tl.sum(exponentials, 1), mask=inside)
    if STORE:  # noqa: SIM102 (the condition is the compiler's)
        if first_row < stored_rows:
            if TARGET_VALUES:  # noqa: SIM102
                if has_target:
                    value = tl.load(target_values + row, mask=inside, other=0.0)
                    is_target = tl.arange(0, COLUMNS)[None, :] == target[:, None]
                    exponentials = tl.where(is_target, value[:, None], exponentials)
            if SOFTCAP:
                exponentials *= slope
            store_tile(
                stored, rounded(exponentials, DTYPE, INTERPRET), first_row, first_column,
                stored_rows, vocabulary, stored_stride, ROWS, COLUMNS, DESCRIPTORS,
            )  # fmt: skip


@triton.jit
def exponentials_kernel(
    hidden,  # (rows, H), tiles (ROWS, DEPTH)
    weight,  # (V, H), tiles (COLUMNS, DEPTH)
    stored,  # (stored rows, V), tiles (ROWS, COLUMNS): E; not touched without STORE
    bias,  # (V,), or anything without BIAS
    targets,  # (rows,) int64
    shift,  # (rows,) float32, bits
    target_values,  # (rows,) float32: what E has in the target's column; read with TARGET_VALUES, otherwise E has 0
    peaks,  # (column tiles, rows) float32, bits; written with SUMS
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
    NEGATIVE: tl.constexpr,  # outer is: the largest logit is the smallest product
    SUMS: tl.constexpr,
    STORE: tl.constexpr,
    TARGET_VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,  # of E
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(vocabulary, COLUMNS), GROUP)
    write_exponentials_tile(
        hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
        row_tile, column_tile, rows, stored_rows, vocabulary, first_token, inner, outer,
        hidden_stride, weight_stride, stored_stride,
        FEATURES, BIAS, SOFTCAP, NEGATIVE, SUMS, STORE, TARGET_VALUES, ROWS, COLUMNS, DEPTH,
        DTYPE, PRECISION, DESCRIPTORS, INTERPRET,
    )  # fmt: skip


@triton.jit
def moved_exponentials_kernel(
    hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
    first_shift,  # (rows,) float32, bits: the shift that sums and E were computed with
    rows, stored_rows, vocabulary, first_token, inner, outer, hidden_stride, weight_stride, stored_stride,
    FEATURES: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, SUMS: tl.constexpr,
    STORE: tl.constexpr, TARGET_VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """``exponentials_kernel`` again, in the tiles of rows whose shift has moved. Programs share the columns."""
    moved = tl.zeros((ROWS_AT_A_GLANCE,), tl.int32)
    for start in range(0, rows, ROWS_AT_A_GLANCE):  # first all rows at a glance: hardly ever has one moved
        row = start + tl.arange(0, ROWS_AT_A_GLANCE)
        moved = tl.maximum(moved, has_moved(shift, first_shift, row, rows))
    if tl.max(moved) > 0:
        for row_tile in range(0, tl.cdiv(rows, ROWS)):
            row = row_tile * ROWS + tl.arange(0, ROWS)
            if tl.max(has_moved(shift, first_shift, row, rows)) > 0:
                for column_tile in range(tl.program_id(0), tl.cdiv(vocabulary, COLUMNS), tl.num_programs(0)):
                    write_exponentials_tile(
                        hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
                        row_tile, column_tile, rows, stored_rows, vocabulary, first_token, inner, outer,
                        hidden_stride, weight_stride, stored_stride,
                        FEATURES, BIAS, SOFTCAP, NEGATIVE, SUMS, STORE, TARGET_VALUES, ROWS, COLUMNS, DEPTH,
                        DTYPE, PRECISION, DESCRIPTORS, INTERPRET,
                    )  # fmt: skip


@triton.jit
def has_moved(shift, first_shift, row, rows):
    """1 for the rows whose shift is above the first one."""
    before = tl.load(first_shift + row, mask=row < rows, other=0.0)
    after = tl.load(shift + row, mask=row < rows, other=0.0)
    return (after > before).to(tl.int32)


class PartialSums(NamedTuple):
    """A row's log-sum-exp in pieces, the target left out."""

    peaks: Tensor  # (column tiles, rows) float32, bits
    sums: Tensor  # (column tiles, rows) float32: Σ exp2(logit − shift)


class Pass:
    """One pass of hidden states through the head: every tile, then again those of rows whose shift moved."""

    def __init__(
        self,
        hidden: Tensor,  # (rows, H)
        head: Head,  # or a slice of its vocabulary
        targets: Tensor,  # (rows,) int64
        *,
        sums: bool,  # whether the log-sum-exp's pieces are asked for
        store: Tensor | None = None,  # (stored rows ≤ rows, V): filled with E
        target_values: Tensor | None = None,  # (rows,) float32: the target's column of E; 0 without them
        first_token: int = 0,  # of the vocabulary slice that the head is
    ) -> None:
        self.hidden, self.head, self.targets, self.store = hidden, head, targets, store
        self.target_values, self.first_token = target_values, first_token
        self.variant = current()
        self.tile = self._tile()
        self.inner, self.outer, self.bias = self._factors()
        self.column_tiles = triton.cdiv(len(head.weight), self.tile.columns)
        self.partial = None
        if sums:
            pieces = torch.empty(2, self.column_tiles, len(hidden), dtype=torch.float32, device=hidden.device)
            self.partial = PartialSums(*pieces)

    def _factors(self) -> tuple[float, float, Tensor | None]:
        """The head's factors and bias, as the kernel wants them: the product is made larger by what is lost of it."""
        (inner, outer), bias = self.head.factors, self.head.bias
        if share := lost_share(self.hidden.dtype, self.hidden.shape[1]):
            regained = 1 + share
            inner, outer = (inner, outer * regained) if self.head.softcap is None else (inner * regained, outer)
            bias = None if bias is None else bias.float() / regained  # nothing is lost of it
        return inner, outer, bias

    def _tile(self) -> Tile:
        problem = (len(self.hidden), len(self.head.weight), self.hidden.shape[1])
        shape = tile(self.hidden.dtype, problem)
        chosen = {name: value for name in Tile._fields if (value := getattr(self.variant, name)) is not None}
        if chosen:
            shape = shape._replace(**chosen).cut_to(*problem)
        if self.head.softcap is not None and shape.columns > 128:  # the slope wants as many registers as the logits
            shape = shape._replace(columns=128)
        return shape

    def exponentials(self, shift: Tensor) -> PartialSums | None:
        """Computes every tile: (rows,) float32 bits -> the pieces, if they were asked for. Asynchronous."""
        tiles = triton.cdiv(len(self.hidden), self.tile.rows) * self.column_tiles
        if self.variant.epilogue == "light":
            self._launch(exponentials_kernel, tiles, shift)
        elif self.variant.epilogue == "masked":
            self._launch(masked_exponentials_kernel, tiles, shift)
        else:
            programs = min(tiles, multiprocessors(self.hidden.device))
            self._launch(persistent_exponentials_kernel, programs, shift, store_columns=self.tile.columns // 2)
        return self.partial

    def recompute_moved(self, shift: Tensor, first_shift: Tensor) -> None:
        """Computes the tiles again in which a row's shift is above the first one. Asynchronous."""
        programs = min(self.column_tiles, multiprocessors(self.hidden.device))
        # the columns are those of the pieces; with few rows and one stage two more loops fit the registers, as
        # `python -m bench compile` shows
        two_bytes = self.hidden.element_size() == 2
        warps = 4 if two_bytes and self.head.softcap is not None else self.tile.warps
        shape = self.tile._replace(rows=64 if two_bytes else 32, warps=warps, stages=1)
        self._launch(moved_exponentials_kernel, programs, shift, first_shift, shape=shape)

    def _launch(
        self, kernel: Any, programs: int, shift: Tensor, *more: Tensor, shape: Tile | None = None,
        store_columns: int = 0,
    ) -> None:  # fmt: skip
        hidden, weight, shape = self.hidden, self.head.weight, shape or self.tile
        store, unused = self.store, shift
        hidden_operand = operand(hidden, (shape.rows, shape.depth))
        kernel[(programs,)](
            hidden_operand,
            operand(weight, (shape.columns, shape.depth)),
            operand(hidden if store is None else store, (shape.rows, store_columns or shape.columns)),
            unused if self.bias is None else self.bias,
            self.targets, shift,
            unused if self.target_values is None else self.target_values,
            *(self.partial or (unused, unused)), *more,
            len(hidden), 0 if store is None else len(store), len(weight), self.first_token,
            self.inner, self.outer, hidden.stride(0), weight.stride(0), 0 if store is None else store.stride(0),
            FEATURES=hidden.shape[1], BIAS=self.bias is not None, SOFTCAP=self.head.softcap is not None,
            NEGATIVE=self.outer < 0, SUMS=self.partial is not None, STORE=store is not None,
            TARGET_VALUES=self.target_values is not None,
            ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth, GROUP=self.variant.group or GROUP,
            DTYPE=TRITON_DTYPES[hidden.dtype], PRECISION=dot_precision(hidden.dtype),
            DESCRIPTORS=not isinstance(hidden_operand, Tensor), INTERPRET=INTERPRETED,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a kernel that loops over its tiles."""
    if device.type != "cuda":  # interpreted: few, so that each loops
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
