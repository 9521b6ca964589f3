"""Responses: exact draws, seeded, whatever the batch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

from onpo_fast.config import Config
from onpo_fast.errors import UserError
from onpo_fast.policy import Policy, load, score
from onpo_fast.sampling import TransformersSampler, _Draw, _generator

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in (
        "Name a fruit.",
        "Was ist die Hauptstadt von Frankreich?",
        "Why is the sky blue? Answer in one sentence.",
    )
]


def sampler(policy: Policy, batch_size: int = 8, **options) -> TransformersSampler:
    return TransformersSampler(
        policy, **{"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "batch_size": batch_size, **options}
    )


@pytest.fixture(scope="module")
def groups(policy: Policy):
    return sampler(policy)(PROMPTS, 3, [0, 7])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_the_batch_size_changes_nothing(policy: Policy, groups, batch_size: int) -> None:
    again = sampler(policy, batch_size)(PROMPTS, 3, [0, 7])
    assert [[r.tokens for r in g.responses] for g in again] == [[r.tokens for r in g.responses] for g in groups]


def test_a_prompts_responses_depend_on_its_index_only(policy: Policy, groups) -> None:
    assert sampler(policy)(PROMPTS[:1], 2, [0, 7])[0].responses[0].tokens == groups[0].responses[0].tokens
    texts = [r.text for g in sampler(policy)(PROMPTS[:1] * 2, 2, [0, 8]) for r in g.responses]
    assert len(set(texts)) == 4  # other seeds, other indices: other responses


def test_groups_carry_what_training_needs(policy: Policy, groups) -> None:
    assert [g.prompt for g in groups] == PROMPTS
    for group in groups:
        assert group.prompt_tokens == policy.render(group.prompt)
        for r in group.responses:
            assert r.stop_reason == ("eos" if r.tokens[-1] in policy.eos_tokens else "length")
            assert len(r.tokens) == 12 or r.stop_reason == "eos"
            assert not set(r.tokens[:-1]) & set(policy.eos_tokens)
            assert r.text == policy.tokenizer.decode(r.tokens, skip_special_tokens=True)


def test_recorded_log_probs_are_the_policys(policy: Policy, groups) -> None:
    for group, scores in zip(groups, score(policy, groups, 1000)):
        np.testing.assert_allclose([r.logp for r in group.responses], scores.numpy(), rtol=1e-4, atol=1e-3)


def test_some_responses_end_by_themselves(policy: Policy) -> None:
    prompt = [[{"role": "user", "content": "Answer with one word: is water wet?"}]]
    reasons = {r.stop_reason for r in sampler(policy, max_new_tokens=24)(prompt, 12, [0])[0].responses}
    assert "eos" in reasons


def test_a_prompt_beyond_the_context_is_refused(policy: Policy) -> None:
    long = [[{"role": "user", "content": "word " * 9000}]]
    with pytest.raises(UserError, match="exceeds the model's context of 8192 tokens"):
        sampler(policy)(long, 2, [0])


def test_a_models_own_generation_settings_do_not_bend_the_policy(shallow_model, tmp_path) -> None:
    """Nor do settings that transformers would refuse to save stop a fit from being saved."""
    directory = tmp_path / "model"
    shutil.copytree(shallow_model, directory)
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "temperature": 0.6, "eos_token_id": [2, 0]}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    bent = load(directory, Config())
    assert bent.eos_tokens == [0, 2]
    groups = sampler(bent)(PROMPTS, 2, [0])
    for group, scores in zip(groups, score(bent, groups, 1000)):
        np.testing.assert_allclose([r.logp for r in group.responses], scores.numpy(), rtol=1e-4, atol=1e-3)
    bent.save(tmp_path / "saved")


class TestDraw:
    LOGITS = torch.tensor([[1.0, 0.0, -1.0, 2.0, -3.0]])

    def counts(self, temperature: float, top_p: float, n: int = 4000) -> np.ndarray:
        draw = _Draw([_generator(torch.device("cpu"), [0, i]) for i in range(n)], temperature, top_p)
        chosen = draw(torch.zeros(n, 1, dtype=torch.int64), self.LOGITS.expand(n, -1)).argmax(1)
        exact = self.LOGITS[0].log_softmax(0)[chosen]
        torch.testing.assert_close(draw.logps[0], exact)  # at temperature 1, whatever it was drawn at
        return np.bincount(chosen.numpy(), minlength=5)

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_draws_follow_the_softmax(self, temperature: float) -> None:
        want = (self.LOGITS[0] / temperature).softmax(0).double().numpy()
        assert stats.chisquare(self.counts(temperature, 1.0), 4000 * want / want.sum()).pvalue > 1e-3

    def test_top_p_keeps_the_nucleus(self) -> None:
        counts = self.counts(1.0, 0.8)
        assert counts[[1, 2, 4]].sum() == 0
        assert counts[[0, 3]].min() > 0
