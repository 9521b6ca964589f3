"""Everything that only a GPU can show, in one command of ten minutes, without a network:

    make gpu-check [PYTHON=python3] [WHEELS=wheels] [ARGS="--out DIR --budget SECONDS --only tests benchmark"]

1. what is here: device, versions;
2. packages that are missing, from wheels in a folder, into a folder of their own (nothing is installed elsewhere);
3. the tests of the kernels on the GPU (tests/triton_kernels);
4. repeated runs equal, with poisoned memory before each; the same under compute-sanitizer where that is on the PATH;
5. the benchmark, with the shape of the targets first and as much of the rest as the time allows.

``--only`` takes of 3 to 5 those that it names: tests, checks, sanitizer, benchmark.

    make gpu-train [PYTHON=python3] [WHEELS=wheels] [ARGS="--out DIR --budget SECONDS -- OPTIONS"]

does 1 and 2, and then ``python -m bench training OPTIONS``: half an hour at most.

Every step is a process of its own: what one breaks does not stop the next. Results, plots and the log of all steps lie
in --out at any time. Fails (exit status 1) if a step failed; a missed target is not a failure but a result.

``make wheels`` fills the folder where there is a network. A file ``smollm2.npz`` in it (``python -m bench inputs
wheels/smollm2.npz``) stands in for the real model.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# the standard library alone: packages may be missing until step 2

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 30.0  # seconds kept for the end
GPU_GONE = 75  # exit status of bench.kernels when another process should go on
TEST_SECONDS, CHECK_SECONDS, SANITIZER_SECONDS = 150.0, 100.0, 45.0  # at most


@dataclass
class Step:
    name: str
    outcome: str  # "ok", "FAILED" or why it was left out
    seconds: float


class Runner:
    """Runs steps, one process each, and keeps what they print."""

    def __init__(self, out: Path, budget: float, log: str = "gpu-check.log") -> None:
        self.out, self.end = out, time.monotonic() + budget
        self.site = Path(tempfile.mkdtemp(prefix="gpu-check-"))  # where the wheels go
        atexit.register(shutil.rmtree, self.site, ignore_errors=True)
        self.log = open(out / log, "w", encoding="utf-8")
        self.steps: list[Step] = []
        paths = [str(self.site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "150",
        }  # fmt: skip

    def left(self) -> float:
        return self.end - time.monotonic()

    def process(self, command: list[str], seconds: float, show: bool = False) -> tuple[int | None, str]:
        """Exit status (None if it was stopped for the time) and output; the output goes to the log too."""
        seconds = min(seconds, self.left() - RESERVE / 2)
        if seconds <= 0:
            return None, "no time left"
        self.log.write(f"\n$ {' '.join(command)}\n")
        self.log.flush()
        child = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        stopped = threading.Event()
        late = threading.Timer(seconds, lambda: (stopped.set(), stop(child)))
        late.start()
        lines = []
        try:
            for line in child.stdout:  # as it comes: a step may take half an hour, and this process be cut off
                lines.append(line)
                self.log.write(line)
                self.log.flush()
                if show:
                    print(line, end="", flush=True)
            status = child.wait()
        except BaseException:  # this process is being stopped: leave none behind
            stop(child)
            raise
        finally:
            late.cancel()
        if stopped.is_set():
            lines.append(f"\nstopped after {seconds:.0f} s\n")
            self.log.write(lines[-1])
        return None if stopped.is_set() else status, "".join(lines)

    def step(self, name: str, command: list[str], seconds: float, show: bool = False) -> str:
        """Runs a step, notes its outcome and shows the end of what a failure printed. Returns the output."""
        start = time.monotonic()
        status, output = self.process(command, seconds, show)
        outcome = "ok" if status == 0 else "FAILED: out of time" if status is None else f"FAILED: exit status {status}"
        self.note(name, outcome, start)
        if status != 0 and not show:
            print(output[-3000:], flush=True)
        return output

    def note(self, name: str, outcome: str, start: float) -> None:
        self.steps.append(Step(name, outcome, time.monotonic() - start))
        print(f"[{self.left():4.0f} s left] {name}: {outcome} ({self.steps[-1].seconds:.0f} s)", flush=True)


def stop(child: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(child.pid, signal.SIGKILL)  # the child leads a group of its own: its helpers go with it


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for results, plots and log")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="folder of wheels")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", choices=STEPS, help="these of the steps")
    parser.add_argument("--allow-cpu", action="store_true", help="run what runs without a GPU: to try this script")
    parser.add_argument("--training", action="store_true", help="the trainer instead of the kernels (make gpu-train)")
    parser.add_argument("options", nargs="*", metavar="OPTIONS", help="with --training, after --: of `bench training`")
    options = parser.parse_args()
    if options.training and options.only:
        parser.error("--only is about the kernels, and --training about the trainer")
    options.out.mkdir(parents=True, exist_ok=True)
    log = "gpu-train.log" if options.training else "gpu-check.log"
    runner = Runner(options.out.resolve(), options.budget, log)
    output = runner.step("device", [sys.executable, "-c", SURVEY], 90, show=True)
    if "cuda: True" not in output and not options.allow_cpu:
        print("torch sees no GPU here: nothing to check")
        return 1
    install(runner, options.wheels)
    if options.training:
        training(runner, options.options)
        return summary(runner)
    for name in options.only or STEPS:
        STEPS[name](runner, options)
    return summary(runner)


SURVEY = """
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda:", torch.cuda.is_available())
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(p.name, f"{p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 20} MiB")
for name in ("triton", "transformers", "pytest"):
    try: print(name, __import__(name).__version__)
    except ImportError as error: print(name, "is missing:", error)
