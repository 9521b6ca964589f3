"""The judge on real local servers, on one that misbehaves, and on its own cache."""

from __future__ import annotations

import asyncio
import codecs
import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from onpo_fast.oracles.answers import Answers

from onpo_fast import oracles
from onpo_fast import train as module
from onpo_fast.config import Config
from onpo_fast.data import Group, Response
from onpo_fast.errors import UserError
from onpo_fast.oracles import chat_judge
from onpo_fast.run import signals
from tests.support.servers import (
    Error,
    Server,
    bomb,
    break_off,
    completion,
    completion_of,
    flood,
    hang_up,
    message,
    serving,
    trickle,
)

pytestmark = pytest.mark.usefixtures("without_plots")

PROMPT = [{"role": "user", "content": "Name a colour."}]
TEXTS = ["Blue.", "I like red most of all, and you?", "Red.", "Blue."]


def groups(*texts: str, count: int = 1) -> list[Group]:
    """``count`` groups whose prompts differ."""
    responses = [Response(text, [1], "eos", -1.0) for text in texts]
    return [Group([{"role": "user", "content": f"Question {i}?"}], [1], responses) for i in range(count)]


def asked(body: dict) -> tuple[str, str]:
    """The two responses that a request shows."""
    _, _, rest = body["messages"][0]["content"].partition("[Response A]\n")
    first, _, rest = rest.partition("\n\n[Response B]\n")
    return first, rest.partition("\n\n[Question]")[0]


def shorter(body: dict) -> str:
    first, second = asked(body)
    return "A" if len(first) < len(second) else "B"


