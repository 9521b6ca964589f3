"""The report of a run: synthetic run directories in, a page out."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from cycler import cycler
from support.report_runs import (
    ATTACK,
    evaluation,
    fit_row,
    metrics,
    write_finished,
    write_lines,
    write_unfinished,
)

from onpo_fast.report import is_evaluation, main, write_picture, write_report
from onpo_fast.reports.run_data import RunData


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    write_unfinished(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def finished(unfinished: Path) -> Path:
    write_finished(unfinished)
    return unfinished


BEST_OF_NASH = {
    "samples": 64,
    "responses_played": 3.24,
    "win_rate": [0.71, 0.6, 0.47],
    "interval": [[0.62, 0.8], [0.5, 0.7], [0.4, 0.54]],
}


class Page(HTMLParser):
    """Tags in order, attributes of each, and the page's visible text with runs of blanks as one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data)

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


def test_finished_run(finished: Path) -> None:
    path = write_report(finished)
    page = Page(path)
    assert path == finished / "report.html"
    assert "Yes: π₃ wins 68.0 % of comparisons with π₁" in page.text
    assert "(95 % interval 61.0 % to 75.0 %; the interval excludes ½)." in page.text
    assert "2 of 2 iterations done, evaluated. Last record: evaluate," in page.text
    assert page.count("svg") == 13
    assert "Not recorded" not in page.text
    assert page.count("article") == 40
    assert "first 40 of 50 held-out prompts" in page.text
    assert "prefers π₃’s response with probability 73.1 %" in page.text
    assert "2 min 00 s for 2 finished iterations, and 30.0 s for the evaluation" in page.text
    assert "No optimizer step skipped: loss and gradient were finite in all 160 steps." in page.text
    assert "1,200 prompts to train on and 80 held out; no unusable prompts skipped." in page.text
    assert "600 pairs to learn from. Pairs of identical responses, not used: 4. Empty responses: 2." in page.text
    assert "unfinished" not in page.text
    assert "The judge" not in page.text
    assert "<tiny & model>" in page.text
    assert "2.9.0" in page.text
    assert "H100" in page.text


@pytest.mark.usefixtures("without_plots")
def test_what_no_reward_model_can_express(finished: Path) -> None:
    """The share of cyclic triples over all iterations, weighted by their triples, and each policy's classes."""
    rows = [
        row | {"triples": 100, "cyclic_triples": 0.3} if row["stage"] == "judge" and row["iteration"] == 2 else row
        for row in metrics()
    ]
    write_lines(finished / "metrics.jsonl", rows)
    text = Page(write_report(finished)).text
    assert "15.0 % of the 400 triples of responses that were compared in training are cyclic" in text
    assert "No score per response can express that." in text
    assert f"policy rock {ATTACK} the best response wins π₁ 91.2 % 8.8 % 77.4 % π₂ 50.0 % 50.0 % 65.0 %" in text

    write_lines(finished / "metrics.jsonl", [row | {"cyclic_triples": 0.0} for row in metrics()])
    many = {"classes": [f"class {i}" for i in range(90)], "shares": [[1 / 90] * 90] * 3, "best_response": [0.5] * 3}
    (finished / "evaluation.json").write_text(json.dumps(evaluation(0.6, 0.5, 0.7) | {"class_shares": many}))
    text = Page(write_report(finished)).text
    assert "0.0 % of the 600 triples" in text
    assert "No score per response" not in text
    assert "40 of 90 classes are shown" in text


@pytest.mark.parametrize(
    "shares",
    [
        [],
        "x",
        {"classes": ["a"]},
        {"classes": ["a"], "shares": [[1]] * 3},
        {"classes": ["a"], "shares": [[1], [1]], "best_response": [0.5] * 3},
        {"classes": ["a"], "shares": [[2]] * 3, "best_response": [0.5] * 3},
        {"classes": ["a"], "shares": [[1]] * 3, "best_response": [0.5, 0.5, 1.5]},
    ],
)
def test_class_shares_that_cannot_be(shares: object) -> None:
    assert not is_evaluation(evaluation(0.6, 0.5, 0.7) | {"class_shares": shares})


