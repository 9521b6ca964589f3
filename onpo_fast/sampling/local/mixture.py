"""Sampling from a mixture of two policies."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from ...config import SamplingConfig
from ...data import Response
from ...models.policy import Policy
from .generate import TransformersSampler


class MixtureSampler(TransformersSampler):
    """Samples from π_1^s·π^(1−s), normalised for every token (Nash-MD, arXiv 2312.00886).

    Each token is drawn from the normalised product of both models' next-token distributions, and the log-probs of the
    responses are those of these draws, at temperature 1. This is the approximation that TRL's GeometricMixtureWrapper
    uses; the product of the probabilities of whole responses, normalised once, is another distribution.

    Both models are in memory, and each has a KV cache.

    Args:
        initial: π_1, with the vocabulary of ``policy``.
        policy: π. Its tokenizer, dtype and end-of-sequence tokens are used.
        share: s in [0, 1], the weight of π_1.
        config: as for ``TransformersSampler``.

    Raises:
        ValueError: if the vocabularies differ, or s is not in [0, 1].
    """

    def __init__(self, initial: Policy, policy: Policy, share: float, config: SamplingConfig) -> None:
        super().__init__(policy, config)
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], not {share}")
        if initial.head_rows != policy.head_rows:
            raise ValueError(f"initial has {initial.head_rows} tokens, policy {policy.head_rows}: they must agree")
        self.initial, self.share = initial, share

    def check(self) -> None:
        """Checks both policies, each by itself, and limits batches as both of them need."""
        for policy in (self.initial, self.policy):
            sampler = TransformersSampler(policy, self.config)
            sampler.check()
            self.pads &= sampler.pads
            self.batch_size = min(self.batch_size, sampler.batch_size)

    def _generate(self, prompts: list[list[int]], keys: Tensor, max_new_tokens: int) -> list[Response]:
        with self.initial.generating():
            return super()._generate(prompts, keys, max_new_tokens)

    def _logits_processors(self, mask: Tensor) -> list[LogitsProcessor]:
        self.initial.model.eval()
        return [_MixWithInitial(self.initial, self.share, mask)]


class _MixWithInitial(LogitsProcessor):
    """Turns π's logits into those of π_1^s·π^(1−s), up to a constant. One object serves one call of ``generate``."""

    def __init__(self, initial: Policy, share: float, mask: Tensor) -> None:
        self.model, self.share, self.mask = initial.model, share, mask
        self.takes_positions = "position_ids" in inspect.signature(initial.model.forward).parameters
        self.cache: object | None = None  # None: the whole row is computed, also where a family returns no cache

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        initial = self._next_logits(input_ids).to(scores.dtype)
        return self.share * initial.log_softmax(-1) + (1 - self.share) * scores.log_softmax(-1)

    def _next_logits(self, input_ids: Tensor) -> Tensor:
        """Returns π_1's logits (batch, V) of the next token."""
        new = input_ids if self.cache is None else input_ids[:, -1:]
        mask = F.pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1)
        inputs = {"input_ids": new, "attention_mask": mask}
        if self.takes_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        output = self.model(**inputs, use_cache=True)
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1]
