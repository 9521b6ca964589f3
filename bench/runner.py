"""Runs a plan of steps within a time limit; a step that fails, hangs or takes too long does not stop the others.

Every step has planned seconds and a maximum. It may use time that earlier steps left over, up to its maximum, but not
the time planned for later steps. When its time is up, its process group is killed and the next step starts. Results are
collected from each step's folder and written to one JSON file after every step, and every few seconds in between. If
the disk is full, the files are lost but the run continues.

No process outlives the run: a signal passed to ``Runner.stop`` ends them all, and if the run itself is killed, a
watcher process kills them.

Standard library only: this runs before missing packages are installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLOSING = 10.0  # seconds kept for the summary
SAVE_SECONDS = 5.0  # between two writes while a step runs
GPU_GONE = 75  # exit status of a benchmark that lost the GPU: a new process may continue with --resume
MOST_RESTARTS = 4
LEAST_RESTART_SECONDS = 20.0
KEPT_CHARACTERS = 2**20  # number of characters kept from the beginning, and from the end, of a process's output
LINE_CHARACTERS = 2**16  # longer lines are split

# Reads ids of process groups from stdin: positive when a group starts, negative when it has ended. At end of file it
# kills the groups that are left.
WATCHER = """
import os, sys
groups = set()
for group in map(int, sys.stdin):
    groups.add(group) if group > 0 else groups.discard(-group)
for group in groups:
    try:
        os.killpg(group, 9)
    except OSError:
        pass
"""


@dataclass(frozen=True)
class Step:
    """One or more processes that start together, and how their results are read."""

    name: str
    seconds: float  # planned
    most: float  # maximum seconds, if earlier steps left time over
    assumption: str  # what the planned seconds are based on
    # A function is called when the step starts, since commands may depend on the packages installed by then. In an
    # argument, ``{out}`` is replaced by the step's folder, ``{budget}`` by the seconds in which it may start new work.
    commands: list[list[str]] | Callable[[], list[list[str]]]
    read: Callable[[str, Path], Any]  # (output, the step's folder) -> results that JSON can hold
    fault: Callable[[Any], str | None]  # returns what is wrong with the results, or None
    resumes: bool = False  # restart with --resume after a lost GPU or a crash
    scales: bool = True  # its times follow the limit of the run

    def commands_now(self) -> list[list[str]]:
        return self.commands() if callable(self.commands) else self.commands

    def times(self, scale: float) -> tuple[float, float]:
        """Planned and maximum seconds, scaled by ``scale`` if the step's times scale."""
        return (self.seconds * scale, self.most * scale) if self.scales else (self.seconds, self.most)


def planned(group: tuple[Step, ...], scale: float = 1.0) -> float:
    """Planned seconds of a group of steps that run side by side."""
    return max(step.times(scale)[0] for step in group)


def say(text: str) -> None:
    """Prints a text; does nothing if stdout is closed."""
    with suppress(OSError):  # the terminal or the reader of a pipe is gone
        print(text, flush=True)


