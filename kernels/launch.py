"""What the Triton kernels share: tile sizes, tensor descriptors, memory alignment and the matrix product of tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 executes the kernels with numpy, on CPU tensors
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ALIGNMENT = 16  # bytes: a tensor descriptor needs its base address and its rows aligned
TILE_GROUP = 16  # tiles that run side by side, see ``tile_of``

# Rows, columns and depth of small tiles. A dot needs at least 16 of each; half the columns of a carry, one byte each,
# have to fill the 16 bytes of a descriptor.
SMALLEST_TILE = (16, 32, 16)
SMALL_TILE = (16, 128, 64)


class Tile(NamedTuple):
    """The tile of a matrix product that one program computes, and how it is executed."""

    rows: int
    columns: int
    depth: int  # elements of the summed dimension in one step
    warps: int
    stages: int  # stages of the software pipeline

    def cut_to(self, rows: int, columns: int, depth: int) -> Tile:
        """Return a smaller tile if the problem is small. There are three sizes a dimension, because each combination
        is compiled when it is first used."""
        sizes = []
        for size, needed, smallest, small in zip(self[:3], (rows, columns, depth), SMALLEST_TILE, SMALL_TILE):
            fitting = smallest if needed <= smallest else small if needed <= small else size
            sizes.append(max(smallest, min(size, fitting)))
        return Tile(*sizes, self.warps, self.stages)


# Tiles by the lowest compute capability that they are for, then by the operands' bytes an element. Fixed rather than
# autotuned, so that results are bit-identical between runs. ``python -m bench compile`` shows what they compile to.
TILES: dict[int, dict[int, Tile]] = {
    80: {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 128, 32, 8, 3)},
    86: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 8, 2)},  # 99 KiB of shared memory, to 8.0's 163
    90: {2: Tile(128, 256, 64, 8, 4), 4: Tile(64, 128, 32, 8, 3)},
    100: {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 128, 32, 8, 3)},
    120: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 8, 3)},
}


def choose_tile(dtype: torch.dtype, problem: tuple[int, int, int]) -> Tile:
    """Return the tile for operands of ``dtype`` and a (rows, columns, depth) problem on the current device."""
    if INTERPRETED:  # at least three tiles a dimension, to test every edge; large ones, because numpy is slow to start
        rows, columns, depth = (min(limit, _power(-(-size // 3))) for size, limit in zip(problem, (128, 2048, 512)))
        return Tile(rows, columns, depth, 1, 1).cut_to(rows, columns, depth)
    architecture = triton.runtime.driver.active.get_current_target().arch
    return TILES[max(a for a in TILES if a <= architecture)][dtype.itemsize].cut_to(*problem)


def dot_precision(dtype: torch.dtype) -> str:
    """Return how float32 operands are multiplied, which follows ``torch.set_float32_matmul_precision``.

    "highest" takes three TF32 products, whose sum is exact to the last bit or two of float32; other settings take one.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "tf32x3"
    return "tf32"


# By compute capability, the share of a sum of products that is lost with every 16 terms of bf16 operands. Tensor cores
# round towards zero after each such step (arXiv 2512.07004), so that a long sum is too small, and the errors of a
# response's tokens add up in its log-prob. 0.26·2⁻²⁴ was measured from log-probs of random states on an H200
# (``docs/tuning.md``). What is lost depends on the terms and their order. Where nothing is lost, the correction is an
# error as large as what it corrects elsewhere, 4·10⁻⁶ of a logit at H = 4096.
LOST_PER_STEP = {90: 0.26 * 2.0**-24}


def lost_share(dtype: torch.dtype, terms: int) -> float:
    """Return the share by which the current device makes a sum of so many products too small; 0 if unknown."""
    if INTERPRETED or dtype != torch.bfloat16:
        return 0.0
    return LOST_PER_STEP.get(triton.runtime.driver.active.get_current_target().arch, 0.0) * terms / 16


def uses_descriptors() -> bool:
    """Return whether tiles are loaded through tensor descriptors (Hopper and later have the hardware) or pointers."""
    return INTERPRETED or triton.runtime.driver.active.get_current_target().arch >= 90


def as_operand(matrix: Tensor, tile: tuple[int, int]) -> TensorDescriptor | Tensor:
    """Return a matrix in the form that ``load_tile`` and ``store_tile`` take, for tiles of this shape."""
    return TensorDescriptor.from_tensor(matrix, list(tile)) if uses_descriptors() else matrix


def aligned(matrix: Tensor) -> Tensor:
    """Return (n, H) as a tensor descriptor can read it: itself, or a copy with contiguous rows on aligned addresses."""
    rows_aligned = matrix.stride(0) * matrix.element_size() % ALIGNMENT == 0 and matrix.stride(0) >= matrix.shape[1]
    if matrix.stride(1) == 1 and rows_aligned and matrix.data_ptr() % ALIGNMENT == 0:
        return matrix
    copy = empty_rows(len(matrix), matrix.shape[1], matrix.dtype, matrix.device)
    return copy.copy_(matrix)


def empty_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (rows, columns), uninitialised, with each row on an aligned address."""
    step = 16  # elements: more than a descriptor needs; Triton specialises on strides divisible by 16
    return torch.empty(rows, -(-columns // step) * step, dtype=dtype, device=device)[:, :columns]


def _power(size: int) -> int:
    return triton.next_power_of_2(max(size, 1))


@triton.jit
def tile_of(program, near_tiles, far_tiles, TILE_GROUP: tl.constexpr):
    """Return (near, far), the tile of a program. ``TILE_GROUP`` near tiles run side by side for one far tile after
    another, so that the near operand stays in the cache while the far one streams through it."""
    first = program // (TILE_GROUP * far_tiles) * TILE_GROUP
    side_by_side = min(near_tiles - first, TILE_GROUP)
    within = program % (TILE_GROUP * far_tiles)
    return first + within % side_by_side, within // side_by_side


@triton.jit
def load_tile(
    matrix, row, column, rows, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load the tile at (row, column), with zeros beyond (rows, columns). ``matrix`` comes from ``as_operand``."""
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
    """Store a tile at (row, column), and nothing beyond (rows, columns)."""
    if DESCRIPTORS:
        matrix.store([row, column], value)
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = r[:, None].to(tl.int64) * stride + c[None, :]
        tl.store(matrix + at, value, mask=(r < rows)[:, None] & (c < columns)[None, :])


@triton.jit
def matmul_step(a, b, total, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Return total + a b. The interpreter stores bf16 as integers, so it has to convert them first."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Round float32 to ``dtype``, to nearest even. For bf16 the interpreter would truncate, unlike the hardware."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