SHORTER = np.array([[0.5, 1], [0, 0.5]])  # of "a" and "bcd"


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Makes a judge that asks a server, with waits of milliseconds."""
    monkeypatch.setattr(chat_judge, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(chat_judge, "LONGEST_WAIT", 0.05)

    def make(server: Server | str, directory: Path | None = tmp_path, **options) -> chat_judge.ChatJudge:
        url = server if isinstance(server, str) else server.url
        return oracles.load("judge", judge=Config(judge_url=url, judge_model="m", **options), directory=directory)

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Real servers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_serve(model_directory) -> str:
    """``transformers serve`` with the real small model; the URL. Its endpoint ignores log-probs."""
    pytest.importorskip("fastapi")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [
        str(Path(sys.executable).parent / "transformers"),
        "serve",
        str(model_directory),
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--default-seed",
        "0",
    ]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "transformers serve ended"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def test_a_real_server_is_asked_once(transformers_serve: str, model_directory, tmp_path) -> None:
    """The same matrix again with zero requests, and each order as the model itself answers it."""
    config = Config(
        judge_url=transformers_serve, judge_model=str(model_directory), judge_concurrency=2, judge_max_tokens=4
    )
    first = oracles.load("judge", judge=config, directory=tmp_path)
    (matrix,) = oracles.judge(first, groups(*TEXTS), "judge")
    spent = first.take_counters()
    assert spent["requests"] == 6 + spent["nonsense"]  # four texts, two of them equal; what says nothing is asked again
    assert (spent["answered"], spent["cached"], spent["failures"]) == (6, 0, 0)
    assert spent["prompt_tokens"] > 6 * 100
    again = oracles.load("judge", judge=config, directory=tmp_path)
    (same,) = oracles.judge(again, groups(*TEXTS), "judge")
    np.testing.assert_array_equal(same, matrix)
    zero = {"requests": 0, "failures": 0, "prompt_tokens": 0, "completion_tokens": 0, "answered": 0}
    assert again.take_counters() == {**zero, "cached": 6, "nonsense": spent["nonsense"]}
    np.testing.assert_array_equal(matrix + matrix.T, np.ones((4, 4)))
    assert matrix[0, 3] == 0.5


def test_log_probs_of_a_real_model(policy, judge) -> None:
    """Served with log-probs: a probability, not a letter; not ½, and the same again without a request."""

    def reply(body: dict) -> dict:
        assert body["logprobs"] is True
        with torch.no_grad():
            ids = torch.tensor([policy.renderer.render(body["messages"])])
            logps = policy.model(ids).logits[0, -1].log_softmax(-1)
        values, tokens = logps.topk(body["top_logprobs"])
        likely = [(policy.tokenizer.decode([t]), p) for t, p in zip(tokens.tolist(), values.tolist())]
        return completion(likely[0][0], likely)

    with serving(reply) as server:
        (matrix,) = oracles.judge(judge(server, judge_concurrency=1), groups(*TEXTS[:2]), "judge")
        requests = len(server.bodies)
        (same,) = oracles.judge(judge(server), groups(*TEXTS[:2]), "judge")
        assert len(server.bodies) == requests == 2
    assert 0 < matrix[0, 1] < 1
    assert matrix[0, 1] != 0.5
    np.testing.assert_array_equal(matrix, same)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked, and how an answer is read
# ---------------------------------------------------------------------------------------------------------------------


def test_both_orders_are_asked_and_averaged(judge) -> None:
    with serving(lambda body: "A") as server:  # whoever comes first
        (matrix,) = oracles.judge(judge(server), groups("a", "b"), "judge")
        assert sorted(map(asked, server.bodies)) == [("a", "b"), ("b", "a")]
    np.testing.assert_array_equal(matrix, np.full((2, 2), 0.5))


def test_log_probs_beat_the_letter(judge) -> None:
    top = [("A", np.log(0.6)), (" A", np.log(0.1)), ("B", np.log(0.3)), ("x", -9.0)]
    with serving(lambda body: completion("A", top if asked(body)[0] == "a" else [("A", 0.0)])) as server:
        (matrix,) = oracles.judge(judge(server), groups("a", "b"), "judge")
    assert matrix[0, 1] == pytest.approx((0.7 + 0) / 2)


@pytest.mark.parametrize("bad", [[("A", float("nan"))], [("x", -0.1)], [("A", -5000.0)], "other"])
def test_log_probs_that_say_nothing_leave_the_letter(judge, bad: list | str) -> None:
    """ "other": the letter that was said is not among the likely tokens, the other one is."""

    def reply(body: dict) -> dict:
        said = shorter(body)
        return completion(said, [("B" if said == "A" else "A", -0.1)] if bad == "other" else bad)

    with serving(reply) as server:
        (matrix,) = oracles.judge(judge(server), groups("a", "bcd"), "judge")
    np.testing.assert_array_equal(matrix, SHORTER)


def test_a_server_that_refuses_log_probs_is_asked_without(judge) -> None:
    def reply(body: dict) -> object:
        return Error(400, "logprobs are not supported") if "logprobs" in body else shorter(body)

    with serving(reply) as server:
        oracle = judge(server, judge_concurrency=1)
        (matrix,) = oracles.judge(oracle, groups("a", "bcd"), "judge")
        assert len(server.bodies) == 3
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], matrix)
        assert len(server.bodies) == 3
    np.testing.assert_array_equal(matrix, SHORTER)


FASTAPI = {"detail": [{"loc": ["body", "logprobs"], "msg": "Extra inputs are not permitted"}]}


REFUSALS = [
    Error(400, "no logprobs"),
    Error(422, content=json.dumps(FASTAPI).encode()),
    Error(403, "You are not allowed to request logprobs from this model"),
    Error(404, "Log probabilities are no feature of this deployment"),
    Error(500, "logprobs is not implemented"),
    Error(500, "got an unexpected keyword argument 'top_logprobs'"),
    Error(501, "log probs aren't supported by this engine"),
    Error(500, "KeyError: 'logprobs'"),
    # which do not say that it is log-probs that they refuse
    Error(501, content=b"Not Implemented"),
    Error(501, "unsupported parameter"),
    Error(400, "This model does not support token probabilities"),
    Error(400, "unrecognized request argument"),
    Error(422, content=b""),
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_log_probs_are_refused_to_all_who_ask_at_once(judge, refusal: Error) -> None:
    """The refusals come when the first has been heard, and requests with log-probs are still under way."""

    def reply(body: dict) -> object:
        time.sleep(0.02 * (len(server.bodies) % 4))
        return refusal if "logprobs" in body else shorter(body)

    with serving(reply) as server:
        matrices = oracles.judge(judge(server, judge_concurrency=8), groups("a", "bcd", count=8), "judge")
        assert sum("logprobs" in body for body in server.bodies) >= 8
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, SHORTER)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refused_log_probs_cost_a_request_or_two(judge, refusal: Error) -> None:
    """And are no failures. Where it may be something else, they must be refused again after an answer without them."""
    certain = refusal.status < 500 and chat_judge.LOGPROBS.search(f"{refusal.message}{refusal.content}")
    with serving(lambda body: refusal if "logprobs" in body else shorter(body)) as server:
        oracle = judge(server, judge_concurrency=1)
        (matrix,) = oracles.judge(oracle, groups("a", "bcd"), "judge")
        asked_with = [True, False, False] if certain else [True, False, True, False]
        assert ["logprobs" in body for body in server.bodies] == asked_with
    np.testing.assert_array_equal(matrix, SHORTER)
    spent = oracle.take_counters()
    assert (spent["requests"], spent["failures"], spent["answered"]) == (len(asked_with), 0, 2)


def test_a_failure_that_repeats_the_request_keeps_log_probs(judge) -> None:
    seen: list[dict] = []

    def reply(body: dict) -> object:
        seen.append(body)
        return Error(500, content=json.dumps({"failed": body}).encode()) if len(seen) == 1 else shorter(body)

    with serving(reply) as server:
        oracles.judge(judge(server, judge_concurrency=1), groups("a", "bcd"), "judge")
        assert all("logprobs" in body for body in server.bodies)


def test_a_passing_failure_keeps_log_probs(judge, capsys) -> None:
    """Though it speaks of them: the third of eight requests."""
    top = [("A", np.log(0.6)), ("B", np.log(0.2))]

    def reply(body: dict) -> object:
        if len(server.bodies) == 3:
            return Error(500, "engine not ready while computing logprobs")
        return completion("A", top if "logprobs" in body else None)

    with serving(reply) as server:
        oracle = judge(server, judge_concurrency=1)
        matrices = oracles.judge(oracle, groups("a", "bcd", count=4), "judge")
        assert ["logprobs" in body for body in server.bodies] == [True, True, True, False, True, *[True] * 5]
    for matrix in matrices:
        assert matrix[0, 1] == pytest.approx(0.5)  # 0.75 in both orders
    answers = sqlite3.connect(oracle.path).execute("SELECT preference FROM answers").fetchall()
    assert [p for (p,) in answers] == pytest.approx([0.75] * 8)
    assert oracle.take_counters()["failures"] == 1
    assert "log-probs" not in capsys.readouterr().out


def test_it_is_said_once_that_there_are_no_log_probs(judge, capsys) -> None:
    with serving(lambda body: Error(400, "no logprobs") if "logprobs" in body else shorter(body)) as server:
        oracles.judge(judge(server, judge_concurrency=4), groups("a", "bcd", count=4), "judge")
        said = capsys.readouterr().out
        assert said.count("gives no log-probs") == 1
        assert """--judge_request '{"logprobs": null, "top_logprobs": null}'""" in said
        before = len(server.bodies)
        off = {"logprobs": None, "top_logprobs": None}
        oracles.judge(judge(server, judge_request=off), groups("a", "bcd", count=4), "judge")  # the same answers
        assert len(server.bodies) == before


def test_answers_with_and_without_log_probs_have_keys_of_their_own(judge, tmp_path) -> None:
    """A request that has log-probs prefers an answer that had them."""
    top = [("A", np.log(0.6)), ("B", np.log(0.2))]
    with serving(lambda body: completion("A", top if "logprobs" in body else None)) as server:
        off = {"logprobs": None, "top_logprobs": None}
        oracle = judge(server)
        oracles.judge(oracle, groups("a", "b"), "judge")
        oracles.judge(judge(server, judge_request=off), groups("a", "b"), "judge")
        assert len(server.bodies) == 4
    answers = sqlite3.connect(oracle.path).execute("SELECT preference FROM answers ORDER BY preference").fetchall()
    assert [p for (p,) in answers] == pytest.approx([0.75, 0.75, 1, 1])


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            "Unsupported parameter: 'max_tokens' is not supported with this model",
            r"""--judge_request '{"max_tokens": null}' leaves that out""",
        ),
        ("temperature must be 1", r"""--judge_request '{"temperature": null}' leaves that out"""),
    ],
)
def test_a_refusal_of_a_field_names_the_flag(judge, refused: str, words: str) -> None:
    with serving(lambda body: Error(400, refused)) as server:
        with pytest.raises(UserError) as error:
            oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")
        assert len(server.bodies) == 1
    assert words in str(error.value)


# Reasoning, and content that is no text ------------------------------------------------------------------------------


def test_the_verdict_after_the_reasoning(judge) -> None:
    """What the reasoning says is the opposite, its log-probs too; and nothing of an earlier version is read."""

    def reply(body: dict) -> dict:
        verdict = shorter(body)
        other = "B" if verdict == "A" else "A"
        return completion_of(
            [
                ("Response ", []),
                (other, [(other, 0.9), (verdict, 0.1)]),
                (" is longer.", []),
                ("</think>", []),
                ("\n\n", []),
                (verdict, [(verdict, 0.6), (other, 0.2)]),
            ]
        )

    with serving(reply) as server:
        (matrix,) = oracles.judge(judge(server), groups("a", "bcd"), "judge")
    assert matrix[0, 1] == pytest.approx(0.75)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_reasoning_in_a_field_of_its_own(judge, field: str, content: dict) -> None:
    reply = message(**content, **{field: "Response A is better. [[A]]"})
    reply["choices"][0]["finish_reason"] = "length"
    with serving(lambda body: reply) as server:
        with pytest.raises(UserError, match=r"no verdict, A or B, in 2 of 2 .* may need more --judge_max_tokens"):
            oracles.judge(judge(server), groups("a", "bcd"), "judge")
        server.reply = lambda body: message(content=shorter(body), **{field: "A? B?"})
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)


def test_content_as_parts(judge) -> None:
    def reply(body: dict) -> dict:
        return message(
            content=[
                {"type": "thinking", "thinking": [{"type": "text", "text": "[[A]]"}]},
                {"type": "text", "text": "My verdict: ["},
                {"type": "image_url", "image_url": {"url": "http://x"}},
                {"type": "output_text", "text": f"[{shorter(body)}]]", "annotations": []},
                {"type": "refusal", "refusal": "[[A]]"},
            ]
        )

    with serving(reply) as server:
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)


@pytest.mark.parametrize(
    ("fields", "ending", "cause"),
    [
        ({"refusal": "I can't compare these."}, "stop", "a refusal: I can't compare these."),
        ({}, "content_filter", "content filter"),
        ({"reasoning_content": "Hm."}, "stop", "only reasoning"),
        ({"reasoning": "Hm."}, "stop", "only reasoning"),
    ],
)
def test_no_content_and_why(judge, fields: dict, ending: str, cause: str) -> None:
    reply = message(content=None, **fields)
    reply["choices"][0]["finish_reason"] = ending
    with serving(lambda body: reply) as server, pytest.raises(UserError, match="in 2 of 2") as error:
        oracles.judge(judge(server), groups("a", "bcd"), "judge")
    assert cause in str(error.value)


def test_a_null_among_parts(judge) -> None:
    with serving(lambda body: message(content=[None, {"type": "text", "text": shorter(body)}])) as server:
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)
        assert len(server.bodies) == 2


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
        with pytest.raises(UserError, match=r"(prompt\.txt|the default), is not the one .*judge_prompt\.txt: give it"):
            judge("http://x/v1", **options)
    (tmp_path / "judge_prompt.txt").unlink()
    judge("http://x/v1", judge_prompt=str(path))
    path.write_text("{response_b}")
    with pytest.raises(UserError, match=r"lacks \{conversation\} and \{response_a\}"):
        judge("http://x/v1", judge_prompt=str(path))
    with pytest.raises(UserError, match="cannot read --judge_prompt"):
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
        with pytest.raises(UserError, match=f"cannot read --judge_prompt {name}: .*{said}"):
            chat_judge.read_prompt(Path(name))
    (tmp_path / "lines.txt").write_bytes(codecs.BOM_UTF8 + text.replace(" ", "\r\n").encode())
    assert chat_judge.read_prompt(tmp_path / "lines.txt") == text.replace(" ", "\n")


def test_more_of_a_request(judge) -> None:
    with serving(lambda body: "A") as server:
        oracles.judge(judge(server, judge_request={"max_tokens": None, "seed": 3}), groups("a", "b"), "judge")
        assert all("max_tokens" not in body and body["seed"] == 3 for body in server.bodies)
        assert server.bodies[0]["temperature"] == 0
    for name in ("model", "messages"):
        with pytest.raises(UserError, match=f"--judge_request must leave {name} alone"):
            judge("http://x/v1", judge_request={name: None})


def test_the_page_shows_the_prompt() -> None:
    page = (Path(__file__).parents[2] / "docs" / "oracles.md").read_text(encoding="utf-8")
    assert f"```\n{chat_judge.PROMPT}\n```" in page


# ---------------------------------------------------------------------------------------------------------------------
# A server that misbehaves
# ---------------------------------------------------------------------------------------------------------------------

FAULTS = {
    "429": Error(429),
    "500": Error(500),
    "503 with a wait": Error(503, headers={"Retry-After": "0.01"}),
    "a wait that is nonsense": Error(429, headers={"Retry-After": "nan"}),
    "hangs up": hang_up,
    "breaks off": break_off,
    "trickles": trickle,
    "says nothing": lambda handler: time.sleep(1),
    "no JSON": b"<html>Bad gateway</html>",
    "half of JSON": b'{"choices": [{"mess',
    "other JSON": {"hello": 1},
    "no choices": {**completion("A"), "choices": []},
    "null": b"null",
    "a list": b"[]",
    "content that is a number": {**completion("A"), "choices": [{"index": 0, "message": {"content": 7}}]},
    "bad UTF-8": b'{"choices": "\xff\xfe"}',
    "nests without end": b"[" * 200_000,
    "a number without end": b'{"x": ' + b"9" * 10_000 + b"}",
    "a wait until a date": Error(503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "a wait until no date": Error(503, headers={"Retry-After": "Wed, 99 Foo 99999 07:28:00 GMT"}),
    "content that is a dict": {**completion("A"), "choices": [{"index": 0, "message": {"content": {"text": "A"}}}]},
    "parts that are numbers": {**completion("A"), "choices": [{"index": 0, "message": {"content": [7]}}]},
    "a charset that is none": Error(500, headers={"Content-Type": "application/json; charset=nonsense"}),
    "a charset that is no text": Error(500, headers={"Content-Type": "text/html; charset=base64"}),
    "a flood": flood,
    "a bomb": bomb,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass(judge, fault: str) -> None:
    """Every question fails once, then is answered: the matrix is that of a faultless server."""
    seen: set[tuple[str, str]] = set()

    def reply(body: dict) -> object:
        if asked(body) in seen:
            return shorter(body)
        seen.add(asked(body))
        return FAULTS[fault]

    with serving(reply) as server:
        oracle = judge(server, judge_timeout=0.4)
        (matrix,) = oracles.judge(oracle, groups("a", "bcd"), "judge")
    np.testing.assert_array_equal(matrix, SHORTER)
    spent = oracle.take_counters()
    assert (spent["requests"], spent["failures"], spent["answered"], spent["nonsense"]) == (4, 2, 2, 0)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Error(400, content=b'{"detail": "max context is 4096"}'), r'400 - {"detail": "max context is 4096"}'),
        (Error(400, content=b'{"error": "overloaded"}'), r'400 - {"error": "overloaded"}'),
        (Error(400, content=b"max context is 4096\n"), "400 - max context is 4096$"),
        (Error(400, content=b""), "400 - nothing more$"),
        (Error(500, content=b"<html>" + b"x" * 5000), "500 - <html>x{200,300}; all answers"),
        (
            Error(400, "\x1b[2J\x1b]0;boo\x07 \x9b1m\u202eoob\nend"),
            r"400 - \\x1b\[2J\\x1b\]0;boo\\x07 \\x9b1m\\u202eoob end$",
        ),
        (
            {"error": {"message": "upstream overloaded"}},
            'completion: {"error": {"message": "upstream overloaded"}}; all',
        ),
        (b"", "no chat completion: it is empty; all"),
        (hang_up, r"with Connection error \(.*\); all"),
        (flood, "with a reply of more than 4 MiB; all"),
        (bomb, "with a reply of more than 4 MiB; all"),
    ],
)
def test_the_servers_words_are_heard(judge, reply: object, words: str) -> None:
    """And do nothing to the terminal."""
    with serving(lambda body: reply) as server, pytest.raises(UserError, match=words) as error:
        oracles.judge(judge(server, judge_retries=0), groups("a", "b"), "judge")
    assert str(error.value).isprintable()


def test_a_server_that_starts_again_is_waited_for(judge, monkeypatch) -> None:
    """The default patience is minutes, and here a thousandth of them."""
    monkeypatch.undo()
    assert sum(chat_judge.longest_wait(n) / 2 for n in range(1, Config().judge_retries + 1)) >= 300
    monkeypatch.setattr(chat_judge, "FIRST_WAIT", 0.5e-3)
    monkeypatch.setattr(chat_judge, "LONGEST_WAIT", 60e-3)
    start = time.monotonic()
    with serving(lambda body: Error(503) if time.monotonic() < start + 0.25 else shorter(body)) as server:
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)


@pytest.mark.parametrize("fault", ["500", "hangs up", "says nothing", "no JSON"])
def test_a_judge_that_stays_down_stops_the_run_and_keeps_what_it_said(judge, fault: str) -> None:
    down = threading.Event()

    def reply(body: dict) -> object:
        if "Question 5" in body["messages"][0]["content"]:
            down.set()
        return FAULTS[fault] if down.is_set() else shorter(body)

    options = {"judge_retries": 2, "judge_timeout": 0.3, "judge_concurrency": 1}
    with serving(reply) as server:
        with pytest.raises(
            UserError, match=r"--oracle judge, prompt 5 \(.*\): the judge at .* is down: 3 tries"
        ) as error:
            oracles.judge(judge(server, **options), groups("a", "bcd", count=8), "judge")
        assert "judge.sqlite" in str(error.value)
        assert len(server.bodies) == 2 * 5 + 3
        server.reply = shorter  # it is back
        oracle = judge(server, **options)
        matrices = oracles.judge(oracle, groups("a", "bcd", count=8), "judge")
        assert len(server.bodies) == 2 * 5 + 3 + 2 * 3
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, SHORTER)
    assert oracle.take_counters()["cached"] == 10


def test_nobody_there(judge) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="is down: 2 tries failed, the last with Connection error"):
            oracles.judge(judge(url, judge_retries=1), groups("a", "b"), "judge")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_what_the_server_refuses_is_not_tried_again(judge, status: int) -> None:
    with serving(lambda body: Error(status)) as server:
        with pytest.raises(UserError, match=f"refused the question: .*{status}.*scripted") as error:
            oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")
        assert len(server.bodies) == 1
    assert ("OPENAI_API_KEY" in str(error.value)) == (status in (401, 403))


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("-7", 0, 0),
        ("1e300", 120, 120),
        ("inf", 0, 0),
        (30, 28, 30),
        (3600, 120, 120),
        (-3600, 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 120, 120),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0, 0),
        ("soon", 0, 0),
    ],
)
def test_the_wait_that_a_server_asks_for(judge, header: str | int, least: float, most: float) -> None:
    """In seconds, or until a date, which is given here as seconds from now."""
    if isinstance(header, int):
        header = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=header), usegmt=True)
    asked_for = min(chat_judge._seconds(header), chat_judge.LONGEST_REQUESTED_WAIT)
    assert least <= max(asked_for, 0) <= most


@pytest.mark.parametrize("charset", ["nonsense", "base64", "undefined", "rot13", "utf-16", '"', "utf-8; charset=x"])
def test_a_charset_that_is_not_the_texts(judge, charset: str) -> None:
    """JSON is UTF-8."""
    headers = {"Content-Type": f"application/json; charset={charset}"}

    def reply(body: dict) -> Error:
        content = json.dumps(completion(f"{shorter(body)}. Schöne Grüße"), ensure_ascii=False).encode()
        return Error(200, content=content.replace("ß".encode(), b"\xdf"), headers=headers)

    with serving(reply) as server:
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)
        server.reply = lambda body: Error(418, content="Nö".encode(), headers=headers)
        with pytest.raises(UserError, match="418 - Nö"):
            oracles.judge(judge(server), groups("e", "f"), "judge")


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_redirects_are_refused(judge, monkeypatch, status: int) -> None:
    """Nothing goes to the other server, though it would say A."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(lambda body: "A") as other:
        headers = {"Location": f"{other.url}/chat/completions?key=sk-secret"}
        with serving(lambda body: Error(status, headers=headers)) as server:
            with pytest.raises(
                UserError, match=rf"refused the question: {status}, a redirect to http://127\.0\.0\.1:{other.port}: "
            ) as error:
                oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")
            assert len(server.bodies) == 1
        assert not other.bodies
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        (None, "a redirect to no address"),
        ("http://[x", "a redirect to no address"),
        ("/v2/chat/completions", r"a redirect to http://127\.0\.0\.1"),
        ("//judge.example/v1", "a redirect to http://judge.example:"),
        ("ftp://judge.example/v1", "a redirect to ftp://judge.example:"),
    ],
)
def test_redirects_to_anywhere(judge, location: str | None, words: str) -> None:
    headers = {} if location is None else {"Location": location}
    with serving(lambda body: Error(307, headers=headers)) as server, pytest.raises(UserError, match=f"307, {words}"):
        oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")


