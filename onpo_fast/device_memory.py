"""The memory of a device: how much there is, and how much this process takes."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def device_bytes(device: torch.device) -> int | None:
    """Returns the bytes that this process may take: free, or taken by it already; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limits = [] if available is None else [available + (resident_bytes() or 0)]
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.exists() else ""
    limits += [int(text)] if text.isdigit() else []
    return min(limits, default=None)


_earlier_peak = 0  # bytes, before the last ``reset_peak``


def highest_peak_bytes(device: torch.device) -> int:
    """Returns the most bytes since the process began: allocated on a GPU, resident on a CPU; 0 if unknown."""
    return max(_earlier_peak, peak_bytes(device) or 0)


def resident_bytes() -> int | None:
    """Returns the bytes of this process that are in memory; None where the system does not say."""
    return _kilobytes(STATUS, "VmRSS")


def peak_bytes(device: torch.device) -> int | None:
    """Returns the most bytes since ``reset_peak``: allocated on a GPU, resident on a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(STATUS, "VmHWM")


def reset_peak(device: torch.device) -> None:
    """Begins a new peak at what is taken now. A system that cannot keeps the peak since the process began."""
    global _earlier_peak
    _earlier_peak = max(_earlier_peak, peak_bytes(device) or 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        CLEAR_REFS.write_text("5")  # resets the peak resident set size, and nothing else
    except OSError:  # another system, or a container that forbids it
        return


def _kilobytes(file: Path, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE) if file.exists() else None
    return None if found is None else 1024 * int(found[1])


def release_freed() -> None:
    """Gives memory that the process has freed back to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
