"""Runs of the trainer, each in a process of its own, as many at a time as there are cores; they can be resumed."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal

from onpo_fast import oracles
from onpo_fast.console import Progress, progress, say
from onpo_fast.errors import UserError
from onpo_fast.files import atomic_write_text, checksum
from onpo_fast.journal import Journal
from onpo_fast.oracles.classes import ClassPreference
from onpo_fast.run.lock import locked

from . import results
from .measures import measure, measure_best_of_nash, measure_best_response
from .recipe import (
    ARMS,
    BEST_OF_NASH_SAMPLES,
    BEST_RESPONSE_ARM,
    BEST_RESPONSE_ETA,
    CONTROL,
    ITERATIONS,
    OPTIONS,
    OPTIONS_OF_ORACLE,
    ORACLE,
    PROMPTS,
)

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 1.0
# options in which runs of a game differ
OF_A_RUN = "out device seed objective eta tau beta pairing prompts eval_prompts model".split()
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


@dataclass(frozen=True)
class Job:
    """A run: an arm, a seed, the step η of mirror descent and the oracle; or what is done with a finished one.

    Attributes:
        kind: "train": the run itself. "best_response": a copy of its last policy is trained against it for one
            iteration: all responses are those of the frozen policy, so that a large step moves the copy towards the
            best response to it. "best_of_nash": the Nash policy over responses of its π_1, without training.
    """

    arm: str
    seed: int
    eta: float
    oracle: str = ORACLE
    iterations: int = ITERATIONS
    kind: Literal["train", "best_response", "best_of_nash"] = "train"

    @property
    def base(self) -> Job:
        """The run that this is done with."""
        return replace(self, kind="train")

    @property
    def name(self) -> str:
        """The name of its run directory and of its file of results."""
        game = "" if self.oracle == ORACLE else f"-{re.sub(r'[^0-9A-Za-z_.]+', '.', self.oracle)}"
        length = "" if self.iterations == ITERATIONS else f"-T{self.iterations}"
        kind = "" if self.kind == "train" else f"-{self.kind}"
        return f"{self.arm}-eta{self.eta:g}-seed{self.seed}{length}{game}{kind}"

    def options(self) -> dict[str, object]:
        """The options of the trainer."""
        answers = self.kind == "best_response"
        arm = ARMS[BEST_RESPONSE_ARM if answers else self.arm]
        return {
            **_options(self.oracle),
            **PROMPTS,
            "objective": arm.objective,
            **arm.steps(BEST_RESPONSE_ETA if answers else self.eta),
            **arm.options,
            "iterations": 1 if answers else self.iterations,
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
        out: where run directories and logs go.
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
    ended: set[Job] = field(default_factory=set)

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs the jobs that have no results yet, in this order.

        Of a run that fails ``failed`` says why, with its log; the others go on.

        Raises:
            UserError: if another process runs jobs in ``out``, or results that are there are of another game or recipe.
            Stopped: if a signal asks to stop. All runs have saved what they did, and the same command goes on.
        """
        self._check_results(jobs)
        waiting = [job for job in jobs if self._is_needed(job, jobs)]
        if not waiting:
            return
        with locked(self.out / "runs"), progress(f"{len(waiting)} runs", sum(map(units, waiting))) as done:
            try:
                while waiting or self.running:
                    if self.is_late:
                        say("the time is up; the same command goes on")
                        break
                    self._start_some(waiting)
                    time.sleep(POLL_SECONDS)
                    self._collect(done, waiting)
            finally:
                self._stop()

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def _check_results(self, jobs: Sequence[Job]) -> None:
        """Raises ``UserError`` if results are of another run than their name says, or of another game than the jobs."""
        job_of = {self.path(job): job for job in jobs}
        recipes = {(job.oracle, job.iterations): self._recipe(job.oracle) for job in jobs}
        now = {"classes": list(self.preference.names), "matrix": self.preference.full_matrix.tolist()}
        for path in sorted(self.results.glob("*.json")):
            raw = results.read_file(path)
            if (job := job_of.get(path)) is not None:
                names = ("kind", "arm", "eta", "seed", "oracle", "iterations")
                if other := [f"{name} {raw[name]}" for name in names if raw[name] != getattr(job, name)]:
                    raise UserError(f"{path} has results of another run ({', '.join(other)}): rename or remove it")
            recipe = recipes.get((raw["oracle"], raw["iterations"]))
            if recipe is not None and (different := results.differences(raw, now | {"recipe": recipe})):
                raise UserError(
                    f"{path} is of another game than the command would play now: {different}. Give another --results, "
                    "or remove it"
                )

    def _recipe(self, oracle: str) -> dict[str, object]:
        """What is known of the recipe before anything has run, in the form of ``recipe_of``."""
        return {
            "options": {name: value for name, value in _options(oracle).items() if name not in OF_A_RUN},
            "oracle": _of_user(oracle, oracles.fingerprint(self.preference, oracle, functools.cache(checksum))),
            "prompts": {name: checksum(Path(path)) for name, path in PROMPTS.items()},
        }

    def _is_needed(self, job: Job, jobs: Sequence[Job]) -> bool:
        """Whether a job has no results yet, or its run directory is needed for another that has none."""
        if not self.path(job).exists():
            return True
        return any(self._follows(other, job) and not self.path(other).exists() for other in jobs)

    @staticmethod
    def _follows(job: Job, base: Job) -> bool:
        return job.kind != "train" and job.base == base

    def _start_some(self, waiting: list[Job]) -> None:
        """Starts waiting jobs, in their order, while there is room; those that need a run's directory wait for it."""
        unfinished = {one.job for one in self.running} | set(waiting)
        for job in list(waiting):
            if len(self.running) == self.processes:
                return
            if job.kind == "train" or job.base not in unfinished:
                waiting.remove(job)
                self.running.append(self._start(job))

    def path(self, job: Job) -> Path:
        """The file of a job's results."""
        return self.results / f"{job.name}.json"

    def folder(self, job: Job) -> Path:
        """The run directory of a job."""
        return self.out / "runs" / job.name

    def _log(self, job: Job) -> Path:
        return self.folder(job).parent / f"{job.name}.log"

    def _start(self, job: Job) -> _Running:
        folder = self.folder(job)
        command = [sys.executable, "-m", *self._command(job)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = open(self._log(job), "a", encoding="utf-8")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if self.processes > 1:  # threads of several processes would wait for each other
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.processes))
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through this process, once
            preexec_fn=_stop_with_parent,
        )
        return _Running(job, process, log)

    def _command(self, job: Job) -> list[str]:
        """The module to run, with its arguments."""
        folder = self.folder(job)
        if job.kind == "best_of_nash":
            samples = str(BEST_OF_NASH_SAMPLES)
            return ["onpo_fast.evaluate", str(self.folder(job.base)), "--best_of_nash", samples, "--trust_run"]
        command = ["onpo_fast.train", "--out", str(folder), "--device", self.device]
        if (folder / "config.yaml").exists():
            command += ["--resume", "--trust_run"]  # it is this program's own; it refuses options that have changed
        options = job.options()
        if job.kind == "best_response":
            options["model"] = self.folder(job.base) / f"iteration_{job.iterations:02d}" / "policy"
        return [*command, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]

    def _collect(self, done: Progress, waiting: list[Job]) -> None:
        """Counts the work that was done, and takes the results of processes that have ended.

        What needs the directory of a run that failed is given up.
        """
        for one in list(self.running):
            status = one.process.poll()
            now = units(one.job) if status == 0 else done_units(self.folder(one.job))
            done(now - one.seen)
            one.seen = now
            if status is None:
                continue
            self.running.remove(one)
            one.log.close()
            if failure := self._failure(one.job, status):
                waiting[:] = [job for job in waiting if not self._follows(job, one.job)]
                self.failed.append(f"{one.job.name} failed {failure}")
            else:
                self.ended.add(one.job)
            self._clean(waiting)

    def _failure(self, job: Job, status: int) -> str | None:
        """Writes the results of a process that has ended; returns why there are none."""
        if status == 0:
            try:
                self._write(job)
            except (UserError, OSError, ValueError, KeyError) as error:  # of a run directory that was changed, say
                return f"to leave results: {error or type(error).__name__}"
            return None
        log = self._log(job)
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        ended = f"exit status {status}" if status > 0 else signal.Signals(-status).name
        return f"({ended}): {' '.join(last)} (all of it: {log})"

    def _write(self, job: Job) -> None:
        """Writes the results of what has ended; those of a run that was done again, for what follows it, stay."""
        if self.path(job).exists():
            return
        options = Journal(self._finished(job)).note("options")
        found = {
            "kind": job.kind,
            "arm": job.arm,
            "eta": job.eta,
            "seed": job.seed,
            "oracle": job.oracle,
            "iterations": job.iterations,
            "classes": list(self.preference.names),
            "matrix": self.preference.full_matrix.tolist(),
            "recipe": recipe_of(self._finished(job), job),
            "config": {name: value for name, value in options.items() if name not in _paths(job)},
            "environment": json.loads((self._finished(job) / "environment.json").read_text(encoding="utf-8")),
            **self._measured(job),
        }
        atomic_write_text(self.path(job), json.dumps(found, ensure_ascii=False) + "\n")

    def _measured(self, job: Job) -> dict[str, object]:
        """The raw results of what has ended, by its kind."""
        if job.kind == "best_response":
            return measure_best_response(self._finished(job), self.preference)
        if job.kind == "best_of_nash":
            return measure_best_of_nash(self._finished(job), self.preference)
        knows_exact = ARMS[job.arm].exact and job.oracle not in OPTIONS_OF_ORACLE
        return measure(self._finished(job), self.preference, job.eta if knows_exact else None)

    def _finished(self, job: Job) -> Path:
        """The run directory that has a job's results: best of Nash is in the evaluation of its run."""
        return self.folder(job.base if job.kind == "best_of_nash" else job)

    def _clean(self, waiting: Sequence[Job]) -> None:
        """Removes the directories of runs that have ended here and that nothing else needs."""
        needed = {job for other in [*waiting, *(one.job for one in self.running)] for job in (other, other.base)}
        for job in self.ended - needed:
            if self.folder(job).exists() and not self.keep_runs:
                doomed = self.folder(job).with_name(f"{job.name}.removed")  # a half-removed run would not be resumed
                shutil.rmtree(doomed, ignore_errors=True)
                self.folder(job).rename(doomed)
                shutil.rmtree(doomed)

    def _stop(self) -> None:
        """Asks the runs that go on to stop, and waits until they have saved what they did."""
        for one in self.running:
            one.process.send_signal(signal.SIGTERM)
        for one in self.running:
            one.process.wait()
            one.log.close()
        self.running.clear()


