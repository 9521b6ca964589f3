"""Measures the peak memory of one forward and backward pass above its inputs, in bytes.

On a GPU it is the memory allocated by PyTorch. On a CPU it is the resident set size of a separate process:

    python -m bench.memory METHOD TASK SHAPE
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from onpo_fast.device_memory import peak_bytes as peak_bytes_of
from onpo_fast.device_memory import reset_peak, resident_bytes

from .peers import METHODS, TASKS, Method, Task, run
from .problems import SHAPES, Problem, Shape


def peak_bytes(method: Method, task: Task, problem: Problem) -> int:
    """Peak bytes including gradients. The method must have run before, so that first-call allocations are excluded."""
    if problem.device.type != "cuda":
        command = [sys.executable, "-m", "bench.memory", method.name, task.name, problem.shape.name]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
        return int(done.stdout.split()[-1])
    gauge = Gauge(problem.device)
    torch.cuda.synchronize(problem.device)
    before = gauge.held()
    gauge.reset()
    run(method, task, problem)
    torch.cuda.synchronize(problem.device)
    return gauge.peak() - before


def gradient_bytes(task: Task, problem: Problem) -> int:
    """Bytes of the gradients that the task computes."""
    wanted = [(task.hidden, problem.hidden), (task.weight, problem.weight)]
    return sum(x.numel() * x.element_size() for want, x in wanted if want)


class Gauge:
    """Bytes in use: allocated by PyTorch on a GPU, resident set size of this process on a CPU (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident_bytes()

    def peak(self) -> int:
        """Peak bytes since the last ``reset``."""
        return peak_bytes_of(self.device)

    def reset(self) -> None:
        reset_peak(self.device)


def main(method_name: str, task_name: str, shape_name: str) -> None:
    method = next(m for m in METHODS if m.name == method_name)
    task = next(t for t in TASKS if t.name == task_name)
    warm_up = Problem.make(Shape("warm-up", 1, 2, 8, features=16, vocabulary=64))
    run(method, task, warm_up)
    # random inputs, since memory freed after loading a real model could be reused by the method without being counted
    problem = Problem.make(replace(SHAPES[shape_name], text=False))
    problem.ref_logps = torch.zeros(len(problem.cu_seqlens) - 1, dtype=torch.float64)
    gauge = Gauge(problem.device)
    gauge.reset()
    before = gauge.held()
    result = run(method, task, problem)
    assert torch.isfinite(result.logps).all()
    print(gauge.peak() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
