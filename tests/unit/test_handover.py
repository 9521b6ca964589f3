"""The check of sampled responses: right ones pass, over many seeds, and each fault is found."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from onpo_fast.config import Config, SamplingConfig
from onpo_fast.data import Group, Response
from onpo_fast.errors import UnusableResults
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy
from onpo_fast.sampling import TransformersSampler, handover

SERVER = {"sampler": "server", "sampler_url": "http://localhost:1/v1", "sampler_reload": "true"}
PROMPTS = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(8)]


def options(**given: object) -> SamplingConfig:
    return SamplingConfig(**{**SERVER, "max_new_tokens": 32, "sampling_batch_size": 64, **given})


@torch.no_grad()
def sample(
    policy: Policy, processors: Sequence[Callable] = (), seed: int = 0, count: int = 16, prompts: Sequence = PROMPTS
) -> list[Group]:
    """Responses of another program: draws by torch, after transformers' processors; log-probs at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for prompt in prompts:
        tokens = policy.renderer.render(prompt)
        rows, logps = torch.tensor([tokens] * count), []
        new, cache = rows, None
        for _ in range(32):
            with policy.autocast():
                output = policy.model(new, past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1].float(), output.past_key_values
            scores = logits
            for process in processors:
                scores = process(rows, scores)
            new = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            logps.append(logits.log_softmax(-1).gather(1, new)[:, 0])
            rows = torch.cat([rows, new], 1)
        groups.append(Group(prompt, tokens, responses_of(policy, rows[:, len(tokens) :], torch.stack(logps, 1))))
    return groups


def responses_of(policy: Policy, rows: Tensor, logps: Tensor) -> list[Response]:
    responses = []
    for row, each in zip(rows.tolist(), logps.double()):
        end = next((i + 1 for i, token in enumerate(row) if token in policy.eos_tokens), len(row))
        responses.append(Response("", row[:end], "eos", float(each[:end].sum())))
    return responses


