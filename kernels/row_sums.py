"""Sums over rows and over responses, in a fixed order, so that results are bit-identical between runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponentials import PartialSums

# Bits between a row's peak and its target above which exponentials are relative to the peak. 2^86 times a vocabulary of
# 2^18 is 2^104, far from the overflow of fp32 and bf16 at 2^128.
SHIFT_TO_PEAK_ABOVE = 86.0
NATS = 0.6931471805599453  # nats in a bit


@triton.jit
def shifts_kernel(
    peaks,  # (tiles, N) float32, bits
    first_shift,  # (N,) float32, bits
    shift,  # (N,) float32, bits
    tiles,
    rows,
    SHIFT_TO_PEAK_ABOVE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, tiles, TILES):
        at = start + tl.arange(0, TILES)
        mask = (at < tiles)[:, None] & inside[None, :]
        part = tl.load(peaks + at[:, None].to(tl.int64) * rows + row[None, :], mask=mask, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(part, 0))
    near = tl.load(first_shift + row, mask=inside, other=0.0)
    tl.store(shift + row, tl.where(peak - near > SHIFT_TO_PEAK_ABOVE, peak, near), mask=inside)


def shifts(partial: PartialSums, first_shift: Tensor) -> Tensor:
    """Return the shift of every row, (N,) float32 bits: the first one, or the row's peak if that is far above it."""
    tiles, rows = partial.peaks.shape
    shift = torch.empty_like(first_shift)
    block = 32
    shifts_kernel[(triton.cdiv(rows, block),)](
        partial.peaks, first_shift, shift, tiles, rows,
        SHIFT_TO_PEAK_ABOVE=SHIFT_TO_PEAK_ABOVE, ROWS=block, TILES=64, num_warps=4,
    )  # fmt: skip
    return shift


@triton.jit
def log1p(x):
    """float64 log(1 + x) for x ≥ 0, exact also if 1 + x rounds to 1 (Kahan)."""
    u = 1 + x
    lost = x / tl.where(u == 1, 1.0, u - 1)  # corrects for the rounding of u
    return tl.where(u == 1, x, tl.where(x < 1, tl.log(u) * lost, tl.log(u)))


@triton.jit
def merge_kernel(
    sums,  # (tiles, N) float32
    target_logits,  # (N,) float64, bits
    shift,  # (N,) float32, bits
    logps,  # (N,) float64, nats
    others,  # (N,) float32
    total,  # (N,) float32
    tiles,
    rows,
    NATS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    others_sum = tl.zeros((ROWS,), tl.float64)  # without the target
    for start in range(0, tiles, TILES):
        at = start + tl.arange(0, TILES)
        mask = (at < tiles)[:, None] & inside[None, :]
        part = tl.load(sums + at[:, None].to(tl.int64) * rows + row[None, :], mask=mask, other=0.0)
        others_sum += tl.sum(part, 0).to(tl.float64)
    target = tl.load(target_logits + row, mask=inside, other=0.0)
    above = (target - tl.load(shift + row, mask=inside, other=0.0).to(tl.float64)) * NATS
    target_exp = tl.exp(above)  # 1 up to the rounding of the shift, or small if the shift is the row's peak
    near = target_exp > 0.5
    logp = tl.where(near, -log1p(others_sum / tl.where(near, target_exp, 1.0)), above - tl.log(others_sum + target_exp))
    tl.store(logps + row, logp, mask=inside)
    tl.store(others + row, others_sum.to(tl.float32), mask=inside)
    tl.store(total + row, (others_sum + target_exp).to(tl.float32), mask=inside)


class RowSums(NamedTuple):
    """Log-probs and the sums of the softmax, a value for each row. Exponentials are relative to the row's shift."""

    logps: Tensor  # (N,) float64, nats: log-prob of the target
    others: Tensor  # (N,) float32: sum of exponentials without the target
    total: Tensor  # (N,) float32: sum of all exponentials


def merge(sums: Tensor, target_logits: Tensor, shift: Tensor) -> RowSums:
    """Add the partial sums of every row, (tiles, N), relative to ``shift``, (N,) float32, and the exponential of its
    target's logit, (N,) float64. Logits and shifts are in bits."""
    tiles, rows = sums.shape
    logps = torch.empty(rows, dtype=torch.float64, device=sums.device)
    others, total = torch.empty(2, rows, dtype=torch.float32, device=sums.device)
    block = 32
    merge_kernel[(triton.cdiv(rows, block),)](
        sums, target_logits, shift, logps, others, total, tiles, rows,
        NATS=NATS, ROWS=block, TILES=64, num_warps=4,
    )  # fmt: skip
    return RowSums(logps, others, total)


@triton.jit
def segment_sums_kernel(
    values,  # float64
    edges,  # (S + 1,) int64
    sums,  # (S,) float64
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    start, stop = tl.load(edges + segment), tl.load(edges + segment + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < stop, other=0.0)
    tl.store(sums + segment, tl.sum(total))


def segment_sums(values: Tensor, edges: Tensor) -> Tensor:
    """Sum over consecutive values: float64, (S + 1,) int64 -> (S,) float64. An empty segment has 0."""
    segments = len(edges) - 1
    sums = torch.empty(segments, dtype=torch.float64, device=values.device)
    if segments:
        segment_sums_kernel[(segments,)](values, edges, sums, BLOCK=1024)
    return sums
