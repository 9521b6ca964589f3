"""The judge in a run."""

from __future__ import annotations

import json

import pytest
from support.judging import asked, raises, shorter
from support.servers import (
    Error,
    serving,
)

from onpo_fast import oracles
from onpo_fast import train as module
from onpo_fast.config import Config
from onpo_fast.oracles import chat_judge
from onpo_fast.oracles.judge_session import NoVerdicts
from onpo_fast.servers import RequestRefused, retries

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def small(tiny_model, tmp_path, write_lines) -> dict[str, object]:
    """Options of a run of one iteration in "out", on five prompts."""
    prompts = write_lines("prompts.jsonl", *({"prompt": f"What is {i} plus {i}?"} for i in range(5)))
    return {
        "model": str(tiny_model),
        "prompts": str(prompts),
        "out": str(tmp_path / "out"),
        "iterations": 1,
        "prompts_per_iteration": 2,
        "responses_per_prompt": 2,
        "max_new_tokens": 4,
        "eval_samples": 1,
        "batch_pairs": 2,
    }


def test_a_run_with_a_judge(small, tmp_path, monkeypatch) -> None:
    """Its counters are in the metrics, and the key is sent, and nowhere in the run directory though said back."""
    monkeypatch.setenv("MY_KEY", "sk-do-not-tell\n")
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.002)
    faults = iter([Error(500), b"sk-do-not-tell", Error(429)])

    def reply(body: dict) -> object:
        if set(asked(body)) == set(oracles.PROBE_TEXTS):  # it is tried first, in both orders
            return shorter(body)
        return next(faults, f"{shorter(body)}. Your key is sk-do-not-tell")

    config = small | {"oracle": "judge", "judge_model": "m", "judge_key_variable": "MY_KEY"}
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


def test_a_judge_of_no_use_stops_the_run_before_anything_is_sampled(small, tmp_path) -> None:
    """One question in both orders; mended, the run goes on with it, and asks it no more."""
    config = small | {"judge_model": "m", "oracle": "population + judge", "judge_concurrency": 1}
    replies = [(Error(404), RequestRefused, "404", 1), ("Let me think", NoVerdicts, "2 of 2", 4)]
    with serving(shorter) as server:
        for reply, kind, message, requests in replies:
            server.reply, server.bodies = (lambda body, reply=reply: reply), []
            with raises(kind, "member judge, tried before anything is sampled", message):
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
