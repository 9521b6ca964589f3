"""python -m bench kernels: time, memory and error of the loss, its peers and the bare matrix products.

A row is one method at one task. Rows of a shape are measured in waves: the most important ones first, methods that
compile for long last. In a wave each row is called once for its error against float64 and its peak memory, then in a
block of timed calls; then a second timing block of each row follows in reverse order, so that drift of the machine
widens the spread. The results file is rewritten after every row. ``--resume`` continues a run that stopped; a row that
ended the process is not tried again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from onpo_fast.arguments import positive
from onpo_fast.files import atomic_write_text
from onpo_fast.run.tracking import environment

from . import accuracy, plots
from .inputs import Unavailable
from .memory import gradient_bytes, peak_bytes
from .peers import MATERIALISED, METHODS, OURS, SLOW, TASKS, TORCH, TRL, Method, Task, run
from .problems import CPU_SHAPES, GPU_SHAPES, SHAPES, Problem, Shape
from .runner import GPU_GONE
from .targets import TARGET_DEVICES, verdicts
from .timing import Clock, Products, Spread

RESULTS = Path(__file__).parent / "results"
PEER_PACKAGES = ("cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "datasets")
PHASES = ("forward", "backward", "both")
ERRORS = ("logps_nats_max", "hidden_gradient", "weight_gradient")
LEAST_SECONDS = 15.0  # time that must be left to start a shape
ERROR_SECONDS = 60.0  # time limit of a float64 reference; errors are left out if it would take longer

DID_NOT_RETURN = "did not return"  # the status of a row while it is measured


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device on which to run (default: cuda if there is a GPU, otherwise cpu).",
    )
    parser.add_argument(
        "--shapes",
        nargs="*",
        choices=SHAPES,
        metavar="SHAPE",
        help=f"Shapes to measure (default: those for the device). Choices: {', '.join(SHAPES)}.",
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        metavar="TEXT",
        help="Measure only the methods whose names contain one of these texts (default: all).",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=float("inf"),
        metavar="SECONDS",
        help="Start no measurement after this many seconds (default: no limit).",
    )
    parser.add_argument(
        "--block",
        type=positive,
        default=0.5,
        metavar="SECONDS",
        help="Seconds per timing block; two blocks per row (default: %(default)s).",
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="Inputs of the text shapes, written by `python -m bench inputs FILE` (default: computed from the model).",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="Folder for results and plots (default: bench/results)."
    )
    parser.add_argument("--resume", action="store_true", help="Continue the results file in the --out folder.")


def main(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    every = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    shapes = [SHAPES[name] for name in options.shapes] if options.shapes else every
    wanted = [part.lower() for part in options.methods or [""]]
    methods = [method for method in METHODS if any(part in method.name.lower() for part in wanted)]
    report = Report.open(options.out / f"{slug(device)}.json", device, options.resume)
    bench = KernelBench(report, device, options.inputs, time.monotonic() + options.budget, options.block)
    for shape in shapes:
        bench.shape(shape, methods, thorough=shape == shapes[0] and device.type == "cuda")
    report.finish()


def slug(device: torch.device, command: str = "kernels") -> str:
    """Name of a command's results file on a device, without the suffix."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{command}-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def waves(methods: list[Method], thorough: bool, gpu: bool) -> list[list[tuple[Method, Task]]]:
    """Rows of a shape in the order of measurement, in up to three waves.

    1. This package's methods at all tasks, then the peers at their first task. 2. If ``thorough``, two peers at their
    other tasks. 3. Methods that compile for long, and on a GPU this package's PyTorch backend, which is slow there.
    """
    late = (*SLOW, TORCH) if gpu else SLOW
    ours = [method for method in methods if method in OURS and method not in late]
    peers = [method for method in methods if method not in OURS and method not in late]
    first = [(method, task) for method in ours for task in method.tasks] + [(m, m.tasks[0]) for m in peers]
    second = [(m, task) for m in peers if thorough and m in (MATERIALISED, TRL) for task in m.tasks[1:]]
    third = [(m, task) for m in late if m in methods for task in (m.tasks if m in OURS else m.tasks[:1])]
    return [wave for wave in (first, second, third) if wave]


