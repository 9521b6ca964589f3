"""Whole runs with --sampler server: two iterations, the trainer killed and resumed; conversations too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support import servers as faults
from support.sampling_server import SamplingServer
from support.small_runs import SMALL, prepare, small_run

from bench.digest import run_digest
from onpo_fast import train as module
from onpo_fast.data import read_groups
from onpo_fast.errors import UserError
from onpo_fast.files import read_jsonl
from onpo_fast.models.policy import Policy
from onpo_fast.sampling.returned import request_seeds
from onpo_fast.sampling.server import sampler as server_sampler
from onpo_fast.sampling.server.unfinished import UNFINISHED

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.long]

CALL = """
import json, os, sys, urllib.request
body = {"method": "reload_weights", "kwargs": {"weights_path": os.environ["ONPO_POLICY"]}}
headers = {"Content-Type": "application/json"}
urllib.request.urlopen(urllib.request.Request(sys.argv[1], json.dumps(body).encode(), headers)).read()
"""
CONCURRENCY = 2


def test_a_trainer_that_is_killed(policy: Policy, tiny_model: Path, tmp_path: Path) -> None:
    """It ends with the same bits, and asks again only for what was under way."""
    prepare(tmp_path, tiny_model)
    (tmp_path / "call.py").write_text(CALL)
    model = SamplingServer(policy)
    with model.serving() as server:
        root = server.url.removesuffix("/v1")
        options = {
            "sampler": "server",
            "sampler_url": server.url,
            "sampler_reload": f"{sys.executable} {tmp_path}/call.py {root}/collective_rpc",
            "sampler_concurrency": CONCURRENCY,
        }
        config = replace(small_run(tmp_path, "whole"), **options)
        module.train(config)
        given = [call["kwargs"]["weights_path"] for _, call in model.calls]
        one, two = (str(tmp_path / "whole" / f"iteration_0{t}" / "policy") for t in (1, 2))
        assert given == [str(tmp_path / "model"), one, str(tmp_path / "model"), one, two]  # the last three: evaluation
        assert not list((tmp_path / "whole").glob(f"{UNFINISHED}*"))

        model.asked.clear()
        second = model.number + 16 + 9 + 16  # 16 are compared with the policy in each iteration
        line = [sys.executable, "-m", "onpo_fast.train", "--model", config.model, "--prompts", config.prompts]
        values = {**SMALL, **options, "out": str(tmp_path / "killed")}
        trainer = subprocess.Popen(
            line + [part for name, value in values.items() for part in (f"--{name}", str(value))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

        def before(number: int, body: dict) -> object:
            if number == second + 5:
                os.kill(trainer.pid, signal.SIGKILL)
            return faults.hang_up if number >= second + 5 else None

        model.before = before
        output, _ = trainer.communicate(timeout=300)
        assert trainer.returncode == -signal.SIGKILL, output
        model.before = lambda number, body: None
        module.train(replace(config, out=str(tmp_path / "killed")), resume=True)

    counts = Counter(body["seed"] for body in model.asked)
    own = [request_seeds([(0, 0, t, p, k) for p in range(3) for k in range(3)]) for t in (1, 2)]
    assert all(counts[seed] == 1 for seed in own[0])
    again = [seed for seed in own[1] if counts[seed] != 1]
    assert len(again) <= CONCURRENCY
    assert {counts[seed] for seed in again} <= {2}
    for t in (1, 2):
        files = [tmp_path / name / f"iteration_0{t}" / "responses.jsonl" for name in ("whole", "killed")]
        assert read_groups(files[0]) == read_groups(files[1])
    assert run_digest(tmp_path / "killed") == run_digest(tmp_path / "whole")


def test_a_server_that_goes_during_conversations(
    policy: Policy, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said before is kept, every request has a seed of its own, and a resumed run has the same bits."""
    prepare(tmp_path, tiny_model)
    (tmp_path / "call.py").write_text(CALL)
    monkeypatch.setattr(server_sampler, "PROBE_TOKENS", SMALL["max_new_tokens"] - 1)
    model = SamplingServer(policy)

    def seeds() -> list[int]:
        """Of the responses that were asked for; probes have fewer tokens."""
        return [body["seed"] for body in model.asked if body["max_tokens"] == SMALL["max_new_tokens"]]

    with model.serving() as server:
        root = server.url.removesuffix("/v1")
        config = replace(
            small_run(tmp_path, "whole"),
            environment="partner",
            turns=2,
            sampler="server",
            sampler_url=server.url,
            sampler_reload=f"{sys.executable} {tmp_path}/call.py {root}/collective_rpc",
            sampler_concurrency=CONCURRENCY,
            sampler_retries=1,
        )
        module.train(config)
        folder = tmp_path / "whole" / "iteration_01"
        states, rollouts = (read_groups(folder / f"{name}_turn_2.jsonl") for name in ("responses", "rollouts"))
        assert [len(group.responses) for group in states] == [config.responses_per_prompt] * 3
        assert len(rollouts) == 3 * (config.responses_per_prompt - 1)
        training = seeds()[: 2 * (9 + 9 + 6)]
        assert len(set(training)) == len(training)

        model.asked.clear()
        model.before = lambda number, body: faults.hang_up if len(seeds()) >= 13 else None
        with pytest.raises(UserError, match=r"the sampler at .* is down"):
            module.train(replace(config, out=str(tmp_path / "left")))
        folder = tmp_path / "left" / "iteration_01"
        assert list(read_jsonl(folder / "replies_turn_1.jsonl"))
        assert not (folder / "responses_turn_2.jsonl").exists()
        model.before = lambda number, body: None
        module.train(replace(config, out=str(tmp_path / "left")), resume=True)
    counts = Counter(seeds())
    assert all(counts[seed] == 1 for seed in training[:9])
    assert run_digest(tmp_path / "left") == run_digest(tmp_path / "whole")
