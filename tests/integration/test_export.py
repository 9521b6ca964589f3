"""The pairs of a run for datasets and TRL, answers for AlpacaEval."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pandas
import pytest

from onpo_fast import data, export
from onpo_fast.config import Config, ModelConfig, SamplingConfig
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.evaluate import finished_policies
from onpo_fast.journal import Journal
from onpo_fast.reports.hub import policy_files
from onpo_fast.reports.model_card import write_model_cards

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße?"}]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    """A run of two iterations: its pairs, and the tiny model as every policy."""
    directory = tmp_path / "run"
    groups = [Group(PROMPT, [1], [Response(text, [5], "eos", 0.0) for text in ("yes", "no\u2028", "")])]
    for t, pairs in ((1, [Pair(0, 0, 1, 0.75), Pair(0, 0, 2, 1.0)]), (2, [Pair(0, 2, 1, 0.5)])):
        data.write_pairs(directory / f"iteration_{t:02d}/pairs.jsonl", pairs, groups)
        shutil.copytree(tiny_model, directory / f"iteration_{t:02d}/policy", copy_function=os.link)
        Journal(directory).record(f"iteration_{t:02d}/policy")
    config = Config(model=str(tiny_model), max_new_tokens=3, out=str(directory))
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return directory


def test_pairs(run: Path, capsys) -> None:
    export.main([str(run)])
    assert f"3 pairs: {run / 'pairs'}" in capsys.readouterr().out
    table = datasets.load_from_disk(str(run / "pairs"))
    assert table.column_names == ["prompt", "chosen", "rejected", "preference", "group", "iteration"]
    first = table[0]
    assert first["prompt"] == PROMPT
    assert first["chosen"] == [{"role": "assistant", "content": "yes"}]
    assert first["rejected"] == [{"role": "assistant", "content": "no\u2028"}]
    trl = pytest.importorskip("trl", reason="TRL 1.16 wants Python 3.11")
    assert trl.data_utils.is_conversational(first)
    assert (table["preference"][:], table["iteration"][:]) == ([0.75, 1.0, 0.5], [1, 1, 2])


def test_some_iterations(run: Path, tmp_path: Path) -> None:
    assert export.export_pairs(run, tmp_path / "second", [2, 2]) == 1
    assert datasets.load_from_disk(str(tmp_path / "second"))["iteration"][:] == [2]
    with pytest.raises(UserError, match="has no pairs of iteration 3: it has 1, 2"):
        export.export_pairs(run, tmp_path / "third", [3])
    with pytest.raises(UserError, match="second exists: give a new name"):
        export.export_pairs(run, tmp_path / "second")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "second"}


def test_answers(run: Path, tmp_path: Path) -> None:
    asked = [
        {"instruction": "Name a colour.", "dataset": "helpful_base", "output": "another model's", "generator": "b"},
        {"instruction": "用一句话介绍北京。"},
    ]
    (tmp_path / "set.json").write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
    export.main([str(run), "--alpaca", str(tmp_path / "set.json"), "--max_new_tokens", "5"])
    answers = json.loads((run / "alpaca_eval_3.json").read_text(encoding="utf-8"))
    assert [answer["instruction"] for answer in answers] == [one["instruction"] for one in asked]
    assert [answer.get("dataset") for answer in answers] == ["helpful_base", None]
    assert {answer["generator"] for answer in answers} == {"run-policy-3"}
    assert all(isinstance(answer["output"], str) and answer["output"] != "another model's" for answer in answers)
    table = pandas.read_json(run / "alpaca_eval_3.json")  # what AlpacaEval does with the file
    assert {"instruction", "output", "generator"} <= set(table.columns)

    lines = tmp_path / "set.jsonl"
    lines.write_text("".join(json.dumps({"prompt": one["instruction"]}) + "\n" for one in asked))
    config = Config(model=str(run / "iteration_01/policy"), max_new_tokens=5)
    for name, policy in (("a.json", 3), ("b.json", 2)):
        model, sampling = config.section(ModelConfig), config.section(SamplingConfig)
        assert export.export_answers(run, tmp_path / name, str(lines), policy, model, sampling, config.seed) == 2
    a, b = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("a.json", "b.json"))
    assert [answer["output"] for answer in a] == [answer["output"] for answer in answers]  # the same seed
    assert [answer["output"] for answer in b] != [answer["output"] for answer in answers]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpaca", "bad.jsonl"], "bad.jsonl, line 2: expected an object with an"),
        (["--alpaca", "old.jsonl"], "old.jsonl, line 1: it has an"),
        (["--alpaca", "gone.json"], "cannot read gone.json"),
        (["--alpaca", "empty.jsonl"], "empty.jsonl has no instructions"),
        (["--alpaca", "bad.jsonl", "--policy", "9"], "--policy 9: run has no policy of this number; it has 1, 2, 3"),
        (["--alpaca", "bad.jsonl", "--out", "x.txt"], "--out x.txt: "),
        (["--alpaca", "bad.jsonl", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--alpaca", "bad.jsonl", "--policy", "0"], "--policy 0: run has no policy of this number; it has 1, 2, 3"),
        (["--alpaca", "good.jsonl", "--out", "empty.jsonl/a.json"], "--out empty.jsonl/a.json: nothing can be written"),
        (["--out", "empty.jsonl/pairs"], "--out empty.jsonl/pairs: nothing can be written into "),
        (["--policy", "2"], "--policy goes with --alpaca"),
        (["--private"], "--private goes with --push_to_hub"),
        (["--alpaca", "good.jsonl", "--iterations", "1"], "--iterations goes with"),
        (["--push_to_hub", "org/name", "--temperature", "1"], "--temperature goes with --alpaca"),
        (["--push_to_hub", "org/name", "--alpaca", "good.jsonl"], "--alpaca or --push_to_hub"),
        (["--push_to_hub", "name"], "--push_to_hub name: "),
        (["--push_to_hub", "org/.name"], "--push_to_hub org/.name: "),
        (["--push_to_hub", "org/name", "--policy", "1"], "--policy 1: run has no finished policy"),
        (["--push_to_hub", "org/name"], "HF_HUB_OFFLINE"),
        (["--iterations", "x"], "argument --iterations: invalid int value"),
    ],
)
def test_bad_input(run: Path, tmp_path: Path, arguments: list[str], message: str, capsys, monkeypatch) -> None:
    """Before a model is loaded."""
    monkeypatch.delattr("onpo_fast.reports.exports.ResidentPolicy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("bad.jsonl").write_text('{"instruction": "fine"}\n{"instruction": " "}\n')
    Path("good.jsonl").write_text('{"instruction": "fine"}\n')
    Path("old.jsonl").write_text('{"instruction": "Translate.", "input": "yes"}\n')
    Path("empty.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        export.main(["run", *arguments])
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt', "iteration_02/pairs.jsonl, line 1: not JSON ("),
        ("3", "iteration_02/pairs.jsonl, line 1: not a JSON object"),
        ('{"prompt": []}', "iteration_02/pairs.jsonl, line 1: it lacks chosen, rejected, preference, group"),
        ('{"prompt": 1, "chosen": [], "rejected": [], "preference": 1, "group": 0}', "the pairs of run are damaged: "),
    ],
)
def test_damaged_pairs(run: Path, line: str, message: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(run.parent)
    (run / "iteration_02/pairs.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit):
        export.main(["run"])
    said = capsys.readouterr().err
    assert said.removeprefix("error: ").removeprefix("run/").startswith(message), said
    assert not (run / "pairs").exists()


def test_the_files_of_a_saved_policy_can_be_uploaded(run: Path) -> None:
    """All that ``Policy.save`` writes, before and after the policy has a model card."""
    policy = run / "iteration_02/policy"
    files = policy_files(policy)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert set(files) == {path.name for path in policy.iterdir()}
    (card,) = [path for path in write_model_cards(run) if path.parent == policy]
    assert policy_files(policy) == files
    assert list(finished_policies(run, Journal(run))) == ["π_2", "π_3"]  # still as they were saved
    text = card.read_text(encoding="utf-8")
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1].replace("path/of/this/directory", str(policy))
    exec(code, loaded := {})
    assert loaded["model"].config.num_hidden_layers == 2


def test_folders_that_are_none_of_the_run(run: Path) -> None:
    for name in ("iteration_xx/policy", "iteration_/policy", "iteration_xx/pairs.jsonl"):
        (run / name).mkdir(parents=True)
    assert list(finished_policies(run, Journal(run))) == ["π_2", "π_3"]
    assert export.export_pairs(run, run / "pairs") == 3


def test_pairs_with_tools(tmp_path) -> None:
    """Calls and tools keep the keys that they have, and no others."""
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    asked = [{"role": "user", "content": "Late?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rest = {**answers, "preference": 1.0, "group": 0}
    tools = [{"type": "function", "function": {"name": "clock"}}]
    lines = [{"prompt": asked[:1], **rest}, {"prompt": asked, "tools": tools, **rest}]
    (tmp_path / "iteration_01").mkdir()
    (tmp_path / "iteration_01/pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert export.export_pairs(tmp_path, tmp_path / "pairs") == 2
    first, second = datasets.load_from_disk(str(tmp_path / "pairs"))
    assert (first["prompt"], first["tools"]) == (asked[:1], [])
    assert (second["prompt"], second["tools"], second["chosen"]) == (asked, tools, answers["chosen"])
