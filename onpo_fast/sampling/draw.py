"""Draws of tokens whose random numbers depend on the seed, prompt, response, position and token, never on the batch.

The next token is the argmax of logits plus Gumbel noise, an exact draw from the softmax (``kernels/noise.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import TopPLogitsWarper

from ..kernels import noise
from ..loss import choose_backend


class Draw:
    """Draws one token for each row.

    Args:
        device: of the logits.
        temperature, top_p: of sampling.
    """

    def __init__(self, device: torch.device, temperature: float, top_p: float) -> None:
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.draw = draw_function(device)

    def __call__(self, logits: Tensor, keys: Tensor, positions: Tensor | int) -> tuple[Tensor, Tensor]:
        """Returns (n,) int64 tokens and their (n,) float32 log-probs at temperature 1, nats.

        Args:
            logits: (n, V).
            keys: (n,) int64, from ``stream_keys``.
            positions: (n,) int64 indices of the tokens in their responses, or one for all rows.
        """
        allowed = None
        if self.nucleus is not None:
            allowed = self.nucleus(None, logits / self.temperature) > -torch.inf
        with torch.cuda.device_of(logits):
            return self.draw(logits, keys, positions, self.temperature, allowed)


class TokenDraw(LogitsProcessor):
    """Draws the next token of every row, makes it the argmax of the logits, and records its log-prob."""

    def __init__(self, keys: Tensor, temperature: float, top_p: float) -> None:
        self.keys = keys  # (batch,) int64
        self.draw = Draw(keys.device, temperature, top_p)
        self.logps: list[Tensor] = []  # (batch,) log-probs at temperature 1 per step, nats

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logps = self.draw(scores, self.keys, len(self.logps))
        self.logps.append(logps)
        return scores.scatter_(1, tokens[:, None], torch.inf)


def draw_function(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the Triton kernel on a GPU that runs it, else numpy's function. triton is imported only if it is used."""
    if choose_backend("auto", device, torch.float32) == "triton":
        from ..kernels import sampled_tokens

        return sampled_tokens.draw
    return noise.draw


def stream_keys(seeds: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Returns the keys of random streams, (n,) int64: hashes of n sequences of non-negative integers."""
    keys = [np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] for seed in seeds]
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64)).to(device)