class Output:
    """The beginning and the end of a process's output."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.last: deque[str] = deque()
        self.sizes = [0, 0]  # characters in ``first`` and in ``last``
        self.left_out = 0  # characters between them

    def add(self, text: str) -> bool:
        """Adds a text; returns whether it belongs to the beginning."""
        if not self.last and self.sizes[0] + len(text) <= KEPT_CHARACTERS:
            self.first.append(text)
            self.sizes[0] += len(text)
            return True
        self.last.append(text)
        self.sizes[1] += len(text)
        while self.sizes[1] > KEPT_CHARACTERS:
            dropped = len(self.last.popleft())
            self.sizes[1] -= dropped
            self.left_out += dropped
        return False

    def end(self) -> str:
        """Text after the beginning."""
        gap = f"\n[{self.left_out} characters left out]\n" if self.left_out else ""
        return gap + "".join(list(self.last))  # copied, since the reader thread may append

    def text(self) -> str:
        return "".join(self.first) + self.end()


@dataclass
class Process:
    """A command of a step: restarted if allowed, killed with its process group when its time is up."""

    step: Step
    command: list[str]
    folder: Path
    end: float  # on the monotonic clock
    environment: dict[str, str]
    log: Callable[[str], None]
    watch: Callable[[int], None]  # called with the id of a started process group, and its negative at its end
    output: Output = field(default_factory=Output)
    child: subprocess.Popen | None = None
    status: int | None = None
    cut: bool = False
    restarts: int = 0

    def start(self) -> None:
        left = self.end - time.monotonic()
        budget = max(left - CLOSING, 0.7 * left)
        extra = ["--resume"] if self.restarts else []
        self.arguments = [
            part.replace("{out}", str(self.folder)).replace("{budget}", f"{max(budget, 1):.0f}")
            for part in self.command + extra
        ]
        self.log(f"\n$ {' '.join(self.arguments)}\n")
        try:
            self.child = subprocess.Popen(
                self.arguments,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:  # the command does not exist
            self.output.add(f"{error}\n")
            self.status = 127
            return
        self.watch(self.child.pid)
        self.reader = threading.Thread(target=self._read, args=(self.child,), daemon=True)
        self.reader.start()

    def _read(self, child: subprocess.Popen) -> None:
        while line := child.stdout.readline(LINE_CHARACTERS):
            if self.output.add(line):
                self.log(f"[{self.step.name}] {line}")

    def running(self) -> bool:
        """Whether the process still runs; kills it if its time is up, restarts it if it lost the GPU."""
        if self.status is not None or self.cut:
            return False
        if self.child.poll() is None:
            if time.monotonic() < self.end:
                return True
            self.cut = True
            self.end_group()
            return False
        self.end_group()  # kills helpers that are still running
        status = self.child.returncode
        lost = status == GPU_GONE or status < 0
        in_time = self.end - time.monotonic() > LEAST_RESTART_SECONDS
        if self.step.resumes and lost and self.restarts < MOST_RESTARTS and in_time:
            self.restarts += 1
            self.start()
            return True
        self.status = status
        return False

    def kill(self) -> None:
        """Kills the process group without waiting."""
        if self.child is not None:
            with suppress(ProcessLookupError, PermissionError):  # the group has already ended
                os.killpg(self.child.pid, signal.SIGKILL)

    def end_group(self) -> None:
        """Kills the process group and reads the rest of its output."""
        if self.child is None:
            return
        self.kill()
        with suppress(subprocess.TimeoutExpired):  # the process hangs in a driver
            self.child.wait(5)
            self.watch(-self.child.pid)
        self.reader.join(5)


class Runner:
    """Runs groups of steps in order and keeps everything in ``data``, which is written to ``path``."""

    def __init__(self, path: Path, seconds: float, data: dict[str, Any], site: Path | None = None) -> None:
        """``site`` is put first on the import path of every step."""
        self.path, self.end = path, time.monotonic() + seconds
        self.data: dict[str, Any] = {**data, "limit_seconds": seconds, "steps": [], "results": {}}
        self.log_file = open(path.with_suffix(".log"), "wb", buffering=0)
        self.lock = threading.Lock()
        self.disk_failed = False
        self.stopped: int | None = None  # the signal that stopped the run
        paths = [str(site or ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "COLUMNS": "150",
        }
        self.watcher = subprocess.Popen(
            [sys.executable, "-S", "-c", WATCHER], stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )

    def stop(self, number: int, frame: object = None) -> None:
        """Handles a signal by noting it; ``run`` then ends the processes, saves the results and raises SystemExit.

        Raising nothing here ensures that this happens once, however many signals arrive.
        """
        self.stopped = number
        signal.signal(number, signal.SIG_IGN)  # Python's exit would make a second one deadly

    def watch(self, group: int) -> None:
        """Tells the watcher about a process group: its id at the start, the negative at the end."""
        with suppress(OSError):  # the watcher was killed
            self.watcher.stdin.write(f"{group}\n")

    def left(self) -> float:
        """Seconds left for steps."""
        return self.end - CLOSING - time.monotonic()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Reports the first file that cannot be written, and continues."""
        try:
            yield
        except OSError as error:
            if not self.disk_failed:
                self.disk_failed = True
                say(f"cannot write {self.path} or its log ({error}): the check goes on")

    def log(self, text: str) -> None:
        with self.lock, self._writing():
            self.log_file.write(text.encode())

    def save(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.new")
        with self._writing():
            temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)

    def run(
        self,
        groups: list[tuple[Step, ...]],
        scale: float = 1.0,  # factor on the times of steps that scale
        go_on: Callable[[dict[str, Any]], bool] = lambda results: True,  # called with all results after every group
    ) -> None:
        """Runs groups one after the other; the steps of a group run side by side."""
        waiting = [step for group in groups for step in group]
        try:
            for number, group in enumerate(groups):
                later = sum(planned(other, scale) for other in groups[number + 1 :])
                waiting = waiting[len(group) :]
                self._run_group(group, later, scale)
                if not go_on(self.data["results"]):
                    break
        finally:
            for step in waiting:
                self._note(step, "not run", 0.0)
            self.save()
            with suppress(OSError):
                self.watcher.communicate()

    def _run_group(self, group: tuple[Step, ...], later: float, scale: float) -> None:
        begin = time.monotonic()
        room = max(self.left() - later, 0.0)
        open_steps: dict[str, list[Process]] = {step.name: [] for step in group}
        with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
            try:
                for step in group:
                    folder = Path(work, step.name.replace(" ", "-"))
                    folder.mkdir()
                    end = begin + min(step.times(scale)[1], room)
                    for command in step.commands_now():
                        process = Process(step, command, folder, end, self.environment, self.log, self.watch)
                        open_steps[step.name].append(process)
                        process.start()
                saved = begin
                while open_steps:
                    if self.stopped:
                        raise SystemExit(128 + self.stopped)
                    for step in group:
                        processes = open_steps.get(step.name)
                        if processes is not None and not any([process.running() for process in processes]):
                            del open_steps[step.name]
                            self._finish(step, processes, time.monotonic() - begin)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        for step in group:
                            self._collect(step, open_steps.get(step.name, []))
                        self.save()
                        saved = time.monotonic()
                    time.sleep(0.1)
            except BaseException as error:  # the run is being stopped; end all processes
                left = [process for processes in open_steps.values() for process in processes]
                for process in left:  # kill all before waiting, as the next signal may be SIGKILL
                    process.kill()
                for process in left:
                    process.end_group()
                said = signal.Signals(self.stopped).name if self.stopped else f"{type(error).__name__}: {error}"
                for step in group:
                    if step.name in open_steps:
                        self._collect(step, open_steps[step.name])
                        self._note(step, f"FAILED: stopped by {said}", time.monotonic() - begin)
                for process in left:
                    self.log(process.output.end())
                raise

    def _collect(self, step: Step, processes: list[Process]) -> Any:
        """Reads the results of a step so far, and stores them in ``data``."""
        if not processes:
            return None
        output = "".join(process.output.text() for process in processes)
        try:
            results = step.read(output, processes[0].folder)
        except Exception as error:  # half-written or unexpected results; the log has the output
            results = {"unreadable": f"{type(error).__name__}: {error}"}
        self.data["results"][step.name] = results
        return results

    def _finish(self, step: Step, processes: list[Process], seconds: float) -> None:
        results = self._collect(step, processes)
        for process in processes:
            self.log(process.output.end())
        statuses = [process.status for process in processes if process.status]
        restarts = sum(process.restarts for process in processes)
        cut = [f"cut after {seconds:.0f} s"] if any(process.cut for process in processes) else []
        try:
            fault = step.fault(results)
        except Exception as error:
            fault = f"unexpected results, {type(error).__name__}: {error}"
        wrong = [said for said in (fault, f"exit status {statuses[0]}" if statuses else None) if said]
        said = [f"restarted {restarts} times"] if restarts else []
        outcome = f"FAILED: {', '.join(wrong + cut + said)}" if wrong else ", ".join((cut or ["ok"]) + said)
        self._note(step, outcome, seconds)
        if outcome.startswith("FAILED"):
            say("".join("".join(process.output.text().splitlines(keepends=True)[-15:]) for process in processes))

    def _note(self, step: Step, outcome: str, seconds: float) -> None:
        self.data["steps"].append(
            {
                "name": step.name,
                "planned": step.seconds,
                "most": step.most,
                "seconds": round(seconds, 1),
                "outcome": outcome,
            }
        )
        self.save()
        say(f"[{max(self.left(), 0):4.0f} s left] {step.name}: {outcome} ({seconds:.0f} s)")

    @property
    def failed(self) -> bool:
        """Whether a step failed or was not reached."""
        return any(step["outcome"].startswith(("FAILED", "not run")) for step in self.data["steps"])
