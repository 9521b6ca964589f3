"""What a run tells: a progress line a stage, metrics.jsonl, TensorBoard, and what it ran on."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ..errors import UserError, naming, one_line
from ..files import advising, open_regular, parse_json, remove, sync, write_jsonl
from . import signals

PACKAGES = ("onpo_fast", "torch", "triton", "transformers", "trl", "liger_kernel", "flash_attn", "numpy")

LONGEST_NAME = 1000  # characters of a record's text
MOST_METRICS = 2**31  # bytes of metrics.jsonl that a run goes on with
WANDB_KEY = 40  # characters of a key, at least

RECORD = {"time": (int, float), "stage": str, "iteration": int}
RECORDS_OF = {  # beyond those, by stage
    "prompts": {"train": int, "held_out": int},
    "fit": {"fit": str, "step": int, "steps": int},
    "iteration": {"seconds": (int, float), "stage_seconds": dict},
    "evaluate": {"seconds": (int, float)},
}

Item = TypeVar("Item")

MANY_RECORDS = 5000  # that to draw takes seconds

OTHERS = dict.fromkeys(("part", "fit", "model"), (str, NoneType))  # what else is not a number or null

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(message: str) -> None:
    """Prints a message as one line; what it holds of files, models and servers cannot steer the terminal."""
    console.print(one_line(message))


said: set[object] = set()  # what a user need not be told again


def say_once(about: object, message: str) -> None:
    """``say``, the first time in a process that something is said about this."""
    if about not in said:
        said.add(about)
        say(message)


@contextmanager
def progress(description: str, total: int, stoppable: bool = True) -> Iterator[Callable[[int], None]]:
    """One line with a bar and the time left; yields a function that is told how much was done.

    ``stoppable``: it raises ``Stopped`` if a signal has asked for it, since what is under way can be done again.
    """
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(description, total=total)

        def advance(done: int) -> None:
            bars.advance(task, done)
            if stoppable:
                signals.stop_if_asked()

        yield advance


def counted(items: Iterable[Item], done: Callable[[int], None]) -> Iterator[Item]:
    """The same items; tells ``done`` how many were taken, a hundred at a time."""
    number = 0
    for number, item in enumerate(items, 1):
        yield item
        if number % 100 == 0:
            done(100)
    done(number % 100)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use: allocated on a GPU since the stage began, resident on a CPU since the process did."""
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
    versions["torch"] = torch.__version__  # with the build, as +cu130
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
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or None


