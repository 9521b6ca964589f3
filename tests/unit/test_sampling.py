"""Responses: exact draws, seeded, whatever the batch."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from onpo_fast.config import Config, SamplingConfig
from onpo_fast.errors import UserError
from onpo_fast.kernels import noise
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, score
from onpo_fast.sampling import MixtureSampler, TransformersSampler
from onpo_fast.sampling.draw import TokenDraw, stream_keys

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
        policy, SamplingConfig(**{"max_new_tokens": 12, "sampling_batch_size": batch_size, **options})
    )


@pytest.fixture(scope="module")
def groups(policy: Policy):
    return sampler(policy)(PROMPTS, 3, [0, 7])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_the_batch_size_changes_nothing(policy: Policy, groups, batch_size: int) -> None:
    again = sampler(policy, batch_size)(PROMPTS, 3, [0, 7])
    assert [[r.tokens for r in g.responses] for g in again] == [[r.tokens for r in g.responses] for g in groups]


def test_many_rows_a_batch(tiny_model) -> None:
    policy = load(tiny_model, Config())
    one, seven, many = (
        [[r.tokens for r in g.responses] for g in sampler(policy, size, max_new_tokens=3)(PROMPTS, 24, [3])]
        for size in (1, 7, 64)
    )
    assert one == seven == many


def test_a_part_of_the_prompts_gets_the_same_responses(policy: Policy, groups) -> None:
    part = sampler(policy)(PROMPTS[1:], 3, [0, 7], first=1)
    assert [[r.tokens for r in g.responses] for g in part] == [[r.tokens for r in g.responses] for g in groups[1:]]


def test_a_prompts_responses_depend_on_its_index_only(policy: Policy, groups) -> None:
    assert sampler(policy)(PROMPTS[:1], 2, [0, 7])[0].responses[0].tokens == groups[0].responses[0].tokens
    texts = [r.text for g in sampler(policy)(PROMPTS[:1] * 2, 2, [0, 8]) for r in g.responses]
    assert len(set(texts)) == 4  # other seeds, other indices: other responses


def test_groups_carry_what_training_needs(policy: Policy, groups) -> None:
    assert [g.prompt for g in groups] == PROMPTS
    for group in groups:
        assert group.prompt_tokens == policy.renderer.render(group.prompt)
        for r in group.responses:
            assert r.stop_reason == ("eos" if r.tokens[-1] in policy.eos_tokens else "length")
            assert len(r.tokens) == 12 or r.stop_reason == "eos"
            assert not set(r.tokens[:-1]) & set(policy.eos_tokens)
            assert r.text == policy.tokenizer.decode(r.tokens, skip_special_tokens=True)


def test_recorded_log_probs_are_the_policys(policy: Policy, groups) -> None:
    for group, scores in zip(groups, score(policy, groups, 1000)):
        np.testing.assert_allclose([r.logp for r in group.responses], scores.numpy(), rtol=1e-4, atol=1e-3)


def test_a_prompt_beyond_the_context_is_refused(policy: Policy) -> None:
    long = [[{"role": "user", "content": "word " * 9000}]]
    with pytest.raises(UserError, match="exceeds the model's context of 512 tokens"):
        sampler(policy)(long, 2, [0])


def test_a_models_own_generation_settings_do_not_bend_the_policy(tiny_model, tmp_path) -> None:
    """Nor do settings that transformers would refuse to save stop a fit from being saved."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "temperature": 0.6, "eos_token_id": [2, 0]}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    bent = load(directory, Config())
    assert bent.eos_tokens == [0, 2]
    groups = sampler(bent)(PROMPTS, 2, [0])
    for group, scores in zip(groups, score(bent, groups, 1000)):
        np.testing.assert_allclose([r.logp for r in group.responses], scores.numpy(), rtol=1e-4, atol=1e-3)
    bent.save(tmp_path / "saved")


def other_than(policy: Policy) -> Policy:
    """A policy with other weights."""
    other = replace(policy, model=copy.deepcopy(policy.model))
    generator = torch.Generator().manual_seed(1)
    for parameter in other.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return other