def test_a_redirect_on_the_same_host_names_the_path(judge) -> None:
    """Which is what to mend; without the query, which may hold secrets."""
    headers = {"Location": "/api/v1/chat/completions?key=secret"}
    with (
        serving(lambda body: Error(301, headers=headers)) as server,
        pytest.raises(UserError, match=rf"to http://127\.0\.0\.1:{server.port}/api/v1/chat/completions: ") as error,
    ):
        oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"HTTP_PROXY": "PROXY"}, "HTTP_PROXY"),
        ({"http_proxy": "PROXY"}, "http_proxy"),
        ({"All_Proxy": "PROXY"}, "All_Proxy"),
        ({"HTTPS_PROXY": "PROXY", "ALL_PROXY": "PROXY"}, "ALL_PROXY"),
        ({"HTTPS_PROXY": "PROXY"}, None),
        ({"HTTP_PROXY": "PROXY", "NO_PROXY": "127.0.0.1"}, None),
        ({"HTTP_PROXY": "PROXY", "no_proxy": "*"}, None),
        ({}, None),
    ],
)
def test_a_proxy_is_named_where_it_is_why(judge, monkeypatch, environment: dict, named: str | None) -> None:
    """By its variable, without its password."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        for name, value in environment.items():
            monkeypatch.setenv(name, value.replace("PROXY", f"http://me:secret@{address}"))
        with pytest.raises(UserError, match="is down: 1 tries failed, the last with Connection error") as error:
            oracles.judge(judge(f"http://{address}/v1", judge_retries=0), groups("a", "b"), "judge")
    said = str(error.value)
    assert f"through the proxy that ${named} names" in said if named else "through the proxy" not in said
    assert "secret" not in said


@pytest.mark.parametrize("proxy", ["nonsense://me:secret@x:1", "http://me:secret@x:port", "socks9://x"])
def test_a_proxy_that_is_none(judge, monkeypatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match=r"cannot use the proxy that \$ALL_PROXY names") as error:
        oracles.judge(judge("http://judge.example/v1"), groups("a", "b"), "judge")
    assert "secret" not in str(error.value)


def test_what_is_for_openai_goes_to_no_other_server(judge, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Custom: custom-secret\nAuthorization: Bearer other-secret")
    with serving(shorter) as server:
        oracles.judge(judge(server), groups("a", "b"), "judge")
        for headers in server.headers:
            assert headers["authorization"] == "Bearer sk-mine"
            assert "secret" not in str(headers)
    openai = pytest.importorskip("openai")
    for url in ("http://127.0.0.1/v1", "https://api.openai.com.evil.example/v1", "https://openai.com/v1"):
        assert isinstance(chat_judge._headers(url, "k", openai.Omit())["OpenAI-Project"], openai.Omit)
    assert chat_judge._headers("https://api.openai.com/v1", "k", openai.Omit()) == {}


def test_nonsense_is_asked_again_once_then_counts_as_half(judge) -> None:
    def reply(body: dict) -> str:
        return "I'd rather talk about the weather." if "Question 0" in body["messages"][0]["content"] else shorter(body)

    with serving(reply) as server:
        oracle = judge(server)
        silly, sane = oracles.judge(oracle, groups("a", "bcd", count=2), "judge")
        assert len(server.bodies) == 2 * 2 + 2
        np.testing.assert_array_equal(silly, np.full((2, 2), 0.5))
        np.testing.assert_array_equal(sane, SHORTER)
        assert oracle.take_counters()["nonsense"] == 2
        oracles.judge(judge(server), groups("a", "bcd", count=2), "judge")
        assert len(server.bodies) == 6


def test_nonsense_is_not_kept_where_it_could_not_be_asked_again(judge) -> None:
    """Another question was refused meanwhile."""
    refused = threading.Event()

    def reply(body: dict) -> object:
        if asked(body)[0] == "a":
            return Error(400)
        refused.wait(5)
        time.sleep(0.1)
        return "Turtles."

    with serving(reply) as server:
        oracle = judge(server, judge_concurrency=2)
        stop = chat_judge._Sitting.stop

        def stopped(self: chat_judge._Sitting, error: Exception) -> None:
            stop(self, error)
            refused.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat_judge._Sitting, "stop", stopped)
            with pytest.raises(UserError, match="refused the question"):
                oracles.judge(oracle, groups("a", "bcd"), "judge")
        assert len(server.bodies) == 2
        server.reply = shorter
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)


def test_an_answer_with_half_a_character(judge) -> None:
    with serving(lambda body: shorter(body) + ". \ud83d") as server:
        for _ in range(2):
            np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)
        assert len(server.bodies) == 2


@pytest.mark.parametrize("ending", ["stop", "length"])
def test_an_answer_that_ended_too_early(judge, ending: str) -> None:
    reply = completion("<think>Response A is" if ending == "stop" else "Let me see:")
    reply["choices"][0]["finish_reason"] = ending
    with serving(lambda body: reply) as server, pytest.raises(UserError, match="they may need more --judge_max_tokens"):
        oracles.judge(judge(server), groups("a", "bcd"), "judge")


def test_a_tie_is_a_half(judge) -> None:
    with serving(lambda body: "Tie.") as server:
        oracle = judge(server)
        (matrix,) = oracles.judge(oracle, groups("a", "b"), "judge")
    np.testing.assert_array_equal(matrix, np.full((2, 2), 0.5))
    assert oracle.take_counters()["nonsense"] == 0


def test_a_judge_without_verdicts_stops_the_run(judge) -> None:
    """Whether after twenty answers or at the end; and its nonsense is not kept: mended, it is asked again."""
    for count, answers in ((1, 2), (50, 20)):
        with serving(lambda body: "Banana") as server:
            with pytest.raises(UserError, match=rf"no verdict, A or B, in {answers} of {answers} .* last was 'Banana'"):
                oracles.judge(judge(server, judge_concurrency=1), groups("a", "bcd", count=count), "judge")
            server.reply = shorter
            (matrix,) = oracles.judge(judge(server), groups("a", "bcd"), "judge")
        np.testing.assert_array_equal(matrix, SHORTER)
    with serving(lambda body: "") as server:
        oracles.judge(judge(server, judge_max_invalid_rate=1.0), groups("c", "d"), "judge")


def test_concurrency_is_limited_and_used(judge) -> None:
    def reply(body: dict) -> str:
        time.sleep(0.05)
        return "A"

    done: list[int] = []
    with serving(reply) as server:
        oracles.judge(judge(server, judge_concurrency=3), groups("a", "b", count=10), "judge", done.append)
        assert server.busiest == 3
        assert len(server.bodies) == 20
    assert sum(done) == 10
    assert len(done) == 10


def test_a_question_that_comes_twice_is_asked_once(judge) -> None:
    def reply(body: dict) -> str:
        time.sleep(0.05)
        return shorter(body)

    with serving(reply) as server:
        matrices = oracles.judge(judge(server), groups("a", "bcd") * 3, "judge")
        assert len(server.bodies) == 2
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, SHORTER)


def test_a_signal_stops_between_questions(judge, monkeypatch) -> None:
    def reply(body: dict) -> str:
        if len(server.bodies) == 4:
            monkeypatch.setattr(signals, "_asked_by", 15)
        return "A"

    with serving(reply) as server:
        with pytest.raises(signals.Stopped):
            oracles.judge(judge(server, judge_concurrency=1), groups("a", "b", count=10), "judge")
        assert len(server.bodies) == 4
        monkeypatch.setattr(signals, "_asked_by", None)
        oracles.judge(judge(server), groups("a", "b", count=10), "judge")
        assert len(server.bodies) == 20


@pytest.mark.parametrize("answers", [True, False])
def test_a_signal_while_the_judge_thinks(judge, monkeypatch, answers: bool) -> None:
    """What comes soon is kept; what does not is not waited for."""
    monkeypatch.setattr(chat_judge, "GRACE", 5.0 if answers else 0.2)

    def reply(body: dict) -> object:
        monkeypatch.setattr(signals, "_asked_by", 15)
        time.sleep(0.4)
        return shorter(body) if answers else lambda handler: time.sleep(10)

    with serving(reply) as server:
        start = time.monotonic()
        with pytest.raises(signals.Stopped):
            oracles.judge(judge(server, judge_concurrency=2), groups("a", "bcd", count=10), "judge")
        assert time.monotonic() - start < 3
        monkeypatch.setattr(signals, "_asked_by", None)
        server.reply = shorter
        for matrix in oracles.judge(judge(server), groups("a", "bcd", count=10), "judge"):
            np.testing.assert_array_equal(matrix, SHORTER)
        assert len(server.bodies) == 20 + (0 if answers else 2)


def test_a_signal_while_it_waits_for_the_next_try(judge, monkeypatch) -> None:
    def reply(body: dict) -> Error:
        monkeypatch.setattr(signals, "_asked_by", 15)
        return Error(503, headers={"Retry-After": "60"})

    start = time.monotonic()
    with serving(reply) as server, pytest.raises(signals.Stopped):
        oracles.judge(judge(server), groups("a", "b"), "judge")
    assert time.monotonic() - start < 3
    assert len(server.bodies) <= 2


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def test_answers_are_kept_by_everything_that_shaped_them(judge, tmp_path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(chat_judge.PROMPT + " ", encoding="utf-8")
    cache = str(tmp_path / "shared.sqlite")
    changes = ({}, {"judge_max_tokens": 7}, {"judge_prompt": str(prompt)}, {"judge_request": {"seed": 1}})
    with serving(shorter) as server:
        for requests, change in enumerate(changes, 1):
            for _ in range(2):
                oracles.judge(judge(server, None, judge_cache=cache, **change), groups("a", "b"), "judge")
                assert len(server.bodies) == 2 * requests
        config = Config(judge_url=server.url + "/", judge_cache=cache)
        oracles.judge(oracles.load("judge=m", config), groups("a", "b"), "judge")  # the same model and server
        assert len(server.bodies) == 8
        oracles.judge(oracles.load("judge=n", config), groups("a", "b"), "judge")
        assert len(server.bodies) == 10
        with serving(shorter) as other:
            oracles.judge(judge(other, judge_cache=cache), groups("a", "b"), "judge")
            assert len(other.bodies) == 2


def test_two_judges_share_a_file(judge, tmp_path) -> None:
    cache = str(tmp_path / "judge.sqlite")
    with serving(shorter) as server:
        runs = [judge(server, tmp_path / str(run), judge_cache=cache) for run in range(3)]
        threads = [
            threading.Thread(target=oracles.judge, args=(run, groups("a", "bcd", count=10), "judge")) for run in runs
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = len(server.bodies)
        oracles.judge(judge(server), groups("a", "bcd", count=10), "judge")
        assert len(server.bodies) == before
    assert sqlite3.connect(tmp_path / "judge.sqlite").execute("SELECT count(*) FROM answers").fetchone() == (20,)


def in_processes(work: list, seconds: float = 60) -> list:
    """What each function returns, in a process of its own, all at a time."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(index: int) -> None:
        results.put((index, work[index]()))

    processes = [context.Process(target=run, args=(index,)) for index in range(len(work))]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=seconds) for _ in processes)
    for process in processes:
        process.join(seconds)
    return [found[index] for index in range(len(work))]


