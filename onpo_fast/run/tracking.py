"""metrics.jsonl, TensorBoard, Weights & Biases, and the environment of a run."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import NoneType

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ..console import console, progress
from ..errors import UserError, naming
from ..files import advising, open_regular, parse_json, remove, sync, write_jsonl

PACKAGES = ("onpo_fast", "torch", "triton", "transformers", "trl", "liger_kernel", "flash_attn", "numpy")

MAX_TEXT_CHARACTERS = 1000  # of a text in a record
MAX_METRICS_BYTES = 2**31  # of the metrics.jsonl of a run that is resumed
MIN_WANDB_KEY_CHARACTERS = 40

COMMON_FIELDS = {"time": (int, float), "stage": str, "iteration": int}  # of every record of metrics.jsonl
STAGE_FIELDS = {  # required besides, by stage
    "prompts": {"train": int, "held_out": int},
    "fit": {"fit": str, "step": int, "steps": int},
    "iteration": {"seconds": (int, float), "stage_seconds": dict},
    "evaluate": {"seconds": (int, float)},
    "memory": {"fit": str, "planned": dict},
}

TEXT_FIELDS = dict.fromkeys(("part", "fit", "model"), (str, NoneType))  # all other fields are numbers or null

MANY_RECORDS = 5000  # drawing more takes seconds, and shows its progress


def environment(device: torch.device) -> dict[str, str | None]:
    """Versions of packages (None if not installed), device, threads and commit: what the results depend on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # includes the build, as +cu130
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
    """The git commit of the checkout that this file is in; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or None


class Tracker:
    """Appends records to metrics.jsonl and their numbers to TensorBoard, after the records of earlier processes.

    Args:
        directory: of the run.
        report_to: "tensorboard", "wandb" (W&B as well as TensorBoard) or "none" (only metrics.jsonl).
        options: the run's configuration, shown by W&B.
    """

    def __init__(self, directory: Path, report_to: str = "tensorboard", options: dict | None = None) -> None:
        self.path, self.logs = directory / "metrics.jsonl", directory / "tensorboard"
        self.draws = report_to != "none"
        self.part = ""
        records, damaged = self._read()
        self._start(records, rewrite=damaged > 0)
        self.wandb = _Wandb(directory, options or {}, records) if report_to == "wandb" else None

    def begin(self, part: str, keep: Callable[[dict], bool] = lambda record: False) -> int:
        """Begin a part of the run: later records belong to it, and records of an earlier attempt at it are dropped.

        Args:
            part: name of the part.
            keep: whether a record of the earlier attempt stays.

        Returns:
            The number of records that stay.
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
        """Append a record: numbers, None, or one of ``TEXT_FIELDS``."""
        record = {"time": time.time(), "stage": stage, "iteration": iteration, "part": self.part, **values}
        with naming(self.path):
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()
        self.parts[self.part] += 1
        self._draw(record)
        if self.wandb:
            self.wandb.log(record)

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        sync(self.path)

    def close(self) -> None:
        self._stop()
        if self.wandb:
            self.wandb.run.finish()

    def _read(self) -> tuple[list[dict], int]:
        """Return the records and the number of damaged lines. With any, the file is copied to metrics.damaged.jsonl."""
        lines = _lines(self.path)
        records = [record for line in lines if (record := parse_record(line)) is not None]
        if damaged := len(lines) - len(records):
            kept = self.path.with_name("metrics.damaged.jsonl")
            remove(kept)  # copying would follow a link
            shutil.copyfile(self.path, kept)
            console.print(f"{self.path.name}: {damaged} of {len(lines)} lines are damaged and skipped: see {kept}")
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
        sync(self.path.parent)  # so that a new file survives a power cut
        self.parts: Counter[str] = Counter(record.get("part") or "" for record in records)
        self.steps: Counter[str] = Counter()  # x-axis of each TensorBoard series: number of records
        self.board = None
        if not self.draws:
            return
        if not rewrite and has_events(self.logs, len(records)):
            self.steps.update(_series(record)[0] for record in records)
            self.board = _Board(self.logs)
            return
        remove(self.logs)  # TensorBoard cannot remove single records: draw all again
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
    """The name of a record's series, as "fit/policy", and its numbers."""
    series = "/".join([record["stage"], *(str(record[key]) for key in ("fit", "model") if key in record)])
    numbers = {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name not in ("time", "iteration")
    }
    return series, numbers


