"""The forward pass of a decode step: its number of rows and columns, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ...out_of_memory import is_out_of_memory
from ...run.tracking import say_once

COLUMNS = 8  # attention reads a multiple of so many columns, as its kernels on GPUs want
ROWS = 8  # a step has a multiple of so many rows: oneDNN keeps code and buffers for each number that it has met
GRAPH_COLUMNS = 256  # as COLUMNS, where each number needs graphs of its own

Forward: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
Replay: TypeAlias = Callable[[], Tensor]


class Steps:
    """Forward passes whose kernels are launched one by one.

    Args:
        forward: returns the (n, V) logits of the next token of n rows, given their last tokens and the positions of
            these, (n,) int64 each, and the number of columns of the cache that attention reads.
        slots: the most rows.
        limit: the most columns.
    """

    def __init__(self, forward: Forward, slots: int, limit: int) -> None:
        self.forward, self.slots, self.limit = forward, slots, limit

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the numbers of rows and columns of a step that needs so many."""
        return min(rounded(rows, ROWS), self.slots), min(rounded(columns, COLUMNS), self.limit)

    def __call__(self, tokens: Tensor, positions: Tensor, columns: int) -> Tensor:
        """Returns the logits, as ``forward``; their memory may be that of the next step's."""
        return self.forward(tokens, positions, columns)


class GraphedSteps(Steps):
    """Forward passes as CUDA graphs: one launch for all kernels of a step, where the host would be slower than the GPU.

    There is a graph for each number of rows, which are the slots, half of them, a quarter and so on. A graph holds the
    addresses of what it reads, so inputs have buffers of their own, and all graphs are dropped when the cache grows.
    Each is compared with the forward pass when it is captured; where that fails, steps are launched as in ``Steps``.

    Args:
        device: the GPU.
        tolerance: the largest difference between logits of a graph and of the forward pass.
        capture: returns a function that does again what its argument does, in the same memory (a CUDA graph).
    """

    def __init__(
        self,
        forward: Forward,
        slots: int,
        limit: int,
        device: torch.device,
        tolerance: float,
        capture: Callable[[Replay], Replay] | None = None,
    ) -> None:
        super().__init__(forward, slots, limit)
        self.tolerance = tolerance
        self.tokens, self.positions = torch.zeros(2, slots, dtype=torch.int64, device=device)
        self.columns = 0  # of all graphs
        self.graphs: dict[int, Replay] = {}  # by the number of rows
        self.capture = capture or CudaGraphs()
        self.failed = False

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        if self.failed:
            return super().shape(rows, columns)
        count = self.slots
        while count % 2 == 0 and count // 2 >= rows:
            count //= 2
        return count, max(self.columns, min(rounded(columns, GRAPH_COLUMNS), self.limit))

    def __call__(self, tokens: Tensor, positions: Tensor, columns: int) -> Tensor:
        if self.failed:
            return super().__call__(tokens, positions, columns)
        count = len(tokens)
        self.tokens[:count], self.positions[:count] = tokens, positions
        if columns != self.columns:
            self.graphs.clear()
            self.columns = columns
        if count in self.graphs:
            return self.graphs[count]()

        def compute() -> Tensor:
            kind = tokens.device.type
            # what autocast would keep converted, it frees at the end of the block, under the graph
            with torch.autocast(
                kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
            ):
                return self.forward(self.tokens[:count], self.positions[:count], columns)

        wanted = compute()  # grows the cache and loads kernels, which a capture cannot
        self._add(count, compute, wanted)
        return wanted

    def _add(self, count: int, compute: Replay, wanted: Tensor) -> None:
        """Captures the graph of a number of rows, and keeps it if it gives the logits that it should."""
        try:
            self.graphs[count] = self.capture(compute)
            difference = float((self.graphs[count]().float() - wanted.float()).abs().max())
            if not difference <= self.tolerance:  # nor where it is NaN
                raise RuntimeError(f"its logits are up to {difference:.2g} off")
        except Exception as error:  # what a model does that a capture does not allow has errors of many types
            if is_out_of_memory(error):
                raise
            self.failed = True
            self.graphs.clear()
            reason = str(error).partition("\n")[0]
            say_once("graphs", f"responses are sampled without CUDA graphs, as a capture failed: {reason}")


class CudaGraphs:
    """Captures CUDA graphs that share their memory, as only one at a time is replayed and its result read."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Replay) -> Replay:
        """Returns a function that replays ``compute``. All tensors that it reads must stay where they are."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            found = compute()

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


def rounded(count: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below a number."""
    return -(-count // multiple) * multiple
