"""The GPU check: its plan fits its limits, steps are cut and not the run, and all of it runs on a CPU in small."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench import accuracy, checks, gpu_check, plots, problems, summary, survey, sweep, wheels
from bench import runner as running
from bench.gpu_check import LIMITS, PARTS, Setting
from bench.kernels import surroundings
from bench.peers import METHODS, TASKS
from bench.problems import Problem
from bench.runner import CLOSING, GPU_GONE, ROOT, Output, Runner, Step, planned
from bench.targets import TARGETS
from onpo_fast.config import parse
from onpo_fast.kernels.groups import PairLayout
from onpo_fast.kernels.plan import choose_plan
from onpo_fast.kernels.variants import EPILOGUES, Variant

# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_the_plan_fits_the_limit(part: str, tmp_path: Path) -> None:
    groups = PARTS[part](Setting(tmp_path, tmp_path, dry=False))
    slack = 10 if part != "sanitizer" else 5  # seconds, that the first steps may take beyond what is planned
    assert sum(map(planned, groups)) + CLOSING + slack <= LIMITS[part]
    steps = [step for group in groups for step in group]
    assert len({step.name for step in steps}) == len(steps)
    assert all(0 < step.seconds <= step.most and step.assumption and step.commands for step in steps)
    assert sum(step.name in "\n".join(gpu_check.plan_lines(part, groups)) for step in steps) == len(steps)


@pytest.mark.parametrize("dry", [False, True])
def test_every_command_of_the_plan_is_one(dry: bool, tmp_path: Path) -> None:
    """Where no GPU is, the options of the real commands are at least known."""
    found = set()
    for steps in PARTS.values():
        for step in (step for group in steps(Setting(tmp_path, tmp_path, dry)) for step in group):
            for command in step.commands_now():
                if "bench" in command:
                    name, *options = command[command.index("bench") + 1 :]
                    parser = argparse.ArgumentParser(exit_on_error=False)
                    importlib.import_module(f"bench.{name}").arguments(parser)
                    values = parser.parse_args([o.replace("{out}", "x").replace("{budget}", "1") for o in options])
                    parse(shlex.split(getattr(values, "train", "")))
                    found.add(name)
    assert found == {"survey", "checks", "kernels", "sweep", "training"}


def test_shapes_have_the_names_that_the_plan_gives_them() -> None:
    assert gpu_check.TARGET == problems.TARGET.name == checks.CHECKED_SHAPES[0].name
    assert {gpu_check.SMALL_HEAD, gpu_check.TEXT, gpu_check.TINY} <= problems.SHAPES.keys()
    assert problems.SHAPES[gpu_check.SMALL_HEAD] is problems.SMALL_HEAD
    assert sorted(shape for some in gpu_check.CHECK_SHAPES for shape in some) == sorted(
        s.name for s in checks.CHECKED_SHAPES
    )


def test_every_test_of_the_kernels_is_in_the_plan(tmp_path: Path) -> None:
    files = {f"gpu/triton_kernels/{path.name}" for path in (ROOT / "tests/gpu/triton_kernels").glob("test_*.py")}
    at = Setting(tmp_path, tmp_path, dry=False)
    steps = {step.name: step for group in PARTS["1"](at) for step in group}
    planned_files = [
        path
        for name in ("kernel tests", "GPU tests")
        for command in steps[name].commands_now()
        for path in command
        if path.endswith(".py")
    ]
    assert sorted(planned_files) == sorted(str(ROOT / "tests" / file) for file in (*files, "gpu/test_fit_device.py"))


def test_tests_run_in_parallel_where_xdist_was_installed_by_the_check_itself(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    at = Setting(tmp_path, tmp_path / "site", dry=False)
    commands = gpu_check.run_tests(at, "a.py", "b.py")
    assert len(commands()) == 2
    (tmp_path / "site/xdist").mkdir(parents=True)
    (tmp_path / "site/xdist/__init__.py").touch()
    (command,) = commands()
    assert {"-n", str(ROOT / "tests/a.py"), str(ROOT / "tests/b.py")} <= set(command)


def test_a_shorter_limit_leaves_the_preparation_its_time(tmp_path: Path) -> None:
    groups = PARTS["2"](Setting(tmp_path, tmp_path, dry=False))
    least = gpu_check.least_minutes(groups, LIMITS["2"])
    assert 2 < least < 3
    fixed = gpu_check.fixed_seconds(groups)
    scale = (60 * least - fixed) / (LIMITS["2"] - fixed)
    assert [planned(group, scale) for group in groups[:2]] == [planned(group) for group in groups[:2]]
    assert planned(groups[2], scale) == pytest.approx(planned(groups[2]) / 3, rel=0.05)
    assert sum(planned(group, scale) for group in groups) + CLOSING <= 60 * least


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def step(name: str, code: str, seconds: float = 20, most: float = 20, **options) -> Step:
    command = [sys.executable, "-c", code, "{out}", "{budget}"]
    return Step(
        name,
        seconds,
        most,
        "a test",
        [command],
        lambda output, folder: output.split(),
        lambda found: None if found else "no results",
        **options,
    )


def runner(tmp_path: Path, seconds: float = 60) -> Runner:
    return Runner(tmp_path / "check.json", seconds + CLOSING, {"part": "1"})


def outcomes(run: Runner) -> dict[str, str]:
    return {step["name"]: step["outcome"].partition(" after")[0] for step in run.data["steps"]}


def alive(pid: Path) -> bool:
    """Whether the process runs whose id is in the file. One that waits for its exit status to be read does not."""
    stat = Path("/proc", pid.read_text(), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_step_is_cut_and_the_next_one_runs(tmp_path: Path) -> None:
    begin, pid = time.monotonic(), tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    slow = f"import subprocess, sys; print('so-far', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    run = runner(tmp_path)
    run.run(
        [
            (step("slow", slow, 3, 3), step("silent", "import time; time.sleep(60)", 1, 1)),
            (step("bad", "print('said'); raise SystemExit(3)"),),
            (step("good", "print('fine')"), step("beside", "print('fine too')")),
        ]
    )
    assert time.monotonic() - begin < 50
    assert outcomes(run) == {
        "slow": "cut",
        "silent": "FAILED: no results, cut",
        "bad": "FAILED: exit status 3",
        "good": "ok",
        "beside": "ok",
    }
    assert run.failed
    written = json.loads(run.path.read_text())
    assert written["results"] == {
        "slow": ["so-far"],
        "silent": [],
        "bad": ["said"],
        "good": ["fine"],
        "beside": ["fine", "too"],
    }
    assert "[good] fine\n" in run.path.with_suffix(".log").read_text()
    assert not alive(pid)


def test_what_a_step_leaves_goes_to_later_ones_up_to_their_maximum(tmp_path: Path) -> None:
    say = "import sys; print(sys.argv[2])"
    run = runner(tmp_path, seconds=100)
    run.run([(step("first", say, 40, 90),), (step("second", say, 20, 30),), (step("third", say, 40, 400),)])
    first, second, third = (float(run.data["results"][name][0]) for name in ("first", "second", "third"))
    begin_at_most_after = 0.7  # the share of the time in which new work begins, or all but ten seconds
    assert 0.9 * begin_at_most_after * 40 < first <= 40  # what is planned for the others is theirs
    assert second <= 30
    assert third > 60


def test_a_lost_gpu_means_a_new_process_that_resumes(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
file = pathlib.Path(sys.argv[1], "tries"); tries = file.read_text() if file.exists() else ""
file.write_text(tries + "x"); print(len(tries), sys.argv[-1] == "--resume", flush=True)
raise SystemExit({GPU_GONE} if len(tries) < 2 else 0)
"""
    run = runner(tmp_path)
    run.run([(step("bench", code, 50, 50, resumes=True),), (step("others", code, 1, 1),)])
    assert run.data["results"]["bench"] == ["0", "False", "1", "True", "2", "True"]
    assert outcomes(run) == {"bench": "ok, restarted 2 times", "others": f"FAILED: exit status {GPU_GONE}"}


