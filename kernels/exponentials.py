"""The product of hidden states and head, a tile at a time, whose results are never written to memory as logits.

A tile's logits stay in registers, fp32, as the tensor cores accumulated them. The factor that converts them to bits
also corrects for what the tensor cores lose in long sums (``launch.lost_share``). From them the epilogue computes, for
every row:

- the sum of exp(logit − shift) over the tile and the tile's peak, both without the target: the partial sums of the
  log-sum-exp (``row_sums.py``);
- if a backward pass follows, E = exp(logit − shift) in the operands' dtype, times the slope of the softcap.

The shift of a row is known before the product: its target's logit, or its log-sum-exp if logits are computed a second
time. Logits are in bits, so that an exponential is one fused multiply-add and one ``exp2``. The target and the padding
are masked in a branch that few tiles take.

exp(logit − target's logit) overflows if another token is more likely than the target by a factor of 2^128. Rows that
come near it are found from their peaks and shifted to them, and their tiles are computed again by
``recompute_shifted_rows``. A few programs search for such rows on the device, without host synchronisation.

``exponentials_variants.py`` has variants of the kernel, for comparison.
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
    INTERPRETED,
    TILE_GROUP,
    TRITON_DTYPES,
    Tile,
    as_operand,
    choose_tile,
    dot_precision,
    lost_share,
    rounded,
    store_tile,
    tile_of,
)
from .logits import logits_tile
from .variants import current

ROWS_PER_SEARCH_STEP = tl.constexpr(2048)  # of the search for shifted rows


@triton.jit
def write_exponentials_tile(
    hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
    row_tile, column_tile, rows, stored_rows, vocabulary, first_token, inner, outer,
    hidden_stride, weight_stride, stored_stride,
    FEATURES: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, SUMS: tl.constexpr,
    STORE: tl.constexpr, TARGET_VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute one tile. The arguments are those of ``exponentials_kernel``."""
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    row_shift = tl.load(shift + row, mask=inside, other=0.0)  # before the product, which hides the latency
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
    exponentials = tl.exp2(logits * outer - row_shift[:, None])
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
    stored,  # (stored rows, V), tiles (ROWS, COLUMNS): E; written with STORE
    bias,  # (V,), or anything without BIAS
    targets,  # (rows,) int64
    shift,  # (rows,) float32, bits
    target_values,  # (rows,) float32: E in the target's column; read with TARGET_VALUES, otherwise E has 0 there
    peaks,  # (column tiles, rows) float32, bits; written with SUMS
    sums,  # (column tiles, rows) float32; written with SUMS
    rows,
    stored_rows,
    vocabulary,
    first_token,  # offset of the vocabulary slice in weight
    inner,
    outer,
    hidden_stride,
    weight_stride,
    stored_stride,
    FEATURES: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,  # whether outer is negative: the largest logit is then the smallest product
    SUMS: tl.constexpr,
    STORE: tl.constexpr,
    TARGET_VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,  # dtype of E
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(vocabulary, COLUMNS), TILE_GROUP)
    write_exponentials_tile(
        hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
        row_tile, column_tile, rows, stored_rows, vocabulary, first_token, inner, outer,
        hidden_stride, weight_stride, stored_stride,
        FEATURES, BIAS, SOFTCAP, NEGATIVE, SUMS, STORE, TARGET_VALUES, ROWS, COLUMNS, DEPTH,
        DTYPE, PRECISION, DESCRIPTORS, INTERPRET,
    )  # fmt: skip


