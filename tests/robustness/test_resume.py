"""A run that is stopped, killed or damaged ends as if nothing had been."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.small_runs import SMALL, append, cut, flip, prepare, small_run

from bench.digest import run_digest as bits
from onpo_fast import evaluate, files, opening, oracles, signals
from onpo_fast import fit as fitting
from onpo_fast import train as module
from onpo_fast.config import Config, parse_run, read_run
from onpo_fast.errors import UserError
from onpo_fast.files import read_jsonl, write_jsonl
from onpo_fast.journal import Journal
from onpo_fast.run import fit_states
from onpo_fast.run import lock as run_lock
from onpo_fast.run.fit_states import FitStates
from onpo_fast.run.outputs import EVALUATION, RESPONSES, finished_policies, initial_policy
from onpo_fast.run.resumable import ResumableStage
from onpo_fast.run.tracking import Tracker
from onpo_fast.sampling import LocalSampler

pytestmark = pytest.mark.usefixtures("without_plots")


@dataclass
class Whole:
    """A run that nothing disturbed."""

    work: Path
    config: Config
    bits: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model) -> Whole:
    work = tmp_path_factory.mktemp("whole")
    prepare(work, tiny_model)
    config = small_run(work, "whole")
    module.train(config)
    return Whole(work, replace(config, weights="fp32"), bits(work / "whole"))  # which "auto" has become


def command(whole: Whole, out: Path, *arguments: str) -> list[str]:
    options = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    return [
        sys.executable,
        "-m",
        "onpo_fast.train",
        "--model",
        str(whole.work / "model"),
        "--prompts",
        str(whole.work / "prompts.jsonl"),
        "--out",
        str(out),
        *options,
        *arguments,
    ]


@pytest.mark.long
def test_the_crash_test(tiny_model) -> None:
    """Kills at random moments, every kind of damaged file, a damaged state inside a fit."""
    line = [sys.executable, "-m", "bench", "crash_test", "--kills", "6", "--errors", "3"]
    line += ["--tokenizer", str(tiny_model)]
    done = subprocess.run(line, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every run ended with the same bits" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(whole: Whole, tmp_path, number: int) -> None:
    out = tmp_path / "a run"
    process = subprocess.Popen(command(whole, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "iteration_01" / "preferences.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert f"to go on: python -m onpo_fast.train --resume --out '{out}'" in stdout
    assert "Traceback" not in stderr
    done = subprocess.run(command(whole, out, "--resume"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bits(out) == whole.bits


class Killed(BaseException):
    """As a kill would: nothing is cleaned up after it."""


@pytest.mark.parametrize("stage", ["sample", "judge"])
def test_a_stage_goes_on_with_its_parts(whole: Whole, tmp_path, monkeypatch, stage: str) -> None:
    """What was sampled or judged is not done again, unless it is damaged; the end is the same."""
    monkeypatch.setattr(ResumableStage, "SAMPLING_BATCHES", 1)  # of three responses: a prompt's
    monkeypatch.setattr(ResumableStage, "GROUPS", 1)
    done: list[int] = []
    sample, judge = LocalSampler.__call__, oracles.judge
    fails_at = 2

    def sampled(self, prompts, responses, seed, progress, first, *rest):
        called("sample", first)
        return sample(self, prompts, responses, seed, progress, first, *rest)

    def called(by: str, first: int) -> None:
        if by == stage:
            if len(done) == fails_at:
                raise Killed
            done.append(first)

    monkeypatch.setattr(LocalSampler, "__call__", sampled)
    monkeypatch.setattr(oracles, "judge", lambda *asked: (called("judge", asked[4]), judge(*asked))[1])
    config = replace(whole.config, out=str(tmp_path / "run"), iterations=1)
    with pytest.raises(Killed):
        module.train(config)
    parts = sorted((tmp_path / "run" / "iteration_01").glob("*.parts/*"))
    assert [part.name for part in parts] == ["00000000.jsonl", "00000001.jsonl"]
    flip(parts[1])
    fails_at = 9
    module.train(config, resume=True)
    assert done[:4] == [0, 1, 1, 2]
    assert not list((tmp_path / "run").glob("**/*.parts"))
    monkeypatch.undo()
    undisturbed = replace(config, out=str(tmp_path / "undisturbed"))
    module.train(undisturbed)
    assert bits(tmp_path / "run") == bits(tmp_path / "undisturbed")


def test_a_part_of_other_items_is_made_again(tmp_path) -> None:
    journal, known = Journal(tmp_path), []
    parts = ResumableStage(journal, "all.jsonl", {"temperature": 1.0})

    def double(items: list[int], first: int) -> list[dict]:
        return [{"first": first, "twice": 2 * item} for item in items]

    def read_lines(file: Path, items: list[int]) -> list[dict]:
        return list(read_jsonl(file))

    def make(items: list[int], size: int) -> list[int]:
        results, spent = parts.make(items, size, double, read_lines, write_jsonl, known.append, lambda: {"asked": 1})
        assert spent.pop("seconds") > 0
        assert spent == {"asked": -(-len(items) // size)}  # also what earlier calls were asked
        return [result["twice"] for result in results]

    assert make([1, 2, 3], 2) == [2, 4, 6]
    assert make([1, 2, 5], 2) == [2, 4, 10]
    assert known == [2]
    assert make([1, 2, 5], 3) == [2, 4, 10]
    assert known == [2]
    assert make([1, 2, 5], 3) == [2, 4, 10]
    assert known == [2, 3]
    parts = ResumableStage(journal, "all.jsonl", {"temperature": 2.0})
    assert make([1, 2, 5], 3) == [2, 4, 10]
    assert known == [2, 3]
    parts.clear()
    assert {path.name for path in tmp_path.iterdir()} == set(Journal.FILES)
    assert Journal(tmp_path).entries == {}


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
    with pytest.raises(UserError, match=r"--learning_rate 0\.001 → 0\.002, --seed 0 → 3"):
        parse_run(["--resume", "--out", out, "--seed", "3", "--learning_rate", "2e-3"])
    config, _ = parse_run(["--resume", "--force", "--out", out, "--iterations", "3"])
    assert config.iterations == 3


@pytest.fixture
def run(whole: Whole, tmp_path) -> Path:
    """A copy of the undisturbed run."""
    return Path(shutil.copytree(whole.work / "whole", tmp_path / "run"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate: 0.001", "learning_rate: 0.009", r"--learning_rate 0\.001 → 0\.009\. Leave them out"),
        ("learning_rate: 0.001", "learnjng_rate: 0.001", "there is no option learnjng_rate; .*: remove it, and --res"),
        ("learning_rate: 0.001", "learning_rate: [0.001", "not YAML .*: remove it, and --resume writes it again"),
        ("learning_rate: 0.001", "learning_rate: often", "line .*: learning_rate must be a number, not often"),
        ("learning_rate: 0.001\n", "", "config.yaml lacks learning_rate: remove it, and --resume writes it again"),
    ],
)
def test_a_damaged_or_edited_configuration_is_refused(run: Path, old: str, new: str, message: str) -> None:
    file = run / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        parse_run(["--resume", "--out", str(run)])


def test_what_was_edited_can_be_forced(run: Path) -> None:
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.001", "learning_rate: 0.009"))
    config, _ = parse_run(["--resume", "--force", "--out", str(run)])
    assert config.learning_rate == 0.009
    module.train(config, resume=True)
    assert parse_run(["--resume", "--out", str(run)]) == (config, True)  # from now on it is the run's


def test_a_lost_configuration_is_in_the_journal(whole: Whole, run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: text.index("prompts_per_iteration")])
    assert replace(read_run(run), out=whole.config.out) == whole.config  # for the other commands
    (run / "config.yaml").unlink()
    config, _ = parse_run(["--resume", "--out", str(run)])
    assert replace(config, out=whole.config.out) == whole.config


def test_from_its_first_file_on_a_run_knows_its_options(whole: Whole, tmp_path, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*arguments) -> None:
        raise Killed

    monkeypatch.setattr("onpo_fast.opening.atomic_write_text", kill)  # writes config.yaml
    config = replace(whole.config, out=str(tmp_path / "run"))
    with pytest.raises(Killed):
        module.train(config, resume=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", *sorted(Journal.FILES)]
    assert parse_run(["--resume", "--out", config.out]) == (config, True)


def test_one_command_line_starts_a_run_and_goes_on_with_it(whole: Whole, tmp_path) -> None:
    out = tmp_path / "run"
    line = [*command(whole, out, "--resume")[3:]]
    for left in ([], [".lock"], [".lock", "journal.jsonl.partial"]):  # nothing, or what a kill left
        out.mkdir(exist_ok=True)
        for name in left:
            (out / name).touch()
        config, resume = parse_run(line)
        assert (replace(config, out=whole.config.out, weights="fp32"), resume) == (whole.config, True)
        opening.check_directory(out, resume=True)


def test_a_run_from_before_its_journal_had_the_options(whole: Whole, run: Path) -> None:
    entries = {name: entry for name, entry in Journal(run).entries.items() if name not in ("options", "model")}
    for name in Journal.FILES:
        (run / name).unlink()
    (run / "journal.json").write_text(json.dumps(entries, indent=1))
    config, _ = parse_run(["--resume", "--out", str(run)])
    with pytest.raises(UserError, match="--seed 0 → 3"):
        parse_run(["--resume", "--out", str(run), "--seed", "3"])
    module.train(config, resume=True)
    assert bits(run) == whole.bits
    assert Journal(run).note("options") == vars(config)
    for name in ("config.yaml", *Journal.FILES):
        (run / name).unlink()
    (run / "journal.json").write_text(json.dumps({"prompts": entries["prompts"]}))
    with pytest.raises(UserError, match="has no run to continue; to start one there, give its options too"):
        parse_run(["--resume", "--out", str(run)])


def test_a_directory_of_somebody_else_is_left_alone(whole: Whole, tmp_path) -> None:
    out = tmp_path / "photos"
    (out / "tensorboard").mkdir(parents=True)
    for name in ("metrics.jsonl", "heldout.jsonl", "tensorboard/mine"):
        (out / name).write_text("precious")
    with pytest.raises(UserError, match="is not empty, and has no run to go on with: give a new directory"):
        module.train(replace(whole.config, out=str(out)), resume=True)
    assert {path.name for path in out.rglob("*")} == {"tensorboard", "metrics.jsonl", "heldout.jsonl", "mine"}
    assert (out / "heldout.jsonl").read_text() == "precious"


@pytest.mark.parametrize("harm", [flip, cut, lambda path: path.write_text("[]"), lambda path: path.unlink()])
def test_a_damaged_journal_gives_way_to_its_copy(run: Path, harm: Callable[[Path], None]) -> None:
    entries = Journal(run).entries
    harm(run / "journal.jsonl")
    journal = Journal(run)
    assert (journal.entries, journal.mended) == (entries, True)
    flip(run / "journal.copy.jsonl")
    (run / "journal.jsonl").write_text("[]")
    with pytest.raises(UserError, match=r"journal.copy.jsonl is damaged \(.*--resume"):
        Journal(run)


def test_a_flipped_digit_in_the_journal_is_not_taken_for_other_prompts(run: Path, whole: Whole) -> None:
    journal = run / "journal.jsonl"
    known = Journal(run).note("prompts")["sha256"]
    journal.write_text(journal.read_text().replace(known, known.replace(known[0], "0" if known[0] != "0" else "1")))
    module.train(replace(whole.config, out=str(run)), resume=True)
    assert not Journal(run).mended


def filled(directory: Path) -> Journal:
    """A journal with entries recorded, forgotten, and recorded again with other contents."""
    directory.mkdir(exist_ok=True)
    journal = Journal(directory)
    journal.begin({"options": {"seed": 0}, "prompts": {"sha256": "x"}})
    for number in range(6):
        journal.record(f"a/{number}.jsonl", {"number": number, "loss": None}, content=f"{number}")
    journal.forget_folder("b")
    journal.forget("a/1.jsonl")
    journal.record("a/4.jsonl", {"number": 9}, content="other")  # 5 is forgotten
    return journal


def test_a_journal_grows_by_a_line_a_change(tmp_path) -> None:
    journal = filled(tmp_path)
    expected = dict(journal.entries)
    assert [name for name in expected if "/" in name] == ["a/0.jsonl", "a/2.jsonl", "a/3.jsonl", "a/4.jsonl"]
    for number in range(3):
        before = [(tmp_path / name).read_bytes() for name in Journal.FILES]
        journal.record("last", {"number": number}, file=False)
        for name, content in zip(Journal.FILES, before):
            added = (tmp_path / name).read_bytes().removeprefix(content)
            assert added.count(b"\n") == 1
            assert len(added) < 200
    again = Journal(tmp_path)
    assert list(again.entries.items()) == list(journal.entries.items())
    assert list(again.entries)[:-1] == list(expected)
    again.begin({"options": {"seed": 0}})  # the first change of a process leaves out what no longer counts
    assert (tmp_path / "journal.jsonl").read_bytes().count(b"\n") == 1 + len(again.entries)
    assert Journal(tmp_path).entries == again.entries


def test_a_torn_last_line_of_the_journal_is_left_out(tmp_path) -> None:
    """As a power cut leaves it, at any byte, in one file or in both."""
    journal = filled(tmp_path / "whole")
    before = dict(journal.entries)
    lengths = [(tmp_path / "whole" / name).stat().st_size for name in Journal.FILES]
    journal.record("a/7.jsonl", content="7")
    contents = [(tmp_path / "whole" / name).read_bytes() for name in Journal.FILES]
    for kept in range(len(contents[0]) - lengths[0]):
        for tail in (b"", b"\0" * 20, b"\0" * 20 + b"\n"):
            torn = contents[0][: lengths[0] + kept] + tail * (kept > 0)
            for name, content in zip(Journal.FILES, (torn, contents[1][: lengths[1]])):
                (tmp_path / name).write_bytes(content)
            journal = Journal(tmp_path)
            assert (journal.entries, journal.mended) == (before, False), (kept, tail)
    journal.record("a/8.jsonl", content="8")  # not after half a line
    assert list(Journal(tmp_path).entries) == [*before, "a/8.jsonl"]
    (tmp_path / "journal.copy.jsonl").write_bytes(contents[1])
    (tmp_path / "journal.jsonl").write_bytes(contents[0][: lengths[0] + 9])
    assert Journal(tmp_path).entries.keys() == {*before, "a/7.jsonl"}  # the copy goes on where the file ends


def test_damage_within_the_journal_takes_the_copy(tmp_path) -> None:
    expected = filled(tmp_path).entries
    copy = tmp_path / "journal.copy.jsonl"
    whole = copy.read_bytes()
    lines = whole.splitlines(keepends=True)
    for number in range(len(lines) - 1):
        for harmed in (lines[number].replace(b'"', b"'", 1), b"", b"[]\n", b"null\n", b"[" * 5000 + b"\n"):
            (tmp_path / "journal.jsonl").write_bytes(b"".join([*lines[:number], harmed, *lines[number + 1 :]]))
            assert (journal := Journal(tmp_path)).entries == expected
            assert journal.mended
    copy.write_bytes(whole.replace(b"seed", b"sead"))
    with pytest.raises(UserError, match=r"journal\.jsonl is damaged .* and .*copy\.jsonl is damaged \(line 2 is"):
        Journal(tmp_path)


def test_after_a_write_that_failed_the_journal_is_written_anew(tmp_path, monkeypatch) -> None:
    journal = filled(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*journal\.jsonl'"):
        journal.record("a/7.jsonl", content="7")
    monkeypatch.undo()
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"name": "a')
    journal.record("a/8.jsonl", content="8")
    again = Journal(tmp_path)
    assert (again.entries, again.mended) == (journal.entries, False)


def test_the_journal_of_an_earlier_version_is_read_and_converted(run: Path, whole: Whole) -> None:
    entries = Journal(run).entries
    for name in Journal.FILES:
        (run / name).unlink()
    own = {"checksum": hashlib.sha256(json.dumps(entries).encode()).hexdigest(), "note": {}}
    for name in Journal.EARLIER_FILES:
        (run / name).write_text(json.dumps({**entries, "journal.json": own}, indent=1) + "\n")
    times = {path: path.stat().st_mtime_ns for path in run.glob("iteration_*/*")}
    assert Journal(run).entries == entries
    flip(run / "journal.json")
    assert (Journal(run).entries, Journal(run).mended) == (entries, True)
    module.train(replace(whole.config, out=str(run)), resume=True)
    assert {path: path.stat().st_mtime_ns for path in run.glob("iteration_*/*")} == times
    assert {path.name for path in run.glob("journal*")} == set(Journal.FILES)
    assert bits(run) == whole.bits


@pytest.mark.parametrize("name", ["../secret", "/secret", "a/../../secret", "a/..", "..", ".", "", "a//b", "a\0b"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_journal_that_names_what_is_outside_is_refused(tmp_path, name: str, earlier: bool) -> None:
    directory = tmp_path / "run"
    journal = filled(directory)
    (tmp_path / "secret").write_text("precious")
    if earlier:
        for file in Journal.FILES:
            (directory / file).unlink()
        (directory / "journal.json").write_text(json.dumps({name: {"checksum": None, "note": {}}}))
    else:
        journal.record(name, file=False)
    with pytest.raises(UserError, match=rf"journal\.jsonl?: its entry {re.escape(repr(name))} is not a path"):
        Journal(directory)
    assert (tmp_path / "secret").read_text() == "precious"


@pytest.mark.parametrize("link", ["iteration_02", "iteration_02/policy", "metrics.jsonl", "tensorboard", ".lock"])
def test_a_symbolic_link_in_a_run_is_refused(run: Path, whole: Whole, tmp_path, link: str) -> None:
    """Before anything is written, or removed, where it leads."""
    elsewhere = tmp_path / "elsewhere"
    (run / link).rename(elsewhere)
    (run / link).symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"{link}( is a symbolic link|: put the)"):
        module.train(replace(whole.config, out=str(run), iterations=3), resume=True, force=True)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(run)])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def record(run: Path, name: str, note: dict | None = None) -> None:
    """Makes the journal's entry fit the file as it is now, as a stranger can, and leaves all others."""
    journal = Journal(run)
    journal.entries[name] = {
        "checksum": files.checksum(run / name),
        "note": journal.entries[name]["note"] if note is None else note,
    }
    journal._write_anew()


