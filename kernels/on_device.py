"""Per-layout tensors on the device: copied once, used by every call with the same layout."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .groups import PairLayout

Cached = TypeVar("Cached")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without host synchronisation."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class PerStream(Generic[Cached]):
    """A cache of ``make(layout, device)``, with one entry for each layout and CUDA stream.

    A copy to the device is ordered only with the work of its own stream; another stream could read it too early.
    Nothing may be copied while a CUDA graph is captured. The entry of any stream serves then, because a capture begins
    with a synchronised device. It is never evicted, because the graph reads this memory at every replay.
    """

    CAPACITY = 32  # entries; the least recently used is evicted first

    def __init__(self, make: Callable[[PairLayout, torch.device], Cached]) -> None:
        self.make = make
        self.entries: OrderedDict[tuple[PairLayout, torch.device, int], Cached] = OrderedDict()
        self.read_by_graphs: list[Cached] = []  # never evicted
        self.lock = threading.Lock()  # autograd runs a second backward pass in a thread of its own

    def __call__(self, layout: PairLayout, device: torch.device) -> Cached:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (layout, device, stream)
        with self.lock:
            if capturing(device):
                known = [entry for (other, place, _), entry in self.entries.items() if (other, place) == key[:2]]
                result = known[-1] if known else self.make(layout, device)
                self.read_by_graphs.append(result)
                return result
            if key not in self.entries:
                self.entries[key] = self.make(layout, device)
                if len(self.entries) > self.CAPACITY:
                    self.entries.popitem(last=False)
            self.entries.move_to_end(key)
            return self.entries[key]
