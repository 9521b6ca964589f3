"""Peak extra memory of one call, in a process of its own.

    python -m bench.memory PEER SHAPE

prints the bytes by which the resident set rose above the inputs: gradients and everything in between.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from .peers import PEERS
from .problems import SHAPES, Problem, Shape


def peak_extra_bytes(peer: str, shape: str) -> int:
    command = [sys.executable, "-m", "bench.memory", peer, shape]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def main(peer: str, shape: str) -> None:
    PEERS[peer](Problem.make(Shape("warm-up", 1, 8, 16, 64)))  # what only the first call allocates
    problem = Problem.make(SHAPES[shape])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = _resident("VmRSS")
    result = PEERS[peer](problem)
    assert torch.isfinite(result[0])
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
