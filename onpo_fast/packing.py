"""Packing: preference groups as model input, with positions, attention mask and the index of every prediction.

Two layouts give every response the same hidden states:

- ``shared``: one row per group, ``[prompt | y_1 | … | y_K]``. The prompt is computed once; each response attends to the
  prompt and itself, and its positions continue from the prompt's. The model must accept a 4-D mask.
- ``separate``: one row per response, ``[prompt | y_k]``, with a padding mask. Works with every causal model and with
  flash-attention.

Rows are padded on the right. The last token of a response predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .models.device import to_device

Layout = Literal["shared", "separate"]
TokenGroup = tuple[list[int], list[list[int]]]  # prompt tokens, tokens of each response


@dataclass(frozen=True)
class Packed:
    """A batch of B rows of L tokens that hold S responses with N tokens in total, group by group."""

    input_ids: Tensor  # (B, L) int64
    position_ids: Tensor  # (B, L) int64
    segment: Tensor  # (B, L) int32: 0 for the prompt, k for the k-th response, −1 for padding
    rows: Tensor  # (N,) int64: indices into B·L of the positions that predict the response tokens
    targets: Tensor  # (N,) int64: the response tokens
    cu_seqlens: Tensor  # (S+1,) int32 on the CPU: response boundaries in N
    layout: Layout

    @cached_property
    def attention_mask(self) -> Tensor:
        """(B, 1, L, L) bool for shared prompts, (B, L) int64 for separate rows.

        Made on the device, because it is L times as large as the tokens.
        """
        if self.layout == "separate":
            return (self.segment >= 0).long()
        length = self.segment.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.segment.device).tril()
        query, key = self.segment[:, :, None], self.segment[:, None, :]
        return (((key == 0) | (key == query)) & earlier)[
            :, None
        ]  # padding attends to padding, so that no query is without a key

    def to(self, device: torch.device) -> Packed:
        """Returns a copy on the device, except for ``cu_seqlens``, which stays on the CPU."""
        names = ("input_ids", "position_ids", "segment", "rows", "targets")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})


def pack(groups: Sequence[TokenGroup], layout: Layout = "shared", pad: int = 0) -> Packed:
    """Packs groups into rows. Every prompt has at least one token; a response may be empty.

    >>> packed = pack([([7, 8], [[1, 2], [3]])])
    >>> packed.input_ids.tolist(), packed.position_ids.tolist()
    ([[7, 8, 1]], [[0, 1, 2]])
    >>> packed.rows.tolist(), packed.targets.tolist(), packed.cu_seqlens.tolist()
    ([1, 2, 1], [1, 2, 3], [0, 2, 3])
    """
    if layout == "separate":
        rows_of = [(prompt, [response]) for prompt, responses in groups for response in responses]
    else:
        rows_of = list(groups)
    length = max((row_length(*row) for row in rows_of), default=0)
    batch = len(rows_of)
    input_ids = torch.full((batch, length), pad)
    position_ids = torch.zeros(batch, length, dtype=torch.int64)
    segment = torch.full((batch, length), -1, dtype=torch.int32)
    rows: list[int] = []
    targets: list[int] = []
    lengths = [0]
    for b, (prompt, responses) in enumerate(rows_of):
        cursor = len(prompt)
        input_ids[b, :cursor] = torch.tensor(prompt)
        position_ids[b, :cursor] = torch.arange(cursor)
        segment[b, :cursor] = 0
        for k, response in enumerate(responses, 1):
            inputs = response[:-1]
            span = slice(cursor, cursor + len(inputs))
            input_ids[b, span] = torch.tensor(inputs, dtype=torch.int64)
            position_ids[b, span] = torch.arange(len(prompt), len(prompt) + len(inputs))
            segment[b, span] = k
            if response:
                rows += [b * length + len(prompt) - 1, *range(b * length + span.start, b * length + span.stop)]
            targets += response
            lengths.append(len(response))
            cursor = span.stop
    cu_seqlens = torch.tensor(lengths).cumsum(0).int()
    return Packed(
        input_ids,
        position_ids,
        segment,
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        cu_seqlens,
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
        tokens: the most packed tokens of a micro-batch: rows × longest row. A larger group is a micro-batch of its own.
        boundary: groups with prompts of more tokens are never together with others, because LongRoPE rotates a whole
            batch by the angles of its longest row (``Policy.rotary_boundary``).
    """

    def shape(index: int) -> tuple[int, int]:  # rows, longest row
        prompt, responses = groups[index]
        if layout == "shared":
            return 1, row_length(prompt, responses)
        return len(responses), max((row_length(prompt, [response]) for response in responses), default=0)

    def is_long(index: int) -> bool:
        return boundary is not None and len(groups[index][0]) > boundary

    current: list[int] = []
    rows = 0
    for index in sorted(range(len(groups)), key=lambda i: (is_long(i), shape(i)[1])):
        more, length = shape(index)
        if current and ((rows + more) * length > tokens or is_long(current[0]) != is_long(index)):
            yield current
            current, rows = [], 0
        current.append(index)
        rows += more
    if current:
        yield current
