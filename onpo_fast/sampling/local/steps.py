"""The forward pass of a decode step: its number of rows and columns, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ...errors import UserError
from ...out_of_memory import is_out_of_memory

COLUMN_MULTIPLE = 8  # attention reads a multiple of so many columns, as its kernels on GPUs want
ROW_MULTIPLE = 8  # a step has a multiple of so many rows: on a CPU oneDNN keeps code and buffers for each number
GRAPH_COLUMNS = 256  # as COLUMN_MULTIPLE, where each number needs graphs of its own

Forward: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
Replay: TypeAlias = Callable[[], Tensor]


class Steps:
    """Forward passes whose kernels are launched one by one.

    Args:
        forward: returns the (n, V) logits of the next token of n rows, given their last tokens and the positions of
            these, (n,) int64 each, and the number of columns of the cache that attention reads.
        slots: the most rows.
        limit: the most tokens of a row.
    """

    def __init__(self, forward: Forward, slots: int, limit: int) -> None:
        self.forward, self.slots, self.limit = forward, slots, limit

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the numbers of rows and columns of a step that needs so many."""
        return min(rounded(rows, ROW_MULTIPLE), self.slots), rounded(columns, COLUMN_MULTIPLE)

    def __call__(self, tokens: Tensor, positions: Tensor, columns: int) -> Tensor:
        """Returns the logits, as ``forward``. The next call may overwrite them."""
        return self.forward(tokens, positions, columns)


class GraphedSteps(Steps):
    """Forward passes as CUDA graphs: one launch for all kernels of a step, where the host would be slower than the GPU.

    There is a graph for each number of rows, which are the slots, half of them, a quarter and so on. A graph holds the
    addresses of what it reads, so inputs have buffers of their own, and all graphs are dropped when the cache grows.
    Each is compared with the forward pass, on two inputs, before it is used.

    Args:
        device: the GPU.
        tolerance: the largest difference between logits of a graph and of the forward pass.
        new_capture: called for each set of graphs; returns a function that captures another as a CUDA graph and returns
            its replay.
    """

    def __init__(
        self,
        forward: Forward,
        slots: int,
        limit: int,
        device: torch.device,
        tolerance: float,
        new_capture: Callable[[torch.device], Callable[[Replay], Replay]] | None = None,
    ) -> None:
        super().__init__(forward, slots, limit)
        self.device, self.tolerance, self.new_capture = device, tolerance, new_capture or CudaGraphs
        self.tokens, self.positions = torch.zeros(2, slots, dtype=torch.int64, device=device)
        self.columns = 0  # of all graphs
        self.graphs: dict[int, Replay] = {}  # by the number of rows

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        count = self.slots
        while count % 2 == 0 and count // 2 >= rows:
            count //= 2
        most = rounded(self.limit, COLUMN_MULTIPLE)
        return count, max(self.columns, min(rounded(columns, GRAPH_COLUMNS), most))

    def __call__(self, tokens: Tensor, positions: Tensor, columns: int) -> Tensor:
        """Returns the logits; see ``Steps``.

        Raises:
            UserError: if the model's forward pass cannot be captured, or a graph gives other logits than it.
        """
        count = len(tokens)
        if columns != self.columns:
            self.graphs.clear()
            self.capture = self.new_capture(self.device)
            self.columns = columns
        if count not in self.graphs:
            self._add(count, tokens, positions)
        self.tokens[:count], self.positions[:count] = tokens, positions
        return self.graphs[count]()

    def _add(self, count: int, tokens: Tensor, positions: Tensor) -> None:
        """Captures the graph of a number of rows, and checks it.

        It is captured with other inputs than those of the step, which come last, as a constant that it holds would show
        in their logits. The others write to the last position, which is read only after it is written again.
        """
        compute = partial(self.forward, self.tokens[:count], self.positions[:count], self.columns)
        self.tokens[:count], self.positions[:count] = 0, min(self.columns, self.limit) - 1
        wanted = compute()  # grows the cache and loads kernels, which a capture cannot
        try:
            replay = self.capture(compute)
        except Exception as error:  # what a capture does not allow has errors of many types, and it may not be undone
            if is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"the model's forward pass cannot be captured as a CUDA graph ({reason}): set --cuda_graphs false"
            ) from error
        self._check(replay, wanted)
        self.tokens[:count], self.positions[:count] = tokens, positions
        self._check(replay, compute())
        self.graphs[count] = replay

    def _check(self, replay: Replay, wanted: Tensor) -> None:
        difference = float((replay().float() - wanted.float()).abs().max())
        if not difference <= self.tolerance:  # nor where it is NaN
            raise UserError(f"a CUDA graph gives logits that are up to {difference:.2g} off: set --cuda_graphs false")


class CudaGraphs:
    """Captures CUDA graphs that share their memory, as only one at a time is replayed and its result read.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, compute: Replay) -> Replay:
        """Returns a function that replays ``compute``. All tensors that it reads must stay where they are."""
        graph = torch.cuda.CUDAGraph()
        # another thread may ask an oracle on another GPU meanwhile
        with torch.cuda.device(self.device), torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            found = compute()

        def replay() -> Tensor:
            with torch.cuda.device(self.device):
                graph.replay()
            return found

        return replay


def rounded(count: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below a number."""
    return -(-count // multiple) * multiple
