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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from .models.device import to_device

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


@dataclass
class _Rows:
    """Rows that are being filled with sequences, the longest first."""

    layout: Layout
    used: list[int] = field(default_factory=list)  # tokens in each row

    def place(self, length: int) -> tuple[int, int]:
        """Finds room for a sequence of so many tokens: returns the row and where it begins there."""
        row = len(self.used)  # a new one
        if self.layout.endswith("_row"):
            row = 0
        elif self.layout == "shared":  # the first row is the longest sequence, and full
            row = next((r for r, used in enumerate(self.used) if used + length <= self.used[0]), row)
        if row == len(self.used):
            self.used.append(0)
        self.used[row] += length
        return row, self.used[row] - length

    @property
    def length(self) -> int:
        """The tokens of each row, padding included."""
        longest = max(self.used, default=0)
        return -(-longest // FLEX_BLOCK) * FLEX_BLOCK if self.layout == "shared_row" else longest

    @property
    def tokens(self) -> int:
        """The tokens of all rows, padding included."""
        return len(self.used) * self.length


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
    placed = _Rows(layout)
    in_order = sorted(range(len(sizes)), key=lambda s: -sizes[s]) if layout == "shared" else range(len(sizes))
    places = {s: placed.place(sizes[s]) for s in in_order}
    shape = len(placed.used), placed.length
    input_ids = torch.full(shape, pad)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    sequence = torch.full(shape, -1, dtype=torch.int32)
    segment = torch.zeros(shape, dtype=torch.int32)
    rows: list[int] = []
    targets: list[int] = []
    lengths = [0]
    for s, (prompt, responses) in enumerate(sequences):
        b, start = places[s]
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
    """Yields the indices of the groups of every micro-batch: the longest first, with others of similar lengths.

    Args:
        tokens: the most packed tokens of a micro-batch: rows × row length. A larger group is a micro-batch of its own.
        boundary: groups with prompts of more tokens are never together with others, because LongRoPE rotates a whole
            batch by the angles of its longest row (``Policy.rotary_boundary``).
    """
    sizes = [[row_length(*one) for one in _sequences(group, layout)] for group in groups]

    def is_long(index: int) -> bool:
        return boundary is not None and len(groups[index][0]) > boundary

    current: list[int] = []
    rows = _Rows(layout)
    for index in sorted(range(len(groups)), key=lambda i: (is_long(i), -max(sizes[i], default=0))):
        more = replace(rows, used=list(rows.used))
        for size in sizes[index]:
            more.place(size)
        if current and (more.tokens > tokens or is_long(current[0]) != is_long(index)):
            yield current
            current, more = [], _Rows(layout)
            for size in sizes[index]:
                more.place(size)
        current.append(index)
        rows = more
    if current:
        yield current