def test_runs_that_share_a_cache_ask_each_question_once(judge, tmp_path) -> None:
    """Three processes at a time: what another asks is waited for, and counts as cached."""

    def reply(body: dict) -> str:
        time.sleep(0.03)
        return shorter(body)

    def run(index: int) -> tuple[list, dict]:
        oracle = judge(server, tmp_path / str(index), judge_cache=str(tmp_path / "shared.sqlite"), judge_concurrency=4)
        return oracles.judge(oracle, groups("a", "bcd", count=8), "judge"), oracle.take_counters()

    with serving(reply) as server:
        runs = in_processes([lambda index=index: run(index) for index in range(3)])
        questions = [body["messages"][0]["content"] for body in server.bodies]
    assert len(questions) == len(set(questions)) == 16
    for matrices, counters in runs:
        for matrix in matrices:
            np.testing.assert_array_equal(matrix, SHORTER)
        assert counters["answered"] + counters["cached"] == 16
    assert sum(counters["requests"] for _, counters in runs) == 16
    assert sum(counters["answered"] for _, counters in runs) == 16
    claims = sqlite3.connect(tmp_path / "shared.sqlite").execute("SELECT count(*) FROM claims").fetchone()
    assert claims == (0,)


def test_a_claim_is_renewed_while_the_judge_thinks(judge, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Answers, "CLAIM_SECONDS", 0.4)

    def reply(body: dict) -> str:
        time.sleep(1.2)
        return shorter(body)

    with serving(reply) as server:
        cache = str(tmp_path / "shared.sqlite")
        runs = [judge(server, tmp_path / str(run), judge_cache=cache, judge_concurrency=2) for run in range(2)]
        threads = [threading.Thread(target=oracles.judge, args=(run, groups("a", "bcd"), "judge")) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.bodies) == 2
    spent = [run.take_counters() for run in runs]
    assert sum(one["answered"] for one in spent) == sum(one["cached"] for one in spent) == 2


