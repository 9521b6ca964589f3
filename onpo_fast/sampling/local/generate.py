"""Sampling with transformers' ``generate``, in batches that run to their longest response.

For families that the decode loop of ``local`` cannot sample from, and for mixtures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ...config import SamplingConfig
from ...console import Progress, say_once
from ...data import Group, Messages, Response
from ...errors import UserError
from ...models.checks import computing
from ...models.policy import LOGP_TOLERANCE, Policy, pad_token
from ...out_of_memory import in_halves
from ..draw import TokenDraw, stream_keys
from ..gathering import Gathering, make_response
from ..interface import OnGroup
from .probe import difference

Job = TypeVar("Job")


class TransformersSampler:
    """Batched generation with a KV cache, on the policy's device.

    Args:
        policy: the policy to sample from.
        config: its ``sampling_batch_size`` must be set.
    """

    def __init__(self, policy: Policy, config: SamplingConfig) -> None:
        self.policy, self.config = policy, config
        self.batch_size = config.sampling_batch_size
        self.pads = True  # whether prompts of different lengths may be in one batch, padded on the left

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress = lambda n: None,
        first: int = 0,
        on_group: OnGroup = lambda index, group: None,
    ) -> list[Group]:
        """Samples responses and returns the groups in the order of the prompts; see ``Sampler``.

        Raises:
            UserError: if a prompt and a response exceed the model's context.
        """
        max_new_tokens, renderer = self.config.max_new_tokens, self.policy.renderer
        rendered = [renderer.render(prompt, max_new_tokens) for prompt in prompts]
        self.policy.model.eval()
        gathering = Gathering(prompts, rendered, responses_per_prompt, progress, first, on_group)
        for batch in self._batches(gathering.places(), lambda job: len(rendered[job[0]])):

            def generate(some: Sequence[tuple[int, int]]) -> list[Response]:
                keys = stream_keys([[*seed, first + p, k] for p, k in some], self.policy.device)
                with computing(f"a model of the family {self.policy.family}"):
                    return self._generate([rendered[p] for p, _ in some], keys, max_new_tokens)

            generated = in_halves(generate, batch, "responses are sampled", "--sampling_batch_size")
            for place, response in zip(batch, generated):
                gathering.add(place, response)
        return gathering.groups()

    def close(self) -> None:
        """Does nothing: the policy is the caller's."""

    def check(self) -> None:
        """Compares the log-probs of a few sampled tokens with those that the policy is scored by, in float32.

        If they agree only without padding (left padding is wrong in transformers for some recurrent families), prompts
        of different lengths are no longer in one batch. If they agree only for single rows, one response is sampled at
        a time.

        Raises:
            UserError: if they do not agree; names the family and the difference.
        """
        family, allowed = self.policy.family, LOGP_TOLERANCE[torch.float32]
        if (padded := self._difference()) <= allowed:
            return
        self.pads, done = False, "prompts of different lengths are sampled one after the other"
        if self._difference() > allowed:
            self.batch_size, done = 1, "one response is sampled at a time"
            if (alone := self._difference()) > allowed:
                raise UserError(
                    f"a model of the family {family} cannot be trained with this version of transformers: the "
                    f"log-probs it generates with and those it is scored by differ by up to {alone:.2g} nats a token"
                )
        say_once(
            ("sampler", family),
            f"a model of the family {family} gives log-probs that are up to {padded:.2g} nats a token off where "
            f"prompts are in one batch: {done}",
        )

    def _difference(self) -> float:
        """Returns the largest difference between sampled and scored log-probs of a few responses; see ``probe``."""

        def generate(prompts: list[list[int]], keys: list[int], max_new_tokens: int) -> list[Response]:
            found: dict[int, Response] = {}
            for batch in self._batches(range(len(prompts)), lambda p: len(prompts[p])):
                chosen = torch.tensor([keys[p] for p in batch], device=self.policy.device)
                found.update(zip(batch, self._generate([prompts[p] for p in batch], chosen, max_new_tokens)))
            return [found[p] for p in range(len(prompts))]

        return difference(self.policy, generate)

    def _batches(self, jobs: Sequence[Job], length: Callable[[Job], int]) -> Iterator[list[Job]]:
        """Yields jobs in batches, the shortest prompts first; ``length`` returns that of a job's prompt in tokens."""
        boundary = self.policy.rotary_boundary or math.inf

        def kind(job: Job) -> tuple[bool, int]:  # the same for all jobs of a batch
            return length(job) > boundary, 0 if self.pads else length(job)

        for _, alike in itertools.groupby(sorted(jobs, key=length), key=kind):
            alike = list(alike)
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]

    def _generate(self, prompts: list[list[int]], keys: Tensor, max_new_tokens: int) -> list[Response]:
        policy, device = self.policy, self.policy.device
        width = max(map(len, prompts))
        pad = pad_token(policy.model, policy.tokenizer)
        input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        draw = TokenDraw(keys, self.config.temperature, self.config.top_p)
        with policy.autocast(), policy.generating():
            output = policy.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([*self._logits_processors(mask), draw]),
                generation_config=GenerationConfig(
                    do_sample=False,  # the processor has drawn the token: generate takes its argmax
                    max_new_tokens=max_new_tokens,
                    eos_token_id=policy.eos_tokens,
                    pad_token_id=pad,
                ),
            )
        logps = torch.stack(draw.logps, 1).double().cpu()
        return [self._response(row, lp) for row, lp in zip(output[:, width:].tolist(), logps)]

    def _logits_processors(self, mask: Tensor) -> list[LogitsProcessor]:
        """Returns what changes the logits before the draw. ``mask``: (batch, width), 0 where a prompt is padded."""
        return []

    def _response(self, tokens: list[int], logps: Tensor) -> Response:
        """Returns a row of a batch, which may go on after the response's end, as a response."""
        eos = self.policy.eos_tokens
        kept = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
        return make_response(tokens[:kept], float(logps[:kept].sum()), self.policy.tokenizer, eos)
