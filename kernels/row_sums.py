"""Sums over rows and over responses, in a fixed order: the same bits every time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponentials import PartialSums

FAR = 86.0  # bits between a row's peak and its target beyond which exponentials are taken relative to the peak
# 2^86 times a vocabulary of 2^18 is 2^104: sums stay far from the 2^128 of fp32 and bf16
NATS = 0.6931471805599453  # in a bit


@triton.jit
def shifts_kernel(
    peaks,  # (tiles, N) float32, bits
    first_shift,  # (N,) float32, bits
    shift,  # (N,) float32, bits
    tiles,
    rows,
    FAR: tl.constexpr,
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
    tl.store(shift + row, tl.where(peak - near > FAR, peak, near), mask=inside)


def shifts(partial: PartialSums, first_shift: Tensor) -> Tensor:
    """(N,) float32, bits: the shift of every row, which is the first one, or its peak where that is far above."""
    tiles, rows = partial.peaks.shape
    shift = torch.empty_like(first_shift)
    block = 32
    shifts_kernel[(triton.cdiv(rows, block),)](
        partial.peaks, first_shift, shift, tiles, rows, FAR=FAR, ROWS=block, TILES=64, num_warps=4
    )
    return shift


@triton.jit
def log1p(x):
    """float64 log(1 + x) for x ≥ 0, also where 1 + x is 1 (Kahan)."""
    u = 1 + x
    lost = x / tl.where(u == 1, 1.0, u - 1)  # what the rounding of u changed, as a factor
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
    rest = tl.zeros((ROWS,), tl.float64)  # without the target
    for start in range(0, tiles, TILES):
        at = start + tl.arange(0, TILES)
        mask = (at < tiles)[:, None] & inside[None, :]
        part = tl.load(sums + at[:, None].to(tl.int64) * rows + row[None, :], mask=mask, other=0.0)
        rest += tl.sum(part, 0).to(tl.float64)
    target = tl.load(target_logits + row, mask=inside, other=0.0)
    above = (target - tl.load(shift + row, mask=inside, other=0.0).to(tl.float64)) * NATS
    own = tl.exp(above)  # 1 but for the rounding of the shift; small where the shift is the row's peak
    near = own > 0.5
    logp = tl.where(near, -log1p(rest / tl.where(near, own, 1.0)), above - tl.log(rest + own))
    tl.store(logps + row, logp, mask=inside)
    tl.store(others + row, rest.to(tl.float32), mask=inside)
    tl.store(total + row, (rest + own).to(tl.float32), mask=inside)


class RowSums(NamedTuple):
    """What a row's softmax comes down to. Exponentials are relative to the row's shift."""

    logps: Tensor  # (N,) float64: the target's log-prob, nats
    others: Tensor  # (N,) float32: the sum of the exponentials of all other tokens
    total: Tensor  # (N,) float32: of all tokens


def merge(sums: Tensor, target_logits: Tensor, shift: Tensor) -> RowSums:
    """The pieces of every row's sum, (tiles, N) relative to ``shift``, (N,) float32, and its target's logit, (N,)
    float64, put together. Logits and shifts in bits."""
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
    """Sums over consecutive values: float64, (S + 1,) int64 -> (S,) float64. An empty segment sums to 0."""
    segments = len(edges) - 1
    sums = torch.empty(segments, dtype=torch.float64, device=values.device)
    if segments:
        segment_sums_kernel[(segments,)](values, edges, sums, BLOCK=1024)
    return sums