@triton.jit
def shifted_exponentials_kernel(
    hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
    first_shift,  # (rows,) float32, bits: the shift of the first computation
    rows, stored_rows, vocabulary, first_token, inner, outer, hidden_stride, weight_stride, stored_stride,
    FEATURES: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, SUMS: tl.constexpr,
    STORE: tl.constexpr, TARGET_VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TILE_GROUP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute again the tiles with a row whose shift has changed. Programs share the columns."""
    shifted = tl.zeros((ROWS_PER_SEARCH_STEP,), tl.int32)
    for start in range(0, rows, ROWS_PER_SEARCH_STEP):  # all rows first: hardly ever has one shifted
        row = start + tl.arange(0, ROWS_PER_SEARCH_STEP)
        shifted = tl.maximum(shifted, has_shifted(shift, first_shift, row, rows))
    if tl.max(shifted) > 0:
        for row_tile in range(0, tl.cdiv(rows, ROWS)):
            row = row_tile * ROWS + tl.arange(0, ROWS)
            if tl.max(has_shifted(shift, first_shift, row, rows)) > 0:
                for column_tile in range(tl.program_id(0), tl.cdiv(vocabulary, COLUMNS), tl.num_programs(0)):
                    write_exponentials_tile(
                        hidden, weight, stored, bias, targets, shift, target_values, peaks, sums,
                        row_tile, column_tile, rows, stored_rows, vocabulary, first_token, inner, outer,
                        hidden_stride, weight_stride, stored_stride,
                        FEATURES, BIAS, SOFTCAP, NEGATIVE, SUMS, STORE, TARGET_VALUES, ROWS, COLUMNS, DEPTH,
                        DTYPE, PRECISION, DESCRIPTORS, INTERPRET,
                    )  # fmt: skip


@triton.jit
def has_shifted(shift, first_shift, row, rows):
    """Return 1 for each row whose shift is above the first one, else 0."""
    before = tl.load(first_shift + row, mask=row < rows, other=0.0)
    after = tl.load(shift + row, mask=row < rows, other=0.0)
    return (after > before).to(tl.int32)


class PartialSums(NamedTuple):
    """The log-sum-exp of each row in parts, one for each column tile, without the target."""

    peaks: Tensor  # (column tiles, rows) float32, bits
    sums: Tensor  # (column tiles, rows) float32: Σ exp2(logit − shift)


class HeadPass:
    """One pass of hidden states through the head. Launches kernels, without host synchronisation."""

    def __init__(
        self,
        hidden: Tensor,  # (rows, H)
        head: Head,  # or a slice of its vocabulary
        targets: Tensor,  # (rows,) int64
        *,
        sums: bool,  # whether to compute the partial sums of the log-sum-exp
        store: Tensor | None = None,  # (stored rows ≤ rows, V): E is written here
        target_values: Tensor | None = None,  # (rows,) float32: E in the target's column; None for 0
        first_token: int = 0,  # offset of the head's vocabulary slice
    ) -> None:
        self.hidden, self.head, self.targets, self.store = hidden, head, targets, store
        self.target_values, self.first_token = target_values, first_token
        self.variant = current()
        self.tile = self._choose_tile()
        self.inner, self.outer, self.bias = self._factors()
        self.column_tiles = triton.cdiv(len(head.weight), self.tile.columns)
        self.partial = None
        if sums:
            parts = torch.empty(2, self.column_tiles, len(hidden), dtype=torch.float32, device=hidden.device)
            self.partial = PartialSums(*parts)

    def _factors(self) -> tuple[float, float, Tensor | None]:
        """Return inner, outer and bias for the kernel: the product is enlarged by what the tensor cores lose of it."""
        (inner, outer), bias = self.head.factors, self.head.bias
        if share := lost_share(self.hidden.dtype, self.hidden.shape[1]):
            correction = 1 + share
            inner, outer = (inner, outer * correction) if self.head.softcap is None else (inner * correction, outer)
            bias = None if bias is None else bias.float() / correction  # is multiplied too, but nothing of it is lost
        return inner, outer, bias

    def _choose_tile(self) -> Tile:
        problem = (len(self.hidden), len(self.head.weight), self.hidden.shape[1])
        shape = choose_tile(self.hidden.dtype, problem)
        chosen = {name: value for name in Tile._fields if (value := getattr(self.variant, name)) is not None}
        if chosen:
            shape = shape._replace(**chosen).cut_to(*problem)
        if self.head.softcap is not None and shape.columns > 128:  # the slope takes as many registers as the logits
            shape = shape._replace(columns=128)
        return shape

    def exponentials(self, shift: Tensor) -> PartialSums | None:
        """Compute every tile, with a shift of (rows,) float32 bits. Returns the partial sums if they were asked for."""
        tiles = triton.cdiv(len(self.hidden), self.tile.rows) * self.column_tiles
        if self.variant.epilogue == "light":
            self._launch(exponentials_kernel, tiles, shift)
        elif self.variant.epilogue == "masked":
            self._launch(masked_exponentials_kernel, tiles, shift)
        else:
            programs = min(tiles, multiprocessors(self.hidden.device))
            self._launch(persistent_exponentials_kernel, programs, shift, store_columns=self.tile.columns // 2)
        return self.partial

    def recompute_shifted_rows(self, shift: Tensor, first_shift: Tensor) -> None:
        """Compute again the tiles with a row whose shift is above the first one."""
        programs = min(self.column_tiles, multiprocessors(self.hidden.device))
        # The columns have to be those of the partial sums. With few rows and one stage, the two more loops fit the
        # registers (``python -m bench compile``).
        two_bytes = self.hidden.element_size() == 2
        warps = 4 if two_bytes and self.head.softcap is not None else self.tile.warps
        shape = self.tile._replace(rows=64 if two_bytes else 32, warps=warps, stages=1)
        self._launch(shifted_exponentials_kernel, programs, shift, first_shift, shape=shape)

    def _launch(
        self,
        kernel: Any,
        programs: int,
        shift: Tensor,
        *more: Tensor,
        shape: Tile | None = None,
        store_columns: int = 0,
    ) -> None:
        hidden, weight, shape = self.hidden, self.head.weight, shape or self.tile
        store, unused = self.store, shift
        hidden_operand = as_operand(hidden, (shape.rows, shape.depth))
        kernel[(programs,)](
            hidden_operand,
            as_operand(weight, (shape.columns, shape.depth)),
            as_operand(hidden if store is None else store, (shape.rows, store_columns or shape.columns)),
            unused if self.bias is None else self.bias,
            self.targets, shift,
            unused if self.target_values is None else self.target_values,
            *(self.partial or (unused, unused)), *more,
            len(hidden), 0 if store is None else len(store), len(weight), self.first_token,
            self.inner, self.outer, hidden.stride(0), weight.stride(0), 0 if store is None else store.stride(0),
            FEATURES=hidden.shape[1], BIAS=self.bias is not None, SOFTCAP=self.head.softcap is not None,
            NEGATIVE=self.outer < 0, SUMS=self.partial is not None, STORE=store is not None,
            TARGET_VALUES=self.target_values is not None,
            ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth, TILE_GROUP=self.variant.tile_group or TILE_GROUP,
            DTYPE=TRITON_DTYPES[hidden.dtype], PRECISION=dot_precision(hidden.dtype),
            DESCRIPTORS=not isinstance(hidden_operand, Tensor), INTERPRET=INTERPRETED,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of programs of a kernel that loops over tiles."""
    if device.type != "cuda":  # interpreted: few, so that each program loops
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
