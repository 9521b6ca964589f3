"""Which rows belong to which response, and which responses to which preference group."""

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

Rows = slice | Tensor  # a slice where the rows are contiguous: indexing is then a view


@dataclass(frozen=True)
class Group:
    """A preference group: responses that must be through the head before any of them has a coefficient."""

    responses: list[int]
    pairs: list[int]
    tokens: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Response boundaries, pairs and preference groups. Lives on the host; equal ones are one object."""

    edges: list[int]  # S + 1 response boundaries
    pairs: Tensor  # (P, 2) int64 on the CPU
    groups: list[Group]  # ordered by their first response

    @classmethod
    def of(cls, cu_seqlens: Tensor, pairs: Tensor) -> Layout:
        """A preference group is a connected component of the graph whose edges are the pairs."""
        return cls._of(*(values.cpu().long().numpy().tobytes() for values in (cu_seqlens, pairs)))

    @classmethod
    @lru_cache(maxsize=64)
    def _of(cls, boundaries: bytes, pair_list: bytes) -> Layout:
        """From int64s, by their bytes: what a cache tells apart fastest."""
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
        groups = [Group(m, p, sum(edges[r + 1] - edges[r] for r in m)) for m, p in zip(members, pair_ids)]
        return cls(edges, pairs, sorted(groups, key=lambda group: group.responses[0]))

    def rows(self, responses: list[int], device: torch.device) -> Rows:
        """The rows of these responses, in order."""
        ranges = [range(self.edges[r], self.edges[r + 1]) for r in responses]
        ranges = [r for r in ranges if len(r)]
        if not ranges:
            return slice(0, 0)
        if all(a.stop == b.start for a, b in pairwise(ranges)):
            return slice(ranges[0].start, ranges[-1].stop)
        return torch.tensor([i for r in ranges for i in r], device=device)

    def lengths(self, responses: list[int], device: torch.device) -> Tensor:
        return torch.tensor([self.edges[r + 1] - self.edges[r] for r in responses], device=device)


def chunks(groups: list[Group], capacity: int) -> Iterator[list[Group]]:
    """Consecutive groups of at most ``capacity`` tokens together; a group that does not fit stands alone."""
    chunk: list[Group] = []
    tokens = 0
    for group in groups:
        if chunk and tokens + group.tokens > capacity:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(group)
        tokens += group.tokens
    if chunk:
        yield chunk
