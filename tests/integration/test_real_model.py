"""What only a real model and its tokenizer show: SmolLM2-135M-Instruct, loaded from its GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onpo_fast import data
from onpo_fast.config import Config, SamplingConfig
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.fit import fit, plan_steps
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, score
from onpo_fast.objectives import Onpo
from onpo_fast.packing import pack
from onpo_fast.sampling import TransformersSampler

PACKED = [
    ([10, 11, 12], [[20, 21, 22, 23], [30], [], [40, 41]]),
    ([10, 50, 51, 52, 53], [[60, 61], [70, 71, 72]]),
]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def make_groups(policy: Policy) -> list[Group]:
    """Four prompts with three responses each."""
    texts = ["Yes.", "No, thank you very much!", "Perhaps it will rain.", ""]
    prompts = [[user(question)] for question in ("Tea?", "Will it rain tomorrow?", "Do fish sleep?", "Why?")]
    return [
        Group(
            prompt,
            policy.renderer.render(prompt),
            [
                Response(text, policy.tokenizer(text)["input_ids"] + policy.eos_tokens[:1] if text else [], "eos", 0.0)
                for text in (texts[i:] + texts[:i])[:3]
            ],
        )
        for i, prompt in enumerate(prompts)
    ]


PAIRS = [Pair(g, w, lo, p) for g in range(4) for w, lo, p in ((0, 1, 1.0), (2, 0, 0.7), (1, 2, 0.9))]


def hidden_alone(policy: Policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Hidden states that predict the response, from a call on a row of its own."""
    hidden = policy.model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
    return hidden[len(prompt) - 1 : len(prompt) + len(response) - 1]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_hidden_states_of_the_real_model(real_policy: Policy, layout: str) -> None:
    packed = pack(PACKED, layout)
    got = real_policy.scoring.hidden_states(packed)
    want = torch.cat([hidden_alone(real_policy, prompt, y) for prompt, responses in PACKED for y in responses])
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * float(want.std()))
    assert packed.targets.tolist() == [t for _, responses in PACKED for y in responses for t in y]
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 5, 7, 9, 12]
    assert packed.cu_seqlens.dtype == torch.int32


def test_some_responses_end_by_themselves(real_policy: Policy) -> None:
    prompt = [[{"role": "user", "content": "Answer with one word: is water wet?"}]]
    sampler = TransformersSampler(real_policy, SamplingConfig(max_new_tokens=24, sampling_batch_size=8))
    reasons = {r.stop_reason for r in sampler(prompt, 12, [0])[0].responses}
    assert "eos" in reasons


def test_margins_go_to_the_least_squares_solution(model_directory) -> None:
    """The labels of every group go in a circle, 1 + 0.8 + 0.4 nats round it, where margins add up to 0."""
    config = Config(model=str(model_directory), learning_rate=2e-6, warmup_ratio=0.0)
    policy = load(model_directory, config)
    groups = make_groups(policy)
    anchor = score(policy, groups, 1000)
    records: list[dict] = []
    fit(policy, groups, plan_steps(PAIRS, 16, 12, [0]), anchor, Onpo(eta=2.0), config, records.append)
    least = (2.2 / 3) ** 2
    assert records[0]["loss"] - least > 0.05
    assert records[-1]["loss"] - least < 0.01
    ratio = [after - before for after, before in zip(score(policy, groups, 1000), anchor)]
    margins = torch.stack([ratio[p.group][p.winner] - ratio[p.group][p.loser] for p in PAIRS])
    targets = torch.tensor([2.0 * (p.preference - 0.5) for p in PAIRS])
    assert (margins - (targets - 2.2 / 3)).abs().max() < 0.15


def test_a_prompt_of_megabytes_is_never_tokenised_whole(real_policy, monkeypatch) -> None:
    asked = []
    encode = type(real_policy.tokenizer)._encode_plus

    def watched(self, text, *arguments, **options):
        asked.append(len(text))
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(type(real_policy.tokenizer), "_encode_plus", watched)
    for text in ("word " * 10**6, "x" * 5 * 10**6, "\u4e16" * 10**6):
        with pytest.raises(UserError, match="has more than 8190 tokens: with --max_new_tokens 2 it exceeds the"):
            real_policy.renderer.render(data.Prompt([user(text)]), 2)
    assert max(asked) == 2**16
    skipped = data.Skipped()
    assert real_policy.renderer.usable([[user("Hi")], [user("word " * 10**6)]], 2, skipped) == [[user("Hi")]]
    assert skipped.count == 1
    blanks = [user("Hi" + " " * 200_000)]  # many characters, few tokens
    assert len(real_policy.renderer.render(blanks, 2)) < 8190


def test_pieces_do_not_refuse_what_fits(real_policy) -> None:
    """The limit is met to 1%, whatever the text."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(data.__file__).parent.glob("*.py")))
    for sample in (text[:300_000], text.replace(" ", "")[:200_000], "\u4e16\u754c " * 50_000, " " * 200_000):
        count = len(real_policy.tokenizer.encode(sample, add_special_tokens=False))
        assert not real_policy.renderer.has_more_tokens(sample, count)
        assert real_policy.renderer.has_more_tokens(sample, int(0.97 * count) - 300)
