"""What the host plans for a layout, kept on the device: copied once, used by every call with the same layout."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .groups import Layout

Planned = TypeVar("Planned")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy without host synchronisation: neither this process nor the device waits for the other."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class PerStream(Generic[Planned]):
    """Keeps what ``make(layout, device)`` returned, one copy for each CUDA stream.

    A copy to the device is in order with the work of its own stream only; another stream could read it too early. While
    a CUDA graph is captured nothing may be copied: what any stream has is taken, since a capture begins with a
    synchronised device, and is kept for good, since the graph reads this memory whenever it is replayed.
    """

    KEPT = 32  # layouts and streams, the least recently used go first

    def __init__(self, make: Callable[[Layout, torch.device], Planned]) -> None:
        self.make = make
        self.kept: OrderedDict[tuple[Layout, torch.device, int], Planned] = OrderedDict()
        self.read_by_graphs: list[Planned] = []  # for good
        self.lock = threading.Lock()  # a second backward pass runs in a thread of autograd's

    def __call__(self, layout: Layout, device: torch.device) -> Planned:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (layout, device, stream)
        with self.lock:
            if capturing(device):
                known = [kept for (other, place, _), kept in self.kept.items() if other is layout and place == device]
                result = known[-1] if known else self.make(layout, device)
                self.read_by_graphs.append(result)
                return result
            if key not in self.kept:
                self.kept[key] = self.make(layout, device)
                if len(self.kept) > self.KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return self.kept[key]