FIRST = "iteration_01"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("responses", lambda lines: lines[:-1], "preferences.jsonl has more than 2 lines where there are 2 groups"),
        ("responses", lambda lines: [*lines, lines[0]], "preferences.jsonl has 3 lines where there are 4 groups of"),
        ("responses", lambda lines: [], "responses.jsonl has no lines"),
        (
            "responses",
            lambda lines: [
                re.sub(r'"response_tokens": \[\[\d+', r'"response_tokens": [[9999999', lines[0]),
                *lines[1:],
            ],
            "responses.jsonl, line 1: it has a token beyond the model's",
        ),
        *(
            (name, lambda lines: lines[:-1], f"{name}.jsonl has 2 lines where there are 3 groups of responses")
            for name in ("preferences", "logps_initial")
        ),
        *(
            (
                name,
                lambda lines: [*lines, lines[0]],
                f"{name}.jsonl has more than 3 lines where there are 3 groups of re",
            )
            for name in ("preferences", "logps_initial")
        ),
        *(
            (name, lambda lines: [], f"{name}.jsonl has 0 lines where there are 3 groups of responses")
            for name in ("preferences", "logps_initial")
        ),
        ("pairs", lambda lines: [], "pairs.jsonl has no lines"),
        ("pairs", lambda lines: [re.sub(r'"winner": \d+', '"winner": 99', lines[0])], "pairs.jsonl, line 1: it comp"),
        ("pairs", lambda lines: [re.sub(r'"group": \d+', '"group": 99', lines[0])], "pairs.jsonl, line 1: it names gr"),
    ],
)
def test_files_that_do_not_fit_each_other_are_named(
    run: Path, whole: Whole, name: str, change: Callable, message: str
) -> None:
    """Though each is as the journal has it. What the message says to remove can be removed."""
    file = run / FIRST / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    changed = change(lines)
    assert changed != lines
    file.write_text("".join(line + "\n" for line in changed), encoding="utf-8")
    record(run, f"{FIRST}/{name}.jsonl")
    config = replace(whole.config, out=str(run))
    expected = re.escape(f"{run}/{FIRST}/{message}")
    with pytest.raises(UserError, match=rf"^{expected}.*remove the file, and --resume makes it again$"):
        module.train(config, resume=True)
    if name != "responses":
        file.unlink()
        module.train(config, resume=True)
        assert bits(run) == whole.bits


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("responses.jsonl", {"stage": "sample"}),
        ("responses.jsonl", {"stage": "sample", "seconds": "x"}),
        ("responses.jsonl", {"stage": ["a"], "seconds": 1.0}),
        ("preferences.jsonl", {"stage": "judge", "seconds": float("nan")}),
        ("policy", {"stage": "fit policy", "seconds": 1.0, "loss": "x"}),
        ("policy", {"stage": "fit policy", "seconds": 1.0, "loss": [1]}),
        ("policy", {"stage": "fit policy", "seconds": 1.0, "loss": 10**400}),
    ],
)
def test_notes_that_are_none_are_named(run: Path, whole: Whole, name: str, note: dict) -> None:
    record(run, f"{FIRST}/{name}", note)
    with pytest.raises(UserError, match=rf"{FIRST}/{name}: its entry in journal.jsonl is not what a run notes there"):
        module.train(replace(whole.config, out=str(run)), resume=True)


