"""Runs a plan of steps within a time limit; one step that fails, hangs or takes too long does not stop the others.

Every step has planned seconds and a maximum. It may use what the steps before it left over, up to its maximum, but
never what is planned for the steps after it. When its time is up its process group is killed and the next step begins.
Results are collected from each step's own folder and written to one JSON file after every step, and every few seconds
in between.

Standard library only: this runs before missing packages are installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLOSING = 10.0  # seconds kept for the summary
SAVE_SECONDS = 5.0  # between two writes while a step runs
GPU_GONE = 75  # exit status of a benchmark that lost the GPU: a new process may continue with --resume
MOST_RESTARTS = 4
LEAST_RESTART_SECONDS = 20.0


@dataclass(frozen=True)
class Step:
    """One or more processes that start together, and what they leave."""

    name: str
    seconds: float  # planned
    most: float  # seconds at most, if earlier steps left some over
    assumption: str  # what the planned seconds stand for
    # ``{out}`` in an argument becomes the step's own folder, ``{budget}`` the seconds in which to begin new work
    commands: list[list[str]]
    read: Callable[[str, Path], Any]  # (output, the step's folder) -> results that JSON can hold
    fault: Callable[[Any], str | None]  # what is wrong with these results; None where they show what they should
    resumes: bool = False  # restart with --resume after a lost GPU or a crash


def planned(group: tuple[Step, ...]) -> float:
    """Seconds of steps that run side by side."""
    return max(step.seconds for step in group)


@dataclass
class Process:
    """One command of a step: restarted where that is allowed, killed with its group when its time is up."""

    step: Step
    command: list[str]
    folder: Path
    end: float  # on the monotonic clock
    environment: dict[str, str]
    log: Callable[[str], None]
    output: list[str] = field(default_factory=list)
    status: int | None = None
    cut: bool = False
    restarts: int = 0

    def start(self) -> None:
        left = self.end - time.monotonic()
        budget = max(left - CLOSING, 0.7 * left)
        extra = ["--resume"] if self.restarts else []
        self.arguments = [
            part.replace("{out}", str(self.folder)).replace("{budget}", f"{budget:.0f}")
            for part in self.command + extra
        ]
        self.log(f"\n$ {' '.join(self.arguments)}\n")
        self.child = subprocess.Popen(
            self.arguments, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, args=(self.child,), daemon=True)
        self.reader.start()

    def _read(self, child: subprocess.Popen) -> None:
        for line in child.stdout:
            self.output.append(line)
            self.log(f"[{self.step.name}] {line}")

    def running(self) -> bool:
        """Whether it still runs; ends it if its time is up, restarts it if it lost the GPU."""
        if self.status is not None or self.cut:
            return False
        if self.child.poll() is None:
            if time.monotonic() < self.end:
                return True
            self.cut = True
            self.kill()
            return False
        self.kill()  # helpers that it left behind
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
        with suppress(ProcessLookupError, PermissionError):  # none of the group is left
            os.killpg(self.child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # it hangs in a driver: go on without it
            self.child.wait(5)
        self.reader.join(5)


class Runner:
    """Runs groups of steps in order and keeps everything in ``data``, which is written to ``path``."""

    def __init__(self, path: Path, seconds: float, data: dict[str, Any], site: Path | None = None) -> None:
        """``site``: a folder that is put first on the import path of every step."""
        self.path, self.end = path, time.monotonic() + seconds
        self.data: dict[str, Any] = {**data, "limit_seconds": seconds, "steps": [], "results": {}}
        self.log_file = open(path.with_suffix(".log"), "w", encoding="utf-8")
        self.lock = threading.Lock()
        paths = [str(site or ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "150",
        }  # fmt: skip

    def left(self) -> float:
        """Seconds for steps."""
        return self.end - CLOSING - time.monotonic()

    def log(self, text: str) -> None:
        with self.lock:
            self.log_file.write(text)
            self.log_file.flush()

    def save(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.new")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def run(
        self,
        groups: list[tuple[Step, ...]],
        scale: float = 1.0,  # of all times
        go_on: Callable[[dict[str, Any]], bool] = lambda results: True,  # asked with all results after every group
    ) -> None:
        """The steps of a group run side by side, the groups one after the other."""
        waiting = [step for group in groups for step in group]
        try:
            for number, group in enumerate(groups):
                later = sum(planned(other) for other in groups[number + 1 :]) * scale
                waiting = waiting[len(group) :]
                self._run_group(group, later, scale)
                if not go_on(self.data["results"]):
                    break
        finally:
            for step in waiting:
                self._note(step, "not run", 0.0)
            self.save()

    def _run_group(self, group: tuple[Step, ...], later: float, scale: float) -> None:
        begin = time.monotonic()
        room = max(self.left() - later, 0.0)
        open_steps: dict[str, list[Process]] = {}
        with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
            try:
                for step in group:
                    folder = Path(work, step.name.replace(" ", "-"))
                    folder.mkdir()
                    end = begin + min(step.most * scale, room)
                    processes = open_steps[step.name] = []
                    for command in step.commands:
                        process = Process(step, command, folder, end, self.environment, self.log)
                        process.start()
                        processes.append(process)
                saved = begin
                while open_steps:
                    for step in group:
                        processes = open_steps.get(step.name)
                        if processes is not None and not any([process.running() for process in processes]):
                            self._finish(step, processes, time.monotonic() - begin)
                            del open_steps[step.name]
                    if time.monotonic() - saved > SAVE_SECONDS:
                        for processes in open_steps.values():
                            self._collect(processes)
                        self.save()
                        saved = time.monotonic()
                    time.sleep(0.1)
            except BaseException as error:  # this process is being stopped, or cannot start one: leave none behind
                for processes in open_steps.values():
                    for process in processes:
                        process.kill()
                    self._collect(processes)
                    if processes:
                        said = f"FAILED: stopped by {type(error).__name__}"
                        self._note(processes[0].step, said, time.monotonic() - begin)
                self.save()
                raise

    def _collect(self, processes: list[Process]) -> Any:
        if not processes:
            return None
        output = "".join("".join(process.output) for process in processes)
        try:
            results = processes[0].step.read(output, processes[0].folder)
        except Exception as error:  # half-written or unexpected: the log has it
            results = {"unreadable": f"{type(error).__name__}: {error}"}
        self.data["results"][processes[0].step.name] = results
        return results

    def _finish(self, step: Step, processes: list[Process], seconds: float) -> None:
        results = self._collect(processes)
        statuses = [process.status for process in processes if process.status]
        restarts = sum(process.restarts for process in processes)
        cut = [f"cut after {seconds:.0f} s"] if any(process.cut for process in processes) else []
        wrong = [said for said in (step.fault(results), f"exit status {statuses[0]}" if statuses else None) if said]
        said = [f"restarted {restarts} times"] if restarts else []
        outcome = f"FAILED: {', '.join(wrong + cut + said)}" if wrong else ", ".join((cut or ["ok"]) + said)
        self._note(step, outcome, seconds)
        if outcome.startswith("FAILED"):
            print("".join("".join(process.output[-15:]) for process in processes), end="", flush=True)

    def _note(self, step: Step, outcome: str, seconds: float) -> None:
        self.data["steps"].append(
            {"name": step.name, "planned": step.seconds, "most": step.most, "seconds": round(seconds, 1),
             "outcome": outcome}
        )  # fmt: skip
        self.save()
        print(f"[{max(self.left(), 0):4.0f} s left] {step.name}: {outcome} ({seconds:.0f} s)", flush=True)

    @property
    def failed(self) -> bool:
        """Whether a step failed or was not reached."""
        return any(step["outcome"].startswith(("FAILED", "not run")) for step in self.data["steps"])
