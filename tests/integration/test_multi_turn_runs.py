"""Runs of the trainer on conversations of several turns, on a model of a few thousand weights."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.small_runs import prepare, small_run

from bench.digest import run_digest
from onpo_fast import train as module
from onpo_fast.config import Config, EnvironmentConfig
from onpo_fast.conversations import Messages
from onpo_fast.data import read_groups, read_pairs
from onpo_fast.errors import UserError
from onpo_fast.evaluate import main as evaluate_command
from onpo_fast.files import read_jsonl
from onpo_fast.multi_turn.environment import CheckedEnvironment
from onpo_fast.reports.run_data import RunData

pytestmark = pytest.mark.usefixtures("without_plots")

TURNS = 3
OWN = """
import os
import numpy as np


def partner(messages, seed):
    fails = os.environ.get("PARTNER_FAILS_AT")
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    if fails and len(said) == int(fails):
        raise RuntimeError("out of words")
    if os.environ.get("PARTNER_IS_LONG") and seed % 3 == 0:
        return "word " * 3000
    return None if seed % 4 == 0 else f"And number {seed % 7}?"
"""
ORACLE = """
import numpy as np


def by_bytes(prompt, responses):
    kinds = np.array([sum(response.encode()) % 3 for response in responses])
    after = (kinds[None, :] - kinds[:, None]) % 3
    return np.select([after == 0, after == 1], [0.5, 0.8], 0.2)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    prepare(folder, tiny_model)
    return folder


