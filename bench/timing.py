"""Times calls between marks that they set, with device events on a GPU and the host's clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # more than any GPU's cache, so that inputs are not cached

Call = Callable[[Callable[[], None]], object]  # receives mark(), and calls it at least twice


class Clock:
    """Times calls on one device. The cache is overwritten before each call, so that inputs are read from memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.gpu else 0, dtype=torch.uint8, device=device)

    def laps(self, call: Call) -> list[float]:
        """Makes one call; returns the seconds between its marks."""
        if not self.gpu:
            times: list[float] = []
            call(lambda: times.append(time.perf_counter()))
            return [b - a for a, b in pairwise(times)]
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        torch.cuda.synchronize(self.device)
        self.flush.zero_()  # also hides the launch time of the first kernel
        call(mark)
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]

    def block(self, call: Call, seconds: float, fewest: int, most: int) -> list[list[float]]:
        """Laps of ``fewest`` to ``most`` consecutive calls, as many as fit in ``seconds``, after one warm-up call."""
        start = time.perf_counter()
        self.laps(call)
        once = max(time.perf_counter() - start, 1e-6)
        return [self.laps(call) for _ in range(int(min(max(seconds / once, fewest), most)))]


class Spread(NamedTuple):
    """Statistics of samples, in seconds."""

    median: float
    iqr: float  # interquartile range
    least: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
        return cls(statistics.median(samples), high - low, min(samples), len(samples))


class Products:
    """The bare matrix products through the head, the floor of every method's time: ``torch.mm`` into existing memory.

    Rows are split into as few equal pieces as the memory for one piece of logits allows. Instead of the gradient of the
    logits, the products for dX and dW use the logits themselves.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:  # (N, H), (V, H)
        piece_bytes = 6 * 2**30 if hidden.is_cuda else 128 * 2**20
        pieces = -(-len(hidden) * len(weight) * weight.element_size() // piece_bytes)
        rows = -(-len(hidden) // pieces)
        self.hidden, self.weight = hidden, weight
        self.parts = [slice(start, start + rows) for start in range(0, len(hidden), rows)]
        self.buffer = weight.new_empty(rows, len(weight))
        self.hidden_gradient, self.weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def logits(self) -> None:
        for part in self.parts:
            x = self.hidden[part]
            torch.mm(x, self.weight.T, out=self.buffer[: len(x)])

    def to_hidden(self) -> None:
        for part in self.parts:
            out = self.hidden_gradient[part]
            torch.mm(self.buffer[: len(out)], self.weight, out=out)

    def to_weight(self) -> None:
        for i, part in enumerate(self.parts):
            x = self.hidden[part]
            if i == 0:
                torch.mm(self.buffer[: len(x)].T, x, out=self.weight_gradient)
            else:
                self.weight_gradient.addmm_(self.buffer[: len(x)].T, x)

    def all(self, mark: Callable[[], None]) -> None:
        mark()
        self.logits()
        mark()
        self.to_hidden()
        mark()
        self.to_weight()
        mark()
