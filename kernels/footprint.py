"""The memory of one evaluation of the pair loss beside its inputs, from its shapes. Imports no triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .chunked import CPU_COLUMNS, default_workspace
from .groups import ResponseGroup
from .plan import choose_plan
from .problem import accumulation_dtype


@dataclass(frozen=True)
class LossShape:
    """What the memory of the loss depends on.

    Attributes:
        groups: response tokens of each preference group.
        head: (V, H).
        dtype: of the matrix products.
        leaf_dtype: of hidden states and head, which differs from ``dtype`` under autocast.
        softcap: whether the logits are capped.
        head_gradient: whether the head needs one.
    """

    groups: Sequence[int]
    head: tuple[int, int]
    dtype: torch.dtype
    leaf_dtype: torch.dtype
    softcap: bool = False
    head_gradient: bool = True
    mode: str = "auto"


@dataclass(frozen=True)
class Footprint:
    """Memory of one evaluation.

    Attributes:
        workspace: bytes that are freed when it ends.
        gradient_dtype: in which gradients of hidden states and head are kept until the backward pass.
    """

    workspace: int
    gradient_dtype: torch.dtype


def footprint(shape: LossShape, backend: str, device: torch.device, free_memory: int | None = None) -> Footprint:
    """Returns the memory of one evaluation by this backend.

    Args:
        backend: "triton", "torch" or "reference".
        free_memory: bytes that the device has left, by which the Triton backend chooses its workspace.
    """
    (vocabulary, features), tokens = shape.head, sum(shape.groups)
    # under autocast the head is cast once for the evaluation
    cast = 0 if shape.dtype == shape.leaf_dtype else vocabulary * features * shape.dtype.itemsize
    wide = accumulation_dtype(shape.dtype)
    if backend == "triton":
        groups = [ResponseGroup([], [0], size) for size in shape.groups]
        carried = shape.head_gradient and shape.leaf_dtype == torch.bfloat16
        plan = choose_plan(groups, shape.head, shape.dtype, carried, shape.mode, None, free_memory)
        half = torch.bfloat16 if shape.leaf_dtype == torch.bfloat16 else torch.float32
        return Footprint(plan.workspace + cast, half)
    if backend == "reference":
        return Footprint(2 * 8 * (tokens * vocabulary + vocabulary * features), torch.float64)
    copies = 2 if shape.softcap or (device.type == "cuda" and shape.dtype != wide) else 1
    fit = default_workspace(device, shape.mode) // (copies * vocabulary * wide.itemsize)
    rows = max(1, min(tokens, fit))
    logits = copies * rows * vocabulary * wide.itemsize
    # beside the logits of a block: products of a slice of the vocabulary, and the targets' logits in float64
    slices = 0 if device.type == "cuda" else rows * min(CPU_COLUMNS, vocabulary) * wide.itemsize
    if device.type != "cuda" and shape.dtype != wide:
        slices += min(CPU_COLUMNS, vocabulary) * features * wide.itemsize
    targets = 3 * 8 * rows * features
    unscaled = tokens * features * wide.itemsize if max(shape.groups, default=0) > rows else 0
    return Footprint(logits + max(slices, targets) + unscaled + cast, wide)