def test_results_are_written_while_a_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SAVE_SECONDS", 0.2)
    path = tmp_path / "check.json"
    code = f"""
import json, time
print("early", flush=True)
for _ in range(100):
    time.sleep(0.1)
    try: seen = json.load(open({str(path)!r}))["results"]["one"]
    except (OSError, KeyError): continue
    if seen: print("seen"); break
"""
    run = runner(tmp_path)
    run.run([(step("one", code),)])
    assert run.data["results"]["one"] == ["early", "seen"]


def test_a_flood_of_output_is_kept_at_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "KEPT_CHARACTERS", 20_000)
    monkeypatch.setattr(running, "LINE_CHARACTERS", 1000)
    run = runner(tmp_path)
    run.run(
        [
            (step("lines", "print('begin'); [print('x' * 99) for _ in range(10**5)]; print('end')"),),
            (step("one line", "print('begin ' + 'y' * 10**7 + ' end')"),),
        ]
    )
    for found in run.data["results"].values():
        assert (found[0], found[-1]) == ("begin", "end")
        assert sum(map(len, found)) < 50_000
    log = run.path.with_suffix(".log")
    assert log.stat().st_size < 100_000
    assert "[lines] begin\n" in log.read_text()
    assert "characters left out]" in log.read_text()
    assert "\nend\n" in log.read_text()


def test_output_that_is_not_much_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "KEPT_CHARACTERS", 6)
    output = Output()
    assert [output.add(text) for text in ("one\n", "two\n", "a\n")] == [True, False, False]
    assert output.text() == "one\ntwo\na\n"
    assert not output.add("five\n")
    assert output.text() == "one\n\n[6 characters left out]\nfive\n"


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    run = runner(tmp_path)

    def full(*_, **__) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "log_file", SimpleNamespace(write=full))
    monkeypatch.setattr(Path, "write_text", full)
    run.run([(step("one", "print('done')"),), (step("two", "print('done')"),)])
    assert [(step["name"], step["outcome"]) for step in run.data["steps"]] == [("one", "ok"), ("two", "ok")]
    assert capfd.readouterr().out.count("No space left on device") == 1


def test_what_cannot_be_started_or_read_is_a_failed_step(tmp_path: Path) -> None:
    absent = Step("absent", 5, 5, "a test", [["no-such-command"]], lambda output, folder: output, lambda found: None)
    odd = Step(
        "odd",
        5,
        5,
        "a test",
        [[sys.executable, "-c", ""]],
        lambda output, folder: json.loads(output),
        lambda found: found["failed"],
    )
    run = runner(tmp_path)
    run.run([(absent, odd), (step("good", "print('fine')"),)])
    assert outcomes(run) == {
        "absent": "FAILED: exit status 127",
        "good": "ok",
        "odd": "FAILED: unexpected results, KeyError: 'failed'",
    }
    assert "no-such-command" in run.data["results"]["absent"]


