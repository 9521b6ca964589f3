"""The client of OpenAI-compatible servers: retries, redaction, refusals, workers."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from onpo_fast.errors import UserError
from onpo_fast.servers import Client, Endpoint, Halted, Workers, check_url, logprobs, read_key, retries, run_async
from onpo_fast.servers.failures import MalformedReply
from onpo_fast.servers.replies import read_reply

ENDPOINT = Endpoint(role="sampler", url="http://localhost:8000/v1", key="sk-secret/1")


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
def test_the_wait_that_a_server_asks_for(header: str | int, least: float, most: float) -> None:
    """In seconds, or until a date, which is given here as seconds from now."""
    if isinstance(header, int):
        header = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=header), usegmt=True)
    asked_for = min(retries.parse_retry_after(header), retries.LONGEST_REQUESTED_WAIT)
    assert least <= max(asked_for, 0) <= most


def test_options_are_named_by_the_servers_role(monkeypatch) -> None:
    with pytest.raises(UserError, match="--sampler_url"):
        check_url("localhost", "sampler")
    with pytest.raises(UserError, match="--sampler_key_variable"):
        read_key("no name", "sampler")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"--sampler_url .*openai.*onpo_fast\[judge\]"):
        Client(ENDPOINT, "judge")


def test_the_key_is_redacted() -> None:
    assert "secret" not in repr(ENDPOINT)
    for said in (ENDPOINT.key, json.dumps(ENDPOINT.key), ENDPOINT.key.replace("/", r"\/")):
        assert "secret" not in ENDPOINT.redact(f"your key is {said}")
    assert Endpoint(role="sampler", url="http://x").redact("text") == "text"  # without a key


def test_a_chat_completion_is_read() -> None:
    choice = {"message": {"content": "Hi"}, "finish_reason": "length"}
    reply = read_reply(json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": -1}}))
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("Hi", 7, 0)
    assert reply.reached_token_limit
    with pytest.raises(MalformedReply):
        read_reply('{"choices": []}')


def test_refusals_of_log_probs() -> None:
    body = {"model": "m", "messages": [], "logprobs": True, "top_logprobs": 5, "seed": 1}
    refusal = logprobs.LogprobsRefusal
    for status, text, expected in (
        (400, "logprobs are not supported", refusal.CERTAIN),
        (500, "logprobs are not supported", refusal.POSSIBLE),
        (501, "", refusal.POSSIBLE),
        (400, "seed is not supported", refusal.NO),
        (429, "too many requests with logprobs", refusal.NO),
    ):
        assert logprobs.logprobs_refusal(status, text, body) is expected, text
    assert logprobs.without_logprobs(body) == {"model": "m", "messages": [], "seed": 1}


def test_the_first_error_stops_all_workers() -> None:
    """What has begun ends, nothing new is begun, and waits are ended."""
    begun: list[int] = []

    async def background() -> None:
        await asyncio.sleep(60)

    async def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise KeyError(item)
        with pytest.raises(Halted):
            await workers.sleep(60)
        raise ValueError(item)

    async def run() -> None:
        nonlocal workers
        workers = Workers(3)
        await workers.run(iter(range(100)), work, background())

    workers: Workers
    with pytest.raises(KeyError, match="2"):
        run_async(run())
    assert begun == [0, 1, 2]