@pytest.mark.usefixtures("without_plots")
def test_a_run_without_classes_has_no_table_of_them(finished: Path) -> None:
    (finished / "evaluation.json").write_text(json.dumps(evaluation(0.6, 0.5, 0.7)))
    assert "Classes of responses" not in Page(write_report(finished)).text


def test_plots_are_described_and_ids_unique(finished: Path) -> None:
    page = Page(write_report(finished))
    labels = [attributes.get("aria-label") or "" for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(labels) == page.count("svg")
    assert all(re.search(r"\. .*\d", label) for label in labels)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_comes_from_a_network(finished: Path) -> None:
    page = Page(write_report(finished))
    assert not {"link", "img", "iframe", "image"} & {tag for tag, _ in page.tags}
    links = [value or "" for _, a in page.tags for key, value in a.items() if key in ("src", "href", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    ("rate", "low", "high", "words"),
    [
        (0.53, 0.46, 0.60, "Not shown: π₃ wins 53.0 %"),
        (0.53, 0.46, 0.60, "(95 % interval 46.0 % to 60.0 %; the interval does not exclude ½)"),
        (0.57, 0.50, 0.64, "the interval does not exclude ½"),
        (0.57, 0.51, 0.63, "Yes: π₃ wins 57.0 %"),
        (0.40, 0.33, 0.47, "No, it got worse: π₃ wins 40.0 %"),
        (0.40, 0.33, 0.47, "(95 % interval 33.0 % to 47.0 %; the interval excludes ½)"),
    ],
)
def test_headline_is_honest(finished: Path, rate: float, low: float, high: float, words: str) -> None:
    (finished / "evaluation.json").write_text(json.dumps(evaluation(rate, low, high)))
    assert words in Page(write_report(finished)).text


@pytest.mark.usefixtures("without_plots")
def test_text_of_a_model_is_escaped(finished: Path) -> None:
    path = write_report(finished)
    page = Page(path)
    assert page.count("script") == 1  # the search box's
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert ATTACK in page.text
    assert ATTACK not in path.read_text(encoding="utf-8")
    assert "half a surrogate pair: ?" in page.text


def test_unfinished_run(unfinished: Path) -> None:
    page = Page(write_report(unfinished))
    assert "Not known yet: the run has not been evaluated." in page.text
    assert "1 of 2 iterations done, not evaluated. Last record: fit auxiliary, step 1 of 40" in page.text
    assert "Not recorded: responses to held-out prompts." in page.text
    assert "Not recorded: versions, device and commit." in page.text
    assert page.count("svg") == 11
    assert "1 min 00 s for 1 finished iteration. 0.5 s so far for iteration 2, which has not ended." in page.text
    assert "2 (so far) 0.0 0.0 0.0 0.0 0.5 0.0 0.5" in page.text


@pytest.mark.usefixtures("without_plots")
def test_the_newest_responses_of_an_unfinished_run(unfinished: Path) -> None:
    """Of π_2, when iteration 2 has sampled; those of earlier iterations no longer."""
    for t, text in ((1, "Old."), (2, ATTACK)):
        (unfinished / f"iteration_{t:02d}").mkdir()
        asked = [{"role": "user", "content": f"Question {n}"} for n in range(3)]
        rows = [{"prompt": [one], "responses": [text, "Second.", "Third."]} for one in asked]
        write_lines(unfinished / f"iteration_{t:02d}/responses.jsonl", rows)
    page = Page(write_report(unfinished))
    assert "the first two responses that π₂ gave to 3 of the prompts that iteration 2 trains on." in page.text
    assert "The oracle prefers" not in page.text  # it has not been asked
    assert page.text.count(ATTACK) == page.text.count("Second.") == page.count("article") == 3
    assert not {"Old.", "Third."} & set(page.text.split())

    judged = unfinished / "iteration_02/preferences.jsonl"
    judged.write_text('{"preferences": [[0.5, 0.9], [0.1, 0.5]]}\n\x00\n{"preferences": [[0.5, 0.25], [0.75, 0.5]]}\n')
    shares = re.findall(r"prefers the first of the two with probability (\S+) %", Page(write_report(unfinished)).text)
    assert shares == ["90.0", "25.0"]  # a damaged line moves no other


def test_ticks_of_iterations_and_steps_are_whole(unfinished: Path) -> None:
    rows = [row for row in metrics(1)[:-1] if row.get("step", 1) == 1]
    write_lines(unfinished / "metrics.jsonl", [row | {"log_ratio_loser": -1e-7 * row.get("step", 1)} for row in rows])
    page = write_report(unfinished).read_text(encoding="utf-8")
    for title in ("Normalised loss", "Seconds by stage", "Response length", "Gradient norm"):
        svg = page.partition(f"<h3>{title}</h3>")[2].partition("</svg>")[0]
        ticks = [int(text) for text in re.findall(r"text-anchor: middle[^>]*>([\d.]+)</text>", svg)]
        assert ticks == ([1, 2] if title in ("Normalised loss", "Gradient norm") else [1]), title
    assert "1e−7" not in page.partition("<h3>What the margin is made of</h3>")[2].partition("</svg>")[0]


@pytest.mark.usefixtures("without_plots")
def test_unfinished_run_says_how_to_go_on(unfinished: Path) -> None:
    directory = unfinished.rename(unfinished.with_name("a run"))
    command = f"python -m onpo_fast.train --resume --out {shlex.quote(str(directory))}"
    assert f"The run is unfinished. If no process is working on it, continue it with: {command} " in (
        Page(write_report(directory)).text
    )


def test_run_that_goes_on_with_more_iterations(finished: Path) -> None:
    """What was evaluated is not the whole run; the prompts, which are recorded anew, are not its progress."""
    config = (finished / "config.yaml").read_text()
    (finished / "config.yaml").write_text(config.replace("iterations: 2", "iterations: 4"))
    write_lines(finished / "metrics.jsonl", [*metrics()[1:], metrics()[0] | {"time": 1.8e9}])
    page = Page(write_report(finished))
    assert "2 of 4 iterations done, evaluated up to π₃. Last record: evaluate," in page.text
    assert "The run is unfinished." in page.text


def test_skipped_steps_are_named(finished: Path) -> None:
    rows = metrics()
    for row in rows:
        if row["stage"] == "fit" and row["fit"] == "policy" and (row["iteration"] == 2 or row["step"] == 9):
            row |= {"skipped": 1, "loss": None, "loss_normalised": None, "margin": None, "gradient_norm": None}
    write_lines(finished / "metrics.jsonl", rows)
    page = Page(write_report(finished))
    assert (
        "41 of 160 optimizer steps skipped because the loss or the gradient was not finite: "
        "iteration 1, policy: 1 (step 9); iteration 2, policy: 40 (step 1, 2, 3, 4, 5, …)."
    ) in page.text
    (loss,) = (a["aria-label"] for _, a in page.tags if (a.get("aria-label") or "").startswith("Plot. Normalised loss"))
    assert loss == (
        "Plot. Normalised loss. iteration 2, auxiliary: from 0.246 to 0.1; iteration 1, policy: from 0.246 to 0.1; "
        "iteration 1, untrained: 0.21; iteration 2, untrained: 0.22; "
        "iteration 1, policy: 1 steps skipped; iteration 2, policy: 40 steps skipped."
    )


@pytest.mark.usefixtures("without_plots")
def test_judge_and_prompts_are_counted(finished: Path) -> None:
    counters = {"requests": 1000, "failures": 3, "prompt_tokens": 70_000, "completion_tokens": 900}
    counters |= {"answered": 997, "cached": 5, "nonsense": 2}
    rows = metrics()
    rows[0]["skipped"] = 7
    rows = [row | counters if row["stage"] in ("judge", "evaluate") else row for row in rows]
    write_lines(finished / "metrics.jsonl", rows)
    page = Page(write_report(finished))
    assert "80 held out; 7 unusable prompts skipped." in page.text
    assert "The judge gave 2,991 answers; 15 more came from its cache; 6 of them without a verdict." in page.text
    assert "3,000 requests, 9 of which failed; 210,000 tokens in, 2,700 out." in page.text
    write_lines(finished / "metrics.jsonl", [*rows[:2], rows[2] | {"stopped": True}, *rows[2:]])
    assert "iteration 1 2,000 6 140,000" in Page(write_report(finished)).text  # paid for, though nothing came of it
    assert "evaluation 1,000 3 70,000 900 997 5 2 in all 3,000 9 210,000 2,700 2,991 15 6" in page.text


def test_run_that_has_only_started(unfinished: Path) -> None:
    (unfinished / "metrics.jsonl").unlink()
    page = Page(write_report(unfinished))
    assert page.count("svg") == 0
    assert "No measurements yet." in page.text
    assert "Not recorded: seconds by stage; peak memory; speed by stage." in page.text


@pytest.mark.usefixtures("without_plots")
def test_resumed_run_counts_a_repeated_step_once(unfinished: Path) -> None:
    before = Page(write_report(unfinished)).text
    lines = (unfinished / "metrics.jsonl").read_text().splitlines()
    repeated = [line for line in lines[:-1] if '"fit"' in line]
    # The torn line stays where the kill left it: in the middle of the file.
    (unfinished / "metrics.jsonl").write_text("\n".join([*lines, *repeated]) + "\n")
    assert Page(write_report(unfinished)).text == before


def test_missing_values_are_passed_over(finished: Path) -> None:
    """On a CPU there is no peak memory; DPO with hard labels has no target; a run may diverge."""
    rows = [row | {"peak_memory_bytes": None, "target": None} for row in metrics()]
    rows[-3] |= {"loss_normalised": float("nan"), "gradient_norm": float("inf")}
    write_lines(finished / "metrics.jsonl", rows)
    page = Page(write_report(finished))
    assert page.count("svg") == 12
    assert "Not recorded: peak memory." in page.text


@pytest.mark.usefixtures("without_plots")
def test_damaged_records_are_passed_over(finished: Path) -> None:
    """A bit flip, or half a line that a crash left."""
    before = Page(write_report(finished)).text
    for name in ("metrics.jsonl", "evaluation_responses.jsonl"):
        with (finished / name).open("a") as file:
            file.write('1\n{}\nnull\n{"time": 1, "stage": "fit", "iteration": 1}\n{"prompt": [')
    said = "Damaged lines that were skipped: 5 of evaluation_responses.jsonl; 5 of metrics.jsonl. "
    assert Page(write_report(finished)).text == before.replace("Did it work?", said + "Did it work?", 1)


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"policies": ["π_1", "π_2"]}', json.dumps(evaluation(0.6, 0.5, 0.7) | {"win_rate": [[0.5]]})),
        json.dumps(evaluation(0.6, 0.5, 0.7) | {"confidence": None}),
        json.dumps(evaluation(0.6, 0.5, 0.7) | {"policies": ["π_1", "π_2", "x"]}),
    ],
)
def test_a_damaged_evaluation_is_named(finished: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "evaluation.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        main([str(finished)])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {finished / 'evaluation.json'} is damaged: ")
    assert "--resume" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [", ", line 1: not YAML ("),
        ("config.yaml", "- a", ' is damaged: expected "name: value"'),
        ("config.yaml", "iterations: two", " is damaged: iterations must be a whole number"),
        ("config.yaml", "iterations: 0x" + 5000 * "f", " is damaged: iterations must be a whole number"),
        ("config.yaml", "a: " + 5000 * "1", ": not YAML (Exceeds the limit"),
        ("config.yaml", "a: &a [*a]", ", line 1: *a is an alias: write the value itself"),
        ("config.yaml", "a: &a [x, x]\nb: &b [*a, *a]", ", line 2: *a is an alias"),
        ("config.yaml", "a: " + 9000 * "[" + 9000 * "]", ": not YAML (nested too deeply)"),
        ("config.yaml", "a: " + 300_000 * "x", " has 300,003 bytes: at most 262,144 are read"),
        ("environment.json", "[1]", " is damaged: it lacks what a run writes there"),
        ("environment.json", 100_000 * "[", " is damaged: not JSON (nested too deeply)"),
    ],
)
def test_damaged_files_are_named(finished: Path, name: str, content: str, message: str, capsys) -> None:
    (finished / name).write_text(content)
    with pytest.raises(SystemExit):
        main([str(finished)])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {finished / name}{message}")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("without_plots")
