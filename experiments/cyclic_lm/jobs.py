"""Runs of the trainer, each in a process of its own, as many at a time as there are cores; they can be resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from onpo_fast.errors import UserError
from onpo_fast.files import atomic_write_text
from onpo_fast.oracles.classes import ClassPreference
from onpo_fast.run.tracking import progress, say

from .measures import measure
from .recipe import ARMS, ITERATIONS, OPTIONS, ORACLE, write_prompts

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """A run: an arm, a seed, the step η of mirror descent and the oracle."""

    arm: str
    seed: int
    eta: float
    oracle: str = ORACLE
    iterations: int = ITERATIONS

    @property
    def name(self) -> str:
        """The name of its run directory and of its file of results."""
        game = "" if self.oracle == ORACLE else "-" + re.sub(r"\W+", "_", self.oracle)
        length = "" if self.iterations == ITERATIONS else f"-T{self.iterations}"
        return f"{self.arm}-eta{self.eta:g}-seed{self.seed}{length}{game}"

    def options(self) -> dict[str, object]:
        """The options of the trainer that are not files."""
        arm = ARMS[self.arm]
        return {
            **OPTIONS,
            "objective": arm.objective,
            **arm.steps(self.eta),
            **arm.options,
            "iterations": self.iterations,
            "seed": self.seed,
            "oracle": self.oracle,
        }


@dataclass
class _Running:
    """A job whose process runs; ``seen`` is the number of its units of work that were counted."""

    job: Job
    process: subprocess.Popen
    log: IO
    seen: int = 0


@dataclass
class Runner:
    """Runs jobs and writes their results.

    Attributes:
        out: where run directories, logs and prompts go.
        results: where a file with the results of each job goes. A job that has one is not run again.
        preference: the oracle of all jobs.
        processes: the number of jobs at a time.
        device: value of --device.
        keep_runs: whether run directories stay when their results are written.
        deadline: no work after this time (``time.monotonic()``); None: no limit.
    """

    out: Path
    results: Path
    preference: ClassPreference
    processes: int
    device: str = "auto"
    keep_runs: bool = False
    deadline: float | None = None
    running: list[_Running] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs the jobs that have no results yet, in this order.

        Raises:
            UserError: if a run fails, when the others have ended; names the log.
            Stopped: if a signal asks to stop. All runs have saved what they did, and the same command goes on.
        """
        files = write_prompts(self.out)
        waiting = [job for job in jobs if not self.path(job).exists()]
        total = sum(units(job) for job in waiting)
        if not waiting:
            return
        try:
            with progress(f"{len(waiting)} runs", total) as done:
                while waiting or self.running:
                    if self.deadline is not None and time.monotonic() > self.deadline:
                        say("the time is up; the same command goes on")
                        break
                    while waiting and len(self.running) < self.processes:
                        self.running.append(self._start(waiting.pop(0), files))
                    time.sleep(POLL_SECONDS)
                    self._collect(done)
        finally:
            self._stop()
        if self.failed:
            raise UserError("; ".join(self.failed))

    def path(self, job: Job) -> Path:
        """The file of a job's results."""
        return self.results / f"{job.name}.json"

    def folder(self, job: Job) -> Path:
        """The run directory of a job."""
        return self.out / "runs" / job.name

    def _start(self, job: Job, files: dict[str, str]) -> _Running:
        folder = self.folder(job)
        command = [sys.executable, "-m", "onpo_fast.train", "--out", str(folder), "--device", self.device]
        if (folder / "config.yaml").exists():
            command += ["--resume", "--trust_run"]  # it is this program's own
        else:
            for name, value in {**job.options(), **files}.items():
                command += [f"--{name}", str(value)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = open(folder.with_suffix(".log"), "a", encoding="utf-8")
        paths = [os.getcwd(), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if self.processes > 1:  # threads of several processes would wait for each other
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.processes))
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        return _Running(job, process, log)

    def _collect(self, done) -> None:
        """Counts the work that was done, and takes the results of processes that have ended."""
        for one in list(self.running):
            status = one.process.poll()
            now = units(one.job) if status == 0 else done_units(self.folder(one.job))
            done(now - one.seen)
            one.seen = now
            if status is None:
                continue
            self.running.remove(one)
            one.log.close()
            if status == 0:
                self._write(one.job)
            else:
                log = self.folder(one.job).with_suffix(".log")
                last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
                self.failed.append(f"{one.job.name} failed: {' '.join(last)} (all of it: {log})")

    def _write(self, job: Job) -> None:
        folder = self.folder(job)
        results = {
            "arm": job.arm,
            "eta": job.eta,
            "seed": job.seed,
            "oracle": job.oracle,
            "classes": list(self.preference.names),
            "matrix": self.preference.full_matrix.tolist(),
            "options": {name: value for name, value in job.options().items() if name != "oracle"},
            **measure(folder, self.preference, ARMS[job.arm], job.eta),
        }
        atomic_write_text(self.path(job), json.dumps(results, ensure_ascii=False) + "\n")
        if not self.keep_runs:
            shutil.rmtree(folder)

    def _stop(self) -> None:
        """Asks the runs that go on to stop, and waits until they have saved what they did."""
        for one in self.running:
            one.process.send_signal(signal.SIGTERM)
        for one in self.running:
            one.process.wait()
            one.log.close()
        self.running.clear()


def units(job: Job) -> int:
    """Returns how much work a job is, in iterations; the evaluation is about one for every four."""
    return job.iterations + max(1, job.iterations // 4)


def done_units(folder: Path) -> int:
    """Returns the number of a run's iterations that have ended."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    return path.read_text(encoding="utf-8", errors="replace").count('"stage": "iteration"')