@torch.no_grad()
def mixed_log_probs(initial: Policy, policy: Policy, share: float, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Log-probs of a response's tokens under the mixture, from whole rows without a cache."""
    row = torch.tensor([prompt + tokens])
    parts = ((initial, share), (policy, 1 - share))
    logits = sum(s * p.model(row, use_cache=False).logits[0].double().log_softmax(-1) for p, s in parts)
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_is_sampled_from_the_product_of_both_models(policy: Policy, share: float) -> None:
    initial = other_than(policy)
    mixture = MixtureSampler(initial, policy, share, SamplingConfig(max_new_tokens=12, sampling_batch_size=5))
    mixture.check()
    groups = mixture(PROMPTS, 3, [0, 7])
    for group in groups:
        for response in group.responses:
            exact = mixed_log_probs(initial, policy, share, group.prompt_tokens, response.tokens)
            assert response.logp == pytest.approx(exact.sum(), abs=1e-3)
    alone = {0.0: policy, 1.0: initial}.get(share)
    if alone:
        same = sampler(alone)(PROMPTS, 3, [0, 7])
        assert [[r.tokens for r in g.responses] for g in groups] == [[r.tokens for r in g.responses] for g in same]


def test_a_mixture_wants_a_share_and_one_vocabulary(policy: Policy) -> None:
    config = SamplingConfig(sampling_batch_size=1)
    with pytest.raises(ValueError, match="share"):
        MixtureSampler(policy, policy, 1.5, config)
    other = replace(policy, model=copy.deepcopy(policy.model))
    other.model.resize_token_embeddings(policy.head_rows + 8)
    with pytest.raises(ValueError, match="initial"):
        MixtureSampler(other, policy, 0.5, config)


class TestDraw:
    LOGITS = torch.tensor([[1.0, 0.0, -1.0, 2.0, -3.0, -9.0, -torch.inf, 1.5, 0.5]])

    def counts(self, temperature: float, top_p: float, rows: int = 2000, steps: int = 500) -> np.ndarray:
        """Of a million draws."""
        draw = TokenDraw(stream_keys([[0, i] for i in range(rows)], torch.device("cpu")), temperature, top_p)
        total = np.zeros(self.LOGITS.shape[1], int)
        for step in range(steps):
            chosen = draw(torch.zeros(rows, 1, dtype=torch.int64), self.LOGITS.repeat(rows, 1)).argmax(1)
            total += np.bincount(chosen.numpy(), minlength=len(total))
            exact = self.LOGITS[0].log_softmax(0)[chosen]
            torch.testing.assert_close(draw.logps[step], exact)  # at temperature 1, whatever it was drawn at
        return total

    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.9)])
    def test_draws_follow_the_softmax(self, temperature: float, top_p: float) -> None:
        chances = (self.LOGITS[0].double() / temperature).softmax(0).numpy()
        order = np.argsort(-chances)
        nucleus = order[: np.searchsorted(chances[order].cumsum(), top_p) + 1] if top_p < 1 else np.flatnonzero(chances)
        counts = self.counts(temperature, top_p)
        assert counts.sum() == counts[nucleus].sum() == 1_000_000
        assert stats.chisquare(counts[nucleus], 1e6 * chances[nucleus] / chances[nucleus].sum()).pvalue > 1e-3

    def test_a_single_token_that_may_be_drawn_is(self) -> None:
        logits = torch.full((64, 1000), -torch.inf)
        only = torch.arange(64) * 13
        logits[torch.arange(64), only] = -50.0
        tokens, logps = noise.draw(logits, torch.arange(64), 3)
        assert torch.equal(tokens, only)
        assert logps.eq(0).all()
        among = torch.zeros(64, 1000, dtype=torch.bool)
        among[torch.arange(64), only] = True
        tokens, logps = noise.draw(torch.zeros(64, 1000), torch.arange(64), 3, allowed=among)
        assert torch.equal(tokens, only)
        torch.testing.assert_close(logps, torch.full((64,), -np.log(1000.0)).float())

    @pytest.mark.parametrize("vocabulary", [1, 2, 5, 8191, 16385, 49152])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_any_size_and_dtype(self, vocabulary: int, dtype: torch.dtype) -> None:
        wide = torch.randn(11, 2 * vocabulary, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
        keys = stream_keys([[i] for i in range(11)], torch.device("cpu"))
        for logits in (wide[:, :vocabulary], wide[:, ::2], wide[:1, :vocabulary].expand(11, -1)):
            tokens, logps = noise.draw(logits, keys, 5, 0.7)
            scores = logits.float() / np.float32(0.7) + torch.from_numpy(noise.gumbel(keys.numpy(), 5, 0, vocabulary))
            assert torch.equal(tokens, scores.argmax(1))
            exact = logits.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(logps.double(), exact, rtol=1e-6, atol=4e-6)


class TestNoise:
    KEYS = stream_keys([[0, 7, 5, 3]], torch.device("cpu")).numpy()

    @pytest.mark.parametrize(
        ("key", "counter", "words"),
        [  # Random123's known answers for philox4x32 of ten rounds
            ([0] * 2, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
            ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
            (
                [0xA4093822, 0x299F31D0],
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            ),
        ],
    )
    def test_philox_is_the_published_one(self, key: list[int], counter: list[int], words: list[int]) -> None:
        arrays = [[np.array([word], np.uint64) for word in part] for part in (key, counter)]
        assert [int(word[0]) for word in noise.philox(*arrays)] == words

    def test_every_word_gives_finite_noise_as_defined(self, monkeypatch) -> None:
        near = np.arange(-3, 4) % 2**32
        words = np.unique(np.concatenate([(near + 2**bit) % 2**32 for bit in range(33)])).astype(np.uint64)[None]
        monkeypatch.setattr(noise, "philox", lambda key, counter: (words,) * 4)
        got = noise.gumbel(self.KEYS, 0, 0, 4 * words.size)[0, ::4]
        u = (words[0].astype(np.float32) + np.float32(0.5)).astype(float) * noise.SCALE
        np.testing.assert_allclose(got, -np.log(-np.log1p(-u)), rtol=2e-6, atol=2e-6)
        assert got.max() == pytest.approx(33 * np.log(2))
        assert got.min() == pytest.approx(-np.log(24 * np.log(2)))
        assert (np.diff(got) <= 0).all()

    def test_the_noise_is_standard_gumbel(self) -> None:
        sample = noise.gumbel(self.KEYS, 0, 0, 1_000_000)[0]
        assert stats.kstest(sample, stats.gumbel_r.cdf).pvalue > 1e-3
        tail = [(sample > x).sum() for x in (6.0, 8.0, 10.0)]
        for count, x in zip(tail, (6.0, 8.0, 10.0)):
            assert stats.binomtest(int(count), sample.size, stats.gumbel_r.sf(x)).pvalue > 1e-3

    def test_a_token_has_the_same_noise_wherever_its_block_starts(self) -> None:
        whole = noise.gumbel(self.KEYS, 9, 0, 1003)
        assert np.array_equal(whole[:, 504:], noise.gumbel(self.KEYS, 9, 504, 499))

    def test_neighbours_are_independent(self) -> None:
        """Tokens, positions, responses, prompts, seeds; a chi-square test of the joint deciles, and correlation."""
        n = 1_000_000

        def stream(seed: int = 7, prompt: int = 5, response: int = 3, position: int = 11) -> np.ndarray:
            key = stream_keys([[seed, 0, prompt, response]], torch.device("cpu")).numpy()
            return noise.gumbel(key, position, 0, n)[0]

        here = stream()
        neighbours = {
            "token": np.roll(here, 1),
            "two tokens": np.roll(here, 2),
            "four tokens": np.roll(here, 4),
            "position": stream(position=12),
            "response": stream(response=4),
            "prompt": stream(prompt=6),
            "seed": stream(seed=8),
            "prompt and response swapped": stream(prompt=3, response=5),
        }
        edges = stats.gumbel_r.ppf(np.arange(1, 10) / 10)
        for name, other in neighbours.items():
            joint = np.bincount(10 * np.digitize(here, edges) + np.digitize(other, edges), minlength=100)
            assert stats.chisquare(joint).pvalue > 1e-3, name
            assert abs(np.corrcoef(here, other)[0, 1]) < 4 / n**0.5, name

    def test_keys_and_positions_are_independent(self) -> None:
        """The noise of one token for 500 keys at 200 positions."""
        keys = stream_keys([[0, i // 25, i % 25] for i in range(500)], torch.device("cpu")).numpy()
        first = np.stack([noise.gumbel(keys, position, 0, 1)[:, 0] for position in range(200)])
        assert stats.kstest(first.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3
        assert len(np.unique(first)) > 0.99 * first.size
        for a, b in ((first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.size**0.5
