"""--sampler server with a real vLLM server, where there is an environment of ``make vllm-env``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import small_runs
from support.vllm_engines import make_model, vllm_python  # noqa: F401

from onpo_fast import train as module
from onpo_fast.config import Config, ModelConfig
from onpo_fast.data import Group, read_groups
from onpo_fast.errors import UserError
from onpo_fast.models.policy import score
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.sampling import open_sampler
from onpo_fast.sampling.server.unfinished import UNFINISHED

pytestmark = pytest.mark.long

PROMPTS = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(4)]
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
RELOAD = """
import json, os, sys, urllib.request
for call, body in (
    ("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": os.environ["ONPO_POLICY"]}}),
    ("reset_prefix_cache", {}),
):
    url, headers = f"{sys.argv[1]}/{call}", {"Content-Type": "application/json"}
    print(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)).read())
"""


@contextmanager
def vllm_server(python: str, model: Path, log: Path) -> Iterator[str]:
    """Starts a server; yields its root URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "policy"]
    line += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    with open(log, "wb") as output:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
        process = subprocess.Popen(
            line, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            waiting = process.poll() is None and time.monotonic() < deadline
            assert waiting, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def sample(policies: ResidentPolicy, source: Path, url: str, reload: str, seed: int = 0, **options) -> list[Group]:
    chosen = {"sampler_reload": reload, "max_new_tokens": 24, "sampler_concurrency": 8, **options}
    sampler = open_sampler(policies, str(source), Config(sampler="server", sampler_url=f"{url}/v1", **chosen))
    try:
        return sampler(PROMPTS, 4, [seed], lambda n: None)
    finally:
        sampler.close()


def tokens_of(groups: list[Group]) -> list[list[list[int]]]:
    return [[response.tokens for response in group.responses] for group in groups]


def test_a_run_that_was_killed(vllm_python: str, tmp_path: Path, without_plots) -> None:  # noqa: F811
    """vLLM reloads each policy in place. The resumed run has the tokens of one that was never killed."""
    make_model(tmp_path / "start", tied=False)
    small_runs.prepare(tmp_path, tmp_path / "start")
    with vllm_server(vllm_python, tmp_path / "start", tmp_path / "server.log") as root:
        options = {**small_runs.SMALL, "max_new_tokens": 40, "tokens_per_microbatch": 2048}
        options |= {"model": tmp_path / "model", "prompts": tmp_path / "prompts.jsonl", "sampler": "server"}
        options |= {"sampler_url": f"{root}/v1", "sampler_reload": "vllm", "sampler_concurrency": 1}
        texts = {name: value if isinstance(value, (int, float)) else str(value) for name, value in options.items()}
        module.train(whole := Config(**texts, out=str(tmp_path / "whole")))

        flags = [part for name, value in texts.items() for part in (f"--{name}", str(value))]
        out = tmp_path / "killed"
        line = [sys.executable, "-m", "onpo_fast.train", *flags, "--out", str(out)]
        trainer = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        unfinished = out / f"{UNFINISHED}_0.jsonl"
        while not ((out / "iteration_02").exists() or (out / "iteration_01" / "policy").exists()) or not (
            unfinished.exists() and unfinished.read_bytes().count(b"\n") >= 3
        ):
            assert trainer.poll() is None, trainer.communicate()
            time.sleep(0.01)
        trainer.kill()
        trainer.communicate()
        kept = unfinished.read_text().splitlines()
        assert 3 <= len(kept) < 9
        assert not (out / "iteration_02" / "responses.jsonl").exists()
        module.train(Config(**texts, out=str(out)), resume=True)

        for t in (1, 2):
            of_both = [
                read_groups(tmp_path / name / f"iteration_0{t}" / "responses.jsonl") for name in ("whole", "killed")
            ]
            assert tokens_of(of_both[0]) == tokens_of(of_both[1])
        assert (out / "evaluation.json").exists()

        policies = ResidentPolicy(whole.section(ModelConfig))
        second = tmp_path / "whole" / "iteration_01" / "policy"
        groups = sample(policies, second, root, "vllm")
        scores = score(policies(str(second)), groups, 2048)
        for group, theirs in zip(groups, scores):
            ours = torch.tensor([response.logp for response in group.responses], dtype=torch.float64)
            torch.testing.assert_close(ours, theirs.double(), atol=1e-3, rtol=0)
        assert tokens_of(sample(policies, second, root, "vllm", sampler_concurrency=3)) == tokens_of(groups)
        assert {response.stop_reason for group in groups for response in group.responses} == {"eos", "length"}


def test_a_stale_head_is_caught(vllm_python: str, tmp_path: Path) -> None:  # noqa: F811
    """vLLM keeps the old head of a tied model when it reloads in place: refused, or found if a command does it."""
    model, trained = tmp_path / "model", tmp_path / "trained"
    make_model(model, tied=True)
    policies = ResidentPolicy(Config(model=str(model)).section(ModelConfig))
    policy = policies.take(str(model), "")
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.add_(torch.randn(272, 64), alpha=0.05)
    policies.save(trained, policy)
    (tmp_path / "reload.py").write_text(RELOAD)
    with vllm_server(vllm_python, model, tmp_path / "server.log") as root:
        with pytest.raises(UserError, match=r"--sampler_reload vllm.*tied"):
            sample(policies, trained, root, "vllm")
        command = f"{sys.executable} {tmp_path}/reload.py {root}"
        sample(policies, model, root, command)
        with pytest.raises(UserError, match="old LM head"):
            sample(policies, trained, root, command)