STOPPED = """
import signal, sys
from pathlib import Path
from bench.runner import Runner, Step
def step(name, code):
    return Step(name, 50, 50, "a test", [[sys.executable, "-c", code]], lambda output, folder: output.split(),
                lambda found: None)
run = Runner(Path(sys.argv[1], "check.json"), 100, {})
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, run.stop)
sleep = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
codes = [f"import subprocess, sys; print('so-far', flush=True);"
         f"subprocess.run([sys.executable, '-c', {sleep!r}, {sys.argv[1] + '/' + name!r}])" for name in ("a", "b")]
run.run([tuple(step(name, code) for name, code in zip("ab", codes)), (step("later", ""),)])
"""


@pytest.fixture
def two_sleepers(tmp_path: Path):
    """A run in a process of its own, both of whose steps have a child that sleeps; and the files with their ids."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a run that is killed leaves its folder there
    run = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT, env=environment)
    files = [tmp_path / name for name in "ab"]
    until(lambda: all(file.is_file() and file.read_text() for file in files))
    assert all(map(alive, files))
    yield run, files
    run.kill()


def until(met, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("pause", [0.0, 0.005, 0.1, 0.2])
def test_a_signal_that_comes_twice_stops_once(number: signal.Signals, pause: float, two_sleepers, tmp_path) -> None:
    """As `make` passes it on, and a second Ctrl-C."""
    run, files = two_sleepers
    run.send_signal(number)
    time.sleep(pause)
    run.send_signal(number)
    assert run.wait(60) == 128 + number
    assert not any(map(alive, files))
    data = json.loads((tmp_path / "check.json").read_text())
    assert data["results"] == {"a": ["so-far"], "b": ["so-far"]}
    stopped = f"FAILED: stopped by {number.name}"
    assert [(step["name"], step["outcome"]) for step in data["steps"]] == [
        ("a", stopped),
        ("b", stopped),
        ("later", "not run"),
    ]


def test_nothing_outlives_a_run_that_is_killed(two_sleepers) -> None:
    run, files = two_sleepers
    run.kill()
    until(lambda: not any(map(alive, files)), 10)


def test_nothing_is_checked_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command("--part", "1", "--out", str(tmp_path), "--wheels", str(tmp_path))
    assert done.returncode == 1
    assert "survey: no GPU" in done.stdout
    data = json.loads((tmp_path / "gpu-check-1.json").read_text())
    assert [step["outcome"] for step in data["steps"][2:]] == ["not run"] * 4


def command(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bench.gpu_check", *options], cwd=ROOT, capture_output=True, text=True)


def test_options_that_do_not_go_together() -> None:
    for options in ((), ("--part", "1", "--dry-run"), ("--part", "1", "--minutes", "nan")):
        assert command(*options).returncode == 2


def test_options_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for options, said in (
        (("--part", "1", "--minutes", "0.5"), "--minutes must be at least 1.7 for part 1"),
        (("--part", "1", "--out", str(tmp_path / "file")), "--out must be a folder: "),
    ):
        done = command(*options)
        assert done.returncode == 2
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_check_that_is_stopped_ends_with_its_summary(number: signal.Signals, tmp_path: Path) -> None:
    options = ["--dry-run", "--out", str(tmp_path), "--wheels", str(tmp_path)]
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu_check", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in child.stdout:
        if "survey: ok" in line:
            break
    time.sleep(1)
    child.send_signal(number)
    printed = child.stdout.read()
    assert child.wait(60) == 128 + number
    data = json.loads((tmp_path / "gpu-check-dry-1.json").read_text())
    ended = {step["name"]: step["outcome"] for step in data["steps"]}
    assert ended["survey"] == "ok"
    assert ended["checks"] == f"FAILED: stopped by {number.name}"
    assert ended["GPU tests"] == "not run"
    assert printed.splitlines()[-1] == f"results: {tmp_path / 'gpu-check-dry-1.json'}"
    assert "x86_64" in printed or "aarch64" in printed


# ---------------------------------------------------------------------------------------------------------------------
# What steps print, and the summary
# ---------------------------------------------------------------------------------------------------------------------


def test_outcomes_of_tests_are_read_with_and_without_xdist() -> None:
    output = """
tests/a.py::test_one[x y] PASSED                                         [ 10%]
tests/a.py::test_two SKIPPED (needs a GPU)                               [ 20%]
tests/a.py::test_three FAILED                                            [ 30%]
[gw1] [ 40%] PASSED tests/b.py::test_four[1.0-a b]
tests/b.py::test_five
[gw0] [  5%] ERROR tests/b.py::test_five
FAILED tests/a.py::test_three - AssertionError
tests/b.py::test_four[1.0-a b]
tests/b.py::test_hangs[a b]
tests/a.py::test_hangs_too"""
    found = gpu_check.read_tests(output.replace("\n", " \n"), Path())
    failures = ["tests/a.py::test_three", "tests/b.py::test_five"]
    unfinished = ["tests/b.py::test_hangs[a b]", "tests/a.py::test_hangs_too"]
    assert found == {"passed": 2, "failed": 2, "skipped": 1, "failures": failures, "unfinished": unfinished}
    assert "  did not end: tests/a.py::test_hangs_too" in summary.test_lines("kernel tests", found)
    assert gpu_check.tests_pass(found) == "2 tests failed"
    assert gpu_check.tests_pass(gpu_check.read_tests("", Path())) == "no results"
    assert gpu_check.tests_pass({"passed": 0, "failed": 0, "skipped": 9}) == "no results"


def test_outcomes_of_the_checks_are_read() -> None:
    output = """tiny-2x2x40: onpo_fast fast: absent: needs a GPU
