"""What a run tells: a progress line a stage, metrics.jsonl, TensorBoard, and what it ran on."""

from __future__ import annotations

import json
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

PACKAGES = ("onpo_fast", "torch", "triton", "transformers", "trl", "liger_kernel", "flash_attn", "numpy")

console = Console(highlight=False, soft_wrap=True, markup=False)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """One line with a bar and the time left; yields a function that is told how much was done."""
    columns = (
        TextColumn("{task.description:<34}"), BarColumn(24), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(description, total=total)
        yield lambda done: bars.advance(task, done)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def environment(device: torch.device) -> dict[str, str | None]:
    """What the numbers of a run depend on: versions (None where absent), device and commit."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        **versions,
        "python": platform.python_version(),
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "commit": _commit(),
    }


def _processor() -> str:
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return models[0] if models else platform.machine()


def _commit() -> str | None:
    """Of the checkout that this file is in; None if it is installed elsewhere."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or None


class Tracker:
    """Appends records to metrics.jsonl and their numbers to TensorBoard."""

    def __init__(self, directory: Path) -> None:
        self.file = open(directory / "metrics.jsonl", "a", encoding="utf-8")
        self.board = SummaryWriter(directory / "tensorboard")
        self.steps: dict[str, int] = {}  # x-axis of each TensorBoard series: records so far

    def log(self, stage: str, iteration: int, **values) -> None:
        record = {"time": time.time(), "stage": stage, "iteration": iteration, **values}
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()
        series = "/".join([stage, *(str(values[key]) for key in ("fit", "model") if key in values)])
        step = self.steps[series] = self.steps.get(series, 0) + 1
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{series}/{name}", value, step)
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()