class Tracker:
    """Appends records to metrics.jsonl and their numbers to TensorBoard. Goes on with those that are there.

    Args:
        report_to: where else numbers go, as ``Config`` has it.
        options: the run's, for W&B.
    """

    def __init__(self, directory: Path, report_to: str = "tensorboard", options: dict | None = None) -> None:
        self.path, self.logs = directory / "metrics.jsonl", directory / "tensorboard"
        self.draws = report_to != "none"
        self.part = ""
        records, damaged = self._read()
        self._start(records, rewrite=damaged > 0)
        self.wandb = _Wandb(directory, options or {}, records) if report_to == "wandb" else None

    def begin(self, part: str, keep: Callable[[dict], bool] = lambda record: False) -> int:
        """What is logged from now on belongs to this part of the run; what an earlier attempt at it left is dropped.

        ``keep`` says which of the earlier records still hold. Returns how many there are.
        """
        self.part = part
        if torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        if not self.parts[part]:
            return 0
        records, damaged = self._read()
        held = [record for record in records if record.get("part") != part or keep(record)]
        if damaged or len(held) < len(records):
            self._stop()
            self._start(held, rewrite=True)
        return self.parts[part]

    def log(self, stage: str, iteration: int, **values) -> None:
        record = {"time": time.time(), "stage": stage, "iteration": iteration, "part": self.part, **values}
        with naming(self.path):
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()
        self.parts[self.part] += 1
        self._draw(record)
        if self.wandb:
            self.wandb.log(record)

    def sync(self) -> None:
        """Waits until all records are on the disk."""
        sync(self.path)

    def close(self) -> None:
        self._stop()
        if self.wandb:
            self.wandb.run.finish()

    def _read(self) -> tuple[list[dict], int]:
        """The records so far, and how many lines are none: the file as it was is kept, before it is written anew."""
        lines = _lines(self.path)
        records = whole_records(lines)
        if damaged := len(lines) - len(records):
            kept = self.path.with_name("metrics.damaged.jsonl")
            remove(kept)  # a link there would be followed
            shutil.copyfile(self.path, kept)
            console.print(f"{self.path.name}: {damaged} of {len(lines)} lines are damaged and left out: see {kept}")
        return records, damaged

    def _stop(self) -> None:
        with naming(self.path):
            self.file.close()
        if self.board:
            self.board.close()

    def _start(self, records: list[dict], rewrite: bool) -> None:
        if rewrite or _ends_within_a_line(self.path):
            write_jsonl(self.path, records)
        self.file = open(self.path, "a", encoding="utf-8")
        sync(self.path.parent)  # the file's name too is to survive a power cut
        self.parts: Counter[str] = Counter(record.get("part") or "" for record in records)
        self.steps: Counter[str] = Counter()  # x-axis of each TensorBoard series: records so far
        self.board = None
        if not self.draws:
            return
        if not rewrite and has_events(self.logs, len(records)):
            self.steps.update(_series(record)[0] for record in records)
            self.board = _Board(self.logs)
            return
        remove(self.logs)  # TensorBoard cannot take a record back: all are drawn again
        self.board = _Board(self.logs)
        shown = progress("TensorBoard: draw again", len(records), stoppable=False)
        with shown if len(records) > MANY_RECORDS else nullcontext(lambda count: None) as done:
            for record in records:
                self._draw(record)
                done(1)

    def _draw(self, record: dict) -> None:
        if self.board:
            series, numbers = _series(record)
            self.steps[series] += 1
            self.board.add(record["time"], self.steps[series], {f"{series}/{name}": numbers[name] for name in numbers})


def _series(record: dict) -> tuple[str, dict[str, float]]:
    """The name of a record's series, as fit/policy, and its numbers."""
    series = "/".join([record["stage"], *(str(record[key]) for key in ("fit", "model") if key in record)])
    numbers = {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name not in ("time", "iteration")
    }
    return series, numbers