tiny-2x2x40: onpo_fast torch, policy + reference: ok
long-pair-1x2x3000: onpo_fast lean, scoring: logps differs between runs; RuntimeError: no: more
long-pair-1x2x3000: onpo_fast lean, policy + reference: not checked: out of memory
qwen3-8b-4x2x1024: not checked: it needs 28 GiB of free memory, here are 20
2 faults, 2 not checked
"""
    found = gpu_check.read_checks(output, Path())
    assert found["ok"] == 1
    assert [line.split(":")[0] for line in found["faults"]] == ["long-pair-1x2x3000"]
    assert [line.split(":")[0] for line in found["not_checked"]] == ["long-pair-1x2x3000", "qwen3-8b-4x2x1024"]
    assert gpu_check.checks_pass(found) == "1 faults"
    assert gpu_check.checks_pass({**found, "faults": []}) == "not checked: 2"


def test_a_kernel_of_ours_that_fails_is_a_failure_and_a_peer_is_not() -> None:
    def rows(**status: str) -> dict:
        names = {"fast": "onpo_fast fast", "trl": "TRL"}
        return {"shapes": [{"rows": [{"method": names[n], "task": "t", "status": s} for n, s in status.items()]}]}

    fault = gpu_check.ours_measured("onpo_fast fast")
    assert fault(rows(fast="measured", trl="failed")) is None
    assert fault(rows(fast="failed", trl="measured")) == "onpo_fast fast, t: failed"
    for status in ("skipped", "absent"):
        assert fault(rows(fast=status, trl="measured")) == "onpo_fast fast was not measured"
    assert fault(rows(trl="measured")) == fault(None) == "onpo_fast fast was not measured"


def test_a_fit_with_our_loss_must_have_been_measured() -> None:
    def fits(**status: str) -> dict:
        return {"fits": [{"loss": loss, "status": said} for loss, said in status.items()]}

    fault = gpu_check.fit_measured("triton")
    assert fault(fits(triton="measured", materialised="out of memory")) is None
    assert fault(fits(triton="out of memory", materialised="measured")) == "the fit with triton: out of memory"
    assert fault(fits()) == fault(None) == "the fit with triton: not run"


def test_the_epilogues_with_their_own_tile_must_have_been_measured() -> None:
    def record(**status: str) -> dict:
        lines = {
            "light": sweep.epilogue_line("light", 3),
            "masked": sweep.epilogue_line("masked", 1),
            "tile": sweep.Line(Variant(rows=128, columns=128, depth=128, stages=3)),
        }
        return {
            "shape": "s",
            "rows": [
                {"line": lines[name].name, "variant": vars(lines[name].variant), "status": said}
                for name, said in status.items()
            ],
        }

    def fault(*records: dict) -> str | None:
        return gpu_check.epilogues_measured({"shapes": list(records)})

    good = record(light="measured", tile="failed", masked="skipped")
    assert fault(good) is None
    assert fault(record(light="measured", masked="failed")) == "s: masked, 1 GiB: failed"
    assert fault(record(light="measured", masked="did not return")) == "s: masked, 1 GiB: did not return"
    assert fault(record(light="skipped", tile="measured")) == "light, 3 GiB: skipped"
    assert fault(record(tile="measured")) == fault() == gpu_check.epilogues_measured(None) == "light, 3 GiB: not run"
    assert fault(good, record(light="skipped")) is None  # there was no time for another shape
    assert fault(good, record(light="failed")) == "s: light, 3 GiB: failed"
    assert fault(record(light="skipped"), good) == "light, 3 GiB: skipped"


def test_reports_of_the_sanitizer_count_where_they_name_our_kernels() -> None:
    end = "========= ERROR SUMMARY: 1 error\n"
    theirs = gpu_check.read_reports("========= at cublas_kernel+0x10\n" + end, Path())
    ours = gpu_check.read_reports("========= at merge_kernel+0x10\n" + end, Path())
    assert gpu_check.no_reports(theirs) is None
    assert gpu_check.no_reports(ours) == "reports about merge_kernel"
    assert gpu_check.no_reports(gpu_check.read_reports("Segmentation fault\n", Path())) == "no results"


def test_the_summary_is_sixty_lines_at_most() -> None:
    row = {
        "line": "light, 3 GiB",
        "predicted": 1.08,
        "over_products": 1.1,
        "predicted_scoring": None,
        "nats": 0.016,
        "status": "failed",
        "reason": "OutOfResources",
    }
    data = {
        "part": "1",
        "commit": None,
        "results": {
            "kernel tests": {"passed": 1, "failed": 40, "skipped": 0, "failures": [f"test_{i}" for i in range(40)]},
            "sweep": {"shapes": [{"shape": "s", "rows": [row] * 50}]},
            "checks": {"ok": 3, "faults": ["f"] * 40, "not_checked": []},
        },
        "steps": [{"name": f"step {i}", "planned": 1, "seconds": 1, "outcome": "ok"} for i in range(8)],
    }
    lines = summary.lines(data, "check.json")
    assert len(lines) == summary.MOST_LINES
    assert "8 of 8 steps ok: step 0 1 s, step 1 1 s," in lines[-2]
    assert lines[-1] == "results: check.json"
    assert any("34 more" in line for line in lines)
    assert any("more lines in check.json" in line for line in lines)
    assert any("| light, 3 GiB | 1.08      | 1.100" in line for line in lines)
    assert any("| 1.6e-02 | failed: OutOfResources" in line for line in lines)
    assert len(summary.lines({"part": "1", "results": {}, "steps": data["steps"]}, "check.json")) < 5


def full_record() -> dict:
    """Part 1 with all that it can have: every method at every task, every line of the sweep, every target missed."""
    fast = iter(range(100, 0, -1))

    def measured(method, task) -> dict:
        return {
            "method": method.name,
            "task": task.name,
            "status": "measured",
            "seconds": {"both": {"median": 0.0625}},
            "over_floor": 1.125,
            "peak_extra_bytes": 2.5e9,
            "error": {"logps_nats_max": 1e-3},
        }

    rows = [measured(method, task) for method in METHODS for task in TASKS if task in method.tasks]
    rows += [{"method": f"peer {i}", "task": "scoring", "status": "absent", "reason": "no module"} for i in range(4)]
    headline = {
        "shape": "qwen3-8b-4x2x1024",
        "dtype": "bfloat16",
        "features": 4096,
        "vocabulary": 151936,
        "rows": rows,
        "floor_seconds": {"logits": 0.0137, "hidden": 0.0137, "weight": 0.0137},
    }
    swept = {
        shape: [
            {
                "line": line.name,
                "variant": vars(line.variant),
                "status": "measured",
                "over_products": 1 + next(fast) / 100,
                "predicted": line.predicted,
                "predicted_scoring": line.predicted_scoring,
            }
            for line in sweep.lines_of(shape)
        ]
        for shape in (problems.TARGET, problems.SMALL_HEAD)
    }
    swept[problems.TARGET][-1] |= {"status": "failed", "reason": "OutOfResources: shared memory", "over_products": None}
    verdicts = [{"claim": t.claim, "limit": str(t.limit), "measured": 9.5, "verdict": "missed"} for t in TARGETS]
    fit = {
        "loss": "triton",
        "layers": 32,
        "of_layers": 32,
        "status": "measured",
        "pairs_per_second": 1.5,
        "pairs": 2,
        "shape": "llama3-8b",
    }
    names = ("install", "survey", "kernel tests", "checks", "compile", "headline", "sweep", "fit")
    steps = [{"name": name, "planned": 60, "seconds": 50, "outcome": "ok"} for name in names]
    steps[2]["outcome"] = "FAILED: 9 tests failed"
    return {
        "part": "1",
        "commit": "0" * 40,
        "steps": steps,
        "results": {
            "install": ["34 wheels installed from wheels"],
            "survey": {"device": "NVIDIA H100", "products": {"mm": "right"}, "versions": {"torch": "2.11"}},
            "kernel tests": {"passed": 200, "failed": 9, "failures": [f"test_{i}" for i in range(9)]},
            "checks": {"ok": 60, "faults": ["a fault"] * 9, "not_checked": []},
            "headline": {"shapes": [headline], "verdicts": verdicts},
            "sweep": {"shapes": [{"shape": shape.name, "rows": rows} for shape, rows in swept.items()]},
            "fit": {"fits": [fit, {**fit, "loss": "other"}]},
        },
    }


def test_a_full_summary_cuts_no_verdict() -> None:
    data = full_record()
    lines = summary.lines(data, "check.json")
    assert len(lines) == summary.MOST_LINES
    assert sum(line.startswith("  missed: ") for line in lines) == len(TARGETS)
    for part in ("not measured: peer 0", "| kernel tests | 60 ", "7 of 8 steps ok", "2 pairs a step", "failed: test_1"):
        assert any(part in line for line in lines), part
    headline = lines[lines.index(next(line for line in lines if line.startswith("| method"))) + 2 :]
    assert [line.split("|")[1].strip() for line in headline[:5]] == ["onpo_fast fast"] * 4 + ["onpo_fast lean"]
    rows = data["results"]["sweep"]["shapes"][0]["rows"]
    by_time = sorted(rows, key=lambda row: row["over_products"] or 9)
    assert any(line.startswith(f"| {by_time[0]['line']} ") for line in lines)
    assert "variants of the kernels at smollm2-4x2x1024" in lines
    data["results"] |= {"kernel tests": {"passed": 1}, "checks": {"ok": 1}}
    data["results"]["headline"]["verdicts"] = []
    lines = summary.lines(data, "check.json")  # with less to say, all that was predicted and a row of every peer
    for row in rows:
        assert row["predicted"] is None or any(line.startswith(f"| {row['line']} ") for line in lines)
    shown = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    for method in METHODS:
        assert shown.count(method.name) == (len(method.tasks) if method.name in summary.OURS else 1)


# ---------------------------------------------------------------------------------------------------------------------
# The sweep
# ---------------------------------------------------------------------------------------------------------------------


def test_predictions_of_the_sweep() -> None:
    """Those that an audit of the compiled kernels gave, where it gave one; nothing is made up for the others."""
    by_name = {line.name: line for line in sweep.LINES}
    assert len(by_name) == len(sweep.LINES)
    assert {line.variant.epilogue for line in sweep.LINES} == set(EPILOGUES)
    wanted = {"masked, 1 GiB": 1.17, "light, 3 GiB": 1.08, "persistent, 3 GiB": 1.06}
    assert {name: round(by_name[name].predicted, 2) for name in wanted} == wanted
    assert by_name["masked, 3 GiB"].predicted_scoring == pytest.approx(15.8 / 13.7)
    predicted = {line.name for line in sweep.LINES if line.predicted is not None}
    assert predicted == {f"{epilogue}, {gib} GiB" for epilogue in EPILOGUES for gib in (1, 3)}


def test_lines_of_other_shapes() -> None:
    assert sweep.lines_of(problems.TARGET) == list(sweep.LINES)
    small, tiny = (sweep.lines_of(shape) for shape in (problems.SMALL_HEAD, problems.TINY))
    assert [line.name for line in small] == [line.name for line in sweep.LINES if line.gib == sweep.ONE_CHUNK_GIB]
    assert len(small) < len(tiny)
    assert [line.name for line in tiny] == [line.name for line in sweep.LINES]
    assert {prediction for line in small + tiny for prediction in (line.predicted, line.predicted_scoring)} == {None}


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sweep whose lines are measured by a stand-in for the kernels; by name, what the line does."""

    def run(behaviour: dict[str, float | Exception], record: dict | None = None) -> list[dict]:
        """The rows, after a sweep that goes on with the record of another shape and with ``record``."""

        def train(problem: Problem, workspace: int, mark=lambda: None):
            mark()
            what = behaviour[active[-1].epilogue]
            mark()
            if isinstance(what, Exception):
                raise what
            return torch.full((4, 4), what), exact + 0.004  # nats, of 40 tokens

        class using:
            def __init__(self, variant: Variant) -> None:
                self.variant = variant

            def __enter__(self) -> None:
                active.append(self.variant)

            def __exit__(self, *_) -> None:
                active.pop()

        active: list[Variant] = []
        exact = accuracy.exact_logps(Problem.make(problems.TINY))
        monkeypatch.setattr(sweep, "train", train)
        monkeypatch.setattr(sweep, "score", lambda problem, mark: (mark(), mark()))
        monkeypatch.setattr(sweep, "using", using)
        other = {"shape": "another", "rows": [{"line": f"{e}, 3 GiB"} for e in behaviour]}
        data = {"shapes": [other, *([{"shape": problems.TINY.name, **record}] if record else [])]}
        path, device = tmp_path / "sweep.json", torch.device("cpu")
        sweeping = sweep.Sweep(path, data, device, problems.TINY, time.monotonic() + 60, 0.0)
        sweeping.run([line for line in sweep.LINES if line.name in {f"{e}, 3 GiB" for e in behaviour}])
        written, found = json.loads(path.read_text())["shapes"]
        assert written == other
        assert found.keys() >= {"floor_seconds"}
        return found["rows"]

    return run