def test_odd_values_are_passed_over(finished: Path) -> None:
    """JSON that is whole, with values that nothing of a run writes."""
    write_report(finished)
    before = Page(finished / "report.html").text
    odd = [{"loss": "x"}, {"loss": [1]}, {"fit": 3}]
    with (finished / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(fit_row(2, "policy", 40) | one) + "\n" for one in odd)
    told = {"prompt": [{"role": "user", "content": "x"}], "responses": {"π_1": ["y"]}, "preference": 0.5}
    with (finished / "evaluation_responses.jsonl").open("a") as file:
        wrong = [{"prompt": 1}, {"prompt": [3]}, {"responses": ["y"]}, {"responses": {"π_1": 3}}, {"preference": "x"}]
        file.writelines(json.dumps(told | one) + "\n" for one in wrong)
    said = "Damaged lines that were skipped: 5 of evaluation_responses.jsonl; 3 of metrics.jsonl. "
    assert Page(write_report(finished)).text == before.replace("Did it work?", said + "Did it work?", 1)
    (finished / "metrics.jsonl").write_text('{"time": 1e300, "stage": "sample", "iteration": 1}\n')
    assert "Last record: sample, at an unknown time." in Page(write_report(finished)).text


def test_same_input_same_bytes(finished: Path) -> None:
    first = write_report(finished).read_bytes()
    assert write_report(finished).read_bytes() == first


