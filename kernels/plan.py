"""Planning of the Triton backend on the host: mode, chunks and workspace. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .groups import ResponseGroup, split_into_chunks

FREE_MEMORY_DIVISOR = 4  # fast mode may use a quarter of the free memory: a single chunk needs no sums between chunks
DEFAULT_WORKSPACE = 2**30  # bytes, if the free memory is unknown
LEAN_WORKSPACE = 2**27  # bytes for a vocabulary slice of lean mode, or the size of the hidden states if that is more
MIN_CHUNK_ROWS = 512  # on average: with fewer, each chunk reads the head and updates dW for too little work
NARROWEST_TILE = 128  # vocabulary entries; a wider tile makes fewer partial sums


@dataclass(frozen=True)
class PairPlan:
    """How one evaluation of the loss runs."""

    mode: str  # "fast" or "lean"
    chunks: list[list[ResponseGroup]]  # of the groups that have pairs
    workspace: int  # bytes beside inputs and gradients, about
    reason: str


def choose_plan(
    groups: list[ResponseGroup],  # the groups that have pairs
    head_shape: tuple[int, int],  # (V, H)
    dtype: torch.dtype,
    carried: bool,  # whether a bf16 gradient of the weight is needed, which takes a carry between chunks
    mode: str,
    workspace: int | None,  # bytes
    free_memory: int | None,  # bytes of device memory, if known
) -> PairPlan:
    """Choose mode and chunks.

    Raises:
        ValueError: if ``mode`` is "fast" and the largest group does not fit ``workspace``.
    """
    vocabulary, features = head_shape
    tokens, largest = sum(g.tokens for g in groups), max((g.tokens for g in groups), default=0)
    size = dtype.itemsize
    # a row: E; X scaled and dX in fp32, or X beside the anchor's; the partial sums of both log-sum-exps
    row = size * vocabulary + (size + 4) * features + 16 * -(-vocabulary // NARROWEST_TILE)
    carry = vocabulary * features // 2 if carried else 0
    width = slice_width(max(tokens, 1), features, vocabulary, size, workspace)
    lean_bytes = tokens * (size * width + (size + 4) * features)

    def lean(reason: str) -> PairPlan:
        return PairPlan("lean", [groups], lean_bytes, reason)

    if dtype == torch.float16:
        return lean("the range of fp16 is too small for exponentials relative to the target")
    if mode == "lean":
        return lean("as asked")
    needed = row * largest + (carry if largest < tokens else 0)
    budget = workspace
    if budget is None:
        budget = DEFAULT_WORKSPACE if free_memory is None else free_memory // FREE_MEMORY_DIVISOR
        if mode == "fast":
            budget = max(budget, needed)
    if row * tokens <= budget:
        return PairPlan("fast", [groups], row * tokens, "everything fits one chunk")
    if needed > budget:
        text = f"the largest preference group, {largest} tokens, needs {needed} bytes of workspace, more than {budget}"
        if mode == "fast":
            raise ValueError(
                f"mode='fast': {text}; raise workspace_bytes, or use mode='lean' or 'auto', which can compute the "
                "logits twice instead"
            )
        if lean_bytes < needed:
            return lean(text)
        budget = needed  # lean mode would take more memory than this
    chunks = list(split_into_chunks(groups, (budget - carry) // row))
    sizes = [sum(group.tokens for group in chunk) for chunk in chunks]
    if mode == "auto" and tokens / len(chunks) < MIN_CHUNK_ROWS and lean_bytes <= budget:
        return lean(f"{len(chunks)} chunks of at most {max(sizes)} tokens would be too small")
    return PairPlan("fast", chunks, carry + row * max(sizes), "each preference group fits, in several chunks")


def slice_width(rows: int, features: int, vocabulary: int, itemsize: int, workspace: int | None) -> int:
    """Return the vocabulary entries of a slice in lean mode. Wider is faster: each slice updates the fp32 sum of dX."""
    if workspace is None:
        room = max(LEAN_WORKSPACE, rows * features * itemsize)
    else:
        room = workspace - rows * features * (4 + itemsize)
    width = room // max(rows * itemsize, 1) // 256 * 256
    return max(min(width, vocabulary), min(256, vocabulary))