def test_the_claims_of_a_killed_run_end(judge, monkeypatch) -> None:
    monkeypatch.setattr(Answers, "CLAIM_SECONDS", 1.0)
    asked_first = threading.Event()

    def reply(body: dict) -> object:
        asked_first.set()
        return lambda handler: time.sleep(5)

    with serving(reply) as server:
        killed = multiprocessing.get_context("fork").Process(
            target=lambda: oracles.judge(judge(server, judge_concurrency=1), groups("a", "bcd"), "judge")
        )
        killed.start()
        assert asked_first.wait(30)
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        server.reply = shorter
        oracle = judge(server)
        (matrix,) = oracles.judge(oracle, groups("a", "bcd"), "judge")
        assert len(server.bodies) == 3
    np.testing.assert_array_equal(matrix, SHORTER)
    assert oracle.take_counters()["answered"] == 2


def test_a_question_that_another_run_could_not_ask_is_left_to_this_one(judge, tmp_path) -> None:
    """Its server refused it."""
    seen: list[dict] = []
    errors: list[Exception] = []

    def reply(body: dict) -> object:
        seen.append(body)
        if len(seen) > 1:
            return shorter(body)
        time.sleep(0.3)
        return Error(400)

    def run(index: int) -> list[np.ndarray] | None:
        oracle = judge(server, tmp_path / str(index), judge_cache=str(tmp_path / "shared.sqlite"), judge_concurrency=1)
        try:
            return oracles.judge(oracle, groups("a", "bcd"), "judge")
        except UserError as error:
            errors.append(error)

    with serving(reply) as server:
        first = threading.Thread(target=run, args=(0,))
        first.start()
        while not seen:
            time.sleep(0.01)
        np.testing.assert_array_equal(run(1)[0], SHORTER)
        first.join()
        assert len(server.bodies) == 3
    assert "refused the question" in str(errors)