def changed(policy: Policy, size: float, only: str = "") -> Policy:
    """The policy with other weights: noise of ``size`` times the spread of each, in those whose name has ``only``."""
    other = replace(policy, model=copy.deepcopy(policy.model))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in other.model.named_parameters():
        if only in name and parameter.dim() > 1:
            parameter.data += size * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def half(tiny_model) -> Policy:
    return load(tiny_model, Config(dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_responses_pass(policy: Policy, half: Policy, dtype: str) -> None:
    """Over many seeds, and far from both limits."""
    evidence = []
    for seed in range(4):
        own = policy if dtype == "float32" else half
        found = handover.check(own, sample(own, seed=seed), options())
        assert found["checked_tokens"] > 2000
        assert found["logp_error"] < (1e-5 if dtype == "float32" else 2 * found["rounding"])
        evidence.append(found["fault_evidence"])
    assert max(evidence) < 10


def test_responses_of_this_program_pass(policy: Policy) -> None:
    for given in ({}, {"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 1.3, "top_p": 0.8}):
        config = SamplingConfig(max_new_tokens=32, sampling_batch_size=64, **given)
        handover.check(policy, TransformersSampler(policy, config)(PROMPTS, 8, [0]), config)


FAULTS = {
    "temperature 0.8": [TemperatureLogitsWarper(0.8)],
    "temperature 1.3": [TemperatureLogitsWarper(1.3)],
    "top_k": [TopKLogitsWarper(50)],
    "top_p": [TopPLogitsWarper(0.9)],
    "min_p": [MinPLogitsWarper(0.05)],
    "repetition_penalty": [RepetitionPenaltyLogitsProcessor(3.0)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tokens_that_are_drawn_otherwise_are_found(policy: Policy, fault: str) -> None:
    with pytest.raises(UnusableResults, match=f"--sampler server did not draw.*{fault.split()[0]}"):
        handover.check(policy, sample(policy, FAULTS[fault]), options())


def test_options_that_the_sampler_ignores_are_found(policy: Policy) -> None:
    for given in ({"temperature": 0.7}, {"top_p": 0.9}):
        with pytest.raises(UnusableResults, match=f"--{next(iter(given))}"):
            handover.check(policy, sample(policy), options(**given))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 0.001), ("bfloat16", 0.05)])
def test_other_weights_are_found(policy: Policy, half: Policy, dtype: str, size: float) -> None:
    own = policy if dtype == "float32" else half
    with pytest.raises(UnusableResults, match="--sampler server"):
        handover.check(changed(own, size), sample(own), options())


def test_an_old_head_of_a_tied_model_is_found(policy: Policy) -> None:
    """What a reload in place does: new weights everywhere but in the head, which has the old embedding."""
    new = changed(policy, 0.01, only="embed_tokens")
    served = replace(new, model=copy.deepcopy(new.model))
    served.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().clone())
    handover.check(new, sample(new), options())
    with pytest.raises(UnusableResults, match="--sampler server"):
        handover.check(new, sample(served), options())


def test_log_probs_of_another_temperature_and_tokens_of_another_model_are_found(policy: Policy) -> None:
    groups = sample(policy)
    scaled = [replace(g, responses=[replace(r, logp=0.9 * r.logp) for r in g.responses]) for g in groups]
    with pytest.raises(UnusableResults, match="--sampler server"):
        handover.check(policy, scaled, options())
    broken = [replace(g, responses=[replace(r, logp=math.nan) for r in g.responses]) for g in groups]
    with pytest.raises(UnusableResults):
        handover.check(policy, broken, options())
    foreign = [replace(g, responses=[replace(r, tokens=[*r.tokens, 500]) for r in g.responses]) for g in groups]
    with pytest.raises(UnusableResults, match="500"):
        handover.check(policy, foreign, options())


def test_responses_are_chosen_whatever_they_are(policy: Policy) -> None:
    """The same ones whether they are long or short, until there are enough tokens."""

    def groups(length: int) -> list[Group]:
        return [Group([], [i], [Response(str((i, k)), [1] * length, "eos", 0.0) for k in range(4)]) for i in range(50)]

    short, long = ([r.text for _, r in handover.choose(groups(length))] for length in (1, 100))
    assert len(short) == 200
    assert long == short[: math.ceil(handover.CHECKED_TOKENS / 100)]
    assert len(set(long)) == len(long)


def with_ties(policy: Policy, distinct: int) -> Policy:
    """The policy with only so many different rows in its head; with one, it is uniform."""
    tied = replace(policy, model=copy.deepcopy(policy.model))
    rows = tied.model.lm_head.weight.data
    rows.copy_(rows[torch.arange(len(rows)) % distinct].clone() if distinct > 1 else torch.zeros_like(rows))
    return tied


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("distinct", [272, 20, 1])
def test_right_samplers_raise_no_alarm(policy: Policy, distinct: int, top_p: float) -> None:
    """Each of twelve seeds is far below the limit, also where many tokens have the same logit."""
    own = policy if distinct == 272 else with_ties(policy, distinct)
    processors = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for seed in range(12):
        groups = sample(own, processors, seed, count=32, prompts=PROMPTS[:1])
        assert handover.check(own, groups, options(top_p=top_p))["fault_evidence"] < 10


@pytest.mark.parametrize("ties", ["none", "some", "beyond the likeliest", "all"])
def test_a_likelihood_ratio_has_the_mean_of_one(ties: str) -> None:
    """The sum over all tokens of its expectation: what the false alarm rate rests on."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 2000, generator=generator)
    if ties == "some":
        logits = logits.round()
    elif ties == "beyond the likeliest":
        logits[:, 10:1990] = 2.0
    elif ties == "all":
        logits = torch.zeros_like(logits)
    seen = torch.rand(5, 2000, generator=generator) < 0.1
    every = torch.arange(2000)
    for row in range(5):
        repeated = logits[row].expand(2000, -1)
        for top_p in (1.0, 0.9):
            asked = handover.asked_log_probs(repeated, every, top_p)
            np.testing.assert_allclose(asked.double().exp().sum(), 1, rtol=1e-4)
        for name, fault in handover.fault_log_probs(repeated, every, seen[row].expand(2000, -1)).items():
            np.testing.assert_allclose(fault.double().exp().sum(), 1, rtol=1e-4, err_msg=name)


def test_the_limit_grows_with_what_a_nucleus_may_leak() -> None:
    """The mean of a ratio does, where what was asked for is computed with a share of all tokens."""
    assert handover.most_evidence(15, 4096, 1.0) == pytest.approx(math.log(15e9))
    leak = handover.most_evidence(15, 4096, 0.9) - handover.most_evidence(15, 4096, 1.0)
    assert leak == pytest.approx(4096 * handover.NUCLEUS_LEAK, rel=1e-3)
