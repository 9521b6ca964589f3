"""A run that is stopped, killed or damaged ends as if nothing had been."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench.drill import SMALL, bits, flip, prepare, small_run
from onpo_fast import fit as fitting
from onpo_fast import train as module
from onpo_fast.checkpoint import Checkpoints, Journal
from onpo_fast.config import Config, parse_run
from onpo_fast.errors import UserError


@dataclass
class Whole:
    """A run that nothing disturbed."""

    work: Path
    config: Config
    bits: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_directory) -> Whole:
    work = tmp_path_factory.mktemp("whole")
    prepare(work, str(model_directory))
    config = small_run(work, "whole")
    module.train(config)
    return Whole(work, config, bits(work / "whole"))


def command(whole: Whole, out: Path, *arguments: str) -> list[str]:
    options = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "onpo_fast.train", "--model", str(whole.work / "model"), "--prompts",
            str(whole.work / "prompts.jsonl"), "--out", str(out), *options, *arguments]  # fmt: skip


def test_the_drill(model_directory) -> None:
    """Kills at random moments, every kind of damaged file, a damaged state inside a fit."""
    line = [sys.executable, "-m", "bench", "drill", "--kills", "6", "--tokenizer", str(model_directory)]
    done = subprocess.run(line, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every run ended with the same bits" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(whole: Whole, tmp_path, number: int) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(command(whole, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "iteration_01" / "preferences.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"to go on: python -m onpo_fast.train --resume --out {out}" in stdout
    assert "Traceback" not in stderr
    done = subprocess.run(command(whole, out, "--resume"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bits(out) == whole.bits


def test_a_finished_run_resumes_to_itself(whole: Whole) -> None:
    out = whole.work / "whole"
    times = {path: path.stat().st_mtime_ns for path in out.glob("iteration_*/*")}
    module.train(whole.config, resume=True)
    assert {path: path.stat().st_mtime_ns for path in out.glob("iteration_*/*")} == times
    assert bits(out) == whole.bits


def test_changed_options_are_named_and_refused(whole: Whole) -> None:
    out = str(whole.work / "whole")
    config, resume = parse_run(["--resume", "--out", out])
    assert resume
    assert config == whole.config
    with pytest.raises(UserError, match=r"--seed 0 → 3, --learning_rate 0\.001 → 0\.002"):
        parse_run(["--resume", "--out", out, "--seed", "3", "--learning_rate", "2e-3"])
    config, _ = parse_run(["--resume", "--force", "--out", out, "--iterations", "3"])
    assert config.iterations == 3
    with pytest.raises(UserError, match="--resume needs --out"):
        parse_run(["--resume"])


def test_more_iterations_go_on_from_the_end(whole: Whole, tmp_path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole.work / "whole", out)
    result = module.train(Config(**{**vars(whole.config), "out": str(out), "iterations": 3}), resume=True)
    assert result["policies"] == ["π_1", "π_2", "π_3", "π_4"]
    assert json.loads((out / "evaluation.json").read_text())["policies"][-1] == "π_4"


def test_other_prompts_are_refused(whole: Whole, tmp_path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole.work / "whole", out)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text((whole.work / "prompts.jsonl").read_text().replace("7 plus 7", "7 minus 7"))
    with pytest.raises(UserError, match="the prompts are not those"):
        module.train(Config(**{**vars(whole.config), "out": str(out), "prompts": str(prompts)}), resume=True)


def test_two_runs_in_one_directory(whole: Whole, tmp_path) -> None:
    out = tmp_path / "run"
    lock = module._locked(out)
    with pytest.raises(UserError, match="is in use by another run"):
        module.train(Config(**{**vars(whole.config), "out": str(out)}))
    lock.release()


def test_a_full_disk(whole: Whole, tmp_path) -> None:
    """One line, and a resumed run that ends as it should when there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (whole.work / "whole").rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        out = disk / "run"
        done = subprocess.run(command(whole, out), capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: no space left for ")
        assert "Traceback" not in done.stderr
        assert not list(out.rglob("*.partial"))
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        done = subprocess.run(command(whole, out, "--resume"), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert bits(out) == whole.bits
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_state_comes_back_to_the_last_bit(tmp_path) -> None:
    def make() -> tuple:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, fitting._cosine_with_warmup(optimizer, 2, 10)

    def step(model, optimizer, schedule) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
        schedule.step()

    journal = Journal(tmp_path)
    model, optimizer, schedule = make()
    for number in range(1, 7):
        step(model, optimizer, schedule)
        if number <= 4:
            checkpoints = Checkpoints(journal, "fit", 1, 1e9)
            checkpoints.save(number, model, optimizer, {"schedule": schedule.state_dict()})
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == ["step_00000003", "step_00000004"]
    flip(tmp_path / "fit" / "step_00000004" / "state.safetensors")

    checkpoints = Checkpoints(Journal(tmp_path), "fit", 1, 1e9)
    assert checkpoints.step() == 3
    again, optimizer, schedule = make()
    state = checkpoints.restore(again, optimizer)
    schedule.load_state_dict(state["schedule"])
    for _ in range(3):
        step(again, optimizer, schedule)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
