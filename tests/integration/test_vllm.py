"""--sampler vllm with a real vLLM, where there is an environment of ``make vllm-env``."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from support import small_runs
from support.vllm_engines import ends, make_model, parts, start_run, vllm_python, wait_for  # noqa: F401

from onpo_fast.config import Config, ModelConfig
from onpo_fast.data import Group, read_groups
from onpo_fast.models.policy import score
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.sampling import open_sampler

pytestmark = pytest.mark.long

PROMPTS = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(3)]
OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}  # starts sooner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads of a size that vLLM has on a CPU."""
    directory = tmp_path_factory.mktemp("vllm") / "model"
    make_model(directory, tied=True)
    return directory


def sample(policies: ResidentPolicy, source, python: str, seed: list[int], prompts=PROMPTS, **options) -> list[Group]:
    config = Config(sampler="vllm", vllm_python=python, vllm_options=OPTIONS, **options)
    sampler = open_sampler(policies, source, config)
    try:
        return sampler(prompts, 3, seed, lambda n: None)
    finally:
        sampler.close()


def tokens_of(groups: list[Group]) -> list[list[list[int]]]:
    return [[response.tokens for response in group.responses] for group in groups]


def assert_scored_alike(policies: ResidentPolicy, source, groups: list[Group]) -> None:
    scores = score(policies(source), groups, 1024)
    for group, theirs in zip(groups, scores):
        ours = torch.tensor([response.logp for response in group.responses], dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_a_run_that_was_killed(model: Path, vllm_python: str, tmp_path, without_plots) -> None:  # noqa: F811
    """SIGKILL while responses are sampled ends vLLM; the resumed run has the tokens of one that was never killed."""
    small_runs.prepare(tmp_path, model)
    flags = ["--vllm_options", '{"enforce_eager": true, "kv_cache_memory_bytes": 67108864}', "--eval_fraction=0.2"]
    flags += ["--prompts_per_iteration=4", "--sampling_batch_size=1", "--max_new_tokens=40"]
    run = start_run(tmp_path, vllm_python, *flags)
    first = tmp_path / "run" / "iteration_01" / "responses.jsonl.parts" / "00000000.jsonl"
    wait_for(first, run)
    engine = int(subprocess.run(["pgrep", "-P", str(run.pid), "-f", "vllm/engine.py"], capture_output=True).stdout)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert ends(engine)
    kept = parts(tmp_path / "run")
    assert 1 <= len(kept) < 4
    resumed = start_run(tmp_path, vllm_python, *flags, "--resume")
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    policies = ResidentPolicy(Config(model=str(tmp_path / "model")).section(ModelConfig))
    for t, source in ((1, tmp_path / "model"), (2, tmp_path / "run" / "iteration_01" / "policy")):
        groups = read_groups(tmp_path / "run" / f"iteration_{t:02d}" / "responses.jsonl")
        assert_scored_alike(policies, str(source), groups)
        prompts = [group.prompt for group in groups]
        options = {"max_new_tokens": 40, "sampling_batch_size": 64}
        again = sample(policies, str(source), vllm_python, [0, 0, t], prompts, **options)
        assert tokens_of(again) == tokens_of(groups)  # 12 at a time here, one at a time there


def test_log_probs_are_those_of_the_policy(model: Path, vllm_python: str) -> None:  # noqa: F811
    """At temperature 1 over all tokens, whatever the draw is from; responses end as the policy ends them."""
    policies = ResidentPolicy(Config(model=str(model)).section(ModelConfig))
    groups = sample(policies, str(model), vllm_python, [1], temperature=1.5, top_p=0.8, max_new_tokens=300)
    assert_scored_alike(policies, str(model), groups)
    endings = {(r.stop_reason, r.tokens[-1] == 2) for group in groups for r in group.responses}
    assert endings <= {("eos", True), ("length", False)}
    assert ("eos", True) in endings


def test_more_prompts_than_a_batch_holds(model: Path, vllm_python: str) -> None:  # noqa: F811
    """Together they have more tokens than vLLM computes at a time, so that it would split one of them."""
    policies = ResidentPolicy(Config(model=str(model)).section(ModelConfig))
    prompts = [[{"role": "user", "content": f"What is {i}{' plus 1' * 40}?"}] for i in range(40)]
    groups = sample(policies, str(model), vllm_python, [1], prompts, max_new_tokens=8, sampling_batch_size=120)
    assert sum(len(group.prompt_tokens) for group in groups) > 8192
    assert_scored_alike(policies, str(model), groups)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
def test_adapters(targets: str, model: Path, vllm_python: str, tmp_path) -> None:  # noqa: F811
    config = Config(model=str(model), lora_rank=4, lora_targets=targets)
    policies = ResidentPolicy(config.section(ModelConfig))
    policy = policies.take(str(model), "1")
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    policies.save(tmp_path / "adapter", policy)
    groups = sample(policies, tmp_path / "adapter", vllm_python, [1], max_new_tokens=20, sampling_batch_size=9)
    assert_scored_alike(policies, tmp_path / "adapter", groups)
    base = score(policies(str(model)), groups, 1024)
    adapted = [sum(response.logp for response in group.responses) for group in groups]
    assert abs(sum(adapted) - float(sum(scores.sum() for scores in base))) > 1  # the adapter counts