def test_a_signal_while_another_run_asks(judge, tmp_path, monkeypatch) -> None:
    """Waiting for it holds nobody up."""
    other = Answers(tmp_path / "judge.sqlite")
    claim = Answers.claim
    with serving(shorter) as server:
        monkeypatch.setattr(Answers, "claim", lambda self, keys: claim(other, keys) and self is other)
        monkeypatch.setattr(signals, "_asked_by", None)
        threading.Timer(0.3, lambda: setattr(signals, "_asked_by", 2)).start()
        start = time.monotonic()
        with pytest.raises(signals.Stopped):
            oracles.judge(judge(server), groups("a", "bcd"), "judge")
        assert 0.2 < time.monotonic() - start < 3
        assert not server.bodies
    other.close()


def test_a_clock_that_was_put_back_leaves_no_claim_for_ever(tmp_path) -> None:
    first, second = Answers(tmp_path / "judge.sqlite"), Answers(tmp_path / "judge.sqlite")
    assert first.claim(["key", "another"])
    assert not second.claim(["key"])
    assert not second.claim(["key", "third"])
    assert not first.claim(["third"])
    first.connection.execute("UPDATE claims SET expires = expires + 1e6")
    assert second.claim(["key"])
    first.close()
    second.close()


def test_a_file_that_is_no_cache(judge, tmp_path) -> None:
    (tmp_path / "judge.sqlite").write_text("This is a letter. " * 100)
    with pytest.raises(UserError, match=r"cannot use .*judge\.sqlite for the judge's answers: .* move it away"):
        oracles.judge(judge("http://127.0.0.1:9/v1"), groups("a", "b"), "judge")