def test_a_variant_that_fails_is_a_line(swept) -> None:
    masked, light, persistent = swept(
        {"masked": RuntimeError("out of resource: shared memory\nmore"), "light": 1.0, "persistent": 1.5}
    )
    assert (masked["status"], masked["reason"]) == ("failed", "RuntimeError: out of resource: shared memory")
    assert light["status"] == "measured"
    assert light["difference"] == 0
    assert light["nats"] == persistent["nats"] == pytest.approx(0.1)
    assert light["seconds"]["rounds"] == 6  # two blocks of three
    assert light["over_products"] > 0
    assert light["scoring_over_product"] > 0
    assert "dX differs by 5.0e-01" in persistent["reason"]


def test_a_sweep_resumes_behind_the_line_that_lost_the_gpu(swept) -> None:
    before = [{"line": "masked, 3 GiB", "status": "did not return", "predicted": None, "predicted_scoring": None}]
    rows = swept({"masked": 1.0, "light": 1.0}, {"rows": before})
    assert [(row["line"], row["status"]) for row in rows] == [
        ("masked, 3 GiB", "did not return"),
        ("light, 3 GiB", "measured"),
    ]


def test_a_resumed_sweep_compares_with_the_same_line(swept) -> None:
    def before(first: str) -> dict:
        return {
            "compared_with": first,
            "rows": [
                {"line": "masked, 3 GiB", "status": "measured", "predicted": None, "predicted_scoring": None},
                {"line": "light, 3 GiB", "status": "did not return", "predicted": None, "predicted_scoring": None},
            ],
        }

    *_, persistent = swept({"masked": 1.0, "light": 2.0, "persistent": 1.5}, before("masked, 3 GiB"))
    assert "dX differs by 5.0e-01" in persistent["reason"]
    masked, _, persistent = swept({"masked": RuntimeError("lost"), "persistent": 1.5}, before("masked, 3 GiB"))
    assert (masked["status"], persistent["status"]) == ("failed", "measured")


