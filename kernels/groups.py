"""Preference groups: which rows belong to which response, and which responses are compared with each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Rows = slice | Tensor  # a slice if the rows are contiguous, so that indexing returns a view


@dataclass(frozen=True)
class ResponseGroup:
    """A preference group: responses linked by pairs, whose loss derivatives depend on each other's log-probs."""

    responses: list[int]
    pairs: list[int]
    tokens: int


@dataclass(frozen=True, eq=False)
class PairLayout:
    """Response boundaries, pairs and preference groups of one batch, on the host. Equal layouts are one object."""

    edges: list[int]  # S + 1 response boundaries
    pairs: Tensor  # (P, 2) int64 on the CPU
    groups: list[ResponseGroup]  # ordered by their first response

    @classmethod
    def of(cls, cu_seqlens: Tensor, pairs: Tensor) -> PairLayout:
        """Build a layout from (S+1,) boundaries and (P, 2) pairs, or return the cached one.

        A preference group is a connected component of the graph whose nodes are the responses and whose edges are
        the pairs.
        """
        return cls._of(*(values.cpu().long().numpy().tobytes() for values in (cu_seqlens, pairs)))

    @classmethod
    @lru_cache(maxsize=64)
    def _of(cls, boundaries: bytes, pair_list: bytes) -> PairLayout:
        """Build a layout from int64 values as bytes, which hash quickly as an lru_cache key."""
        edges = np.frombuffer(boundaries, np.int64).tolist()
        pairs = torch.from_numpy(np.frombuffer(pair_list, np.int64).reshape(-1, 2).copy())
        responses = len(edges) - 1
        if responses == 0:
            return cls(edges, pairs, [])
        winners, losers = pairs.numpy().T
        graph = coo_array(([True] * len(pairs), (winners, losers)), shape=(responses, responses))
        count, label = connected_components(graph, directed=False)
        members: list[list[int]] = [[] for _ in range(count)]
        pair_ids: list[list[int]] = [[] for _ in range(count)]
        for response, group in enumerate(label):
            members[group].append(response)
        for pair, group in enumerate(label[winners]):
            pair_ids[group].append(pair)
        groups = [ResponseGroup(m, p, sum(edges[r + 1] - edges[r] for r in m)) for m, p in zip(members, pair_ids)]
        return cls(edges, pairs, sorted(groups, key=lambda group: group.responses[0]))

    def rows(self, responses: list[int], device: torch.device) -> Rows:
        """Return the rows of these responses, in order."""
        ranges = [range(self.edges[r], self.edges[r + 1]) for r in responses]
        ranges = [r for r in ranges if len(r)]
        if not ranges:
            return slice(0, 0)
        if all(a.stop == b.start for a, b in pairwise(ranges)):
            return slice(ranges[0].start, ranges[-1].stop)
        return torch.tensor([i for r in ranges for i in r], device=device)

    def lengths(self, responses: list[int], device: torch.device) -> Tensor:
        """Return the number of rows of each of these responses."""
        return torch.tensor([self.edges[r + 1] - self.edges[r] for r in responses], device=device)


def split_into_chunks(groups: list[ResponseGroup], capacity: int) -> Iterator[list[ResponseGroup]]:
    """Yield consecutive groups with at most ``capacity`` tokens together; a larger group is a chunk of its own."""
    chunk: list[ResponseGroup] = []
    tokens = 0
    for group in groups:
        if chunk and tokens + group.tokens > capacity:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(group)
        tokens += group.tokens
    if chunk:
        yield chunk