def test_long_fits_stay_small(finished: Path) -> None:
    small = len(write_report(finished).read_bytes())
    rows = [fit_row(1, "policy", step, steps=20_000) for step in range(1, 20_001)]
    write_lines(finished / "metrics.jsonl", [*metrics(), *rows])
    assert len(write_report(finished).read_bytes()) < 2 * small


def test_command_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(finished)])
    assert capsys.readouterr().out == f"{finished / 'report.html'}\n"


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_directory_that_is_no_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / name)])
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no config.yaml" in captured.err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# A run from anybody
# ---------------------------------------------------------------------------------------------------------------------

READ = (
    "config.yaml",
    "metrics.jsonl",
    "evaluation.json",
    "evaluation_responses.jsonl",
    "environment.json",
    "iteration_02/responses.jsonl",
    "iteration_02/preferences.jsonl",
)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))  # a name of at most 108 bytes


def vast(path: Path) -> None:
    """A file with a hole, of no size on disk."""
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("harm", [fifo, endless, bound, Path.mkdir, vast])
def test_no_file_of_a_run_is_waited_for(finished: Path, harm: Callable, name: str, capsys, monkeypatch) -> None:
    """One line, or for a file of lines that has no end, a page; and never gigabytes of memory."""
    monkeypatch.chdir(finished)
    monkeypatch.setattr("onpo_fast.reports.reading.MOST_LINES_BYTES", 2**20)  # for this test to be quick
    monkeypatch.setattr("onpo_fast.files.read_lines.__defaults__", (2**20, 100))
    (finished / "iteration_02").mkdir()
    write_lines(finished / "iteration_02/responses.jsonl", [{"prompt": [], "responses": ["x"]}])
    (finished / name).unlink(missing_ok=True)
    harm(finished / name)
    if harm is vast and name.endswith("jsonl"):
        page = Page(write_report(finished))
        if not name.endswith("preferences.jsonl"):  # only the lines of responses that are shown are read
            assert f"Of {name} only the first" in page.text
        return
    with pytest.raises(SystemExit) as stopped:
        main(["."])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("error: ")
    assert name in said
    assert said.count("\n") == 1


