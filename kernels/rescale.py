"""Scaling of a gradient by the upstream scalar, which is nearly always 1 and lives on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rescale_kernel(values, factor, count, BLOCK: tl.constexpr):
    scale = tl.load(factor).to(tl.float32)
    if scale == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(values + at, mask=inside).to(tl.float32)
    tl.store(values + at, (x * scale).to(values.dtype.element_ty), mask=inside)


def rescale(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor, in place, without host synchronisation. If the factor is 1, the values are not touched."""
    block = 4096
    if values.numel():
        rescale_kernel[(triton.cdiv(values.numel(), block),)](values, factor, values.numel(), BLOCK=block)
    return values
