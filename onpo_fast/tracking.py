"""What a run tells: a progress line a stage, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

console = Console(highlight=False, soft_wrap=True)


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


class Tracker:
    """Appends records to metrics.jsonl and their numbers to TensorBoard; adds up the seconds of stages."""

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