ODD_LINES = [
    *("null", "[]", "{}", "NaN", "-Infinity", '"x"', "1" * 5000, "[" * 10**5, '{"a":' * 10**5, "\x00", "\ufeff{}", ""),
    *(
        '{"time": NaN, "stage": "fit", "iteration": 1, "fit": "x", "step": 1, "steps": 1}',
        '{"time": 1, "stage": "fit", "iteration": 1, "fit": "policy", "step": 0, "steps": 1}',
        '{"time": 1, "stage": "iteration", "iteration": 1, "seconds": NaN, "stage_seconds": {}}',
        '{"time": 1, "stage": "iteration", "iteration": 1, "seconds": 1, "stage_seconds": {"sample": "x"}}',
        '{"time": 1, "stage": "iteration", "iteration": 1, "seconds": 1, "stage_seconds": {"sample": Infinity}}',
        '{"time": 1, "stage": "\\ud800", "iteration": 1}',
        '{"time": 1, "stage": "sample", "iteration": -1}',
    ),
    '{"time": 1, "stage": "sample", "iteration": 1, "tokens": ' + "1" * 400 + "}",
    *(
        '{"prompt": [{"role": "user", "content": "x"}], "responses": {"π_1": ["y"]}, "preference": NaN}',
        '{"prompt": [{"role": [], "content": "x"}], "responses": {"π_1": ["y"]}, "preference": 0.5}',
        '{"prompt": [{"role": "user", "content": 3}], "responses": {"π_1": ["y"]}, "preference": 0.5}',
        '{"prompt": [], "responses": {"π_1": ["y"]}, "preference": 0.5}',
        '{"prompt": [{"role": "user", "content": "x"}], "responses": {}, "preference": 0.5}',
        '{"prompt": [{"role": "user", "content": "x"}], "responses": {"x": ["y"]}, "preference": 0.5}',
        '{"prompt": [{"role": "user", "content": "x"}], "responses": {"π_1": ["y"]}, "preference": 1e999}',
    ),
]


