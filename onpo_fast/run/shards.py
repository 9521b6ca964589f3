"""Tensors on disk as the ranks have them: a safetensors file a rank, with where each of its tensors begins.

The files are those of ``torch.distributed.checkpoint`` in its format without pickle: its ``HuggingFaceStorageReader``
reads them. They are written and read here because that writer holds another copy in memory, gathers all ranks' plans
while training goes on, and takes no quantised tensors; of what FSDP2 splits, by rows, resharding is a slice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import naming
from ..files import remove, sync

OFFSETS = (
    "DCP_SHARDING_INFO"  # in a file's metadata: name → {"saved_offsets": where its tensor begins in the whole one}
)


@dataclass(frozen=True)
class HostShards:
    """A rank's parts of tensors, in host memory."""

    tensors: dict[str, Tensor]
    offsets: dict[str, list[int]]


def copy_shards(tensors: dict[str, Tensor]) -> HostShards:
    """Copies this rank's parts to host memory. Waits for the device, since the optimizer is about to change them.

    The memory is not pinned: torch would never free it, and rounds its size up to a power of two.
    """
    copied = {
        name: local(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return HostShards(
        copied, {name: [first_row(tensor)] + [0] * (tensor.dim() - 1) for name, tensor in tensors.items()}
    )


def write_shards(path: Path, shards: HostShards) -> None:
    """Writes a rank's file, and waits until it is on the disk. The copy in memory is freed."""
    offsets = {name: {"saved_offsets": shards.offsets[name][: t.dim()]} for name, t in shards.tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        remove(path)
        save_file(shards.tensors, path, {"format": "pt", OFFSETS: json.dumps(offsets)})
        shards.tensors.clear()
    sync(path)
    sync(path.parent)


class StoredShards:
    """The tensors in the files of some ranks.

    Raises:
        SafetensorError, ValueError, …: if the files are anything else (``fit_states.NO_STATE``).
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.chunks: dict[str, list[tuple[int, list[int], Any]]] = {}  # first row, shape, and file, by name
        for path in files:
            file = safe_open(path, "pt")
            offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            names = file.keys()
            for name in names:
                begins = offsets[name]["saved_offsets"] if name in offsets else [0]
                self.chunks.setdefault(name, []).append(((*begins, 0)[0], file.get_slice(name).get_shape(), file))

    def whole(self, name: str) -> Tensor:
        """Returns a tensor as the first of the files has it."""
        return self.chunks[name][0][2].get_tensor(name)

    def rows_of(self, name: str, parameter: Tensor) -> Tensor:
        """Returns the rows of a tensor that this rank has of a parameter of the same shape.

        Raises:
            ValueError: if its shape is another, or rows are missing.
        """
        own, first = local(parameter), first_row(parameter)
        rows = own.shape[0]
        found: dict[int, Tensor] = {}  # by first row
        for begin, shape, file in self.chunks[name]:
            low, high = max(begin, first), min(begin + shape[0], first + rows)
            if shape[1:] != list(parameter.shape[1:]) or begin + shape[0] > parameter.shape[0]:
                raise ValueError(f"{name} does not have the shape {tuple(parameter.shape)}")
            if low < high and low not in found:
                found[low] = file.get_slice(name)[low - begin : high - begin]
        values = torch.cat([found[low] for low in sorted(found)]) if found else torch.empty(0, *own.shape[1:])
        if values.shape != own.shape:
            raise ValueError(f"{name} lacks rows")
        return values


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank has: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Returns where this rank's part of a tensor begins."""
    if not isinstance(tensor, DTensor):
        return 0
    chunks = tensor.__create_chunk_list__()  # what torch.distributed.checkpoint asks of a tensor
    return chunks[0].offsets[0] if chunks and tensor.dim() else 0


def like(parameter: Tensor, values: Tensor) -> Tensor:
    """Returns this rank's rows as a tensor that is sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return values
    mesh, placements = parameter.device_mesh, parameter.placements
    values = values.to(local(parameter).device)
    return DTensor.from_local(
        values, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