def _stop_with_parent() -> None:
    """Asks the kernel to send SIGTERM to this process when its parent ends, however that ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def recipe_of(run: Path, job: Job) -> dict[str, object]:
    """Returns what all runs of a game have in common: options that the recipe sets, and checksums of files."""
    journal = Journal(run)
    options = journal.note("options")
    prompts = {name: checksum(Path(options[name])) for name in PROMPTS}  # the run's own depends on its seed's order
    return {
        "options": {name: options[name] for name in _options(job.oracle) if name not in OF_A_RUN},
        "oracle": _of_user(job.oracle, journal.note("oracle")),
        "prompts": prompts,
    } | ({} if job.kind == "best_response" else {"model": journal.note("model")})  # a best response begins as π_{T+1}


def _options(oracle: str) -> dict[str, object]:
    """The options that the recipe sets in a game."""
    return OPTIONS | OPTIONS_OF_ORACLE.get(oracle, {})


def _of_user(oracle: str, checksums: dict[str, str]) -> dict[str, str]:
    """Checksums of the user's oracle. Those of the experiment's own would change with any file of its package."""
    return {} if oracle in (CONTROL, *OPTIONS_OF_ORACLE) else checksums


def _paths(job: Job) -> tuple[str, ...]:
    """Options with paths of this machine, which say nothing elsewhere: a best response begins in a run directory."""
    return ("out", "prompts", "eval_prompts", *(["model"] if job.kind == "best_response" else []))


def units(job: Job) -> int:
    """Returns how much work a job is, in iterations; the evaluation of four policies is about one."""
    return 1 + job.iterations + job.iterations // 4 if job.kind == "train" else 2


def done_units(folder: Path) -> int:
    """Returns the number of a run's iterations that have ended."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    return path.read_text(encoding="utf-8", errors="replace").count('"stage": "iteration"')