def test_best_of_nash_is_beside_the_policies(finished: Path) -> None:
    before = Page(write_report(finished))
    assert "Best of Nash" not in before.text
    assert "best of Nash" not in before.text
    (finished / "evaluation.json").write_text(json.dumps(evaluation(0.68, 0.61, 0.75) | {"best_of_nash": BEST_OF_NASH}))
    after = Page(write_report(finished))
    assert "wins 47.0 % of comparisons with π₃ (interval 40.0 % to 54.0 %) and 71.0 % with π₁ (62.0 % to" in after.text
    assert "64 responses of π₁" in after.text
    assert "plays 3.2 of them" in after.text
    assert "These 2,016 comparisons" in after.text
    assert "best of Nash 71.0 % 62.0 % to 80.0 % 60.0 % 50.0 % to 70.0 % 47.0 % 40.0 % to 54.0 %" in after.text
    assert "Yes: π₃ wins 68.0 % of comparisons with π₁" in after.text


def test_an_evaluation_is_known_from_what_only_looks_like_one() -> None:
    """A run that goes on makes anew what is none."""
    assert is_evaluation(evaluation(0.6, 0.5, 0.7))
    for document in (None, [], {}, {"policies": ["π_1"]}, evaluation(0.6, 0.5, 0.7) | {"win_rate": "x"}):
        assert not is_evaluation(document)


