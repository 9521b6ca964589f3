"""Measurements that are processes of their own, until the time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from .runner import ROOT

LOOK_SECONDS = 2.0  # between two calls of ``meanwhile``

Row = dict[str, Any]


class Jobs:
    """Runs Python modules of this repository, each in a process of its own.

    Args:
        budget: seconds from now after which the running process is killed and no other is started.
    """

    def __init__(self, budget: float = float("inf")) -> None:
        self.end = time.monotonic() + budget

    def process(
        self, command: list[str], meanwhile: Callable[[], None] = lambda: None, **environment: str
    ) -> tuple[Row, str]:
        """Runs a Python module; returns how it ended, and its output.

        ``meanwhile`` is called every few seconds. ``environment`` has defaults for environment variables.
        """
        if time.monotonic() >= self.end:
            return {"status": "skipped", "reason": "no time left"}, ""
        start = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**environment, **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # with what it starts, so that all end together
        )
        while child.returncode is None:
            if time.monotonic() >= self.end:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                return {"status": "stopped", "reason": f"no time left after {time.monotonic() - start:.0f} s"}, ""
            try:
                output, errors = child.communicate(timeout=min(LOOK_SECONDS, max(self.end - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                meanwhile()
        ended = {"wall_seconds": time.monotonic() - start}
        if child.returncode == 0:
            return {"status": "measured", **ended}, output
        print(output[-1000:], errors[-3000:], sep="\n", file=sys.stderr, flush=True)
        said = (errors.strip() or output.strip() or f"exit status {child.returncode}").split("\n")[-1]
        return {"status": "out of memory" if "OutOfMemoryError" in said else "failed", "reason": said[:300]}, ""

    def job(self, module: str, **arguments: Any) -> Row:
        """Runs one measurement, whose last line of output is JSON; returns that, or how it ended."""
        # expandable segments avoid fragmentation, since a fit uses nine tenths of a GPU's memory
        row, output = self.process([module, json.dumps(arguments)], PYTORCH_ALLOC_CONF="expandable_segments:True")
        return json.loads(output.splitlines()[-1]) if output else row
