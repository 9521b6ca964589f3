"""The GPU check: its plan fits its limits, steps are cut and not the run, and all of it runs on a CPU in small."""

from __future__ import annotations

import argparse
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

import pytest
import torch

from bench import checks, gpu_check, plots, problems, summary, sweep, wheels
from bench.gpu_check import LIMITS, PARTS, Setting
from bench.problems import Problem
from bench.runner import CLOSING, GPU_GONE, ROOT, Runner, Step, planned
from onpo_fast.config import parse
from onpo_fast.kernels.variants import EPILOGUES, Variant

# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_the_plan_fits_the_limit(part: str, tmp_path: Path) -> None:
    groups = PARTS[part](Setting(tmp_path, tmp_path, dry=False))
    assert sum(map(planned, groups)) + CLOSING <= LIMITS[part]
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
            for command in step.commands:
                if "bench" in command:
                    name, *options = command[command.index("bench") + 1 :]
                    parser = argparse.ArgumentParser(exit_on_error=False)
                    importlib.import_module(f"bench.{name}").arguments(parser)
                    values = parser.parse_args([o.replace("{out}", "x").replace("{budget}", "1") for o in options])
                    parse(shlex.split(getattr(values, "train", "")))
                    found.add(name)
    assert found == {"survey", "checks", "kernels", "sweep", "training"}


def test_shapes_have_the_names_that_the_plan_gives_them() -> None:
    assert gpu_check.TARGET == problems.TARGET.name == checks.SHAPES[0].name
    assert gpu_check.TEXT in problems.SHAPES
    assert sorted(shape for some in gpu_check.CHECK_SHAPES for shape in some) == sorted(s.name for s in checks.SHAPES)


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def step(name: str, code: str, seconds: float = 20, most: float = 20, **options) -> Step:
    command = [sys.executable, "-c", code, "{out}", "{budget}"]
    return Step(name, seconds, most, "a test", [command], lambda output, folder: output.split(),
                lambda found: None if found else "no results", **options)  # fmt: skip


def runner(tmp_path: Path, seconds: float = 60) -> Runner:
    return Runner(tmp_path / "check.json", seconds + CLOSING, {"part": "1"})


def outcomes(run: Runner) -> dict[str, str]:
    return {step["name"]: step["outcome"].partition(" after")[0] for step in run.data["steps"]}


def test_a_step_is_cut_and_the_next_one_runs(tmp_path: Path) -> None:
    begin, pid = time.monotonic(), tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    slow = f"import subprocess, sys; print('so-far', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    run = runner(tmp_path)
    run.run([
        (step("slow", slow, 3, 3), step("silent", "import time; time.sleep(60)", 1, 1)),
        (step("bad", "print('said'); raise SystemExit(3)"),),
        (step("good", "print('fine')"), step("beside", "print('fine too')")),
    ])  # fmt: skip
    assert time.monotonic() - begin < 30
    assert outcomes(run) == {
        "slow": "cut", "silent": "FAILED: no results, cut", "bad": "FAILED: exit status 3", "good": "ok",
        "beside": "ok",
    }  # fmt: skip
    assert run.failed
    written = json.loads(run.path.read_text())
    assert written["results"] == {
        "slow": ["so-far"], "silent": [], "bad": ["said"], "good": ["fine"], "beside": ["fine", "too"],
    }  # fmt: skip
    assert "[good] fine\n" in run.path.with_suffix(".log").read_text()
    helper = Path("/proc", pid.read_text(), "stat")  # of what was cut: it is gone, or waits for its exit to be read
    assert not helper.exists() or helper.read_text().rpartition(")")[2].split()[0] == "Z"


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
    monkeypatch.setattr("bench.runner.SAVE_SECONDS", 0.2)
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


def test_nothing_is_checked_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command("--part", "1", "--out", str(tmp_path), "--wheels", str(tmp_path))
    assert done.returncode == 1
    assert "survey: no GPU" in done.stdout
    data = json.loads((tmp_path / "gpu-check-1.json").read_text())
    assert [step["outcome"] for step in data["steps"][2:]] == ["not run"] * 6


