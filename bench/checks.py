"""Checks for races and unwritten outputs: runs every method of the loss several times on poisoned memory.

Repeated runs must give the same bits, all results must be finite, and their error against float64 must be about that of
PyTorch's materialised form. Before each run the memory that the allocator hands out next is filled with 0xFF, which is
NaN as a float and −1 as an integer.

The exit status is 1 if a check fails, or if a check could not be made on a GPU.
"""

from __future__ import annotations

import argparse

import torch

from . import accuracy
from .peers import MATERIALISED, OURS, Method, Result, Task, run
from .problems import TARGET, TINY, Problem, Shape

RUNS = 4
ALLOCATOR = 1.2  # bytes that the allocator reserves, per byte in use
SLACK = 2.0  # allowed error, as a multiple of the materialised form's; PyTorch versions differ by as much
FLOOR = {"logps_nats_max": 1e-2, "hidden_gradient": 1e-6, "weight_gradient": 1e-6}  # errors below these are accepted

# In order of importance, in case the time limit cuts the check.
CHECKED_SHAPES = (
    TARGET,
    TINY,
    Shape("odd", 3, 3, 37, features=72, vocabulary=1031),
    Shape("one-token", 2, 2, 1, features=128, vocabulary=4099),
    Shape("long-pair", 1, 2, 3000, features=256, vocabulary=32003),
    Shape("groups", 3, 8, 129, features=512, vocabulary=50257),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device on which to run (default: cuda if there is a GPU, otherwise cpu).",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=[shape.name for shape in CHECKED_SHAPES],
        metavar="SHAPE",
        help="Shapes to check (default: all on a GPU, two small ones on a CPU). Choices: "
        f"{', '.join(shape.name for shape in CHECKED_SHAPES)}.",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="Run every method once on one tiny shape, as for compute-sanitizer."
    )


def main(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    shapes, runs = ((TINY,), 1) if options.tiny else (CHECKED_SHAPES if gpu else CHECKED_SHAPES[1:3], RUNS)
    if options.shapes:
        shapes = tuple(shape for shape in CHECKED_SHAPES if shape.name in options.shapes)
    faults = unchecked = 0
    for shape in shapes:
        try:
            if reason := too_large(shape, device):
                raise NotChecked(reason)
            problem = Problem.make(shape, torch.bfloat16 if gpu else torch.float32, device)
            exact = accuracy.Exact.of(problem, {method.objective for method in OURS})
        except (NotChecked, torch.OutOfMemoryError) as error:
            unchecked += 1
            print(f"{shape.name}: not checked: {reason_of(error)}", flush=True)
            continue
        problem.ref_logps = exact.ref_logps
        for method in OURS:
            if reason := method.absent(problem):
                unchecked += 1
                print(f"{shape.name}: {method.name}: {'not checked' if gpu else 'absent'}: {reason}", flush=True)
                continue
            for task in method.tasks:
                try:
                    found = faults_of(method, task, problem, exact, runs)
                    faults += len(found)
                    said = "; ".join(found) or "ok"
                except torch.OutOfMemoryError as error:
                    unchecked += 1
                    said = f"not checked: {reason_of(error)}"
                print(f"{shape.name}: {method.name}, {task.name}: {said}", flush=True)
    print(f"{faults} faults, {unchecked} not checked")
    return 1 if faults or (gpu and unchecked) else 0


class NotChecked(Exception):
    """A shape cannot be checked here; the message says why."""


def reason_of(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)


def too_large(shape: Shape, device: torch.device) -> str | None:
    """Returns why a shape cannot be checked on the device, or None if it can."""
    if device.type != "cuda":
        return "it needs a GPU" if shape is TARGET else None
    needed, free = bytes_needed(shape), torch.cuda.mem_get_info(device)[0]
    return None if free >= needed else f"it needs {needed / 2**30:.0f} GiB of free memory, here are {free / 2**30:.0f}"


def bytes_needed(shape: Shape) -> int:
    """Peak GPU memory of the check of a shape, in bytes: 28 GiB at ``TARGET``.

    The inputs are held throughout. The peak is the larger of two phases. One computes the float64 reference. The other
    holds the reference's gradients and the bf16 gradients of two results, while PyTorch's materialised form allocates
    its logits in bf16 and three float32 tensors of the same shape: the log-softmax, and in the backward pass the
    gradients of it and of the logits. Poisoned memory and the kernels' workspace are smaller than either phase.
    """
    head = (shape.rows + shape.vocabulary) * shape.features
    inputs, results, materialised = 2 * 2 * head, 2 * 2 * head, (2 + 3 * 4) * shape.rows * shape.vocabulary
    most = max(accuracy.bytes_while_made(shape), accuracy.bytes_kept(shape) + results + materialised)
    return int(ALLOCATOR * (inputs + most))


def faults_of(method: Method, task: Task, problem: Problem, exact: accuracy.Exact, runs: int = RUNS) -> list[str]:
    """Lists what is wrong with a method at a task; empty if nothing is.

    Raises:
        torch.OutOfMemoryError: if the check does not fit in memory.
    """
    try:
        first = _poisoned(method, task, problem)
        found = [
            f"{name} is not finite" for name, x in first._asdict().items() if x is not None and not x.isfinite().all()
        ]
        for _ in range(runs - 1):
            found += [f"{name} differs between runs" for name in differences(first, _poisoned(method, task, problem))]
        own = exact.errors(first, method.objective)
        allowed = exact.errors(run(MATERIALISED, task, problem), MATERIALISED.objective)
    except torch.OutOfMemoryError:  # no fault of the method
        raise
    except Exception as error:
        return [f"{type(error).__name__}: {error}".split("\n")[0]]
    for name, floor in FLOOR.items():
        # ``not <=`` rather than ``>``, so that NaN counts as a fault
        if name in own and not own[name] <= max(SLACK * allowed[name], floor):
            found.append(f"error of {name} {own[name]:.1e}, PyTorch's is {allowed[name]:.1e}")
    return list(dict.fromkeys(found))


def differences(a: Result, b: Result) -> list[str]:
    """Lists the fields of two results that differ in any bit. NaN differs from NaN."""
    return [
        name
        for name in Result._fields
        if getattr(a, name) is not None and not torch.equal(getattr(a, name), getattr(b, name))
    ]


def _poisoned(method: Method, task: Task, problem: Problem) -> Result:
    if problem.device.type == "cuda":
        poison(problem)
    return run(method, task, problem)


def poison(problem: Problem) -> None:
    """Fills the memory that the allocator hands out next: small blocks, large blocks and one as large as the logits."""
    free, _ = torch.cuda.mem_get_info(problem.device)
    large = min(free // 4, 2**32, 8 * problem.shape.rows * problem.shape.vocabulary)
    sizes = [2**9] * 64 + [2**14] * 64 + [2**19] * 32 + [2**24] * 8 + [2**28] * 4 + [large]
    held = [torch.full((size,), 0xFF, dtype=torch.uint8, device=problem.device) for size in sizes]
    del held  # returns the blocks to the allocator's cache with their contents
