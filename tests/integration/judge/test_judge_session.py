"""Concurrency, signals and event loops."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
from support.judging import SHORTER, groups, shorter
from support.servers import (
    Error,
    serving,
)

from onpo_fast import oracles, signals
from onpo_fast.oracles.judge_cache import JudgeCache
from onpo_fast.servers import workers


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
    monkeypatch.setattr(workers, "SHUTDOWN_SECONDS", 5.0 if answers else 0.2)

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


def test_a_signal_while_another_run_asks(judge, tmp_path, monkeypatch) -> None:
    """Waiting for it holds nobody up."""
    other = JudgeCache(tmp_path / "judge.sqlite")
    claim = JudgeCache.claim
    with serving(shorter) as server:
        monkeypatch.setattr(JudgeCache, "claim", lambda self, keys: claim(other, keys) and self is other)
        monkeypatch.setattr(signals, "_asked_by", None)
        threading.Timer(0.3, lambda: setattr(signals, "_asked_by", 2)).start()
        start = time.monotonic()
        with pytest.raises(signals.Stopped):
            oracles.judge(judge(server), groups("a", "bcd"), "judge")
        assert 0.2 < time.monotonic() - start < 3
        assert not server.bodies
    other.close()


def test_where_an_event_loop_runs(judge) -> None:
    """As in a notebook."""

    async def cell() -> list[np.ndarray]:
        return oracles.judge(judge(server), groups("a", "bcd"), "judge")

    with serving(shorter) as server:
        (matrix,) = asyncio.run(cell())
    np.testing.assert_array_equal(matrix, SHORTER)