def test_a_sweep_resumes_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    sweep.arguments(parser)
    options = parser.parse_args(
        [
            "--device",
            "cpu",
            "--shape",
            "tiny-2x2x40",
            "--out",
            str(tmp_path),
            "--resume",
            "--budget",
            "1e-9",
            "--lines",
            "light, 3 GiB",
            "--block",
            "0.05",
        ]
    )
    assert sweep.main(options) == 0
    (record,) = json.loads((tmp_path / "sweep.json").read_text())["shapes"]
    assert [row["status"] for row in record["rows"]] == ["skipped"]
    (tmp_path / "sweep.json").write_text(json.dumps({"shapes": [{**record, "floor_seconds": "as before"}]}))
    assert sweep.main(options) == 0  # there is nothing left to do
    assert json.loads((tmp_path / "sweep.json").read_text())["shapes"][0]["floor_seconds"] == "as before"


def compiled(monkeypatch: pytest.MonkeyPatch, outcome) -> tuple[int, list]:
    """Exit status of compiling all lines, and what was compiled, with ``outcome`` in place of the compiler."""
    tried = []

    class Pool:
        def __init__(self, *_, **__) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None: ...

        def map(self, function, *given):
            for values in zip(*given):
                tried.append(values)
                yield outcome(values[0][0]), str(values[0])

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Pool)
    lines = {shape: sweep.lines_of(shape) for shape in (problems.TARGET, problems.SMALL_HEAD)}
    return sweep.compile_lines(lines, "cuda", 1), tried


