"""Seconds of a call between marks that it sets: device events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # more than any GPU's cache: no call starts with its inputs at hand

Call = Callable[[Callable[[], None]], object]  # is given mark(), which it calls at least twice


class Clock:
    """Times calls on one device. Input is read from memory: the cache is overwritten before each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.gpu else 0, dtype=torch.uint8, device=device)

    def laps(self, call: Call) -> list[float]:
        """One call: the seconds between its marks."""
        if not self.gpu:
            times: list[float] = []
            call(lambda: times.append(time.perf_counter()))
            return [b - a for a, b in pairwise(times)]
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        torch.cuda.synchronize(self.device)
        self.flush.zero_()  # also covers for the launch of the first kernel, which would be counted otherwise
        call(mark)
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]

    def block(self, call: Call, seconds: float, fewest: int, most: int) -> list[list[float]]:
        """Laps of consecutive calls, as many as fit ``seconds`` but at least and at most so many; one more warms up."""
        start = time.perf_counter()
        self.laps(call)
        once = max(time.perf_counter() - start, 1e-6)
        return [self.laps(call) for _ in range(int(min(max(seconds / once, fewest), most)))]


class Spread(NamedTuple):
    """Of samples in seconds."""

    median: float
    iqr: float  # between the quartiles
    least: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
        return cls(statistics.median(samples), high - low, min(samples), len(samples))


class Products:
    """The bare products through the head, the floor of every method: ``torch.mm`` into memory that is there already.

    In as few pieces of equal size as the memory for one piece of logits allows. The gradients' operands are logits.
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
