"""Times the loss and its peers with pytest-benchmark at one shape: forward, backward and both.

    pytest bench --benchmark-only [-k "TRL and both"]

``python -m bench kernels`` also measures other shapes, memory and errors, and compares with the bare products.
"""

from __future__ import annotations

import pytest
import torch

from .peers import METHODS, OURS, TASKS, Method, Passes, Task
from .problems import CPU_SHAPES, TARGET, Problem

ROUNDS = 5
PHASES = {"forward": [Passes.forward], "backward": [Passes.backward], "both": [Passes.forward, Passes.backward]}
CASES = [
    pytest.param(method, task, phase, id=f"{method.name}-{task.name}-{phase}")
    for task in TASKS
    for method in METHODS
    for phase in (PHASES if task.trains else ["forward"])
    if task in method.tasks and (task is method.tasks[0] or method in OURS)
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    if torch.cuda.is_available():
        return Problem.make(TARGET, torch.bfloat16, "cuda")
    return Problem.make(CPU_SHAPES[1])


@pytest.mark.parametrize(("method", "task", "phase"), CASES)
def test_time(benchmark, problem: Problem, method: Method, task: Task, phase: str) -> None:
    if reason := method.absent(problem):
        pytest.skip(f"absent: {reason}")
    benchmark.group = f"{problem.shape.name}: {task.name}, {phase}"
    benchmark.extra_info |= {"method": method.name, "gemms": task.gemms, "gemm_flops": problem.shape.gemm_flops}

    def wait() -> None:
        if problem.device.type == "cuda":
            torch.cuda.synchronize()

    def setup() -> tuple[tuple[Passes], dict]:
        step = Passes(method, task, problem)
        if phase == "backward":
            step.forward()
        wait()
        return (step,), {}

    def passes(step: Passes) -> None:
        for one in PHASES[phase]:
            one(step)
        wait()

    benchmark.pedantic(passes, setup=setup, rounds=ROUNDS, warmup_rounds=1)