def test_an_epilogue_that_does_not_compile_is_a_failure_and_an_odd_tile_is_not(monkeypatch) -> None:
    status, tried = compiled(monkeypatch, lambda variant: True)
    assert status == 0
    target, small = (sweep.small_problem(shape) for shape in (problems.TARGET, problems.SMALL_HEAD))
    assert {given for given, in_chunks in tried if in_chunks} == {(Variant(name), target) for name in EPILOGUES}
    assert {given for given, _ in tried} == {
        *((line.variant, target) for line in sweep.LINES),
        *((line.variant, small) for line in sweep.lines_of(problems.SMALL_HEAD)),
    }
    assert compiled(monkeypatch, lambda variant: variant == Variant(variant.epilogue))[0] == 0
    assert compiled(monkeypatch, lambda variant: variant != Variant("persistent"))[0] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_compiled_in_chunks_has_several(dtype: torch.dtype) -> None:
    """As many chunks as the shape of the targets has in 1 GiB, so that the same forms of the kernels are met."""

    def chunks(shape: problems.Shape, workspace: int) -> int:
        length = shape.responses * shape.tokens
        groups = PairLayout.of(torch.arange(0, shape.rows + 1, shape.tokens), shape.pairs()).groups
        assert [group.tokens for group in groups] == [length] * shape.groups
        sizes = (shape.vocabulary, shape.features)
        return len(choose_plan(groups, sizes, dtype, dtype == torch.bfloat16, "fast", workspace, None).chunks)

    small = sweep.small_problem(problems.TARGET)
    assert chunks(small, sweep.chunk_bytes(small, dtype.itemsize)) == 4
    assert chunks(small, sweep.GIB) == 1
    if dtype == torch.bfloat16:
        assert chunks(problems.TARGET, sweep.GIB) == 4
        assert chunks(problems.TARGET, 3 * sweep.GIB) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Survey and memory
# ---------------------------------------------------------------------------------------------------------------------


def test_a_survey_that_is_cut_has_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(device: torch.device) -> dict:
        raise TimeoutError

    monkeypatch.setattr(survey, "ceilings", hang)
    with pytest.raises(TimeoutError):
        survey.main(argparse.Namespace(device="cpu", out=tmp_path))
    assert json.loads((tmp_path / "survey.json").read_text()).keys() >= {"versions", "device", "products"}


