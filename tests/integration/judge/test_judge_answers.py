"""How the judge's answers become preferences."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from support.judging import SHORTER, asked, groups, raises, shorter
from support.servers import (
    Error,
    completion,
    completion_of,
    message,
    serving,
)

from onpo_fast import oracles
from onpo_fast.oracles.judge_session import NoVerdicts
from onpo_fast.servers import RequestRefused, workers


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
        with raises(NoVerdicts, "2 of 2", "--judge_max_tokens"):
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
    with serving(lambda body: reply) as server, raises(NoVerdicts, "2 of 2", cause):
        oracles.judge(judge(server), groups("a", "bcd"), "judge")


def test_a_null_among_parts(judge) -> None:
    with serving(lambda body: message(content=[None, {"type": "text", "text": shorter(body)}])) as server:
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)
        assert len(server.bodies) == 2


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
        stop = workers.Workers.stop

        def stopped(self: workers.Workers, error: Exception) -> None:
            stop(self, error)
            refused.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers.Workers, "stop", stopped)
            with raises(RequestRefused):
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
    with serving(lambda body: reply) as server, raises(NoVerdicts, "--judge_max_tokens"):
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
            with raises(NoVerdicts, f"{answers} of {answers}", "--judge_max_invalid_rate", "'Banana'"):
                oracles.judge(judge(server, judge_concurrency=1), groups("a", "bcd", count=count), "judge")
            server.reply = shorter
            (matrix,) = oracles.judge(judge(server), groups("a", "bcd"), "judge")
        np.testing.assert_array_equal(matrix, SHORTER)
    with serving(lambda body: "") as server:
        oracles.judge(judge(server, judge_max_invalid_rate=1.0), groups("c", "d"), "judge")
