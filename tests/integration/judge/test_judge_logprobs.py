"""Servers that refuse log-probs."""

from __future__ import annotations

import json
import sqlite3
import time

import numpy as np
import pytest
from support.judging import SHORTER, groups, shorter
from support.servers import (
    Error,
    completion,
    serving,
)

from onpo_fast import oracles
from onpo_fast.servers import logprobs


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
    certain = refusal.status < 500 and logprobs.LOGPROBS.search(f"{refusal.message}{refusal.content}")
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
    answers = sqlite3.connect(oracle.cache_path).execute("SELECT preference FROM answers").fetchall()
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
    answers = (
        sqlite3.connect(oracle.cache_path).execute("SELECT preference FROM answers ORDER BY preference").fetchall()
    )
    assert [p for (p,) in answers] == pytest.approx([0.75, 0.75, 1, 1])
