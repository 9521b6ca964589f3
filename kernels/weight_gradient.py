"""The gradient of the weight, summed over chunks without a float32 copy of the head.

    dW += Eᵀ X        E (n, V), X (n, H) with the row scales multiplied in

Within a chunk the tensor cores sum in fp32. Between chunks a bf16 gradient would lose terms below 2⁻⁹ of the sum, and a
float32 sum would take twice the memory of the head. So the sum keeps four more bits of mantissa than bf16 has: its
upper 16 bits are in the gradient, the next four in ``carry``, packed two to a byte, a quarter of the gradient's size.
Each chunk then rounds to 2⁻¹³; the last one rounds its fp32 sum to bf16, 2⁻⁹. A float32 gradient needs no carry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    INTERPRETED,
    TILE_GROUP,
    TRITON_DTYPES,
    as_operand,
    choose_tile,
    dot_precision,
    load_tile,
    matmul_step,
    rounded,
    store_tile,
    tile_of,
)


@triton.jit
def weight_gradient_kernel(
    exponentials,  # (n, V), tiles (DEPTH, ROWS)
    scaled,  # (n, H), tiles (DEPTH, COLUMNS)
    gradient,  # (V, H), tiles (ROWS, COLUMNS)
    carry,  # (V, H / 2) uint8, tiles (ROWS, COLUMNS / 2); touched with CARRY
    tokens,  # n
    vocabulary,
    features,
    exponentials_stride,
    scaled_stride,
    gradient_stride,
    carry_stride,
    ADD: tl.constexpr,  # to the values in gradient
    CARRY_IN: tl.constexpr,
    CARRY_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,  # dtype of gradient
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(vocabulary, ROWS), tl.cdiv(features, COLUMNS)
    column_tile, row_tile = tile_of(tl.program_id(0), column_tiles, row_tiles, TILE_GROUP)
    row, column = row_tile * ROWS, column_tile * COLUMNS

    if ADD:  # starting from the sum so far leaves nothing to load, unpack and add after the products
        before = load_tile(gradient, row, column, vocabulary, features, gradient_stride, ROWS, COLUMNS, DESCRIPTORS)
        if CARRY_IN:
            packed = load_tile(
                carry, row, column // 2, vocabulary, carry_stride, carry_stride, ROWS, COLUMNS // 2, DESCRIPTORS
            ).to(tl.uint32)
            low = tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, COLUMNS))
            high = before.to(tl.uint16, bitcast=True).to(tl.uint32)
            total = ((high << 16) | (low << 12)).to(tl.float32, bitcast=True)
        else:
            total = before
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, tokens, DEPTH):
        e = load_tile(exponentials, depth, row, tokens, vocabulary, exponentials_stride, DEPTH, ROWS, DESCRIPTORS)
        x = load_tile(scaled, depth, column, tokens, features, scaled_stride, DEPTH, COLUMNS, DESCRIPTORS)
        total = matmul_step(e.T, x, total, PRECISION, INTERPRET)

    if CARRY_OUT:
        bits = tl.where(total == total, total.to(tl.uint32, bitcast=True) + 0x800, 0x7FC00000)  # to nearest, keeps NaN
        even, odd = tl.split(tl.reshape(bits, (ROWS, COLUMNS // 2, 2)))
        packed_out = (((even >> 12) & 15) | ((odd >> 8) & 240)).to(tl.uint8)
        store_tile(
            carry, packed_out, row, column // 2, vocabulary, carry_stride, carry_stride, ROWS, COLUMNS // 2, DESCRIPTORS
        )
        value = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = rounded(total, DTYPE, INTERPRET)
    store_tile(gradient, value, row, column, vocabulary, features, gradient_stride, ROWS, COLUMNS, DESCRIPTORS)


def carry_for(gradient: Tensor) -> Tensor:
    """Return uint8 scratch memory for the four extra mantissa bits of a (V, H) bf16 gradient between chunks."""
    width = -(-gradient.shape[1] // 32) * 16  # bytes a row, aligned
    return torch.empty(len(gradient), width, dtype=torch.uint8, device=gradient.device)


def add_weight_gradient(
    gradient: Tensor,  # (V, H) bf16 or fp32
    exponentials: Tensor,  # (n, V)
    scaled: Tensor,  # (n, H)
    carry: Tensor | None,  # from ``carry_for``; None for a float32 gradient
    *,
    first: bool,  # whether this is the first chunk, which overwrites the gradient
    last: bool,  # whether this is the last chunk, which rounds it
) -> None:
    """gradient += exponentialsᵀ scaled, or = for the first chunk."""
    tokens, vocabulary = exponentials.shape
    features = scaled.shape[1]
    shape = choose_tile(scaled.dtype, (vocabulary, features, tokens))
    if gradient.element_size() > scaled.element_size() and shape.columns > 128:  # an fp32 tile to be stored is large
        shape = shape._replace(columns=128)
    carried = carry is not None
    factor = as_operand(exponentials, (shape.depth, shape.rows))
    weight_gradient_kernel[(triton.cdiv(vocabulary, shape.rows) * triton.cdiv(features, shape.columns),)](
        factor,
        as_operand(scaled, (shape.depth, shape.columns)),
        as_operand(gradient, (shape.rows, shape.columns)),
        as_operand(carry if carried else gradient, (shape.rows, shape.columns // (2 if carried else 1))),
        tokens, vocabulary, features,
        exponentials.stride(0), scaled.stride(0), gradient.stride(0), carry.stride(0) if carried else 0,
        ADD=not first, CARRY_IN=carried and not first, CARRY_OUT=carried and not last,
        ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth, TILE_GROUP=TILE_GROUP,
        DTYPE=TRITON_DTYPES[gradient.dtype], PRECISION=dot_precision(scaled.dtype),
        DESCRIPTORS=not isinstance(factor, Tensor), INTERPRET=INTERPRETED,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