@pytest.fixture
def conversing(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run with an environment and an oracle of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_partner.py").write_text(OWN)
    (tmp_path / "own_oracle.py").write_text(ORACLE)
    for name in ("own_partner", "own_oracle"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # of another test's folder
    config = small_run(work, "unused")
    return replace(
        config, out=str(tmp_path / "run"), environment="own_partner:partner", oracle="own_oracle:by_bytes", turns=TURNS
    )


@pytest.mark.long
def test_what_a_run_of_several_turns_writes(conversing: Config) -> None:
    result = module.train(conversing)
    out, K = Path(conversing.out), conversing.responses_per_prompt
    folder = out / "iteration_01"
    trees = list(read_jsonl(folder / "conversations.jsonl"))
    assert len(trees) == conversing.prompts_per_iteration
    for tree in trees:
        assert K <= len(tree["conversations"]) <= K + (TURNS - 1) * (K - 1)
        for messages in tree["conversations"]:
            roles = [message["role"] for message in messages]
            assert roles[::2] == ["assistant"] * len(roles[::2])
            assert roles[1::2] == ["user"] * len(roles[1::2])
            assert len(roles[::2]) <= TURNS
    states = [group for h in ("", "_turn_2", "_turn_3") for group in read_groups(folder / f"responses{h}.jsonl")]
    pairs = read_pairs(folder / "pairs.jsonl", states)
    assert {pair.group for pair in pairs} == set(range(len(states)))
    assert all(0 <= pair.preference <= 1 for pair in pairs)
    assert any(len(states[pair.group].prompt) == 2 * TURNS - 1 for pair in pairs)  # the history of the third turn
    assert np.array(result["win_rate"]).shape == (3, 3)
    rows = list(read_jsonl(out / "evaluation_responses.jsonl"))
    longest = max((one for row in rows for one in row["conversations"]["π_3"]), key=len)
    assert len(longest) > 1
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "<strong>assistant</strong>" in report
    assert "Turns of the conversations" in report
    turns = RunData.read(out).turns
    assert [(row["iteration"], row["turn"]) for row in turns[:TURNS]] == [(1, turn) for turn in range(1, TURNS + 1)]
    for row in turns[:TURNS]:
        suffix = "" if row["turn"] == 1 else f"_turn_{row['turn']}"
        own = read_groups(folder / f"responses{suffix}.jsonl")
        assert row["responses"] == sum(len(group.responses) for group in own)
        assert row.get("ended", 0) <= row.get("replies", 0)
    judged = [one for one in read_jsonl(out / "metrics.jsonl") if one["stage"] == "judge"]
    size = K + (TURNS - 1) * (K - 1)  # an oracle that is a function compares all conversations of a tree
    at_most = conversing.prompts_per_iteration * size * (size - 1) // 2
    assert all(0 < one["comparisons"] <= at_most for one in judged)


@pytest.mark.long
@pytest.mark.parametrize("turn", [1, 2])
def test_an_environment_that_raises_loses_nothing(
    conversing: Config, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """One line; once it is repaired the run ends with the bits of one in which it never raised."""
    whole = replace(conversing, out=f"{conversing.out}-whole")
    module.train(whole)
    monkeypatch.setattr("onpo_fast.multi_turn.environment.CheckedEnvironment.probe", lambda self, prompt: None)
    monkeypatch.setenv("PARTNER_FAILS_AT", str(turn))
    with pytest.raises(UserError, match="--environment own_partner:partner: it raised RuntimeError: out of words"):
        module.train(conversing)
    sampled = Path(conversing.out, "iteration_01", "responses.jsonl")
    before = sampled.stat().st_mtime_ns
    monkeypatch.delenv("PARTNER_FAILS_AT")
    module.train(conversing, resume=True)
    assert sampled.stat().st_mtime_ns == before
    assert run_digest(Path(conversing.out)) == run_digest(Path(whole.out))


def test_an_environment_that_raises_is_found_before_anything_is_sampled(
    conversing: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARTNER_FAILS_AT", "1")
    with pytest.raises(UserError, match="before anything is sampled"):
        module.train(conversing)
    assert not Path(conversing.out).exists()


@pytest.mark.long
def test_replies_are_kept_in_parts(conversing: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an environment has said is not asked for again after it failed."""
    whole = replace(conversing, iterations=1, out=f"{conversing.out}-whole")
    config = replace(conversing, iterations=1)
    module.train(whole)
    monkeypatch.setattr("onpo_fast.multi_turn.files.REPLIES_AT_A_TIME", 2)
    ask, calls = CheckedEnvironment.__call__, []

    def failing(self: CheckedEnvironment, messages: Messages, seed: int) -> dict | None:
        calls.append(seed)
        if len(calls) == 6:  # the first is the probe's
            raise UserError("it is down")
        return ask(self, messages, seed)

    monkeypatch.setattr(CheckedEnvironment, "__call__", failing)
    with pytest.raises(UserError, match="it is down"):
        module.train(config)
    module.train(config, resume=True)
    assert run_digest(Path(config.out)) == run_digest(Path(whole.out))
    assert len(set(calls[1:5]) & set(calls[7:])) == 0  # two parts of two, after the probe of the first process
    assert calls[5] in calls[7:]


def test_a_reply_without_room_for_an_answer_ends_the_conversation(
    conversing: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARTNER_IS_LONG", "1")
    monkeypatch.setattr("onpo_fast.multi_turn.environment.CheckedEnvironment.probe", lambda self, prompt: None)
    module.train(replace(conversing, iterations=1))
    replies = [one["reply"] for one in read_jsonl(Path(conversing.out, "iteration_01", "replies_turn_1.jsonl"))]
    assert any(replies)
    assert not any(reply and len(reply["content"]) > 100 for reply in replies)


@pytest.mark.long
def test_an_evaluation_with_another_environment(conversing: Config, tmp_path: Path, capsys) -> None:
    """All of it is with the environment as it is now."""
    module.train(replace(conversing, iterations=1))
    out = Path(conversing.out)
    (tmp_path / "own_partner.py").write_text(OWN.replace("And number", "What of"))
    importlib.reload(sys.modules["own_partner"])
    evaluate_command([str(out), "--trust_run"])
    said = capsys.readouterr()
    assert "--environment own_partner:partner is not what" in " ".join((said.out + said.err).split())
    texts = [
        message["content"]
        for row in read_jsonl(out / "evaluation_responses.jsonl")
        for own in row["conversations"].values()
        for conversation in own
        for message in conversation
        if message["role"] == "user"
    ]
    assert texts
    assert all(text.startswith("What of") for text in texts)


def test_conversations_that_all_end_at_their_first_turn(conversing: Config, tmp_path: Path) -> None:
    """Also with more turns to come; the evaluation names another environment, and says so."""
    (tmp_path / "short_partner.py").write_text("def leaves(messages, seed):\n    return None\n")
    config = replace(conversing, environment="short_partner:leaves", iterations=1)
    result = module.train(config)
    assert (result["environment"], result["turns"]) == ("short_partner:leaves", TURNS)
    rows = list(read_jsonl(Path(config.out, "iteration_01", "conversations.jsonl")))
    assert all(len(messages) == 1 for row in rows for messages in row["conversations"])


@pytest.mark.long
def test_an_evaluation_with_an_environment_of_another_name(conversing: Config, capsys) -> None:
    module.train(replace(conversing, iterations=1))
    evaluate_command([conversing.out, "--trust_run", "--environment", "word-game"])
    said = capsys.readouterr()
    words = " ".join((said.out + said.err).split())
    assert "began with --environment own_partner:partner. The evaluation is with --environment word-game" in words
    evaluation = json.loads(Path(conversing.out, "evaluation.json").read_text())
    assert (evaluation["environment"], evaluation["turns"]) == ("word-game", TURNS)
    card = Path(conversing.out, "iteration_01", "policy", "README.md").read_text()
    assert "environment: own_partner:partner" in card
    assert "the policy converses with an environment" in card


def test_one_turn_has_the_bits_of_a_run_without_an_environment(conversing: Config) -> None:
    one = replace(conversing, turns=1, iterations=1)
    turns = EnvironmentConfig().turns  # without an environment no others can be given
    plain = replace(conversing, environment=None, turns=turns, iterations=1, out=f"{conversing.out}-plain")
    module.train(one)
    module.train(plain)
    assert run_digest(Path(one.out)) == run_digest(Path(plain.out))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"environment": "nothing"}, "--environment nothing"),
        ({"objective": "sppo"}, "--objective sppo is for one turn"),
        ({"objective": "egpo"}, "--objective egpo is for one turn"),
        ({"turns": 0}, "--turns"),
        ({"environment_timeout": 0}, "--environment_timeout"),
        ({"multi_turn_target": "both"}, "--multi_turn_target"),
        ({"oracle": "openings"}, "--oracle openings reads the first words"),
        ({"environment": None, "turns": 5}, "--turns is for conversations"),
        (
            {"environment": None, "turns": 2, "multi_turn_target": "branches"},
            "--multi_turn_target is for conversations",
        ),
        ({"environment": "no_such:partner", "turns": 1}, "--environment no_such:partner"),
    ],
)
def test_options_that_do_not_fit(conversing: Config, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        module.train(replace(conversing, **options))
    assert not Path(conversing.out).exists()


def test_an_environment_that_changed(conversing: Config, tmp_path: Path) -> None:
    module.train(replace(conversing, iterations=1))
    (tmp_path / "own_partner.py").write_text(OWN + "\n# another version\n")
    with pytest.raises(UserError, match=r"is not what .* began with: own_partner.py"):
        module.train(replace(conversing, iterations=1), resume=True)


def test_a_damaged_file_of_replies_is_made_again(conversing: Config) -> None:
    whole = replace(conversing, iterations=1, out=f"{conversing.out}-whole")
    module.train(whole)
    config = replace(conversing, iterations=1)
    module.train(config)
    digest = run_digest(Path(whole.out))
    file = Path(config.out, "iteration_01", "replies_turn_1.jsonl")
    file.write_text(json.dumps({"reply": None}) + "\n")
    module.train(config, resume=True)
    assert run_digest(Path(config.out)) == digest