class KernelBench:
    """Measures shapes into a report until the deadline, in seconds of the monotonic clock."""

    def __init__(
        self, report: Report, device: torch.device, inputs: Path | None, deadline: float, block_seconds: float
    ) -> None:
        self.report, self.device, self.inputs, self.deadline = report, device, inputs, deadline
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.clock = Clock(device)
        self.block = (block_seconds, 3, 30)  # seconds, minimum and maximum number of rounds
        torch._dynamo.config.recompile_limit = 64  # beyond the limit, a compiled peer would silently run uncompiled

    def shape(self, shape: Shape, methods: list[Method], thorough: bool) -> None:
        """Measures the rows of ``waves`` at a shape that are not in the report yet."""
        record = self.report.shape(shape, self.dtype)
        done = {(row["method"], row["task"]) for row in record["rows"]}
        plan = [
            [(method, task) for method, task in wave if (method.name, task.name) not in done]
            for wave in waves(methods, thorough, self.device.type == "cuda")
        ]
        if not any(plan) or record.get("unavailable"):
            return
        if self.left() < LEAST_SECONDS:
            record["unavailable"] = "no time left"
            return self.report.save()
        try:
            problem = Problem.make(shape, self.dtype, self.device, inputs=self.inputs)
        except (Unavailable, torch.OutOfMemoryError) as error:
            record["unavailable"] = reason_of(error)
            self.release()
            return self.report.save()
        products: dict[str, list[float]] = {"logits": [], "hidden": [], "weight": []}
        self.floor(problem, products, record)
        exact = self.exact(problem, {method.objective for wave in plan for method, _ in wave}, record)
        for wave in plan:
            self.wave(wave, problem, exact, record)
            if self.left() > 0:
                self.floor(problem, products, record)
            self.report.save()

    def wave(
        self, plan: list[tuple[Method, Task]], problem: Problem, exact: accuracy.Exact | None, record: dict[str, Any]
    ) -> None:
        """Measures rows in order, then times them once more in reverse order."""
        samples: dict[tuple[Method, Task], list[list[float]]] = {}
        for method, task in plan:
            row = self.report.begin(record, method, task)
            if reason := method.absent(problem):
                row |= {"status": "absent", "reason": reason}
            elif self.left() <= 0:
                row |= {"status": "skipped", "reason": "no time left"}
            elif self.guarded(row, lambda: self.first(method, task, problem, exact, row)):  # noqa: B023
                samples[method, task] = []
                self.guarded(row, lambda: self.timed(method, task, problem, samples[method, task], row, record))  # noqa: B023
            self.report.save()
            print(f"{record['shape']}: {method.name}, {task.name}: {_brief(row)}", file=sys.stderr, flush=True)
        for method, task in reversed(samples):
            row = self.report.row(record, method, task)
            if self.left() > 0 and row["status"] == "measured":
                self.guarded(row, lambda: self.timed(method, task, problem, samples[method, task], row, record))  # noqa: B023

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def floor(self, problem: Problem, samples: dict[str, list[float]], record: dict[str, Any]) -> None:
        """Times each bare product; the record has the median of these and earlier ``samples``."""
        try:
            bare = Products(problem.hidden, problem.weight)
            for laps in self.clock.block(bare.all, *self.block):
                for name, lap in zip(samples, laps):
                    samples[name].append(lap)
        except torch.OutOfMemoryError:
            return
        finally:
            bare = None
            self.release()
        record["floor_seconds"] = {name: Spread.of(laps).median for name, laps in samples.items()}
        for row in record["rows"]:
            _over_floor(row, record)

    def exact(self, problem: Problem, objectives: set, record: dict[str, Any]) -> accuracy.Exact | None:
        """Computes the float64 reference; if it is too slow or too large, notes so in the record and returns None."""
        needed = accuracy.seconds(problem, len(objectives))
        if needed > min(ERROR_SECONDS, self.left() / 3):
            record["no_errors"] = f"float64 would take {needed:.0f} s here"
            return None
        try:
            exact = accuracy.Exact.of(problem, objectives)
        except torch.OutOfMemoryError:
            record["no_errors"] = "float64 does not fit the memory"
            exact = None
        else:
            problem.ref_logps = exact.ref_logps
        self.release()
        return exact

    def first(
        self, method: Method, task: Task, problem: Problem, exact: accuracy.Exact | None, row: dict[str, Any]
    ) -> None:
        """Makes the first call, which compiles, and records its errors; then measures the memory of another call."""
        start = time.perf_counter()
        result = run(method, task, problem)
        finite = bool(torch.isfinite(result.logps).all())  # waits for the device
        row["first_call_seconds"] = time.perf_counter() - start
        if not finite:
            raise ArithmeticError("log-probs that are not finite")
        if exact is not None:
            row["error"] = exact.errors(result, method.objective)
        del result
        self.release()
        row["gradient_bytes"] = gradient_bytes(task, problem)
        row["peak_extra_bytes"] = peak_bytes(method, task, problem) - row["gradient_bytes"]

    def timed(
        self,
        method: Method,
        task: Task,
        problem: Problem,
        samples: list[list[float]],
        row: dict[str, Any],
        record: dict[str, Any],
    ) -> None:
        """Times a block of calls, adds it to ``samples`` and updates the row with statistics over all of them."""
        samples += self.clock.block(lambda mark: run(method, task, problem, mark), *self.block)
        forward, backward = ([laps[i] for laps in samples] for i in (0, 1))
        both = [sum(laps) for laps in samples]
        row["seconds"] = {phase: Spread.of(times)._asdict() for phase, times in zip(PHASES, (forward, backward, both))}
        row["tflops_per_second"] = task.gemms * problem.shape.gemm_flops / row["seconds"]["both"]["median"] / 1e12
        row["status"] = "measured"
        _over_floor(row, record)

    def guarded(self, row: dict[str, Any], measure: Callable[[], None]) -> bool:
        """Calls ``measure`` and returns whether it succeeded. An error becomes the row's status; a lost GPU ends the
        process."""
        try:
            measure()
            return True
        except torch.OutOfMemoryError as error:
            row |= {"status": "out of memory", "reason": reason_of(error)}
        except Exception as error:
            row |= {"status": "failed", "reason": reason_of(error)}
        finally:
            self.release(row)
        return False

    def release(self, row: dict[str, Any] | None = None) -> None:
        """Frees memory; ends the process with status ``GPU_GONE`` if the GPU no longer answers."""
        if lost := release_memory(self.device):
            if row is not None:
                row |= {"status": "failed", "reason": lost}
            self.report.save()
            print(f"the GPU is lost to this process: {lost}", file=sys.stderr, flush=True)
            os._exit(GPU_GONE)  # an ordinary exit would wait for the GPU


