"""Where a run's numbers go."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onpo_fast.errors import UserError
from onpo_fast.run.tracking import Tracker, check_reporter

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
    warning = capsys.readouterr().out
    assert "metrics.jsonl: 6 of 8 lines" in warning
    assert str(directory / "metrics.damaged.jsonl") in warning


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    shown = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: [(one.step, one.value) for one in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def steps(directory: Path, *numbers: int, kept: int = 0) -> None:
    """A process that logs these steps of a fit, and first drops those of an earlier one after step ``kept``."""
    tracker = Tracker(directory)
    tracker.begin("fit", keep=lambda record: record["step"] <= kept)
    for number in numbers:
        tracker.log("fit", 1, fit="policy", step=number, steps=9, loss=1 / number, target=None)
    tracker.close()


def test_tensorboard_goes_on_and_is_drawn_again_only_where_records_are_taken_back(tmp_path: Path) -> None:
    values = {"loss": lambda n: pytest.approx(1 / n), "step": lambda n: n, "steps": lambda n: 9}
    expected = {f"fit/policy/{name}": [(n, value(n)) for n in range(1, 5)] for name, value in values.items()}
    steps(tmp_path, 1, 2)
    (first,) = (tmp_path / "tensorboard").iterdir()
    steps(tmp_path, 3, 4, kept=2)
    assert first in (tmp_path / "tensorboard").iterdir()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert curves(tmp_path) == expected
    steps(tmp_path, 3, 4, kept=2)  # as after a kill between two states
    assert first not in (tmp_path / "tensorboard").iterdir()
    assert curves(tmp_path) == expected


@pytest.mark.parametrize("lost", [1, 20, 10**6])
def test_tensorboard_is_drawn_again_where_it_lacks_a_record(tmp_path: Path, lost: int) -> None:
    """A kill comes between the two files, or within an event."""
    steps(tmp_path, 1, 2, 3)
    whole = curves(tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-lost])
    steps(tmp_path, kept=3)
    assert curves(tmp_path) == whole


def test_half_a_line_of_a_crash_is_not_gone_on_with(tmp_path: Path) -> None:
    steps(tmp_path, 1, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"time": 1')
    steps(tmp_path, 3, kept=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    for name, file in (("file", open("/dev/full", "w")), ("board", open("/dev/full", "wb"))):
        tracker = Tracker(tmp_path)
        if name == "file":
            tracker.file = file
        else:
            tracker.board.writer._writer = file
        with pytest.raises(OSError, match=r"No space left on device: '.*(metrics\.jsonl|events\.out.*)'"):
            tracker.log("fit", 1, fit="policy", step=1, steps=1)


@pytest.mark.parametrize(
    ("key", "message"),
    [("short", "WANDB_API_KEY"), (KEY, None)],
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
    with pytest.raises(UserError, match=r"--report_to wandb: .*no such host.*WANDB_MODE=offline.*--resume.*run"):
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


def odd(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    """Of no size on disk, and a thousand million events of no length."""
    path.touch()
    os.truncate(path, 2**34)


@pytest.mark.parametrize("harm", [odd, endless, sparse, Path.mkdir])
def test_odd_files_of_tensorboard_are_not_waited_for(tmp_path: Path, harm: Callable) -> None:
    """All is drawn again."""
    steps(tmp_path, 1, 2)
    expected = curves(tmp_path)
    harm(tmp_path / "tensorboard" / "events.out.tfevents.0")
    start = time.process_time()
    steps(tmp_path, kept=2)
    assert time.process_time() - start < 5
    assert curves(tmp_path) == expected
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
