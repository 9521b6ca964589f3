"""The order in which the Triton backend works on rows, responses and pairs. Imports no triton."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from .groups import PairLayout
from .on_device import PerStream, to_device
from .plan import PairPlan


class GroupedOrder:
    """Rows, responses and pairs numbered so that each chunk of groups is a contiguous range of all three.

    Groups with pairs come first. Index tensors are copied to the device once and used by every call with this layout.
    """

    def __init__(self, layout: PairLayout, device: torch.device) -> None:
        groups = sorted(layout.groups, key=lambda group: not group.pairs)
        responses = [r for group in groups for r in group.responses]
        pairs = [p for group in groups for p in group.pairs]
        lengths = [layout.edges[r + 1] - layout.edges[r] for r in responses]
        number = {r: i for i, r in enumerate(responses)}
        ends = [(number[winner], number[loser]) for winner, loser in layout.pairs[pairs].tolist()]
        entries: list[list[tuple[int, int]]] = [[] for _ in responses]  # (pair, sign) of each pair of a response
        for pair, (winner, loser) in enumerate(ends):
            entries[winner].append((pair, 1))
            entries[loser].append((pair, -1))

        self.groups = groups
        self.plans: dict[tuple, PairPlan] = {}  # plans of earlier calls, which a CUDA graph capture reuses
        self.edges = list(accumulate(lengths, initial=0))
        self.entry_edges = list(accumulate(map(len, entries), initial=0))
        flat = [entry for e in entries for entry in e]
        columns = {
            "edges": self.edges,
            "entry_edges": self.entry_edges,
            "winner": [winner for winner, _ in ends],
            "loser": [loser for _, loser in ends],
            "entry_pair": [p for p, _ in flat],
            "entry_sign": [s for _, s in flat],
            "responses": responses,
            "pairs": pairs,
        }
        joined = torch.tensor([x for column in columns.values() for x in column], dtype=torch.int64)
        parts = to_device(joined, device).split([len(column) for column in columns.values()])
        self.on_device = dict(zip(columns, parts))
        self.responses_move = responses != list(range(len(responses)))
        self.pairs_move = pairs != list(range(len(pairs)))
        self.rows = None  # (N,) permutation of the rows; None if they keep their places
        if self.responses_move:
            rows = [i for r in responses for i in range(layout.edges[r], layout.edges[r + 1])]
            self.rows = to_device(torch.tensor(rows, dtype=torch.int64), device)
        self.response_of_row = to_device(torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)), device)

    def order_rows(self, rows: Tensor) -> Tensor:
        """(N, …) in the caller's order -> (N, …) in this order."""
        return rows if self.rows is None else rows[self.rows]

    def order_responses(self, values: Tensor) -> Tensor:
        """(S,) in the caller's order -> (S,) in this order."""
        return values[self.on_device["responses"]] if self.responses_move else values

    def order_pairs(self, values: Tensor) -> Tensor:
        """(P,) in the caller's order -> (P,) in this order."""
        return values[self.on_device["pairs"]] if self.pairs_move else values

    def restore_rows(self, rows: Tensor) -> Tensor:
        """(N, …) in this order -> (N, …) in the caller's order."""
        return rows if self.rows is None else torch.empty_like(rows).index_copy_(0, self.rows, rows)

    def restore_responses(self, values: Tensor) -> Tensor:
        """(S,) in this order -> (S,) in the caller's order."""
        if not self.responses_move:
            return values
        return torch.empty_like(values).index_copy_(0, self.on_device["responses"], values)

    def restore_pairs(self, values: Tensor) -> Tensor:
        """(P,) in this order -> (P,) in the caller's order."""
        if not self.pairs_move:
            return values
        return torch.empty_like(values).index_copy_(0, self.on_device["pairs"], values)


grouped_order = PerStream(GroupedOrder)


@PerStream
def response_edges(layout: PairLayout, device: torch.device) -> Tensor:
    """(S + 1,) int64: the response boundaries on the device."""
    return to_device(torch.tensor(layout.edges, dtype=torch.int64), device)