def test_a_policy_that_the_journal_does_not_have_is_none_of_the_run(run: Path, whole: Whole) -> None:
    """Of another's ``initial``, or an iteration more, nothing is evaluated."""
    config = replace(whole.config, out=str(run))
    for name in ("initial", "iteration_03/policy"):
        shutil.copytree(run / "iteration_02/policy", run / name)
    Journal(run).forget(EVALUATION, RESPONSES)
    module.train(config, resume=True)
    assert (run / EVALUATION).read_bytes() == (whole.work / "whole" / EVALUATION).read_bytes()
    shutil.rmtree(run / "iteration_03")
    assert bits(run) == whole.bits
    journal = Journal(run)
    assert initial_policy(run, config.model, journal) == config.model
    journal.record("initial")
    assert initial_policy(run, config.model, journal) == run / "initial"
    flip(run / "initial/model.safetensors")
    with pytest.raises(UserError, match="initial is not what it was: train --resume makes it again"):
        initial_policy(run, config.model, Journal(run))
    flip(run / "iteration_02/policy/model.safetensors")
    with pytest.raises(UserError, match="iteration_02/policy is not what it was: train --resume makes it again"):
        finished_policies(run, Journal(run))


@pytest.mark.parametrize("name", ["evaluation.json", f"{FIRST}/pairs.jsonl"])
def test_a_fifo_in_the_place_of_an_output_is_made_again(run: Path, whole: Whole, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    module.train(replace(whole.config, out=str(run)), resume=True)
    assert bits(run) == whole.bits


def test_a_lock_that_is_removed_stops_the_run(whole: Whole, tmp_path, monkeypatch) -> None:
    """Another process may have locked a file of the same name, and write the same outputs."""
    out = tmp_path / "run"
    begun, fit = [], fitting.fit

    def fit_without_lock(*arguments, **options) -> object:
        if not begun:
            (out / ".lock").unlink()
            begun.append(run_lock.locked(out))  # it gets it
        return fit(*arguments, **options)

    monkeypatch.setattr("onpo_fast.language_game.fit", fit_without_lock)
    config = replace(whole.config, out=str(out))
    with pytest.raises(UserError, match=r"\.lock was removed while this process was at work"):
        module.train(config)
    assert not (out / "iteration_01" / "policy").exists()
    begun[0].release()
    module.train(config, resume=True)
    assert bits(out) == whole.bits


def test_metrics_are_on_the_disk_before_an_output_is_recorded(whole: Whole, tmp_path, monkeypatch) -> None:
    flushed: list[str] = []
    unflushed: list[str] = []
    fsync, log = files.os.fsync, Tracker.log

    def note_fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        flushed.append(name)
        if name == "metrics.jsonl":
            unflushed.clear()
        if name == "journal.jsonl":
            assert not unflushed
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", note_fsync)
    monkeypatch.setattr(Tracker, "log", lambda *given, **values: (unflushed.append(given[1]), log(*given, **values)))
    module.train(replace(whole.config, out=str(tmp_path / "run"), iterations=1))
    assert flushed.count("journal.jsonl") > 10
    assert not unflushed


@pytest.mark.parametrize(("number", "raises"), [(22, False), (95, False), (5, True)])
def test_a_file_system_that_cannot_flush_a_directory(tmp_path, monkeypatch, number: int, raises: bool) -> None:
    fsync = files.os.fsync

    def fail_for_directories(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_dir():
            raise OSError(number, "not here")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fail_for_directories)
    with pytest.raises(OSError, match=f"not here: '{tmp_path}'") if raises else nullcontext():
        files.atomic_write_text(tmp_path / "file", "text")


def test_another_model_is_refused(whole: Whole, run: Path, tmp_path) -> None:
    """The same path may hold other weights after a while."""
    model = Path(shutil.copytree(whole.work / "model", tmp_path / "model"))
    config = replace(whole.config, out=str(run), model=str(model))
    module.train(config, resume=True)  # a copy is the same model
    (model / "README.md").write_text("is not read")
    flip(model / "model.safetensors")
    with pytest.raises(UserError, match=r"is not what .* began with: model\.safetensors changed\. Put it back, or add"):
        module.train(config, resume=True)
    module.train(config, resume=True, force=True)
    module.train(config, resume=True)  # from now on it is the run's


@pytest.fixture(scope="module")
def judged(whole: Whole, tmp_path_factory) -> tuple[Config, Path, Path]:
    """A run under a pair-model, which is the policy's model, and a function; the folder of both."""
    work = tmp_path_factory.mktemp("judged")
    shutil.copytree(whole.work / "model", work / "model")
    (work / "steady_taste.py").write_text(
        "def prefer(prompt, responses):\n    return PREFERENCES[len(responses)]\n\n\n"
        "PREFERENCES = {k: [[0.5] * k] * k for k in range(9)}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(work)
        config = replace(
            whole.config,
            out=str(work / "run"),
            oracle="pair-model+3*steady_taste:prefer",
            iterations=1,
            oracle_model=str(work / "model"),
        )
        module.train(config)
        yield config, work


def comment(template: Path) -> None:
    template.write_text(template.read_text() + "{# the same #}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda work: flip(work / "model/model.safetensors"), r"model\.safetensors of member 1, pair-model"),
        (lambda work: comment(work / "model/chat_template.jinja"), r"chat_template\.jinja of member 1, pair-model"),
        (lambda work: (work / "model/added.json").write_text("{}"), r"added\.json of member 1, pair-model"),
        (lambda work: append(work / "steady_taste.py"), r"steady_taste\.py of member 2, steady_taste:prefer"),
    ],
)
def test_another_oracle_under_the_same_name_is_refused(judged, tmp_path, change: Callable, named: str) -> None:
    """Though the run has nothing left to judge, as for another π_1; ``--force`` makes it the run's."""
    config, work = judged
    kept = shutil.copytree(work, tmp_path / "kept")
    config = replace(config, out=str(kept / "run"))
    try:
        change(work)
        with pytest.raises(
            UserError,
            match=rf"--oracle pair-model\+3\*.* \(--oracle_model .*model\) is not what .*run "
            rf"began with: {named} changed\. Put it back, or add --force: [^\n]*\Z",
        ):
            module.train(config, resume=True)
        module.train(config, resume=True, force=True)
        module.train(config, resume=True)
    finally:
        shutil.rmtree(work / "model")
        shutil.copytree(kept / "model", work / "model")
        shutil.copyfile(kept / "steady_taste.py", work / "steady_taste.py")


def test_a_copy_of_the_oracle_is_the_same_and_an_old_run_knows_none(judged, tmp_path) -> None:
    config, work = judged
    copy = shutil.copytree(work, tmp_path / "copy")
    config = replace(config, out=str(copy / "run"), oracle_model=str(copy / "model"))
    module.train(config, resume=True)
    entries = {name: entry for name, entry in Journal(copy / "run").entries.items() if name != "oracle"}
    for name in Journal.FILES:
        (copy / "run" / name).unlink()
    (copy / "run" / Journal.EARLIER_FILES[0]).write_text(json.dumps(entries))
    flip(copy / "model/model.safetensors")
    module.train(config, resume=True)
    assert "model.safetensors of member 1, pair-model" in Journal(copy / "run").note("oracle")


def test_files_are_hashed_once(judged, tmp_path, monkeypatch) -> None:
    """The policy, and two members of a panel, are one model."""
    config, work = judged
    hashed: list[Path] = []
    checksum = files.checksum
    monkeypatch.setattr(opening, "checksum", lambda path: (hashed.append(path), checksum(path))[1])
    model = str(work / "model")
    config = replace(config, model=model, out=str(tmp_path / "run"), oracle=f"pair-model + pair-model={model}/.")
    opening.open_run(config).close()
    assert hashed
    assert len(hashed) == len(set(hashed))
    assert {path.parent for path in hashed} == {work / "model"}


def test_with_force_an_iteration_is_judged_by_one_oracle(whole: Whole, tmp_path, monkeypatch) -> None:
    """What the old one has said of a part of it is asked anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ResumableStage, "GROUPS", 1)
    source = "def prefer(prompt, texts):\n    return [[{0} if a < b else 1 - {0} for b in texts] for a in texts]\n"
    judge, done = oracles.judge, []

    def until_killed(*arguments: object) -> object:
        if len(done) == 1:
            raise Killed
        done.append(arguments)
        return judge(*arguments)

    monkeypatch.setattr(oracles, "judge", until_killed)
    (tmp_path / "changing_taste.py").write_text(source.format(0.9))
    config = replace(whole.config, out=str(tmp_path / "run"), oracle="changing_taste:prefer", iterations=1)
    with pytest.raises(Killed):
        module.train(config)
    (tmp_path / "changing_taste.py").write_text(source.format(0.75))
    del sys.modules["changing_taste"]
    monkeypatch.setattr(oracles, "judge", judge)
    with pytest.raises(UserError, match=r"changing_taste\.py of changing_taste:prefer changed"):
        module.train(config, resume=True)
    module.train(config, resume=True, force=True)
    records = read_jsonl(tmp_path / "run/iteration_01/preferences.jsonl")
    assert {p for record in records for row in record["preferences"] for p in row} == {0.25, 0.5, 0.75}


def test_a_policy_that_is_a_file_is_made_again(whole: Whole, run: Path) -> None:
    shutil.rmtree(run / "iteration_02/policy")
    (run / "iteration_02/policy").write_text("a file where a directory belongs")
    module.train(replace(whole.config, out=str(run)), resume=True)
    assert bits(run) == whole.bits


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
    lock = run_lock.locked(out)
    with pytest.raises(UserError, match="is in use by another process"):
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
        return model, optimizer, fitting.cosine_with_warmup(optimizer, 2, 10)

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
            checkpoints = FitStates(journal, "fit", 1, 1e9)
            checkpoints.save(number, model, optimizer, {"schedule": schedule.state_dict()})
            checkpoints.finish()
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == ["step_00000003", "step_00000004"]
    flip(tmp_path / "fit" / "step_00000004" / "rank_00000.safetensors")

    checkpoints = FitStates(Journal(tmp_path), "fit", 1, 1e9)
    assert checkpoints.step() == 3
    again, optimizer, schedule = make()
    state = checkpoints.restore(again, optimizer)
    schedule.load_state_dict(state["schedule"])
    for _ in range(3):
        step(again, optimizer, schedule)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{}", "KeyError: 'step'"),
        ('{"step": 2}', "it has step 2"),
        ('{"step": 1}', "KeyError: 'param_groups'"),
        ('{"step": 1, "param_groups": 3}', "is not a state of this fit (TypeError: "),
        ("[]", "is not a state of this fit (TypeError: "),
    ],
)
def test_a_state_of_something_else_is_named(tmp_path, document: str, message: str) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    journal = Journal(tmp_path)
    checkpoints = FitStates(journal, "fit", 1, 1e9)
    checkpoints.save(1, model, optimizer, {})
    checkpoints.finish()
    (tmp_path / "fit/step_00000001/state.json").write_text(document)
    journal.record("fit/step_00000001", {"step": 1})
    with pytest.raises(UserError) as error:
        checkpoints.restore(model, optimizer)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/fit/step_00000001 is not a state of this fit (")
    for note in ({}, {"step": "x"}, {"step": 0}, {"step": True}):
        journal.record("fit/step_00000001", note)
        with pytest.raises(UserError, match=r"step_00000001: its entry in journal\.jsonl is not what a run notes"):
            checkpoints.step()


# ---------------------------------------------------------------------------------------------------------------------
# States that are written in the background
# ---------------------------------------------------------------------------------------------------------------------


class Fit:
    """A parameter with its optimizer, and the states of the fit. ``allowed`` is what a write waits for."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(3))
        self.model = torch.nn.ParameterList([self.parameter])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.states = FitStates(Journal(directory), "fit", 1, 1e9)
        self.folder = directory / "fit"
        self.allowed = threading.Event()
        self.allowed.set()
        write = fit_states.write_shards

        def when_allowed(*arguments) -> None:
            assert self.allowed.wait(60)
            write(*arguments)

        monkeypatch.setattr(fit_states, "write_shards", when_allowed)

    def step(self) -> None:
        self.parameter.grad = torch.ones(3)
        self.optimizer.step()

    def save(self, step: int) -> None:
        self.states.save(step, self.model, self.optimizer, {})

    def recorded(self) -> list[str]:
        """As a new process finds them."""
        return [name.split("/")[1] for name in Journal(self.folder.parent).within("fit")]


@pytest.fixture
def states(tmp_path, monkeypatch) -> Fit:
    return Fit(tmp_path, monkeypatch)


def test_training_goes_on_while_a_state_is_written(states: Fit) -> None:
    states.step()
    before = states.parameter.detach().clone()
    states.allowed.clear()
    states.save(1)
    states.step()
    assert not torch.equal(states.parameter, before)
    states.states.record_written()  # does not wait
    assert states.recorded() == []
    states.allowed.set()
    states.states.finish()
    assert states.recorded() == ["step_00000001"]
    assert states.states.restore(states.model, states.optimizer)["step"] == 1
    assert torch.equal(states.parameter, before)
    assert states.optimizer.state[states.parameter]["step"] == 1


def test_a_written_state_is_recorded_at_a_later_step(states: Fit) -> None:
    for step in range(1, 5):
        states.save(step)
        states.states.writing.result()
        assert f"step_{step:08d}" not in states.recorded()
        states.states.record_written()
        assert states.recorded()[-1] == f"step_{step:08d}"
    assert (
        states.recorded()
        == sorted(path.name for path in states.folder.iterdir())
        == [
            "step_00000003",
            "step_00000004",
        ]
    )


def test_states_take_a_twentieth_of_the_time_at_most(states: Fit, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(fit_states, "time", SimpleNamespace(monotonic=lambda: now[0]))
    states.states.began = states.states.ended = 0.0
    assert states.states.due(1)  # nothing is known yet
    states.allowed.clear()
    states.save(1)
    now[0] = 1000.0
    assert not states.states.due(2)  # it is still being written
    states.allowed.set()
    states.states.finish()
    now[0] = 1000.0 + 20 * 1000.0 - 1
    assert not states.states.due(3)
    now[0] += 1
    assert states.states.due(3)
    assert not states.states.due(1)  # no step since
    monkeypatch.setattr(FitStates, "spacing", 0)
    now[0] = 1000.0
    assert states.states.due(2)


def test_a_state_that_cannot_be_written_ends_the_fit(states: Fit, monkeypatch) -> None:
    def full(*arguments) -> None:
        raise OSError(28, "No space left on device", "a state")

    monkeypatch.setattr(fit_states, "write_shards", full)
    for last in (states.states.finish, states.states.clear, lambda: states.save(2)):
        states.save(1)
        with pytest.raises(OSError, match="No space left on device: 'a state'"):
            last()
        states.states.last_step = 0
    states.save(1)
    while not states.states.writing.done():
        time.sleep(0.001)
    with pytest.raises(OSError, match="No space left"):
        states.states.record_written()
    assert states.recorded() == []


def test_a_state_that_was_not_recorded_is_never_used(states: Fit) -> None:
    states.save(1)
    states.states.finish()
    states.save(2)
    states.states.writing.result()  # killed here
    (states.folder / "step_00000003.partial").mkdir()
    assert len(list(states.folder.iterdir())) == 3
    again = FitStates(Journal(states.folder.parent), "fit", 1, 1e9)
    assert again.step() == 1
    assert again.restore(states.model, states.optimizer)["step"] == 1
    assert [path.name for path in states.folder.iterdir()] == ["step_00000001"]


def test_nothing_is_left_when_a_fit_is_done(states: Fit) -> None:
    states.allowed.clear()
    states.save(1)
    clearing = threading.Thread(target=states.states.clear)
    clearing.start()
    assert clearing.is_alive()  # it waits for the write
    states.allowed.set()
    clearing.join()
    states.states.executor.shutdown()  # after whatever is written still
    assert states.recorded() == []
    assert not states.folder.exists()


def test_a_stop_saves_its_step_whatever_the_last_state_took(whole: Whole, tmp_path, monkeypatch) -> None:
    """Ended where no state was due, the run goes on from that step to the same bits."""
    out = tmp_path / "run"
    config = replace(whole.config, out=str(out))
    monkeypatch.setattr(FitStates, "spacing", 1e12)
    log = Tracker.log

    def ask_in_step_two(tracker, stage: str, *arguments, **values) -> None:
        log(tracker, stage, *arguments, **values)
        if stage == "fit" and values["step"] == 2:
            monkeypatch.setattr(signals, "_asked_by", signal.SIGTERM)

    monkeypatch.setattr(Tracker, "log", ask_in_step_two)
    with pytest.raises(signals.Stopped):
        module.train(config)
    assert Journal(out).within("iteration_01/auxiliary.checkpoints") == [
        f"iteration_01/auxiliary.checkpoints/step_{step:08d}" for step in (1, 2)
    ]
    monkeypatch.undo()
    module.train(config, resume=True)
    assert bits(out) == whole.bits


def test_a_fit_that_fails_keeps_the_state_that_was_being_written(whole: Whole, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    config = replace(whole.config, out=str(out))
    log = Tracker.log

    def die_in_step_two(tracker, stage: str, *arguments, **values) -> None:
        log(tracker, stage, *arguments, **values)
        if stage == "fit" and values["step"] == 2:
            raise Killed

    monkeypatch.setattr(Tracker, "log", die_in_step_two)
    with pytest.raises(Killed):
        module.train(config)
    assert [name[-1] for name in Journal(out).within("iteration_01/auxiliary.checkpoints")] == ["1"]
    monkeypatch.undo()
    module.train(config, resume=True)
    assert bits(out) == whole.bits


# ---------------------------------------------------------------------------------------------------------------------
# Defaults that depend on the device
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_batch_sizes_of_the_device_it_began_on(tmp_path, monkeypatch) -> None:
    out = str(tmp_path / "run")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("onpo_fast.config.combined.device_of", lambda name: torch.device("cuda"))
        began = Config(out=out)
    assert (began.tokens_per_microbatch, began.sampling_batch_size) == (None, 256)
    began.tokens_per_microbatch = 16384  # as the run chooses, by the memory of its device
    assert (Config().tokens_per_microbatch, Config().sampling_batch_size) == (1024, 32)
    Path(out).mkdir()
    Journal(Path(out)).begin({"options": vars(began)})
    (Path(out) / "config.yaml").write_text(began.to_yaml())
    assert "tokens_per_microbatch: 16384\n" in began.to_yaml()
    assert parse_run(["--resume", "--out", out])[0] == read_run(Path(out)) == began
    with pytest.raises(UserError, match="--tokens_per_microbatch 16384 → 1024"):
        parse_run(["--resume", "--out", out, "--tokens_per_microbatch", "null"])
    with pytest.raises(UserError, match="--sampling_batch_size 256 → 32"):
        parse_run(["--resume", "--out", out, "--sampling_batch_size", "32"])


def test_a_device_is_asked_for_only_where_a_default_needs_it() -> None:
    """So that a run's directory can be read on a machine without its device."""
    assert Config(device="cuda:7", tokens_per_microbatch=9, sampling_batch_size=9).tokens_per_microbatch == 9
    with pytest.raises(UserError, match=r"^--device gpu is not a device; try auto, cpu or cuda$"):
        Config(device="gpu", tokens_per_microbatch=9)
