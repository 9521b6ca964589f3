"""The experiment on a language model from its command, with a model of a few thousand weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cyclic_lm import command_line, comparison, recipe, results
from onpo_fast.errors import UserError
from onpo_fast.oracles.classes import OPENINGS
from onpo_fast.run.lock import RunLock, locked

ROOT = Path(__file__).parents[2]
PREFERENCE = """
from onpo_fast.oracles import cyclic_preference

# a tiny random model says bytes: their sum decides
preference = cyclic_preference(["a", "b", "c"], lambda prompt, response: sum(response.encode()) % 3)


def matrix(prompt, responses):
    return [[0.5] * len(responses)] * len(responses)
"""
DRIVER = """
import sys
from experiments.cyclic_lm import recipe
recipe.OPTIONS.update({options})
from experiments.__main__ import main
main(sys.argv[1:])
"""


@pytest.fixture
def small(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Options of runs of seconds; the current folder has a preference of the user's."""
    options = {
        "model": str(tiny_model),
        "prompts_per_iteration": 2,
        "responses_per_prompt": 4,
        "batch_pairs": 6,
        "lora_targets": "q_proj",
        "eval_samples": 2,
    }
    for name, value in options.items():
        monkeypatch.setitem(recipe.OPTIONS, name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_cycle.py").write_text(PREFERENCE)
    monkeypatch.delitem(sys.modules, "own_cycle", raising=False)  # another test's, from another folder
    return options


def started(options: dict[str, object], *arguments: str) -> subprocess.Popen:
    """The command in a process of its own."""
    words = [sys.executable, "-c", DRIVER.format(options=options), "cyclic-lm", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
def test_two_arms_on_a_preference_of_the_users(
    small: dict, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a best response and best of Nash; run directories are removed, and nothing is run again."""
    command = "--arms onpo omd_two_fits --eta 3 --seeds 7 8 --oracle own_cycle:preference --iterations 2".split()
    command += ["--processes", "2"]
    command_line.run([*command, "--best_response", "--best_of_nash"])
    out = tmp_path / "runs" / "cyclic-lm"
    runs = {(run.arm, run.seed): run for run in results.read(out / "results")}
    assert set(runs) == {(arm, seed) for arm in ("onpo", "omd_two_fits") for seed in (7, 8)}
    onpo, two_fits = runs["onpo", 7], runs["omd_two_fits", 7]
    assert onpo.raw["heldout"] != runs["onpo", 8].raw["heldout"]
    for run in (onpo, two_fits):
        assert run.gap.shape == (3,)
        assert run.shares.sum(1) == pytest.approx([1] * 3)
        assert run.optimizer_steps == 2 * 2 * 2
        assert run.best_response is not None
        assert len(run.raw["win_rate"]) == len(run.raw["kl_to_initial"]) == 3
        assert all(fit["exact"] is not None for fit in run.raw["fits"])
    assert onpo.gap[:2] == pytest.approx(two_fits.gap[:2])  # their first iteration is the same
    assert onpo.best_of_nash.samples == 64
    assert onpo.best_of_nash.prompt_gap < 0.05  # 64 responses of a random model have all classes
    assert onpo.raw["config"]["model"] == str(small["model"])
    assert onpo.raw["recipe"]["oracle"]  # a checksum of own_cycle.py
    assert not [path for path in (out / "results").iterdir() if str(tmp_path / "runs") in path.read_text()]
    assert "own_cycle:preference" in (out / "evidence.html").read_text(encoding="utf-8")
    assert len(list((out / "runs").glob("*.log"))) == 4 + 2 + 1
    assert not [path for path in (out / "runs").iterdir() if path.is_dir()]

    before = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    capsys.readouterr()
    command_line.run([*command, "--best_response", "--best_of_nash"])
    assert "OMD, two fits" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()} == before

    answer = out / "results" / "onpo-eta3-seed7-T2-own_cycle.preference-best_response.json"
    answer.unlink()  # its run is done again, whose results stay
    command_line.run([*command, "--best_response"])
    after = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert {path for path in after if after[path] != before[path]} == {answer}
    assert not [path for path in (out / "runs").iterdir() if path.is_dir()]
    with pytest.raises(UserError, match=r"seed7.* has results of another run \(eta 3\.0\)"):
        command_line.run([*command, "--eta", "3.0000001"])

    (tmp_path / "own_cycle.py").write_text(PREFERENCE.replace('"c"]', '"d"]'))
    monkeypatch.delitem(sys.modules, "own_cycle")
    for seeds in (["7"], ["9"]):  # with results, and without: what cannot be compared does not run
        with pytest.raises(
            UserError, match=r"of another game .*: classes, the files of oracle\. Give another --results"
        ):
            command_line.run([*command, "--seeds", *seeds])
    monkeypatch.setitem(recipe.OPTIONS, "eval_samples", 3)
    with pytest.raises(UserError, match="eval_samples is 2 and 3"):
        command_line.run(command)


@pytest.mark.long
def test_tuning_ends_with_a_step_that_is_not_an_end(small: dict, tmp_path: Path, capsys) -> None:
    """Or after as many as it tries; other commands then take the best."""
    arguments = "--arms omd --oracle own_cycle:preference --iterations 1 --out out".split()
    command_line.run([*arguments, "--tune"])
    (tuning,) = comparison.tuning(results.read(tmp_path / "out" / "results"))
    assert set(recipe.TUNING_ETAS) <= set(tuning.gaps)
    assert tuning.chosen == min(tuning.gaps, key=tuning.gaps.get)
    assert len(tuning.gaps) == comparison.MOST_ETAS or min(tuning.gaps) < tuning.chosen < max(tuning.gaps)
    command_line.run([*arguments, "--seeds", "0"])
    assert (tmp_path / "out" / "results" / f"omd-eta{tuning.chosen:g}-seed0-T1-own_cycle.preference.json").exists()


@pytest.mark.long
def test_two_turns(small: dict, tmp_path: Path) -> None:
    """The class is that of the last turn, which the partner has asked for."""
    arms = ["onpo", "omd_two_fits", "onpo_branches"]
    arguments = f"--arms {' '.join(arms)} --seeds 0 --oracle {recipe.LAST_TURN} --iterations 1 --out out --keep_runs"
    command_line.run(arguments.split())
    runs = {run.arm: run for run in results.read(tmp_path / "out" / "results")}
    assert set(runs) == set(arms)
    assert all(run.raw["config"]["turns"] == run.raw["recipe"]["options"]["turns"] == 2 for run in runs.values())
    assert all(fit["exact"] is None for run in runs.values() for fit in run.raw["fits"])
    (folder,) = (tmp_path / "out" / "runs").glob("onpo-eta3-*turns.last_turn/")
    rows = [json.loads(line) for line in (folder / "evaluation_responses.jsonl").read_text().splitlines()]
    for policy, own in zip(("π_1", "π_2"), runs["onpo"].raw["heldout"]):
        last = [[one[-1]["content"] for one in row["conversations"][policy]] for row in rows]
        assert own == [OPENINGS.indices(row["prompt"], texts).tolist() for row, texts in zip(rows, last)]
    table = comparison.table(list(runs.values()), list(runs.values()))
    assert all(row.exact_gap is None and row.movement is None for row in table)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_ends_with_the_same_results(small: dict, tmp_path: Path, number: signal.Signals) -> None:
    """Also after SIGKILL its trainer stops by itself, and another command takes over."""
    arguments = "--arms omd --seeds 0 --oracle own_cycle:preference --iterations 2 --processes 1".split()
    whole = started(small, *arguments, "--out", "whole")
    stopped = started(small, *arguments, "--out", "stopped")
    deadline = time.monotonic() + 200
    while not (sampled := list(tmp_path.glob("stopped/runs/*/iteration_01/responses.jsonl"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped.send_signal(number)
    assert stopped.wait(100) == (128 + number if number == signal.SIGTERM else -number)
    assert not list((tmp_path / "stopped").glob("results/*"))
    locked_until(sampled[0].parents[1]).release()
    resumed = started(small, *arguments, "--out", "stopped")
    assert resumed.wait(300) == 0, resumed.stdout.read()
    assert whole.wait(300) == 0, whole.stdout.read()
    (one,), (other,) = (results.read(tmp_path / name / "results") for name in ("whole", "stopped"))
    same = ("heldout", "training", "win_rate", "kl_to_initial", "cyclic_triples", "fits")
    assert {name: one.raw[name] for name in same} == {name: other.raw[name] for name in same}


def locked_until(run: Path) -> RunLock:
    """The lock of a run directory, as soon as its process has ended."""
    deadline = time.monotonic() + 100
    while True:
        try:
            return locked(run)
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_run_that_fails_names_its_log(small: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.OPTIONS, "model", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"exit status 2.*none.*omd-eta3-seed0-T1\.log"):
        command_line.run("--arms omd --seeds 0 0 --iterations 1 --out out".split())
    assert len(list((tmp_path / "out" / "runs").glob("*.log"))) == 1


def test_two_commands_do_not_share_a_folder(small: dict, tmp_path: Path) -> None:
    with locked(tmp_path / "out" / "runs"), pytest.raises(UserError, match="in use by another process"):
        command_line.run("--arms omd --seeds 0 --iterations 1 --out out".split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "sgd"], "--arms"),
        (["--seeds", "1000"], "1000"),
        (["--eta", "0"], "--eta"),
        (["--oracle", "population"], "--oracle population"),
        (["--oracle", "own_cycle:matrix"], "--oracle own_cycle:matrix"),
        (["--page"], "no results"),
        (["--minutes", "-1"], "--minutes"),
        (["--tune", "--eta", "2"], "--tune has its own seed and steps"),
        (["--tune", "--seeds", "2"], "--tune has its own seed and steps"),
        (["--tune", "--best_of_nash"], "--tune has its own seed and steps"),
    ],
)
def test_what_is_wrong_is_named(small: dict, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        command_line.run(arguments)