def command(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bench.gpu_check", *options], cwd=ROOT, capture_output=True, text=True)


def test_options_that_do_not_go_together() -> None:
    for options in ((), ("--part", "1", "--dry-run"), ("--part", "1", "--minutes", "0")):
        assert command(*options).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_check_that_is_stopped_ends_with_its_summary(number: signal.Signals, tmp_path: Path) -> None:
    options = ["--dry-run", "--out", str(tmp_path), "--wheels", str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-m", "bench.gpu_check", *options], cwd=ROOT, stdout=subprocess.PIPE,
                             text=True)  # fmt: skip
    for line in child.stdout:
        if "survey: ok" in line:
            break
    time.sleep(1)
    child.send_signal(number)
    printed = child.stdout.read()
    assert child.wait(20) == 128 + number
    data = json.loads((tmp_path / "gpu-check-dry-1.json").read_text())
    ended = {step["name"]: step["outcome"] for step in data["steps"]}
    assert ended["survey"] == "ok"
    assert ended["checks"].startswith("FAILED: stopped by")
    assert ended["fit"] == "not run"
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
"""
    found = gpu_check.read_tests(output.replace("\n", " \n"), Path())
    failures = ["tests/a.py::test_three", "tests/b.py::test_five"]
    assert found == {"passed": 2, "failed": 2, "skipped": 1, "failures": failures}
    assert gpu_check.tests_pass(found) == "2 tests failed"
    assert gpu_check.tests_pass(gpu_check.read_tests("", Path())) == "no results"


def test_outcomes_of_the_checks_are_read() -> None:
    output = """tiny-2x2x40: onpo_fast fast: absent: needs a GPU
tiny-2x2x40: onpo_fast torch, policy + reference: ok
long-pair-1x2x3000: onpo_fast lean, scoring: logps differs between runs; RuntimeError: no: more
qwen3-8b-4x2x1024: left out: it needs a GPU with 60 GiB free
2 faults
"""
    found = gpu_check.read_checks(output, Path())
    assert found["ok"] == 1
    assert [line.split(":")[0] for line in found["faults"]] == ["long-pair-1x2x3000"]
    assert [line.split(":")[0] for line in found["left_out"]] == ["qwen3-8b-4x2x1024"]
    assert gpu_check.checks_pass(found) == "1 faults"


def test_a_kernel_of_ours_that_fails_is_a_failure_and_a_peer_is_not() -> None:
    def rows(**status: str) -> dict:
        names = {"fast": "onpo_fast fast", "trl": "TRL"}
        return {"shapes": [{"rows": [{"method": names[n], "task": "t", "status": s} for n, s in status.items()]}]}

    assert gpu_check.ours_measured(rows(fast="measured", trl="failed")) is None
    assert gpu_check.ours_measured(rows(fast="failed", trl="measured")) == "onpo_fast fast, t: failed"
    assert gpu_check.ours_measured(rows(fast="skipped", trl="absent")) == "no results"
    assert gpu_check.ours_measured(None) == "no results"


def test_reports_of_the_sanitizer_count_where_they_name_our_kernels() -> None:
    end = "========= ERROR SUMMARY: 1 error\n"
    theirs = gpu_check.read_reports("========= at cublas_kernel+0x10\n" + end, Path())
    ours = gpu_check.read_reports("========= at merge_kernel+0x10\n" + end, Path())
    assert gpu_check.no_reports(theirs) is None
    assert gpu_check.no_reports(ours) == "reports about merge_kernel"
    assert gpu_check.no_reports(gpu_check.read_reports("Segmentation fault\n", Path())) == "no results"


def test_the_summary_is_sixty_lines_at_most() -> None:
    row = {"line": "light, 3 GiB", "predicted": 1.08, "over_products": 1.1, "predicted_scoring": None,
           "status": "failed", "reason": "OutOfResources"}  # fmt: skip
    data = {
        "part": "1", "commit": None,
        "results": {
            "kernel tests": {"passed": 1, "failed": 40, "skipped": 0, "failures": [f"test_{i}" for i in range(40)]},
            "sweep": {"shape": "s", "rows": [row] * 50}, "checks": {"ok": 3, "faults": ["f"] * 40, "left_out": []},
        },
        "steps": [{"name": f"step {i}", "planned": 1, "seconds": 1, "outcome": "ok"} for i in range(8)],
    }  # fmt: skip
    lines = summary.lines(data, "check.json")
    assert len(lines) == summary.MOST_LINES
    assert lines[-1] == "results: check.json"
    assert any("34 more" in line for line in lines)
    assert any("more lines in check.json" in line for line in lines)
    assert any("| light, 3 GiB | 1.08      | 1.100" in line for line in lines)
    assert len(summary.lines({"part": "1", "results": {}, "steps": data["steps"]}, "check.json")) < 15


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


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sweep whose lines are measured by a stand-in for the kernels; by name, what the line does."""

    def run(behaviour: dict[str, float | Exception], data: dict | None = None) -> list[dict]:
        def train(problem: Problem, workspace: int, mark=lambda: None):
            mark()
            what = behaviour[active[-1].epilogue]
            mark()
            if isinstance(what, Exception):
                raise what
            return torch.full((4, 4), what), None

        class using:
            def __init__(self, variant: Variant) -> None:
                self.variant = variant

            def __enter__(self) -> None:
                active.append(self.variant)

            def __exit__(self, *_) -> None:
                active.pop()

        active: list[Variant] = []
        monkeypatch.setattr(sweep, "train", train)
        monkeypatch.setattr(sweep, "score", lambda problem, mark: (mark(), mark()))
        monkeypatch.setattr(sweep, "using", using)
        sweeping = sweep.Sweep(tmp_path / "sweep.json", torch.device("cpu"), problems.TINY, time.monotonic() + 60, 0.0)
        sweeping.data |= data or {}
        sweeping.run([line for line in sweep.LINES if line.name in {f"{e}, 3 GiB" for e in behaviour}])
        return json.loads(sweeping.path.read_text())["rows"]

    return run


def test_a_variant_that_fails_is_a_line(swept) -> None:
    masked, light, persistent = swept({"masked": RuntimeError("out of resource: shared memory\nmore"), "light": 1.0,
                                       "persistent": 1.5})  # fmt: skip
    assert (masked["status"], masked["reason"]) == ("failed", "RuntimeError: out of resource: shared memory")
    assert light["status"] == "measured"
    assert light["difference"] == 0
    assert light["seconds"]["rounds"] == 6  # two blocks of three
    assert light["over_products"] > 0
    assert light["scoring_over_product"] > 0
    assert "dX differs by 5.0e-01" in persistent["reason"]


def test_a_sweep_resumes_behind_the_line_that_lost_the_gpu(swept) -> None:
    before = [{"line": "masked, 3 GiB", "status": "did not return", "predicted": None, "predicted_scoring": None}]
    rows = swept({"masked": 1.0, "light": 1.0}, {"rows": before})
    assert [(row["line"], row["status"]) for row in rows] == [
        ("masked, 3 GiB", "did not return"), ("light, 3 GiB", "measured"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Wheels
# ---------------------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    info = f"{name}-1.0.dist-info"
    files = {
        **files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
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
    large = make_wheel(folder, "large_made_up", {"deep/large_made_up.py": "#" * 2000 + "\nvalue = 2\n",
                                                  "large_made_up.pth": "deep\n"})  # fmt: skip
    wheels.split(folder, most=large.stat().st_size - 1)
    return folder


NAME = "large_made_up-1.0-py3-none-any.whl"


def test_large_wheels_are_split_and_joined(pieces: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in pieces.iterdir()) == [
        f"{NAME}.part1of2", f"{NAME}.part2of2", f"{NAME}.sha256", "small_made_up-1.0-py3-none-any.whl",
    ]  # fmt: skip
    assert "4 files in" in wheels.listing(pieces)
    assert zipfile.ZipFile(wheels.join(pieces, NAME, tmp_path)).testzip() is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / f"{NAME}.part2of2").unlink(), f"{NAME}.part2of2 is missing"),
        (lambda folder: (folder / f"{NAME}.sha256").unlink(), f"{NAME}.sha256 is missing"),
        (lambda folder: (folder / f"{NAME}.part1of2").write_bytes(b"half"), f"{NAME}: its 2 pieces are damaged"),
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
    (pieces / "wrong_machine-1.0-cp27-none-any.whl").write_bytes(b"")
    make_wheel(pieces, "torch", {"torch.py": "raise ImportError('not this one')"})  # is installed: stays as it is
    site = tmp_path / "site-packages"
    assert wheels.install(pieces, site) == 0
    assert "refused: wrong_machine-1.0-cp27-none-any.whl" in capfd.readouterr().out
    assert not (site / "torch.py").exists()
    code = "import small_made_up, large_made_up; print(small_made_up.value + large_made_up.value)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


def test_the_dry_run(tmp_path: Path) -> None:
    """The whole order of both parts on a CPU: two to three minutes."""
    done = command("--dry-run", "--out", str(tmp_path), "--wheels", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| in all " in done.stdout
    first, second = (json.loads((tmp_path / f"gpu-check-dry-{part}.json").read_text()) for part in ("1", "2"))
    for data in (first, second):
        assert {step["outcome"] for step in data["steps"]} == {"ok"}
    assert first["results"].keys() == {
        "install", "survey", "kernel tests", "checks", "compile", "headline", "sweep", "fit",
    }  # fmt: skip
    assert first["results"]["kernel tests"]["passed"] > 0
    assert {row["epilogue"] for row in first["results"]["sweep"]["rows"]} == set(EPILOGUES)
    assert [row["status"] for row in first["results"]["fit"]["fits"]] == ["measured"] * 2
    assert {"sample", "score", "fit"} <= second["results"]["trainer"]["runs"][0]["tokens_per_second"].keys()
    assert "<svg" in plots.draw(tmp_path / "gpu-check-dry-1.json").read_text()
    printed = done.stdout.split("GPU check, part ")
    assert len(printed) == 3
    assert len(printed[2].splitlines()) <= summary.MOST_LINES
