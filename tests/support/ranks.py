"""Runs of several ranks, forked from one process that has imported everything, which takes longer than a run.

``run(jobs)`` starts that process. It plays torchrun: it sets the ranks' environment and keeps their store, but leaves
it to the ranks to end when one of them does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

SECONDS = 90  # for a job, however busy the machine


@dataclass
class Job:
    """A run: its command line, and what befalls a rank in a step of the first fit.

    Attributes:
        ranks: number of ranks; 1 for a process without torchrun.
        at: (rank, step, event), where the event is the name of a signal that the rank sends itself, "error" or
            "hang".
        begun: run directory that it goes on with, in a copy.
    """

    ranks: int
    arguments: list[str]
    out: str
    at: tuple[int, int, str] | None = None
    begun: str | None = None


@dataclass
class Ended:
    """How the ranks of a job ended: exit statuses (minus the number of a signal), output and errors, and seconds."""

    statuses: list[int]
    output: str
    errors: str
    seconds: float


def run(jobs: list[Job], folder: Path) -> list[Ended]:
    """Runs jobs one after the other; their output goes to files in ``folder``."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "support.ranks", str(folder)]
    given = json.dumps([asdict(job) for job in jobs])
    done = subprocess.run(line, cwd=tests, env=environment, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [Ended(**ended) for ended in json.loads(done.stdout.splitlines()[-1])]


def main(folder: Path) -> None:
    from matplotlib.figure import Figure

    from onpo_fast import train  # noqa: F401

    Figure.savefig = lambda figure, file, **options: file.write("<svg></svg>")  # plots take half of the time
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    print(json.dumps([asdict(_run(job, folder / str(number))) for number, job in enumerate(jobs)]))


def _run(job: Job, folder: Path) -> Ended:
    import torch.distributed as dist

    folder.mkdir(parents=True)
    if job.begun is not None:
        shutil.copytree(job.begun, job.out)
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [_fork(job, rank, port, folder) for rank in range(job.ranks)]
    store = job.ranks > 1 and dist.TCPStore(
        "localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS)
    )
    statuses = [_wait(process, began + SECONDS) for process in processes]
    del store
    texts = ["".join(file.read_text() for file in sorted(folder.glob(f"*.{end}"))) for end in ("out", "err")]
    return Ended(statuses, *texts, time.monotonic() - began)


def _wait(process: int, deadline: float) -> int:
    """The exit status of a process; one that has not ended by the deadline is killed."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _fork(job: Job, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{end}", os.O_CREAT | os.O_WRONLY), number)
        if job.ranks > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(job.ranks),
                "LOCAL_WORLD_SIZE": str(job.ranks),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        if job.at is not None and job.at[0] == rank:
            _befall(*job.at[1:])
        status = _train([*job.arguments, "--out", job.out])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(arguments: list[str]) -> int:
    from onpo_fast import train

    try:
        train.main(arguments)
    except SystemExit as ended:
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _befall(at_step: int, event: str) -> None:
    """Lets something happen to this process within a step of the first fit, before the ranks agree on it."""
    from onpo_fast import fit
    from onpo_fast.errors import UserError

    update = fit._Training.update

    def updated(training, *arguments):
        if training.step + 1 == at_step:
            if event == "error":
                raise UserError("--this_rank has an error")
            if event == "hang":
                time.sleep(SECONDS)
            os.kill(os.getpid(), signal.Signals[event])
        return update(training, *arguments)

    fit._Training.update = updated


if __name__ == "__main__":
    main(Path(sys.argv[1]))
