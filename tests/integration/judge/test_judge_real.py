"""The judge on a real server and a real model."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from support.judging import TEXTS, groups
from support.servers import (
    completion,
    serving,
)

from onpo_fast import oracles
from onpo_fast.config import Config
from onpo_fast.models.loading import load


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


def test_log_probs_of_a_real_model(model_directory, judge) -> None:
    """Served with log-probs: a probability, not a letter; not ½, and the same again without a request."""

    policy = load(model_directory, Config())

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
