"""The judge's options: the judging prompt, fields of a request, URL, key."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path

import pytest
from support.judging import groups, raises
from support.servers import (
    Error,
    serving,
)

from onpo_fast import oracles
from onpo_fast import train as module
from onpo_fast.config import Config
from onpo_fast.errors import UserError
from onpo_fast.oracles import chat_judge
from onpo_fast.servers import RequestRefused


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            "Unsupported parameter: 'max_tokens' is not supported with this model",
            """--judge_request '{"max_tokens": null}'""",
        ),
        ("temperature must be 1", """--judge_request '{"temperature": null}'"""),
    ],
)
def test_a_refusal_of_a_field_names_the_flag(judge, refused: str, words: str) -> None:
    with serving(lambda body: Error(400, refused)) as server:
        with raises(RequestRefused, words):
            oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")
        assert len(server.bodies) == 1


def test_a_prompt_of_the_users(judge, tmp_path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("{response_b}|{conversation}|{response_a}", encoding="utf-8")
    with serving(lambda body: "B") as server:
        first = judge(server, judge_prompt=str(path))
        assert [file.name for file in tmp_path.iterdir()] == ["prompt.txt"]  # nothing yet: a run may be refused
        oracles.judge(first, groups("{conversation}", "é"), "judge")
        assert {body["messages"][0]["content"] for body in server.bodies} == {
            "é|User: Question 0?|{conversation}",
            "{conversation}|User: Question 0?|é",
        }
    judge("http://x/v1", judge_prompt=str(path))
    path.write_text("{response_b} | {conversation} | {response_a}", encoding="utf-8")
    for options in ({"judge_prompt": str(path)}, {}):
        with raises(UserError, f"--judge_prompt {path}" if options else "default", "judge_prompt.txt"):
            judge("http://x/v1", **options)
    (tmp_path / "judge_prompt.txt").unlink()
    judge("http://x/v1", judge_prompt=str(path))
    path.write_text("{response_b}")
    with raises(UserError, str(path), "{conversation}", "{response_a}"):
        judge("http://x/v1", judge_prompt=str(path))
    with raises(UserError, "--judge_prompt missing.txt"):
        judge("http://x/v1", judge_prompt="missing.txt")


def test_a_judging_prompt_is_a_file_of_bearable_size(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    large, text = tmp_path / "large.txt", "{conversation} {response_a} {response_b}"
    large.write_text(text + " " * 2**20)
    for name, said in {
        str(tmp_path / "pipe.txt"): "is a FIFO, where a file belongs",
        "/dev/zero": "is a device, where a file belongs",
        str(tmp_path): "Is a directory",
        "x" * 5000: "File name too long",
        str(large): "at most 1,048,576 are read",
    }.items():
        with raises(UserError, f"--judge_prompt {name}", said):
            chat_judge.read_prompt(Path(name))
    (tmp_path / "lines.txt").write_bytes(codecs.BOM_UTF8 + text.replace(" ", "\r\n").encode())
    assert chat_judge.read_prompt(tmp_path / "lines.txt") == text.replace(" ", "\n")


def test_more_of_a_request(judge) -> None:
    with serving(lambda body: "A") as server:
        oracles.judge(judge(server, judge_request={"max_tokens": None, "seed": 3}), groups("a", "b"), "judge")
        assert all("max_tokens" not in body and body["seed"] == 3 for body in server.bodies)
        assert server.bodies[0]["temperature"] == 0
    for name in ("model", "messages"):
        with raises(UserError, "--judge_request", name):
            judge("http://x/v1", judge_request={name: None})


def test_the_page_shows_the_prompt() -> None:
    page = (Path(__file__).parents[3] / "docs" / "oracles.md").read_text(encoding="utf-8")
    assert f"```\n{chat_judge.PROMPT}\n```" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_url": None}, "--judge_url"),
        ({"judge_url": "http://x/v1", "judge_model": None}, "--judge_model"),
        ({"judge_url": "localhost:8000"}, "--judge_url must begin with http"),
        ({"judge_url": "http://[x"}, "--judge_url must begin with http"),
        ({"judge_url": "http://x:port/v1"}, "--judge_url must begin with http"),
        ({"judge_url": "http://user:secret@x/v1"}, "--judge_url must not contain a user"),
        ({"judge_url": "http://x/v1?key=secret"}, "--judge_url must not contain a user"),
        ({"judge_url": "http://x/v1#secret"}, "--judge_url must not contain a user"),
    ],
)
def test_judges_that_cannot_be_had(options: dict, message: str) -> None:
    with raises(UserError, message) as error:
        oracles.load("judge", judge=Config(**{"judge_model": "m", **options}), directory=Path("x"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["sk-secret-123", "gsk_secret123", "a secret", ""])
def test_a_key_in_place_of_its_variables_name(name: str, tmp_path) -> None:
    """It is not said back, and no file has it."""
    options = {"judge_url": "http://x/v1", "judge_model": "m", "oracle": "judge", "out": str(tmp_path / "out")}
    with raises(UserError, "--judge_key_variable") as error:
        module.train(Config(judge_key_variable=name, **options))
    assert "secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["sk-secret\nline", "sk-secret\x01", "sk-secreté", "sk secret"])
def test_keys_that_can_be_none(judge, monkeypatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with raises(UserError, "$OPENAI_API_KEY") as error:
        judge("http://x/v1")
    assert "secret" not in str(error.value)


def test_its_libraries_are_named_where_they_lack(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with raises(UserError, "tenacity", "pip install 'onpo_fast[judge]'"):
        oracles.load("judge", judge=Config(judge_url="http://x/v1", judge_model="m"), directory=Path("x"))
