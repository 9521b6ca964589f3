"""A few responses to compare the log-probs that a sampler gives with those that the policy is scored by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...data import Group, Response
from ...models.checks import computing
from ...models.policy import Policy, score
from ..draw import stream_keys

PROBE_LENGTHS = (3, 9, 22)  # lengths in tokens of the prompts that a sampler is checked with
PROBE_TOKENS = 6  # tokens sampled after each

Generate = Callable[[list[list[int]], list[int], int], list[Response]]


@torch.no_grad()
def difference(policy: Policy, generate: Generate) -> float:
    """Returns the largest difference between sampled and scored log-probs of a few responses, in float32.

    In nats, divided by the square root of a response's number of tokens.

    Args:
        generate: returns a response to each of the prompts, given their tokens, the keys of their random streams and
            the most tokens of a response.
    """
    size = policy.head_rows
    lengths = [length for length in PROBE_LENGTHS if length + PROBE_TOKENS <= policy.safe_length]
    prompts = [prompt for n in lengths for prompt in [[(7 * i + 3 * n) % size for i in range(n)]] * 2]
    if not prompts:
        return 0.0
    policy.model.eval()
    keys = stream_keys([[p] for p in range(len(prompts))], torch.device("cpu")).tolist()
    with policy.in_float32(), computing(f"a model of the family {policy.family}"):
        responses = generate(prompts, keys, PROBE_TOKENS)
        groups = [Group([], prompt, [one]) for prompt, one in zip(prompts, responses)]
        scored = torch.cat(score(policy, groups, len(prompts) * (max(PROBE_LENGTHS) + PROBE_TOKENS)))
    sampled = torch.tensor([one.logp for one in responses], dtype=torch.float64)
    tokens = torch.tensor([len(one.tokens) for one in responses])
    return float(((sampled - scored).abs() / tokens.sqrt()).max().nan_to_num(math.inf))
