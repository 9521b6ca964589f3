"""Where a run's numbers go."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from onpo_fast.errors import UserError
from onpo_fast.tracking import Tracker, check_reporter

KEY = "0123456789abcdef" * 2 + "01234567"  # of the length that W&B takes


def log(directory: Path, report_to: str) -> None:
    directory.mkdir()
    tracker = Tracker(directory, report_to, {"eta": 20.0})
    tracker.begin("fit")
    tracker.log("fit", 1, fit="policy", step=1, steps=2, loss=0.5, target=None)
    tracker.log("fit", 1, fit="policy", step=2, steps=2, loss=0.25, target=None)
    tracker.close()


@pytest.mark.parametrize(("report_to", "board"), [("tensorboard", True), ("none", False)])
def test_metrics_are_always_written(tmp_path: Path, report_to: str, board: bool) -> None:
    log(tmp_path / "run", report_to)
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, 0.25]
    assert (tmp_path / "run/tensorboard").exists() == board


def test_damaged_lines_are_left_out_and_kept_aside(tmp_path: Path, capsys) -> None:
    directory = tmp_path / "run"
    log(directory, "tensorboard")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    odd = ["1", "{}", "null", lines[0].replace('"stage": ', '"stage" '), lines[0].replace('"step"', '"stfp"'), ""]
    damaged = "\n".join([lines[0], *odd, lines[1], '{"time": 1'])  # the last as a crash leaves it
    (directory / "metrics.jsonl").write_text(damaged)
    shutil.rmtree(directory / "tensorboard")
    (directory / "tensorboard").write_text("a file where a directory belongs")
    tracker = Tracker(directory)
    tracker.begin("report")
    tracker.close()
    assert (directory / "metrics.jsonl").read_text().splitlines() == lines
    assert (directory / "metrics.damaged.jsonl").read_text() == damaged
    assert capsys.readouterr().out == (
        f"metrics.jsonl: 6 of 8 lines are damaged and left out: see {directory / 'metrics.damaged.jsonl'}\n"
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [("short", r"the key in \$WANDB_API_KEY can be none: it has fewer than 40 characters"), (KEY, None)],
)
def test_wandb_is_looked_for_early(monkeypatch: pytest.MonkeyPatch, key: str, message: str | None) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_reporter("wandb")


def test_wandb_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**options: object) -> None:
        raise wandb.errors.CommError("no such host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"\(no such host\)\. WANDB_MODE=offline needs .*; --resume goes on with .*run"):
        log(tmp_path / "run", "wandb")


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: all the numbers are in W&B's own file, and the key is in none."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    log(tmp_path / "run", "wandb")
    assert wandb.run is None
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    content, end = b"", time.monotonic() + 30
    while b"0.25" not in content and time.monotonic() < end:  # another process writes it, in its own time
        content = file.read_bytes()  # protocol buffers one after the other, not compressed
        time.sleep(0.1)
    assert all(text in content for text in (b"onpo_fast", b"loss", b"fit/policy/record", b"0.25"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
