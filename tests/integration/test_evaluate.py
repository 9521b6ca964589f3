"""Win rates, intervals and the restricted duality gap on numbers worked out by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.small_runs import flip, prepare, small_run

from bench.digest import run_digest
from onpo_fast import evaluate, oracles, signals, train, win_rates
from onpo_fast.best_of_nash import BestOfNash
from onpo_fast.config import Config
from onpo_fast.data import Group, Response
from onpo_fast.errors import UserError
from onpo_fast.files import checksum
from onpo_fast.journal import Journal
from onpo_fast.report import write_report
from onpo_fast.reports.formatting import percent
from onpo_fast.run.outputs import EVALUATION, HELD_OUT, RESPONSES, finished_policies
from onpo_fast.run.resumable import ResumableStage
from onpo_fast.run.tracking import Tracker
from onpo_fast.sampling import LocalSampler

pytestmark = pytest.mark.usefixtures("without_plots")


def test_blocks_average_the_samples_of_two_policies() -> None:
    upper = np.array([[0.5, 0.6, 0.9, 0.7], [0.4, 0.5, 0.5, 0.3], [0.1, 0.5, 0.5, 0.2], [0.3, 0.7, 0.8, 0.5]])
    blocks = win_rates.win_rates(upper, 2)
    np.testing.assert_allclose(blocks, [[0.5, 0.6], [0.4, 0.5]])


def test_restricted_gap() -> None:
    cycle = np.array([[0.5, 0.7, 0.2], [0.3, 0.5, 0.9], [0.8, 0.1, 0.5]])
    np.testing.assert_allclose(win_rates.restricted_gap(cycle), [0.6, 0.4, 0.8])
    assert win_rates.restricted_gap(np.full((3, 3), 0.5)).tolist() == [0, 0, 0]


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        wins = np.clip(rng.normal(0.6, 0.15, size=(40, 2, 2)), 0, 1)
        low, high = win_rates.intervals(wins)[0, 1]
        hits += low <= 0.6 <= high
    assert hits / 500 >= 0.93


@pytest.mark.parametrize(("prompts", "sure"), [(1, False), (3, False), (80, True)])
def test_a_few_prompts_that_all_agree_are_not_certain(prompts: int, sure: bool) -> None:
    wins = np.tile([[0.5, 1.0], [0.0, 0.5]], (prompts, 1, 1))
    intervals = win_rates.intervals(wins)
    low, high = intervals[0, 1]
    assert (low > 0.5) == sure
    assert high == 1
    np.testing.assert_allclose(intervals[1, 0], [0, 1 - low])
    assert intervals[0, 0].tolist() == [0.5, 0.5]


def test_policies_in_the_order_they_were_made(tmp_path) -> None:
    journal = Journal(tmp_path)
    for t in (1, 2, 99, 100):
        (tmp_path / f"iteration_{t:02d}" / "policy").mkdir(parents=True)
        journal.record(f"iteration_{t:02d}/policy")
    assert list(finished_policies(tmp_path, journal)) == ["π_2", "π_3", "π_100", "π_101"]


def test_nothing_to_evaluate(tmp_path, capsys) -> None:
    with pytest.raises(UserError, match="no finished iteration"):
        evaluate.evaluate(tmp_path, Config(), Journal(tmp_path))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "is not a run directory" in capsys.readouterr().err


class Counting:
    """An oracle that counts what it is asked, and may be killed."""

    def __init__(self) -> None:
        self.asked = self.counted = 0
        self.fails_at = -1

    def many(self, groups: list, progress) -> list[np.ndarray]:
        if self.asked == self.fails_at:
            raise KeyboardInterrupt  # as a kill: nothing is cleaned up after it
        self.asked += len(groups)
        self.counted += len(groups)
        answers = []
        for _, texts in groups:
            lengths = np.array([float(len(text)) for text in texts])
            answers.append(1 / (1 + np.exp(lengths[None] - lengths[:, None])))
        return answers

    def take_counters(self) -> dict[str, int]:
        counted, self.counted = self.counted, 0
        return {"requests": counted}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Config:
    """A run of one iteration, whole."""
    work = tmp_path_factory.mktemp("evaluated")
    prepare(work, tiny_model)
    config = replace(small_run(work, "run"), iterations=1, sampling_batch_size=1, oracle="openings")
    train.train(config)
    return config


def outputs(directory: Path) -> list[str]:
    return [(directory / name).read_text() for name in (EVALUATION, RESPONSES)]


def test_the_classes_of_all_responses_are_counted(run: Config) -> None:
    assert run.oracle == "openings"
    directory = Path(run.out)
    recorded = json.loads((directory / EVALUATION).read_text())["class_shares"]
    rows = [json.loads(line)["responses"] for line in (directory / RESPONSES).read_text().splitlines()]
    for name, shares in zip(["π_1", "π_2"], recorded["shares"], strict=True):
        indices = oracles.OPENINGS.indices([], [text for row in rows for text in row[name]])
        np.testing.assert_allclose(shares, np.bincount(indices, minlength=4) / len(indices))
    assert recorded["classes"] == [*oracles.OPENINGS.names, "none of them"]


@pytest.mark.parametrize("by_command", [False, True])
def test_an_evaluation_goes_on_with_its_parts(run: Config, tmp_path, monkeypatch, by_command: bool) -> None:
    """What was sampled, scored or judged is not done again unless it is damaged, and is counted over all processes."""
    monkeypatch.setattr(ResumableStage, "SAMPLING_BATCHES", 1)  # a prompt each
    monkeypatch.setattr(ResumableStage, "GROUPS", 1)
    directory = tmp_path / "run"
    shutil.copytree(run.out, directory)
    config, oracle, sampled = replace(run, out=str(directory)), Counting(), []
    sample = LocalSampler.__call__
    monkeypatch.setattr(evaluate.oracles, "load", lambda *given: oracle)
    monkeypatch.setattr(evaluate.oracles, "probe", lambda *given, **options: None)  # which would be counted

    def noted(self, prompts, responses, seed, progress, first, *rest):
        sampled.append(first)
        return sample(self, prompts, responses, seed, progress, first, *rest)

    monkeypatch.setattr(LocalSampler, "__call__", noted)

    def go_on() -> None:
        if by_command:
            evaluate.main([str(directory)])
        else:
            train.train(config, resume=True)

    Journal(directory).forget(EVALUATION, RESPONSES)
    oracle.fails_at = 2
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        go_on()
    prompts = len((directory / HELD_OUT).read_text().splitlines())
    assert prompts == 4
    assert sampled == [0, 1, 2, 3] * 2
    parts = sorted(directory.glob("evaluation.parts/*/*"))
    assert [part.parent.name for part in parts] == [
        name
        for name in ("logps_01.parts", "preferences.parts", "responses_00.parts", "responses_01.parts")
        for _ in range(2 if name.startswith("pref") else 4)
    ]
    flip(directory / "evaluation.parts/responses_01.parts/00000002.jsonl")
    oracle.fails_at = -1
    go_on()
    assert sampled[8:] == [2]
    assert oracle.asked == prompts
    assert not list(directory.rglob("*.parts"))
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["stage"] == "evaluate"][-1]
    assert last["requests"] == prompts
    assert last["seconds"] > 0
    undisturbed, disturbed = tmp_path / "undisturbed", outputs(directory)
    shutil.copytree(directory, undisturbed)
    evaluate.main([str(undisturbed)])
    assert outputs(undisturbed) == disturbed
    assert Journal(undisturbed).note(EVALUATION) is not None


# --- Best of Nash -----------------------------------------------------------------------------------------------------


def by_hand(texts: dict[str, list[str]], candidates: list[str], answers: list[dict]) -> list[float]:
    """Win rates of best of Nash on one prompt under ``Counting``, from the file of responses; checks the weights."""
    (lengths,), weights = Counting().many([(None, candidates)], None), np.zeros(len(candidates))
    for answer in answers:
        weights[candidates.index(answer["response"])] += answer["weight"]
    assert weights.sum() == pytest.approx(1)
    assert (lengths @ weights).max() < 0.5 + 1e-9  # a Nash policy: no response beats it
    rates = []
    for responses in texts.values():
        (matrix,) = Counting().many([(None, [*candidates, *responses])], None)
        rates.append(float((weights @ matrix[: len(candidates), len(candidates) :]).mean()))
    return rates


def test_best_of_nash_goes_on_with_its_parts(run: Config, tmp_path, monkeypatch, capsys) -> None:
    """Its numbers are those worked out from its responses, nothing else of the evaluation changes, and a kill loses
    one part."""
    monkeypatch.setattr(ResumableStage, "SAMPLING_BATCHES", 5)  # a prompt each
    monkeypatch.setattr(ResumableStage, "GROUPS", 2)
    directory, oracle, sampled, candidates = tmp_path / "run", Counting(), [], {}
    shutil.copytree(run.out, directory)
    monkeypatch.setattr(evaluate.oracles, "load", lambda *given: oracle)
    monkeypatch.setattr(evaluate.oracles, "probe", lambda *given, **options: None)
    sample = LocalSampler.__call__

    def noted(self, prompts, responses, seed, progress, first, *rest):
        groups = sample(self, prompts, responses, seed, progress, first, *rest)
        if responses == 5:
            sampled.append(first)
            candidates.update({first + i: [r.text for r in group.responses] for i, group in enumerate(groups)})
        return groups

    monkeypatch.setattr(LocalSampler, "__call__", noted)
    evaluate.main([str(directory)])
    plain, oracle.asked = json.loads((directory / EVALUATION).read_text()), 0
    assert "best_of_nash" not in plain
    assert not sampled

    oracle.fails_at = 2
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluate.main([str(directory), "--best_of_nash", "5"])
    assert json.loads((directory / EVALUATION).read_text()) == plain
    assert sampled == [0, 1, 2, 3]
    flip(directory / "evaluation.parts/best_of_nash_5.parts/00000001.jsonl")
    oracle.fails_at = -1
    capsys.readouterr()
    evaluate.main([str(directory), "--best_of_nash", "5"])
    said = " ".join(capsys.readouterr().out.split())
    assert sampled == [0, 1, 2, 3, 1]
    assert oracle.asked == 4  # one prompt each time
    assert not list(directory.rglob("*.parts"))

    result = json.loads((directory / EVALUATION).read_text())
    chosen = result.pop("best_of_nash")
    assert result == plain
    rows = [json.loads(line) for line in (directory / RESPONSES).read_text().splitlines()]
    rates = [by_hand(row["responses"], candidates[p], row["best_of_nash"]) for p, row in enumerate(rows)]
    np.testing.assert_allclose(chosen["win_rate"], np.mean(rates, axis=0))
    np.testing.assert_allclose(chosen["interval"], win_rates.student_intervals(np.array(rates)))
    assert chosen["samples"] == 5
    assert all(rate > own for rate, own in zip(chosen["win_rate"], plain["win_rate"][0]))  # better than π_1
    assert 1 <= chosen["responses_played"] <= 5
    assert f"best of Nash over 5 responses of π_1 wins in {chosen['win_rate'][-1]:.1%} of comparisons with π_2" in said
    assert "best of Nash, N = 5" in said
    write_report(directory)
    assert f"Best of Nash, which trains nothing, wins {percent(chosen['win_rate'][-1])}" in (
        directory / "report.html"
    ).read_text(encoding="utf-8")


def test_best_of_nash_is_the_mixture_of_its_cycle() -> None:
    """Three responses in a circle are played with the weights of its Nash policy, and their wins are averaged so."""
    cycle = np.array([[0.5, 0.9, 0.3], [0.1, 0.5, 0.6], [0.7, 0.4, 0.5]])
    against = np.array([[1.0, 0.0, 0.8, 0.6], [0.5, 0.5, 0.2, 0.2], [0.25, 0.75, 0.0, 1.0]])  # two of each policy
    matrix = np.block([[np.full((4, 4), 0.5), 1 - against.T], [against, cycle]])
    chosen = BestOfNash.choose([matrix], 3, 2)
    np.testing.assert_allclose(chosen.weights[0], np.array([1, 2, 4]) / 7)
    np.testing.assert_allclose(chosen.wins, [[0.5, (0.7 + 2 * 0.2 + 4 * 0.5) / 7]])
    assert chosen.played == 3
    responses = [Response(text, [1], "eos", -1.0) for text in "abc"]
    assert [answer["response"] for answer in chosen.answers(0, Group([], [], responses))] == ["c", "b", "a"]


@pytest.mark.parametrize("count", ["1", "0", "-3", "x", "2.5"])
def test_best_of_nash_needs_a_number_of_responses(run: Config, count: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([run.out, "--best_of_nash", count])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--best_of_nash" in said
    assert said.count("\n") == 1


def test_a_run_with_cuda_graphs_is_evaluated_without_a_gpu(run: Config, tmp_path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(run.out, directory)
    (directory / "config.yaml").write_text(replace(run, cuda_graphs=True, device="cpu").to_yaml())
    before = (directory / EVALUATION).read_bytes()
    evaluate.main([str(directory)])
    assert (directory / EVALUATION).read_bytes() == before


def test_an_evaluation_under_other_options_is_made_anew(run: Config, tmp_path, monkeypatch) -> None:
    directory = tmp_path / "run"
    shutil.copytree(run.out, directory)
    kept = run_digest(directory)
    journal, oracle = Journal(directory), Counting()
    monkeypatch.setattr(evaluate.oracles, "load", lambda *given: oracle)
    oracle.fails_at = 0
    config = replace(run, out=str(directory))
    for options, made in ((config, True), (config, False), (replace(config, temperature=0.9), True)):
        before = {path: path.stat().st_mtime_ns for path in directory.glob("evaluation.parts/*/*")}
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(directory, options, journal)
        after = {path: path.stat().st_mtime_ns for path in directory.glob("evaluation.parts/*/*")}
        assert (after != before) == made
    train.train(config, resume=True)  # its evaluation is whole: the parts go
    assert not list(directory.rglob("*.parts"))
    assert run_digest(directory) == kept


@pytest.mark.parametrize(("asked", "records"), [(0, 0), (3, 1)])
def test_a_stop_is_recorded_with_what_was_asked(run: Config, tmp_path, monkeypatch, asked: int, records: int) -> None:
    """Between two parts nothing was: then there is nothing to record."""

    class Stopping(Counting):
        def many(self, groups: list, progress) -> list[np.ndarray]:
            self.counted = asked
            raise signals.Stopped(2)

    directory = tmp_path / "run"
    shutil.copytree(run.out, directory)
    monkeypatch.setattr(evaluate.oracles, "load", lambda *given: Stopping())
    tracker = Tracker(directory, "none")
    before = (directory / "metrics.jsonl").read_text()
    with pytest.raises(signals.Stopped):
        evaluate.evaluate(directory, replace(run, out=str(directory)), Journal(directory), tracker)
    tracker.close()
    added = (directory / "metrics.jsonl").read_text().removeprefix(before).splitlines()
    assert [json.loads(line)["requests"] for line in added] == [asked] * records


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("responses_00", lambda line: "", "has 0 lines where there are 1 prompts"),
        (
            "responses_01",
            lambda line: line.replace('"response_tokens": [[', '"response_tokens": [[9999999, '),
            "it has the token 9999999, and the model ",
        ),
        ("logps_01", lambda line: "", "has 0 lines where there are 2 groups of responses"),
        ("logps_01", lambda line: line + line, "has more than 2 lines where there are 2 groups of responses"),
        ("preferences", lambda line: "", "has 0 lines where there are 2 groups of responses"),
        ("preferences", lambda line: line.splitlines()[0] + "\n", "has 1 lines where there are 2 groups of responses"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    run: Config, tmp_path, monkeypatch, name: str, change: Callable, message: str
) -> None:
    monkeypatch.setattr(ResumableStage, "SAMPLING_BATCHES", 1)  # a prompt each
    directory = tmp_path / "run"
    shutil.copytree(run.out, directory)
    config, journal, oracle = replace(run, out=str(directory)), Journal(directory), Counting()
    monkeypatch.setattr(ResumableStage, "GROUPS", 2)
    monkeypatch.setattr(evaluate.oracles, "load", lambda *given: oracle)
    oracle.fails_at = 2
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(directory, config, journal)
    part = next(iter(sorted((directory / f"evaluation.parts/{name}.parts").iterdir())))
    if name == "responses_01":  # else they are scored already
        journal.forget_folder("evaluation.parts/logps_01.parts")
    part.write_text(change(part.read_text(encoding="utf-8")), encoding="utf-8")
    own = part.relative_to(directory).as_posix()
    journal.entries[own]["checksum"] = checksum(part)
    journal._write_anew()
    with pytest.raises(UserError, match=rf"evaluation\.parts/{name}\.parts.*{message}"):
        evaluate.evaluate(directory, config, Journal(directory))
