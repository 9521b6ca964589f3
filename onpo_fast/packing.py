"""Packing: preference groups as model input, with positions and the index of every prediction.

A sequence is a prompt with its responses, ``[prompt | y_1 | … | y_K]``. Each response sees the prompt and itself, and
its positions continue from the prompt's. Four layouts give every response the same hidden states:

- ``shared``: a group is one sequence, so that its prompt is computed once. Rows are as long as the longest sequence and
  hold as many others as fit. They are no longer, because attention under a dense mask costs the square of that length.
- ``shared_row``: the same, all sequences in one row; for flex_attention, which skips what a token does not see.
- ``separate``: a row for each response, ``[prompt | y_k]``, with a padding mask. Works with every causal model.
- ``separate_row``: these rows end to end in one row, without padding; for flash-attention.

``models.attention`` makes the masks. Rows are padded on the right. The last token of a response predicts nothing and is
left out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from .device import to_device

Layout = Literal["shared", "shared_row", "separate", "separate_row"]
TokenGroup = tuple[list[int], list[list[int]]]  # prompt tokens, tokens of each response
# tokens: flex_attention computes blocks of 128 × 128, and its kernels are best tested where these divide a row
FLEX_BLOCK = 128


@dataclass(frozen=True)
class Packed:
    """A batch of B rows of L tokens that hold S responses with N tokens in total, group by group."""

    input_ids: Tensor  # (B, L) int64
    position_ids: Tensor  # (B, L) int64, 0 for padding
    sequence: Tensor  # (B, L) int32: index of the sequence that a token is in, −1 for padding
    segment: Tensor  # (B, L) int32: 0 for the prompt of a sequence and for padding, k for its k-th response
    rows: Tensor  # (N,) int64: indices into B·L of the positions that predict the response tokens
    targets: Tensor  # (N,) int64: the response tokens
    edges: Tensor  # (T+1,) int32: boundaries of T sequences in B·L if there is no padding
    cu_seqlens: Tensor  # (S+1,) int32 on the CPU: response boundaries in N
    longest: int  # tokens of the longest prompt with one response: all positions are below it
    layout: Layout

    @property
    def padding_mask(self) -> Tensor:
        """(B, L) int64: 1 for tokens, 0 for padding."""
        return (self.sequence >= 0).long()

    def to(self, device: torch.device) -> Packed:
        """Returns a copy on the device, except for ``cu_seqlens``, which stays on the CPU."""
        names = ("input_ids", "position_ids", "sequence", "segment", "rows", "targets", "edges")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})


@dataclass(frozen=True)
class _Rows:
    """Where sequences are in the rows of a batch."""

    places: list[tuple[int, int]]  # row and first index in it, for each sequence
    count: int
    length: int  # tokens of each row, padding included

    @classmethod
    def of(cls, sizes: Sequence[int], layout: Layout) -> _Rows:
        """Places sequences with so many tokens each."""
        longest = max(sizes, default=0)
        if layout == "separate":
            return cls([(row, 0) for row in range(len(sizes))], len(sizes), longest)
        if layout != "shared":
            edges = [0, *accumulate(sizes)]
            block = FLEX_BLOCK if layout == "shared_row" else 1
            return cls([(0, edge) for edge in edges[:-1]], min(len(sizes), 1), -(-edges[-1] // block) * block)
        places, free = [(0, 0)] * len(sizes), []  # free: tokens left in each row, and the row; the fullest first
        count = 0
        for index in sorted(range(len(sizes)), key=lambda s: -sizes[s]):
            fits = bisect_left(free, (sizes[index], 0))
            left, row = free.pop(fits) if fits < len(free) else (longest, count)
            count = max(count, row + 1)
            places[index] = row, longest - left
            insort(free, (left - sizes[index], row))
        return cls(places, count, longest)

    @property
    def tokens(self) -> int:
        """The tokens of all rows, padding included."""
        return self.count * self.length


def _sequences(group: TokenGroup, layout: Layout) -> list[TokenGroup]:
    """Returns the sequences of a group: itself, or one for each response."""
    prompt, responses = group
    return [group] if layout.startswith("shared") else [(prompt, [response]) for response in responses]


def pack(groups: Sequence[TokenGroup], layout: Layout = "shared", pad: int = 0) -> Packed:
    """Packs groups into rows. Every prompt has at least one token; a response may be empty.

    >>> packed = pack([([7, 8], [[1, 2], [3]])])
    >>> packed.input_ids.tolist(), packed.position_ids.tolist()
    ([[7, 8, 1]], [[0, 1, 2]])
    >>> packed.rows.tolist(), packed.targets.tolist(), packed.cu_seqlens.tolist()
    ([1, 2, 1], [1, 2, 3], [0, 2, 3])
    """
    sequences = [one for group in groups for one in _sequences(group, layout)]
    sizes = [row_length(*one) for one in sequences]
    placed = _Rows.of(sizes, layout)
    shape = placed.count, placed.length
    input_ids = torch.full(shape, pad)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    sequence = torch.full(shape, -1, dtype=torch.int32)
    segment = torch.zeros(shape, dtype=torch.int32)
    rows: list[int] = []
    targets: list[int] = []
    lengths = [0]
    for s, (prompt, responses) in enumerate(sequences):
        b, start = placed.places[s]
        first = b * placed.length + start  # index into B·L
        sequence[b, start : start + sizes[s]] = s
        cursor = start + len(prompt)
        input_ids[b, start:cursor] = torch.tensor(prompt)
        position_ids[b, start:cursor] = torch.arange(len(prompt))
        for k, response in enumerate(responses, 1):
            inputs = response[:-1]
            span = slice(cursor, cursor + len(inputs))
            input_ids[b, span] = torch.tensor(inputs, dtype=torch.int64)
            position_ids[b, span] = torch.arange(len(prompt), len(prompt) + len(inputs))
            segment[b, span] = k
            if response:
                begin = b * placed.length + cursor
                rows += [first + len(prompt) - 1, *range(begin, begin + len(inputs))]
            targets += response
            lengths.append(len(response))
            cursor = span.stop
    return Packed(
        input_ids,
        position_ids,
        sequence,
        segment,
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32),
        torch.tensor(lengths).cumsum(0).int(),
        max((row_length(prompt, [one]) for prompt, responses in sequences for one in [[], *responses]), default=0),
        layout,
    )


def row_length(prompt: list[int], responses: list[list[int]]) -> int:
    """Returns the length in tokens of a row with these responses, without padding."""
    return len(prompt) + sum(max(len(response) - 1, 0) for response in responses)


def microbatches(
    groups: Sequence[TokenGroup], layout: Layout, tokens: int, boundary: int | None = None
) -> Iterator[list[int]]:
    """Yields the indices of the groups of every micro-batch, with groups of similar lengths together.

    Args:
        tokens: the most packed tokens of a micro-batch: rows × row length. A larger group is a micro-batch of its own.
        boundary: groups with prompts of more tokens are never together with others, because LongRoPE rotates a whole
            batch by the angles of its longest row (``Policy.rotary_boundary``).
    """
    sizes = [[row_length(*one) for one in _sequences(group, layout)] for group in groups]

    def is_long(index: int) -> bool:
        return boundary is not None and len(groups[index][0]) > boundary

    current: list[int] = []
    current_sizes: list[int] = []
    for index in sorted(range(len(groups)), key=lambda i: (is_long(i), max(sizes[i], default=0))):
        more = _Rows.of(current_sizes + sizes[index], layout)
        if current and (more.tokens > tokens or is_long(current[0]) != is_long(index)):
            yield current
            current, current_sizes = [], []
        current.append(index)
        current_sizes += sizes[index]
    if current:
        yield current