"""


def install(runner: Runner, wheels: Path) -> None:
    """Wheels of packages that are not installed. Those that are stay: torch and triton go with the GPU's driver."""
    start = time.monotonic()
    missing = [wheel for wheel in sorted(wheels.glob("*.whl")) if not installed(wheel)]
    if not missing:
        return runner.note("wheels", f"none to install from {wheels}", start)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
           "--disable-pip-version-check", "--target", str(runner.site)]  # fmt: skip
    # one at a time, so that one made for another machine stops no other
    refused = [wheel.name.split("-")[0] for wheel in missing if runner.process([*pip, str(wheel)], 60)[0] != 0]
    outcome = f"ok, {len(missing) - len(refused)} installed"
    runner.note("wheels", outcome + (f"; refused: {', '.join(refused)}" if refused else ""), start)


def installed(wheel: Path) -> bool:
    try:
        metadata.version(wheel.name.split("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def tests(runner: Runner, options: argparse.Namespace) -> None:
    folder = ROOT / "tests" / "triton_kernels"
    # the other tests' conftest.py wants the real model and the packages of the trainer: it is left out, its path not
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--confcutdir={folder}",
              "-o", f"pythonpath={folder.parent}", str(folder)]  # fmt: skip
    if importlib.util.find_spec("xdist"):  # most of the time is compilation
        pytest += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    runner.step("tests of the kernels", pytest, TEST_SECONDS)


CHECKS = [sys.executable, "-m", "bench", "checks"]


def checks(runner: Runner, options: argparse.Namespace) -> None:
    runner.step("poison and repetition", CHECKS, CHECK_SECONDS)


def sanitize(runner: Runner, options: argparse.Namespace) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        start = time.monotonic()
        name = f"compute-sanitizer {tool}"
        if sanitizer is None:
            runner.note(name, "not on the PATH", start)
            continue
        # without the allocator's cache, memory out of bounds is memory that nobody has
        command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool", tool, "--error-exitcode", "9"]
        command += [*CHECKS, "--tiny"]
        status, output = runner.process(command, SANITIZER_SECONDS)
        runner.note(name, sanitizer_outcome(status, output), start)


def sanitizer_outcome(status: int | None, output: str) -> str:
    """A report that names a kernel of ours is a failure; libraries' kernels are not ours to judge."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    kernels = re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)", sources)
    reports = [line for line in output.splitlines() if line.startswith("=====")]
    named = sorted({kernel for kernel in kernels if any(re.search(rf"\b{kernel}\b", line) for line in reports)})
    if status == 0:
        return "ok"
    if named:
        return f"FAILED: reports about {', '.join(named)}"
    if status is None:
        return "not finished in time"
    if status == 9:
        return "reports, none about our kernels: see the log"
    return "could not run here: see the log"


def benchmark(runner: Runner, options: argparse.Namespace) -> None:
    """Goes on in a new process where one was lost; ``--resume`` leaves out the row that took it along."""
    start = time.monotonic()
    command = [sys.executable, "-m", "bench", "kernels", "--out", str(runner.out)]
    if (inputs := options.wheels / "smollm2.npz").is_file():
        command += ["--inputs", str(inputs.resolve())]
    lost, status = 0, None
    while runner.left() > 2 * RESERVE and lost < 5:
        budget = runner.left() - 2 * RESERVE  # a method that compiles for long may overrun it
        resume = ["--resume"] if lost else []
        status, output = runner.process([*command, "--budget", f"{budget:.0f}", *resume], budget + RESERVE)
        if status in (0, None):
            break
        print(output[-1500:], flush=True)
        lost += 1
    again = f", in {lost + 1} processes" if lost else ""
    outcome = "ok" if status == 0 else "stopped for the time" if status is None else f"FAILED: exit status {status}"
    runner.note("benchmark", outcome + again, start)


STEPS = {"tests": tests, "checks": checks, "sanitizer": sanitize, "benchmark": benchmark}


def training(runner: Runner, options: list[str]) -> None:
    budget = runner.left() - 2 * RESERVE
    command = [sys.executable, "-m", "bench", "training", "--out", str(runner.out), "--budget", f"{budget:.0f}"]
    runner.step("training", [*command, *options], budget + RESERVE, show=True)


def summary(runner: Runner) -> int:
    """The end of the output, short: the benchmark's first shape, the targets, the steps. The rest is in the log."""
    code = "import sys; from bench.kernels import summarise; summarise(sys.argv[1:])"
    files = [str(path) for path in runner.out.glob("kernels-*.json") if path.stat().st_mtime > STARTED]
    if files:
        runner.process([sys.executable, "-c", code, *files], 60, show=True)
    for step in runner.steps:
        print(f"{step.name}: {step.outcome} ({step.seconds:.0f} s)")
    return 1 if any(step.outcome.startswith("FAILED") for step in runner.steps) else 0


STARTED = time.time()

if __name__ == "__main__":
    raise SystemExit(main())
