"""Packed groups give every response the hidden states of its own row."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from onpo_fast.data import Group, Response
from onpo_fast.models.policy import Policy, score
from onpo_fast.packing import Layout, microbatches, pack, row_length

GROUPS = [
    ([10, 11, 12], [[20, 21, 22, 23], [30], [], [40, 41]]),
    ([10, 50, 51, 52, 53], [[60, 61], [70, 71, 72]]),
]


def alone(policy: Policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Hidden states that predict the response, from an ordinary call on an ordinary row."""
    ids = torch.tensor([prompt + response])
    hidden = policy.model.base_model(input_ids=ids).last_hidden_state[0]
    return hidden[len(prompt) - 1 : len(prompt) + len(response) - 1]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_hidden_states_are_those_of_rows_alone(policy: Policy, layout: str) -> None:
    packed = pack(GROUPS, layout)
    got = policy.scoring.hidden_states(packed)
    want = torch.cat([alone(policy, prompt, y) for prompt, responses in GROUPS for y in responses])
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * float(want.std()))
    assert packed.targets.tolist() == [t for _, responses in GROUPS for y in responses for t in y]
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 5, 7, 9, 12]
    assert packed.cu_seqlens.dtype == torch.int32


def test_the_model_shares_prompts(policy: Policy) -> None:
    assert policy.layout == "shared"


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_the_mask_lets_nothing_through(policy: Policy, layout: str) -> None:
    """Another response's tokens change no hidden state of this one; gradients neither."""
    other = [(GROUPS[0][0], [[20, 21, 22, 23], [99], [], [98, 97]]), GROUPS[1]]
    with torch.no_grad():
        a, b = (policy.scoring.hidden_states(pack(groups, layout))[:4] for groups in (GROUPS, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_shared_prompt_is_computed_once() -> None:
    prompt, responses = [1] * 100, [[2] * 10] * 8
    assert row_length(prompt, responses) == 100 + 8 * 9
    assert pack([(prompt, responses)]).input_ids.numel() == 172
    assert pack([(prompt, responses)], "separate").input_ids.numel() == 8 * 109


def test_microbatches_hold_every_group_once_within_the_budget() -> None:
    g = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> list[int]:
        return [1] * int(torch.randint(low, high, (1,), generator=g))

    groups = [(tokens(1, 40), [tokens(0, 30) for _ in range(3)]) for _ in range(50)] + [([1] * 500, [[1] * 9] * 3)]
    for layout in get_args(Layout):
        batches = list(microbatches(groups, layout, 300))
        assert sorted(i for batch in batches for i in batch) == list(range(51))
        sizes = [pack([groups[i] for i in batch], layout).input_ids.numel() for batch in batches]
        assert all(size <= 300 for size, batch in zip(sizes, batches) if len(batch) > 1)
        assert list(microbatches(groups, layout, 1)) == [
            [i] for batch in microbatches(groups, layout, 1) for i in batch
        ]


def test_scores_are_the_models_own(policy: Policy) -> None:
    groups = [Group([], prompt, [Response("", y, "eos", 0.0) for y in responses]) for prompt, responses in GROUPS]
    separate = dataclasses.replace(policy, layout="separate")
    for p in (policy, separate):
        for tokens in (1, 10_000):
            scores = score(p, groups, tokens)
            for (prompt, responses), got in zip(GROUPS, scores):
                assert got.dtype == torch.float64
                for y, value in zip(responses, got.tolist()):
                    with torch.no_grad():
                        logits = policy.model(torch.tensor([prompt + y])).logits[0].double()
                    logps = logits.log_softmax(-1)
                    want = sum(float(logps[len(prompt) - 1 + i, t]) for i, t in enumerate(y))
                    assert value == pytest.approx(want, rel=1e-5, abs=1e-4)
    assert score(policy, [], 1000) == []