def truncated(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N, K), (V, K) -> (N, V) float32: the running sum is rounded towards zero after every 16 terms."""
    total = torch.zeros(len(hidden), len(weight))
    for x, w in zip(hidden.double().split(16, 1), weight.double().split(16, 1)):
        exact = total + x @ w.T
        rounded = exact.float()
        total = torch.where(rounded.abs() > exact.abs(), rounded.nextafter(torch.zeros(())), rounded)
    return total


def test_what_a_long_product_loses() -> None:
    product, exact = survey.long_product(torch.device("cpu"), 576)
    assert abs(survey.lost_share(product, exact)) < 1e-7
    assert survey.lost_share(exact * (1 - 1e-5), exact) == pytest.approx(1e-5)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 4096, generator=draw) for rows in (64, 256))
    short, long = (
        survey.lost_share(
            truncated(hidden[:, :terms], weight[:, :terms]), hidden[:, :terms].double() @ weight[:, :terms].double().T
        )
        for terms in (512, 4096)
    )
    assert 2**-24 < short < long / 4
    line = summary.lost_share_line({"512": 2**-20, "4096": 2**-18})
    assert line.endswith(": 9.5e-07 at K = 512 (0.50), 3.8e-06 at K = 4096 (0.25)")


def test_the_target_shape_is_checked_where_its_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    needed = checks.bytes_needed(problems.TARGET)
    assert 20 * 2**30 < needed < 35 * 2**30
    for free, said in ((needed, None), (20 * 2**30, "it needs 28 GiB of free memory, here are 20")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * 2**30))
        assert checks.too_large(problems.TARGET, gpu) == said
    assert checks.too_large(problems.TARGET, torch.device("cpu")) == "it needs a GPU"


# ---------------------------------------------------------------------------------------------------------------------
# Wheels
# ---------------------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A folder with a small wheel and one in two pieces, which are all that is left of it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_wheel(folder, "small_made_up", {"small_made_up.py": "value = 1\n"})
    large = make_wheel(
        folder, "large_made_up", {"deep/large_made_up.py": "#" * 2000 + "\nvalue = 2\n", "large_made_up.pth": "deep\n"}
    )
    wheels.split(folder, most=large.stat().st_size - 1)
    return folder


NAME = "large_made_up-1.0-py3-none-any.whl"


def test_large_wheels_are_split_and_joined(pieces: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in pieces.iterdir()) == [
        f"{NAME}.part1of2",
        f"{NAME}.part2of2",
        f"{NAME}.sha256",
        "small_made_up-1.0-py3-none-any.whl",
    ]
    assert "4 files in" in wheels.listing(pieces)
    assert zipfile.ZipFile(wheels.join(pieces, NAME, tmp_path)).testzip() is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / f"{NAME}.part2of2").unlink(), f"{NAME}.part2of2 is missing"),
        (lambda folder: (folder / f"{NAME}.sha256").unlink(), f"{NAME}.sha256 is missing"),
        (lambda folder: (folder / f"{NAME}.part1of2").write_bytes(b"half"), f"{NAME}: its 2 pieces or "),
        (lambda folder: (folder / f"{NAME}.sha256").write_text(""), f"{NAME}.sha256 are damaged"),
        (lambda folder: (folder / f"{NAME}.sha256").write_bytes(b"\xff\xfe"), f"{NAME}.sha256 are damaged"),
        (lambda folder: [part.unlink() for part in folder.glob("*part*")], f"{NAME}.part1of2, {NAME}.part2of2 is"),
    ],
)
def test_a_damaged_or_missing_piece_is_one_line(pieces: Path, tmp_path: Path, capfd, damage, said: str) -> None:
    damage(pieces)
    assert wheels.install(pieces, tmp_path / "site-packages") == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if "large_made_up" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert (tmp_path / "site-packages" / "small_made_up.py").is_file()  # the others are installed all the same


def test_wheels_are_installed_with_the_folders_that_they_add(pieces: Path, tmp_path: Path, capfd) -> None:
    make_wheel(pieces, "torch", {"torch.py": "raise ImportError('not this one')"})  # is installed: stays as it is
    site = tmp_path / "site-packages"
    assert wheels.install(pieces, site) == 0
    assert "2 wheels installed from" in capfd.readouterr().out
    assert not (site / "torch.py").exists()
    code = "import small_made_up, large_made_up; print(small_made_up.value + large_made_up.value)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_folders_that_packages_elsewhere_on_the_path_add(tmp_path: Path) -> None:
    """The private folder comes first and has a sitecustomize.py, which hides any that the other folder has."""
    private, other, plain = (tmp_path / name for name in ("private", "other/site-packages", "plain"))
    wheels.install(tmp_path, private)
    for folder in (other, plain):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep.pth").write_text("deep\n")
        (folder / "sitecustomize.py").touch()
    code = "import sys; print([path for path in sys.path if path.endswith('deep')])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (private, other, plain)))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{[str(other / 'deep')]}\n"


def test_the_commit_that_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    assert gpu_check.commit() != "abc"
    monkeypatch.setenv("COMMIT", "abc")
    assert gpu_check.commit() == "abc"
    assert surroundings(torch.device("cpu"))["commit"] == "abc"


def test_wheels_that_pip_refuses_are_named_and_the_others_installed(pieces: Path, tmp_path: Path, capfd, monkeypatch):
    (pieces / "wrong_machine-1.0-cp27-none-any.whl").write_bytes(b"")
    (pieces / "half_copied-1.0-py3-none-any.whl").write_bytes(b"PK half")
    newer = make_wheel(pieces, "newer_python", {})
    with zipfile.ZipFile(newer) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    files["newer_python-1.0.dist-info/METADATA"] += "Requires-Python: >=3.99\n"
    with zipfile.ZipFile(newer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, **more: calls.append(given) or run(*given, **more))
    site = tmp_path / "site-packages"
    assert wheels.install(pieces, site) == 1
    printed = capfd.readouterr()
    refused = next(line for line in printed.out.splitlines() if line.startswith("refused by pip: "))
    assert sorted(refused.removeprefix("refused by pip: ").split(", ")) == [
        "half_copied-1.0-py3-none-any.whl",
        "newer_python-1.0-py3-none-any.whl",
        "wrong_machine-1.0-cp27-none-any.whl",
    ]
    assert "not a supported wheel" in printed.err
    assert len(calls) == 4  # and not one for each wheel that is in order
    assert {path.name for path in site.glob("*.py")} == {"sitecustomize.py", "small_made_up.py"}


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_dry_run(tmp_path: Path) -> None:
    """The whole order of four parts on a CPU: two to three minutes."""
    done = command("--dry-run", "--out", str(tmp_path), "--wheels", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| in all " in done.stdout
    parts = [json.loads((tmp_path / f"gpu-check-dry-{part}.json").read_text()) for part in "1234"]
    for data in parts:
        assert {step["outcome"] for step in data["steps"]} == {"ok"}
    right, fast, real, whole = (data["results"] for data in parts)
    assert right.keys() == {"install", "survey", "kernel tests", "checks", "compile", "GPU tests"}
    assert right["kernel tests"]["passed"] > 0
    assert fast.keys() == {"install", "survey", "headline", "sweep", "fit"}
    (swept,) = fast["sweep"]["shapes"]
    assert {row["epilogue"] for row in swept["rows"]} == set(EPILOGUES)
    assert all(row["nats"] < 0.02 for row in swept["rows"])
    assert fast["survey"]["lost_share"].keys() == {"576", "2560", "4096"}
    assert [row["status"] for row in fast["fit"]["fits"]] == ["measured"] * 2
    assert {"sample", "score", "fit"} <= real["trainer"]["runs"][0]["tokens_per_second"].keys()
    compared = whole["tiny against TRL"]["trainers"]
    assert [row["status"] for row in compared if row["trainer"] == "onpo_fast"] == ["measured"] * 2
    assert "<svg" in plots.draw(tmp_path / "gpu-check-dry-2.json").read_text()
    printed = done.stdout.split("GPU check, part ")
    assert len(printed) == 5
    assert all(len(text.splitlines()) <= summary.MOST_LINES for text in printed[1:])
