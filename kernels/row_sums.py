"""Sums over rows and over responses, in a fixed order: the same bits every time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponentials import PartialSums

FAR = 60.0  # nats between a row's peak and its target beyond which exponentials are taken relative to the peak
# e^60 times a vocabulary of 2^18 is 3e31: sums stay far from fp32's and bf16's 3e38


@triton.jit
def merge_kernel(
    peaks,  # (tiles, N) float32
    sums,  # (tiles, N) float32
    target_logits,  # (N,) float64
    logps,  # (N,) float64
    shift,  # (N,) float32
    others,  # (N,) float32
    total,  # (N,) float32
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
    base = tl.where(peak == float("-inf"), 0.0, peak)
    whole = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        at = start + tl.arange(0, TILES)
        mask = (at < tiles)[:, None] & inside[None, :]
        offset = at[:, None].to(tl.int64) * rows + row[None, :]
        part = tl.load(sums + offset, mask=mask, other=0.0)
        scale = tl.exp(tl.load(peaks + offset, mask=mask, other=float("-inf")) - base[None, :])
        whole += tl.sum(part * scale, 0)

    target = tl.load(target_logits + row, mask=inside, other=0.0)
    near = target.to(tl.float32)
    origin = tl.where(peak - near > FAR, peak, near)
    rest = whole.to(tl.float64) * tl.exp(peak.to(tl.float64) - origin.to(tl.float64))  # without the target
    above = target - origin.to(tl.float64)
    everything = rest + tl.exp(above)
    tl.store(logps + row, above - tl.log(everything), mask=inside)  # −log(1 + rest) where the origin is the target
    tl.store(shift + row, origin, mask=inside)
    tl.store(others + row, rest.to(tl.float32), mask=inside)
    tl.store(total + row, everything.to(tl.float32), mask=inside)


class RowSums(NamedTuple):
    """What a row's softmax comes down to. Exponentials are relative to ``shift``."""

    logps: Tensor  # (N,) float64: the target's log-prob, nats
    shift: Tensor  # (N,) float32: the target's logit, or the peak where that is far above
    others: Tensor  # (N,) float32: the sum of the exponentials of all other tokens
    total: Tensor  # (N,) float32: of all tokens


def merge(partial: PartialSums, target_logits: Tensor) -> RowSums:
    """The pieces of every row's log-sum-exp, (tiles, N), and its target's logit, (N,) float64, put together."""
    tiles, rows = partial.peaks.shape
    device = target_logits.device
    logps = torch.empty(rows, dtype=torch.float64, device=device)
    shift, others, total = torch.empty(3, rows, dtype=torch.float32, device=device)
    block = 32
    merge_kernel[(triton.cdiv(rows, block),)](
        partial.peaks, partial.sums, target_logits, logps, shift, others, total, tiles, rows,
        FAR=FAR, ROWS=block, TILES=64, num_warps=4,
    )  # fmt: skip
    return RowSums(logps, shift, others, total)


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
