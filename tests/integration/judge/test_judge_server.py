"""Servers that fail, refuse or send malformed replies."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import numpy as np
import pytest
from support.judging import SHORTER, asked, groups, raises, shorter
from support.servers import (
    Error,
    bomb,
    break_off,
    completion,
    flood,
    hang_up,
    serving,
    trickle,
)

from onpo_fast import oracles
from onpo_fast.config import Config
from onpo_fast.servers import RequestRefused, ServerError, ServerUnavailable, retries

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
        (Error(400, content=b""), "400 - .*empty"),
        (Error(500, content=b"<html>" + b"x" * 5000), "500 - <html>x{200,300};"),
        (
            Error(400, "\x1b[2J\x1b]0;boo\x07 \x9b1m\u202eoob\nend"),
            r"400 - \\x1b\[2J\\x1b\]0;boo\\x07 \\x9b1m\\u202eoob end$",
        ),
        (
            {"error": {"message": "upstream overloaded"}},
            'completion: {"error": {"message": "upstream overloaded"}};',
        ),
        (b"", "completion: .*empty;"),
        (hang_up, r"Connection error \(.*\);"),
        (flood, "more than 4 MiB;"),
        (bomb, "more than 4 MiB;"),
    ],
)
def test_the_servers_words_are_heard(judge, reply: object, words: str) -> None:
    """And do nothing to the terminal."""
    with serving(lambda body: reply) as server, raises(ServerError) as error:
        oracles.judge(judge(server, judge_retries=0), groups("a", "b"), "judge")
    assert re.search(words, str(error.value))
    assert str(error.value).isprintable()


def test_a_server_that_starts_again_is_waited_for(judge, monkeypatch) -> None:
    """The default patience is minutes, and here a thousandth of them."""
    monkeypatch.undo()
    assert sum(retries.longest_wait(n) / 2 for n in range(1, Config().judge_retries + 1)) >= 300
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.5e-3)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 60e-3)
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
        with raises(ServerUnavailable, "--oracle judge, prompt 5", server.url, "3 tries", "judge.sqlite"):
            oracles.judge(judge(server, **options), groups("a", "bcd", count=8), "judge")
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
        with raises(ServerUnavailable, url, "2 tries", "Connection error"):
            oracles.judge(judge(url, judge_retries=1), groups("a", "b"), "judge")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_what_the_server_refuses_is_not_tried_again(judge, status: int) -> None:
    with serving(lambda body: Error(status)) as server:
        with raises(RequestRefused, str(status), "scripted") as error:
            oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")
        assert len(server.bodies) == 1
    assert ("OPENAI_API_KEY" in str(error.value)) == (status in (401, 403))


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
        with raises(RequestRefused, "418 - Nö"):
            oracles.judge(judge(server), groups("e", "f"), "judge")