def test_answers_that_are_not_what_they_were_are_asked_again(judge, tmp_path) -> None:
    """One bit of a preference, and of the text."""
    path = tmp_path / "judge.sqlite"
    with serving(lambda body: completion("A", [("A", np.log(0.6)), ("B", np.log(0.3))])) as server:
        oracles.judge(judge(server), groups("a", "b"), "judge")
        whole = path.read_bytes()
        (p,) = {row[0] for row in sqlite3.connect(path).execute("SELECT preference FROM answers")}
        at = whole.index(struct.pack(">d", p))
        for place, bit in ((at + 1, 0x08), (at + 8, 0x80), (at + 8, 0x02)):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            before = len(server.bodies)
            oracles.judge(judge(server), groups("a", "b"), "judge")
            assert len(server.bodies) == before + 1
            oracles.judge(judge(server), groups("a", "b"), "judge")
            assert len(server.bodies) == before + 1


def test_a_cache_with_broken_pages(judge, tmp_path) -> None:
    path = tmp_path / "judge.sqlite"
    with serving(shorter) as server:
        oracles.judge(judge(server), groups("a", "bcd", count=30), "judge")
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        with pytest.raises(UserError, match=r"malformed; move it away, or delete it, and every question is asked anew"):
            oracles.judge(judge(server), groups("a", "bcd", count=30), "judge")
        path.unlink()
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_url": None}, "needs --judge_url"),
        ({"judge_url": "http://x/v1", "judge_model": None}, "needs --judge_model"),
        ({"judge_url": "localhost:8000"}, "must begin with http"),
        ({"judge_url": "http://[x"}, "must begin with http"),
        ({"judge_url": "http://x:port/v1"}, "must begin with http"),
        ({"judge_url": "http://user:secret@x/v1"}, "must hold no user, password or query"),
        ({"judge_url": "http://x/v1?key=secret"}, "must hold no user, password or query"),
        ({"judge_url": "http://x/v1#secret"}, "nor a #fragment"),
    ],
)
def test_judges_that_cannot_be_had(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        oracles.load("judge", judge=Config(**{"judge_model": "m", **options}), directory=Path("x"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["sk-secret-123", "gsk_secret123", "a secret", ""])
def test_a_key_in_place_of_its_variables_name(name: str, tmp_path) -> None:
    """It is not said back, and no file has it."""
    options = {"judge_url": "http://x/v1", "judge_model": "m", "oracle": "judge", "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match="--judge_key_variable must be the NAME") as error:
        module.train(Config(judge_key_variable=name, **options))
    assert "secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["sk-secret\nline", "sk-secret\x01", "sk-secreté", "sk secret"])
def test_keys_that_can_be_none(judge, monkeypatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=r"the key in \$OPENAI_API_KEY can be none") as error:
        judge("http://x/v1")
    assert "secret" not in str(error.value)


def test_its_libraries_are_named_where_they_lack(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(UserError, match=r"pip install 'onpo_fast\[judge\]'"):
        oracles.load("judge", judge=Config(judge_url="http://x/v1", judge_model="m"), directory=Path("x"))


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_with_a_judge(shallow_model, tmp_path, monkeypatch, write_lines) -> None:
    """Its counters are in the metrics, and the key is sent, and nowhere in the run directory though said back."""
    monkeypatch.setenv("MY_KEY", "sk-do-not-tell\n")
    monkeypatch.setattr(chat_judge, "FIRST_WAIT", 0.002)
    faults = iter([Error(500), b"sk-do-not-tell", Error(429)])

    def reply(body: dict) -> object:
        if set(asked(body)) == set(oracles.PROBE_TEXTS):  # it is tried first, in both orders
            return shorter(body)
        return next(faults, f"{shorter(body)}. Your key is sk-do-not-tell")

    prompts = write_lines("prompts.jsonl", *({"prompt": f"What is {i} plus {i}?"} for i in range(5)))
    sizes = {
        "iterations": 1,
        "prompts_per_iteration": 2,
        "responses_per_prompt": 2,
        "max_new_tokens": 4,
        "eval_samples": 1,
        "batch_pairs": 2,
    }
    config = {
        "model": str(shallow_model),
        "prompts": str(prompts),
        "out": str(tmp_path / "out"),
        "oracle": "judge",
        "judge_model": "m",
        "judge_key_variable": "MY_KEY",
        **sizes,
    }
    with serving(reply) as server:
        module.train(Config(judge_url=server.url, **config))
        assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-do-not-tell"}
    assert (tmp_path / "out" / "judge_prompt.txt").read_text() == chat_judge.PROMPT
    module.train(Config(judge_url=server.url, **config), resume=True)  # the server is gone, and nobody asks it
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    (judged,) = [record for record in records if record["stage"] == "judge"]
    assert judged["requests"] == judged["answered"] + 3
    assert judged["prompt_tokens"] == 100 * judged["answered"]
    (evaluated,) = [record for record in records if record["stage"] == "evaluate"]
    assert evaluated["answered"] > 0
    assert len(server.bodies) == 2 + judged["requests"] + evaluated["requests"]
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"sk-do-not-tell" not in path.read_bytes(), path


def test_a_judge_of_no_use_stops_the_run_before_anything_is_sampled(shallow_model, tmp_path, write_lines) -> None:
    """One question in both orders; mended, the run goes on with it, and asks it no more."""
    prompts = write_lines("prompts.jsonl", *({"prompt": f"What is {i} plus {i}?"} for i in range(5)))
    sizes = {
        "iterations": 1,
        "prompts_per_iteration": 2,
        "responses_per_prompt": 2,
        "max_new_tokens": 4,
        "eval_samples": 1,
        "batch_pairs": 2,
    }
    config = {
        "model": str(shallow_model),
        "prompts": str(prompts),
        "out": str(tmp_path / "out"),
        "judge_model": "m",
        "oracle": "population + judge",
        "judge_concurrency": 1,
        **sizes,
    }
    replies = [(Error(404), "refused the question: .*404", 1), ("Let me think", "no verdict, A or B, in 2 of 2", 4)]
    with serving(shorter) as server:
        for reply, message, requests in replies:
            server.reply, server.bodies = (lambda body, reply=reply: reply), []
            with pytest.raises(UserError, match=f"member judge, tried before anything is sampled, .*{message}"):
                module.train(Config(judge_url=server.url, **config), resume=True)
            assert len(server.bodies) == requests
            assert not (tmp_path / "out" / "iteration_01").exists()
        server.reply, server.bodies = shorter, []
        module.train(Config(judge_url=server.url, **config), resume=True)
        assert {asked(body) for body in server.bodies[:2]} == {oracles.PROBE_TEXTS, oracles.PROBE_TEXTS[::-1]}
        (tmp_path / "out" / "evaluation.json").unlink()
        before = len(server.bodies)
        module.train(Config(judge_url=server.url, **config), resume=True)  # every answer is kept
        assert len(server.bodies) == before


def test_the_key_is_not_in_messages(judge, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-tell")
    for status in (401, 500):
        answer = Error(status, "Incorrect key: sk-do-not-tell")
        with serving(lambda body, answer=answer: answer) as server, pytest.raises(UserError) as error:
            oracles.judge(judge(server, judge_retries=0), groups("a", "b"), "judge")
        assert "sk-do-not-tell" not in str(error.value)
        assert "Incorrect key: [key]" in str(error.value)


@pytest.mark.parametrize("escaped", [json.dumps, repr, lambda key: json.dumps(key).replace("/", r"\/")])
def test_nor_is_it_where_the_server_escapes_it(judge, monkeypatch, escaped) -> None:
    key = """sk-"do'not\\tell/it"""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving(lambda body: Error(401, content=f"Incorrect key: {escaped(key)}".encode())) as server:
        with pytest.raises(UserError, match=r"Incorrect key: .\[key\]. ") as error:
            oracles.judge(judge(server), groups("a", "b"), "judge")
        assert "tell" not in str(error.value)
        server.reply = lambda body: (escaped(key) * 100).encode()  # and where it is cut
        with pytest.raises(UserError, match=r"no chat completion: .\[key\]") as error:
            oracles.judge(judge(server, judge_retries=0), groups("a", "b"), "judge")
        assert "tell" not in str(error.value)


def test_where_an_event_loop_runs(judge) -> None:
    """As in a notebook."""

    async def cell() -> list[np.ndarray]:
        return oracles.judge(judge(server), groups("a", "bcd"), "judge")

    with serving(shorter) as server:
        (matrix,) = asyncio.run(cell())
    np.testing.assert_array_equal(matrix, SHORTER)