@pytest.mark.usefixtures("without_plots")
def test_odd_lines_are_counted(finished: Path) -> None:
    before = Page(write_report(finished)).text
    for name in ("metrics.jsonl", "evaluation_responses.jsonl"):
        with (finished / name).open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in ODD_LINES)
    count = len(ODD_LINES)
    said = f"Damaged lines that were skipped: {count} of evaluation_responses.jsonl; {count} of metrics.jsonl. "
    assert Page(write_report(finished)).text == before.replace("Did it work?", said + "Did it work?", 1)


@pytest.mark.usefixtures("without_plots")
def test_a_line_without_an_end_is_not_kept(finished: Path) -> None:
    before = RunData.read(finished)
    os.truncate(finished / "metrics.jsonl", 200 * 2**20)  # zeros, after the last line
    tracemalloc.start()
    run = RunData.read(finished)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    assert run.records == before.records
    assert run.damaged_lines == {"metrics.jsonl": 1}


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "change",
    [
        {"win_rate": [["0.5", 0.4, 0.3], [0.6, 0.5, 0.4], [0.7, 0.6, 0.5]], "interval": "x"},
        {"win_rate": [[0.5, 0.4, 0.3], [0.6, 0.5, 0.4], [0.7, 0.6, 1.5]]},
        {"duality_gap": [float("nan"), 0, 0]},
        {"duality_gap": [10**400, 0, 0]},
        {"confidence": []},
        {"oracle": [[]]},
        {"prompts": "80"},
        {"prompts": 10**4000},
        {"policies": {"π_1": 1, "π_2": 2, "π_3": 3}},
        {"policies": []},
        {"kl_to_initial": [1]},
        {"best_of_nash": None},
        {"best_of_nash": BEST_OF_NASH | {"samples": 1}},
        {"best_of_nash": BEST_OF_NASH | {"samples": "<b>"}},
        {"best_of_nash": BEST_OF_NASH | {"win_rate": [0.5, 0.6]}},
        {"best_of_nash": BEST_OF_NASH | {"responses_played": 65}},
        {"best_of_nash": {"samples": 64}},
    ],
)
def test_an_odd_evaluation_is_one_line(finished: Path, change: dict, capsys) -> None:
    (finished / "evaluation.json").write_text(json.dumps(evaluation(0.6, 0.5, 0.7) | change), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([str(finished)])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {finished / 'evaluation.json'} is damaged: it lacks what a run writes there")
    assert said.count("\n") == 1


def test_a_long_run_is_a_page_of_a_few_mb(finished: Path) -> None:
    """400 iterations, long texts, many options: the first, the last and some between, and what is left out is said."""
    count = 400
    policies = [f"π_{t}" for t in range(1, count + 2)]
    rates = np.full((count + 1, count + 1), 0.5)
    evaluated = evaluation(0.6, 0.5, 0.7) | {
        "policies": policies,
        "win_rate": rates.tolist(),
        "interval": np.stack([rates, rates], -1).tolist(),
        "duality_gap": [0.1] * (count + 1),
        "kl_to_initial": [0.1] * (count + 1),
        "response_tokens_mean": [9.0] * (count + 1),
    }
    (finished / "evaluation.json").write_text(json.dumps(evaluated))
    (finished / "config.yaml").write_text(f"iterations: {count}\nlong: {'x' * 5000}\n")
    (finished / "environment.json").write_text(json.dumps({f"package {n}": "x" for n in range(1000)}))
    write_lines(finished / "metrics.jsonl", metrics(count))
    row = {"prompt": [{"role": "user", "content": "long " * 10**4}] * 30, "preference": 0.5}
    row["responses"] = {name: ["word " * 1000] for name in policies}
    write_lines(finished / "evaluation_responses.jsonl", [row] * 3)
    start = time.process_time()
    path = write_report(finished)
    assert time.process_time() - start < 20  # a few seconds
    assert len(path.read_bytes()) < 4 * 2**20
    text = Page(path).text
    assert "400 of 400 iterations done" in text
    assert "Plots and tables show 40 of 400 iterations: the first, the last and evenly spaced ones." in text
    assert "20 of 401 policies are shown: the first, the last and evenly spaced ones. evaluation.json has all." in text
    assert "120,000 pairs to learn from." in text
    assert "finite in all 32,000 steps." in text
    assert "… (48,000 more characters: see evaluation_responses.jsonl)" in text
    assert "… (3,000 more characters: see evaluation_responses.jsonl)" in text
    assert "(10 more messages: see evaluation_responses.jsonl)" in text
    assert "… (3,000 more characters: see config.yaml)" in text
    assert "(800 more: see environment.json)" in text
    for name in ("π₁", "π₄₀₁"):
        assert name in text


@pytest.mark.usefixtures("without_plots")
def test_only_the_pages_own_script_is_allowed(finished: Path) -> None:
    html = write_report(finished).read_text(encoding="utf-8")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    rules = dict(rule.strip().split(" ", 1) for rule in unescape(policy).split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert "getElementById" in script
    (finished / "evaluation_responses.jsonl").unlink()
    html = write_report(finished).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "script-src 'none'" in unescape(html)


@pytest.mark.usefixtures("without_plots")
def test_what_a_killed_report_has_left_goes(finished: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (finished / f"report.html.{gone.pid}.partial").write_text("half")
    (finished / "report.html.1.partial").write_text("of a process that is there")
    write_report(finished)
    assert sorted(path.name for path in finished.glob("report.html*")) == ["report.html", "report.html.1.partial"]


# ---------------------------------------------------------------------------------------------------------------------
# A matplotlibrc in the folder where a command is run
# ---------------------------------------------------------------------------------------------------------------------


def test_settings_of_matplotlib_change_no_page(finished: Path) -> None:
    """One that a caller has made, or a file has: ``text.usetex`` would run LaTeX, with what it says."""
    expected = write_report(finished).read_bytes()
    settings = {
        "text.usetex": True,
        "text.latex.preamble": r"\nothing",
        "axes.prop_cycle": cycler(color=["red"]),
        "lines.linewidth": 9,
        "savefig.bbox": "tight",
        "svg.id": "x",
    }
    with matplotlib.rc_context(settings):
        assert write_report(finished).read_bytes() == expected
        assert matplotlib.rcParams["text.usetex"]  # the caller's are left alone


# ---------------------------------------------------------------------------------------------------------------------
# A picture of the main plots
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start"), [("plots.svg", b"<?xml"), ("plots.png", b"\x89PNG")])
def test_picture(finished: Path, name: str, start: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    picture = finished / name
    main([str(finished), "--picture", str(picture)])
    assert capsys.readouterr().out.splitlines() == [str(finished / "report.html"), str(picture)]
    first = picture.read_bytes()
    assert first.startswith(start)
    main([str(finished), "--picture", str(picture)])
    assert picture.read_bytes() == first
    if name.endswith("svg"):
        text = first.decode()
        for title in (
            "Win rates on held-out prompts",
            "Normalised loss",
            "KL from the first policy",
            "Seconds by stage",
        ):
            assert title in text


def test_picture_of_an_unfinished_run(unfinished: Path) -> None:
    write_picture(unfinished, unfinished / "plots.svg")
    text = (unfinished / "plots.svg").read_text(encoding="utf-8")
    assert "Win rates on held-out prompts: not recorded yet" in text
    assert "Normalised loss: not recorded yet" not in text


def test_picture_of_another_kind(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(finished), "--picture", "plots.gif"])
    assert "--picture plots.gif" in capsys.readouterr().err