class _Board:
    """Writes a file of TensorBoard events, one for each record, as they come.

    In the calling thread, unlike torch's ``SummaryWriter``: a disk that is full is the caller's error.
    """

    made = 0  # files in this process

    def __init__(self, directory: Path) -> None:
        now = time.time()
        _Board.made += 1
        # TensorBoard reads files in the order of their names
        name = f"{EVENTS}.{now:017.6f}.{socket.gethostname()}.{os.getpid()}.{_Board.made}"
        self.path = directory / name
        directory.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "xb")
        self.writer = RecordWriter(self.file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))

    def add(self, at: float, step: int, numbers: dict[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=_as_float(value)) for tag, value in numbers.items()]
        self._write(Event(wall_time=_as_float(at), step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        with naming(self.path):
            self.writer.write(event.SerializeToString())
            self.writer.flush()

    def close(self) -> None:
        with naming(self.path):
            self.file.close()


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


EVENTS = "events.out.tfevents"


def has_events(directory: Path, expected: int) -> bool:
    """Whether a directory of TensorBoard's has so many events beside the first one of each file, which has no number.

    False if it is no directory, or holds what is no regular file, or a file that ends within an event. Only lengths
    are read, 12 bytes of each event, and no more events than expected.
    """
    if not directory.is_dir():
        return False
    files = list(directory.glob(f"{EVENTS}*"))
    remaining = expected + len(files)
    for path in files:
        try:
            file = open_regular(path)
        except (UserError, IsADirectoryError):
            return False
        with file:
            size, position = os.fstat(file.fileno()).st_size, 0
            while header := file.read(12):
                position += 12 + (struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size) + 4
                remaining -= 1
                if position > size or remaining < 0:
                    return False
                file.seek(position)
    return remaining == 0


def check_reporter(report_to: str) -> None:
    """Whether W&B, if it is asked for, is installed and knows who reports. Its key is only taken from the environment.

    Raises:
        UserError: if not; says what to do.
    """
    if report_to != "wandb":
        return
    try:
        installed = hasattr(importlib.import_module("wandb"), "init")  # a folder ./wandb of earlier runs has none
    except ImportError:
        installed = False
    if not installed:
        raise UserError("--report_to wandb needs its package: pip install 'onpo_fast[wandb]'")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    key = os.environ.get("WANDB_API_KEY", "")
    if not key:
        raise UserError("--report_to wandb needs WANDB_API_KEY in the environment, or WANDB_MODE=offline")
    if len(key) < WANDB_KEY:
        raise UserError(f"the key in $WANDB_API_KEY can be none: it has fewer than {WANDB_KEY} characters")


class _Wandb:
    """The records as a W&B run, in the run directory unless WANDB_DIR says otherwise.

    It takes no record back: what a resumed run does again is there twice.
    """

    def __init__(self, directory: Path, options: dict, records: list[dict]) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "onpo_fast"),
                name=os.environ.get("WANDB_NAME", directory.name),
                dir=os.environ.get("WANDB_DIR", directory),
                config=options,
                # neither the terminal's text nor a diff of the checkout: only what metrics.jsonl has
                settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
            )
        except Exception as error:  # the network, the service, its keys
            raise UserError(
                f"--report_to wandb: it cannot be reached, or refuses ({error}). WANDB_MODE=offline needs neither key "
                f"nor network (`wandb sync` sends what is there later); --resume goes on with {directory}"
            ) from error
        self.steps: dict[str, int] = {}
        for record in records:
            self.log(record)

    def log(self, record: dict) -> None:
        series, numbers = _series(record)
        if series not in self.steps:
            self.run.define_metric(f"{series}/*", step_metric=f"{series}/record")
        step = self.steps[series] = self.steps.get(series, 0) + 1
        self.run.log({f"{series}/record": step, **{f"{series}/{name}": value for name, value in numbers.items()}})


def _lines(path: Path) -> list[str]:
    """The lines of metrics.jsonl, without the half of one that a crash may have left at the end."""
    if not path.exists():
        return []
    with advising("remove it, and the run goes on without these records"), open_regular(path, MOST_METRICS) as file:
        return file.read(MOST_METRICS).decode("utf-8", "replace").split("\n")[:-1]


def _ends_within_a_line(path: Path) -> bool:
    """Whether a crash has left half a line, to which the next record would be added."""
    if not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def whole_records(lines: Iterable[str | bytes]) -> list[dict]:
    """Those lines of metrics.jsonl that are a record, with what all have, and what its stage has."""
    return [record for line in lines if (record := whole_record(line)) is not None]


def whole_record(line: str | bytes) -> dict | None:
    """The record in a line of metrics.jsonl; None if it is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in RECORD.items()):
        return None
    kinds = OTHERS | RECORDS_OF.get(record["stage"], {})
    numbers = {key: (int, float, NoneType) for key in record.keys() - kinds.keys() - RECORD.keys()}
    if not all(isinstance(record.get(key), kind) for key, kind in (kinds | numbers).items()):
        return None
    inside = [*record, *record.values()]
    for mapping in (value for value in record.values() if isinstance(value, dict)):  # stage → seconds
        if not all(isinstance(value, (int, float)) for value in mapping.values()):
            return None
        inside += [*mapping, *mapping.values()]
    return record if all(map(_can_be_kept, inside)) else None


def _can_be_kept(value: object) -> bool:
    """Whether text and whole numbers can be written again, and drawn."""
    if isinstance(value, str):
        return len(value) <= LONGEST_NAME and value.isprintable()  # half of a surrogate pair is not
    return not isinstance(value, int) or abs(value) < 2**63