class _Board:
    """Writes a file of TensorBoard events, one for each record.

    Unlike torch's ``SummaryWriter`` it writes in the calling thread, so that a full disk raises an error there.
    """

    files_created = 0  # by this process

    def __init__(self, directory: Path) -> None:
        now = time.time()
        _Board.files_created += 1
        # TensorBoard reads files in the order of their names
        name = f"{EVENTS}.{now:017.6f}.{socket.gethostname()}.{os.getpid()}.{_Board.files_created}"
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
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


EVENTS = "events.out.tfevents"


def has_events(directory: Path, expected: int) -> bool:
    """Whether a TensorBoard directory has exactly this many events, not counting each file's version event.

    False also if it is no directory, contains a pipe or device, or a file ends within an event. Only the 12 bytes with
    an event's length are read, and of no more events than expected.
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
    """Check that Weights & Biases can be used, if ``report_to`` is "wandb".

    The key is taken from the environment only and is never saved.

    Raises:
        UserError: if the package or the key is missing; says what to do.
    """
    if report_to != "wandb":
        return
    try:
        installed = hasattr(importlib.import_module("wandb"), "init")  # a folder ./wandb of earlier runs has no init
    except ImportError:
        installed = False
    if not installed:
        raise UserError("--report_to wandb needs its package: pip install 'onpo_fast[wandb]'")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    key = os.environ.get("WANDB_API_KEY", "")
    if not key:
        raise UserError("--report_to wandb needs WANDB_API_KEY in the environment, or WANDB_MODE=offline")
    if len(key) < MIN_WANDB_KEY_CHARACTERS:
        raise UserError(f"WANDB_API_KEY is not a key: it has fewer than {MIN_WANDB_KEY_CHARACTERS} characters")


class _Wandb:
    """Sends the records to W&B, which keeps its files in the run directory unless WANDB_DIR is set.

    W&B cannot remove records: steps that a resumed run repeats are there twice.
    """

    def __init__(self, directory: Path, options: dict, records: list[dict]) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "onpo_fast"),
                name=os.environ.get("WANDB_NAME", directory.name),
                dir=os.environ.get("WANDB_DIR", directory),
                config=options,
                # send only the records: no terminal output, no diff of the checkout
                settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
            )
        except Exception as error:  # the network, the service, its keys
            raise UserError(
                f"--report_to wandb: Weights & Biases cannot be reached or refuses ({error}). WANDB_MODE=offline needs "
                f"neither key nor network (`wandb sync` uploads later); --resume continues the run in {directory}"
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
    """The lines of metrics.jsonl, without an unfinished last line, which a crash may leave."""
    if not path.exists():
        return []
    with (
        advising("remove it, and the run continues without these records"),
        open_regular(path, MAX_METRICS_BYTES) as file,
    ):
        return file.read(MAX_METRICS_BYTES).decode("utf-8", "replace").split("\n")[:-1]


def _ends_within_a_line(path: Path) -> bool:
    """Whether the last line is unfinished, so that the next record would be appended to it."""
    if not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def parse_record(line: str | bytes) -> dict | None:
    """The record in a line of metrics.jsonl; None if a field is missing or has the wrong type."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), kind) for key, kind in COMMON_FIELDS.items()
    ):
        return None
    kinds = TEXT_FIELDS | STAGE_FIELDS.get(record["stage"], {})
    numbers = {key: (int, float, NoneType) for key in record.keys() - kinds.keys() - COMMON_FIELDS.keys()}
    if not all(isinstance(record.get(key), kind) for key, kind in (kinds | numbers).items()):
        return None
    inside = [*record, *record.values()]
    for mapping in (value for value in record.values() if isinstance(value, dict)):  # stage → seconds
        if not all(isinstance(value, (int, float)) for value in mapping.values()):
            return None
        inside += [*mapping, *mapping.values()]
    return record if all(map(_is_writable, inside)) else None


def _is_writable(value: object) -> bool:
    """Whether a text or an integer can be written as JSON in UTF-8, and drawn."""
    if isinstance(value, str):
        return len(value) <= MAX_TEXT_CHARACTERS and value.isprintable()  # half of a surrogate pair is not
    return not isinstance(value, int) or abs(value) < 2**63