def release_memory(device: torch.device) -> str | None:
    """Empties the allocator's cache. Returns the error if the GPU no longer answers, otherwise None."""
    if device.type != "cuda":
        return None
    gc.collect()
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        return reason_of(error)
    return None


def reason_of(error: BaseException) -> str:
    """Type of an error and the first line of its text."""
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]


def _over_floor(row: dict[str, Any], record: dict[str, Any]) -> None:
    """Adds the row's time divided by that of its task's bare products, none of them recomputed."""
    if row["status"] == "measured" and (floor := record.get("floor_seconds")):
        task = next(t for t in TASKS if t.name == row["task"])
        products = task.logits * floor["logits"] + task.hidden * floor["hidden"] + task.weight * floor["weight"]
        row["over_floor"] = row["seconds"]["both"]["median"] / products


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


class Report:
    """A results file and its tables."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def open(cls, path: Path, device: torch.device, resume: bool) -> Report:
        if resume and path.is_file():
            return cls(path, json.loads(path.read_text(encoding="utf-8")))
        return cls(
            path,
            {
                "command": " ".join(["python -m bench", *sys.argv[1:]]),
                "environment": surroundings(device),
                "shapes": [],
                "verdicts": [],
            },
        )

    def shape(self, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
        """Returns the record of a shape; adds an empty one if there is none."""
        for record in self.data["shapes"]:
            if record["shape"] == shape.name:
                return record
        record = {
            "shape": shape.name,
            "model": shape.model,
            "inputs": "text" if shape.text else "random",
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": shape.rows,
            "groups": shape.groups,
            "responses": shape.responses,
            "response_tokens": shape.tokens,
            "features": shape.features,
            "vocabulary": shape.vocabulary,
            "gemm_flops": shape.gemm_flops,
            "rows": [],
        }
        self.data["shapes"].append(record)
        return record

    def begin(self, record: dict[str, Any], method: Method, task: Task) -> dict[str, Any]:
        """Adds a row and saves it before it is measured, in case the process dies."""
        record["rows"].append({"method": method.name, "task": task.name, "status": DID_NOT_RETURN})
        self.save()
        return record["rows"][-1]

    def row(self, record: dict[str, Any], method: Method, task: Task) -> dict[str, Any]:
        return next(row for row in record["rows"] if (row["method"], row["task"]) == (method.name, task.name))

    def save(self) -> None:
        self.data["verdicts"] = verdicts(self.data["shapes"])
        atomic_write_text(self.path, json.dumps(self.data, indent=1) + "\n")

    def finish(self) -> None:
        """Prints the tables and draws the plots."""
        console = Console(width=160, highlight=False)
        for record in self.data["shapes"]:
            if record.get("unavailable"):
                console.print(f"{record['shape']}: not measured: {record['unavailable']}", markup=False)
            else:
                console.print(shape_table(record))
        for line in absences(self.data["shapes"]):
            console.print(line, markup=False)
        on_target = any(name in self.data["environment"]["device"] for name in TARGET_DEVICES)
        remark = "" if on_target else f" (they are set for an {' or '.join(TARGET_DEVICES)})"
        console.print(verdict_table(self.data["verdicts"], remark))
        try:
            print(f"written: {self.path}, {plots.draw(self.path)}")
        except Exception as error:  # plots are optional
            print(f"written: {self.path}; no plots: {error}")


def surroundings(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit. The environment variable COMMIT overrides git's commit."""
    found = environment(device)
    for package in PEER_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = os.environ.get("COMMIT") or found["commit"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return found


def shape_table(record: dict[str, Any]) -> Table:
    floor = record.get("floor_seconds")
    bare = "" if floor is None else "; bare products, ms: " + ", ".join(f"{n} {s * 1e3:.4g}" for n, s in floor.items())
    title = (
        f"{record['shape']}: {record['tokens']} tokens, H {record['features']}, V {record['vocabulary']}, "
        f"{record['dtype']}, {record['inputs']} inputs{bare}"
    )
    if record.get("no_errors"):
        title += f"; no errors: {record['no_errors']}"
    table = Table(
        "",
        "task",
        "ms",
        "± iqr",
        "forward",
        "backward",
        "× floor",
        "TFLOP/s",
        "extra MB",
        "nats",
        "dX",
        "dW",
        title=title,
        title_justify="left",
        title_style="bold",
    )
    for row in record["rows"]:
        if row["status"] == "absent":
            continue
        if row["status"] != "measured":
            table.add_row(row["method"], row["task"], row["status"])
            continue
        seconds, error = row["seconds"], row.get("error", {})
        table.add_row(
            row["method"],
            row["task"],
            *(f"{1e3 * seconds['both'][k]:.4g}" for k in ("median", "iqr")),
            *(f"{1e3 * seconds[phase]['median']:.4g}" for phase in ("forward", "backward")),
            f"{row['over_floor']:.2f}" if "over_floor" in row else "",
            f"{row['tflops_per_second']:.3g}",
            f"{row['peak_extra_bytes'] / 1e6:.0f}",
            *(f"{error[k]:.1e}" if k in error else "" for k in ERRORS),
        )
    return table


def absences(shapes: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a line for each method and reason that it was absent, failed or ran out of memory, with the shapes."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for record in shapes:
        for row in record["rows"]:
            if row["status"] != "measured":
                where = seen.setdefault((row["method"], row["status"], row.get("reason", "")), [])
                if record["shape"] not in where:
                    where.append(record["shape"])
    for (method, status, reason), where in seen.items():
        at = "" if status == "absent" else f" at {', '.join(where)}"
        yield f"{status}{at}: {method}{': ' + reason if reason else ''}"


def verdict_table(rows: list[dict[str, Any]], remark: str = "") -> Table:
    table = Table("target", "limit", "measured", "", title=f"Targets{remark}", title_justify="left", title_style="bold")
    for row in rows:
        value = "" if row["measured"] is None else f"{row['measured']:.3g}"
        table.add_row(row["claim"], row["limit"], value, row["verdict"])
    return table


def _brief(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return row["status"]
    return f"{1e3 * row['seconds']['both']['median']:.4g} ms"
