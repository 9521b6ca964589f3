"""What every Triton kernel here is launched with: tiles, tensor descriptors, and the dot product."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: numpy executes the kernels, on CPU tensors
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ALIGNMENT = 16  # bytes: what a tensor descriptor asks of its base and of its rows


LEAST = (16, 32, 16)  # a dot takes 16 of everything; half the columns, a byte each, fill the 16 of a descriptor
FEW = (16, 128, 64)  # the size between the least and the whole, where there is one


class Tile(NamedTuple):
    """A block of a matrix product and how it is executed."""

    rows: int
    columns: int
    depth: int  # of the dimension that is summed over, a step
    warps: int
    stages: int  # of the software pipeline

    def cut_to(self, rows: int, columns: int, depth: int) -> Tile:
        """The tile cut to a small problem, which a large one would mostly miss. Few sizes, since each combination is
        compiled when it is first met."""
        sizes = []
        for own, need, least, few in zip(self[:3], (rows, columns, depth), LEAST, FEW):
            sizes.append(max(least, min(own, least if need <= least else few if need <= few else own)))
        return Tile(*sizes, self.warps, self.stages)


# From a compute capability on: the tile of products of 2-byte and of 4-byte operands. Fixed rather than autotuned, so
# that results are the same bits from one run to the next. ``python -m bench compile`` shows what they compile to.
TILES: dict[int, dict[int, Tile]] = {
    80: {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 128, 32, 8, 3)},
    86: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 8, 2)},  # 99 KiB of shared memory, to 8.0's 163
    90: {2: Tile(128, 256, 64, 8, 4), 4: Tile(64, 128, 32, 8, 3)},
    100: {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 128, 32, 8, 3)},
    120: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 8, 3)},
}


def tile(operand: torch.dtype, problem: tuple[int, int, int]) -> Tile:
    """The tile for a (rows, columns, depth) problem on the current device."""
    if INTERPRETED:  # three tiles or more a dimension show every edge; large ones keep numpy busy
        rows, columns, depth = (min(limit, _power(-(-size // 3))) for size, limit in zip(problem, (128, 2048, 512)))
        return Tile(rows, columns, depth, 1, 1).cut_to(rows, columns, depth)
    architecture = triton.runtime.driver.active.get_current_target().arch
    return TILES[max(a for a in TILES if a <= architecture)][operand.itemsize].cut_to(*problem)


def dot_precision(operand: torch.dtype) -> str:
    """How float32 operands are multiplied, as PyTorch is told to (``torch.set_float32_matmul_precision``).

    "highest" is three TF32 products a product, which is float32 to its last bit or two; the others are one.
    """
    if operand == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "tf32x3"
    return "tf32"


# By compute capability: the share of a product's magnitude that is lost with every 16 terms of bf16 operands. Tensor
# cores round towards zero after each such step (arXiv 2512.07004): a long sum comes out too small, and in the summed
# log-prob of a response this error adds up. 0.26 of 2⁻²⁴ comes from log-probs of random states measured on an H200
# (``docs/tuning.md``). By the terms and their order less may be lost or more: where nothing is, the correction is
# wrong by as much as it corrects elsewhere, 4·10⁻⁶ of a logit at H = 4096.
LOST_A_STEP = {90: 0.26 * 2.0**-24}


def lost_share(operand: torch.dtype, terms: int) -> float:
    """The share by which the current device makes a product of so many terms too small, where it is known; else 0."""
    if INTERPRETED or operand != torch.bfloat16:
        return 0.0
    return LOST_A_STEP.get(triton.runtime.driver.active.get_current_target().arch, 0.0) * terms / 16


def uses_descriptors() -> bool:
    """Tiles come through the tensor memory accelerator where there is one, Hopper and later; pointers elsewhere."""
    return INTERPRETED or triton.runtime.driver.active.get_current_target().arch >= 90


def operand(matrix: Tensor, tile: tuple[int, int]) -> TensorDescriptor | Tensor:
    """(n, H) as ``load_tile`` and ``store_tile`` take it."""
    return TensorDescriptor.from_tensor(matrix, list(tile)) if uses_descriptors() else matrix


def aligned(matrix: Tensor) -> Tensor:
    """(n, H) as a tensor descriptor can read it: itself, or a copy with contiguous rows on aligned addresses."""
    rows_aligned = matrix.stride(0) * matrix.element_size() % ALIGNMENT == 0 and matrix.stride(0) >= matrix.shape[1]
    if matrix.stride(1) == 1 and rows_aligned and matrix.data_ptr() % ALIGNMENT == 0:
        return matrix
    copy = empty_rows(len(matrix), matrix.shape[1], matrix.dtype, matrix.device)
    return copy.copy_(matrix)


def empty_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns), uninitialised, each row starting on an aligned address."""
    step = 16  # elements: more than a descriptor needs, and what Triton knows a stride to be divisible by
    return torch.empty(rows, -(-columns // step) * step, dtype=dtype, device=device)[:, :columns]


def _power(size: int) -> int:
    return triton.next_power_of_2(max(size, 1))


GROUP = 16  # tiles that run side by side


@triton.jit
def tile_of(program, near_tiles, far_tiles, GROUP: tl.constexpr):
    """(near, far): the tile of a program. Those of one far tile and ``GROUP`` near ones are neighbours in time, so that
    the near operand stays in the cache while the far one streams by."""
    first = program // (GROUP * far_tiles) * GROUP
    side_by_side = min(near_tiles - first, GROUP)
    within = program % (GROUP * far_tiles)
    return first + within % side_by_side, within // side_by_side


@triton.jit
def load_tile(
    matrix, row, column, rows, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The tile at (row, column), zeros beyond (rows, columns). ``matrix`` is an ``operand``."""
    if DESCRIPTORS:
        value = matrix.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = r[:, None].to(tl.int64) * stride + c[None, :]
        value = tl.load(matrix + at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return value


@triton.jit
def store_tile(
    matrix, value, row, column, rows, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Writes a tile at (row, column), and nothing beyond (rows, columns)."""
    if DESCRIPTORS:
        matrix.store([row, column], value)
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = r[:, None].to(tl.int64) * stride + c[None, :]
        tl.store(matrix + at, value, mask=(r < rows)[:, None] & (c < columns)[None, :])


@triton.jit
def matmul_step(a, b, total, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """total + a b. The interpreter multiplies the bits of bf16 numbers unless they are converted first."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 to ``dtype``, to nearest even. The interpreter truncates to bf16, the hardware rounds."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
