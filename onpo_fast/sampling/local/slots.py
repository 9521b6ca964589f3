"""A KV cache of rows that are each at a position of their own.

The key and value of position p are in column p of their row. A row may start, end or move at any step without a change
to the others: what its columns hold beyond its own position is masked.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .steps import rounded

# Columns that are added at a time. On a CPU all that may be needed: those that are not written take no memory.
GROWTH = {"cpu": 2**31, "cuda": 256}

States = list[tuple[Tensor, Tensor]]  # keys and values of each layer, of one context: (heads, length, size)


@dataclass
class Step:
    """What the next forward pass adds: one token to each of n rows, the first n of the cache."""

    dtype: torch.dtype  # of the cache
    slots: int  # rows of the cache
    limit: int  # columns that it may need
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (n,) int64
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (n,) int64: 0, 1, …, n − 1
    columns: int = 0  # columns that attention reads


class SlotCache(Cache):
    """Keys and values of up to ``slots`` rows with at most ``limit`` tokens each, in ``dtype``.

    On a CPU, memory is taken by what is written. On a GPU it grows with the longest row. Layers are made when they are
    first used, as the model's dimensions are known only then.
    """

    def __init__(self, slots: int, limit: int, dtype: torch.dtype) -> None:
        self.step = Step(dtype, slots, limit)
        self.every_row: Tensor | None = None  # 0, 1, …, slots − 1; a CUDA graph holds its address
        super().__init__(layer_class_to_replicate=partial(SlotLayer, self.step))

    def expect(self, positions: Tensor, columns: int) -> None:
        """Says what the next forward pass adds.

        Args:
            positions: (n,) int64, the position of each row's token.
            columns: the number that attention reads, above all positions.
        """
        step = self.step
        if self.every_row is None:
            self.every_row = torch.arange(step.slots, device=positions.device)
        step.rows, step.positions, step.columns = self.every_row[: len(positions)], positions, columns

    def fill(self, slots: Sequence[int], states: States) -> None:
        """Copies the states of a context to the first columns of rows."""
        while len(self.layers) < len(states):
            self.layers.append(self.layer_class_to_replicate())
        for layer, (keys, values) in zip(self.layers, states):
            layer.fill(slots, keys, values)

    def move(self, source: int, target: int) -> None:
        """Copies a row over another."""
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, (slots, heads, columns, size) each."""

    is_sliding = False

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes both tensors, with no columns yet, of the heads and sizes of (n, heads, length, size) states."""
        self.keys, self.values = (
            states.new_zeros(self.step.slots, states.shape[1], 0, states.shape[3], dtype=self.step.dtype)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Adds the states of one token to each row, (n, heads, 1, size), and returns those of all its columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.step
        self._reserve(step.columns)
        found = []
        for states, new in ((self.keys, key_states), (self.values, value_states)):
            states[step.rows, :, step.positions] = new[:, :, 0].to(step.dtype)
            found.append(states[: len(step.rows), :, : step.columns])
        return found[0], found[1]

    def fill(self, slots: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Copies (heads, length, size) states to the first columns of rows."""
        if not self.is_initialized:
            self.lazy_initialization(keys[None], values[None])
        length = keys.shape[1]
        self._reserve(length)
        for slot in slots:
            self.keys[slot, :, :length] = keys
            self.values[slot, :, :length] = values

    def _reserve(self, columns: int) -> None:
        """Makes room for as many columns. New ones are 0, as what is masked must be finite."""
        have = self.keys.shape[2]
        if columns > have:
            growth = GROWTH.get(self.keys.device.type, GROWTH["cuda"])
            wanted = max(columns, min(self.step.limit, rounded(columns, growth)))
            self.keys, self.values = (_widened(states, wanted) for states in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of columns and the first of them, for masks that transformers makes."""
        return self.step.columns, 0

    def get_seq_length(self) -> int:
        """Returns the columns before the new one: a length for families that ask for one."""
        return max(0, self.step.columns - 1)

    def get_max_length(self) -> int:
        """Returns the most columns that there may be."""
        return self.step.limit


def _widened(states: Tensor, columns: int) -> Tensor:
    """Returns (slots, heads, length, size) states with more columns, which are 0.

    On a CPU the memory is of a kind that the system gives page by page, when it is first written.
    """
    slots, heads, length, size = states.shape
    shape = (slots, heads, columns, size)
    bytes_ = math.prod(shape) * states.element_size()
    if states.device.type != "cpu" or not bytes_:
        return torch.nn.functional.pad(states, (0, 0, 0, columns - length))
    memory = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = torch.frombuffer(memory, dtype=states.dtype).view(shape)
    found[:, :, :length] = states
    return found
