"""Sampling of responses from a policy.

A sampler turns prompts into groups; ``TransformersSampler`` uses transformers' generation. Random numbers depend on the
seed, the index of the prompt, the index of the response, the position and the token, never on the batch: the next token
is the argmax of logits plus Gumbel noise, an exact draw from the softmax, and the noise is a function of these five
(``kernels/noise.py``). So the batch size changes a response only where rounding decides between two tokens, which has
not been seen on a CPU in float32.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import TopPLogitsWarper

from .config import SamplingConfig
from .data import Group, Messages, Response
from .errors import UserError
from .kernels import noise
from .loss import choose_backend
from .models.checks import computing
from .models.policy import LOGP_TOLERANCE, Policy, pad_token, score
from .out_of_memory import in_halves
from .run.progress import Progress
from .run.tracking import say, say_once

Job = TypeVar("Job")

PROBE_LENGTHS = (3, 9, 22)  # lengths in tokens of the prompts that a sampler is checked with
PROBE_TOKENS = 6  # tokens sampled after each


class TruncationWarning:
    """Warns once if all responses that were sampled together were cut off, and says what may help."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, what: str, policy: Policy, groups: Sequence[Group], max_new_tokens: int) -> None:
        if not self.said and all_truncated(groups):
            self.said = True
            say(
                f"warning: every response of {what} was cut off at {max_new_tokens} tokens: "
                f"{policy.renderer.truncation_remedy(max_new_tokens)}"
            )


def all_truncated(groups: Sequence[Group]) -> bool:
    """Returns whether every response reached the maximum length."""
    return all(response.stop_reason == "length" for group in groups for response in group.responses)


class Sampler(Protocol):
    """Samples K responses to every prompt; see ``TransformersSampler``."""

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress,
        first: int = 0,
    ) -> list[Group]: ...


def make_sampler(policy: Policy, config: SamplingConfig) -> Sampler:
    """Returns a sampler of the policy that has been checked.

    Raises:
        UserError: if the policy's implementation generates from another distribution than it is scored by.
    """
    sampler = TransformersSampler(policy, config)
    sampler.check()
    return sampler


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
    ) -> list[Group]:
        """Samples responses and returns the groups in the order of the prompts.

        Args:
            prompts: conversations that end with the user.
            responses_per_prompt: K.
            seed: non-negative integers; equal seeds give equal responses.
            progress: called with the number of responses of every batch.
            first: the index of the first prompt among all prompts of the seed, so that a part of them gets the same
                responses.

        Raises:
            UserError: if a prompt and a response exceed the model's context.
        """
        max_new_tokens, renderer = self.config.max_new_tokens, self.policy.renderer
        rendered = [renderer.render(prompt, max_new_tokens) for prompt in prompts]
        self.policy.model.eval()
        jobs = [(p, k) for p in range(len(prompts)) for k in range(responses_per_prompt)]
        responses: dict[tuple[int, int], Response] = {}
        for batch in self._batches(jobs, lambda job: len(rendered[job[0]])):

            def generate(some: Sequence[tuple[int, int]]) -> list[Response]:
                keys = _keys([[*seed, first + p, k] for p, k in some], self.policy.device)
                with computing(f"a model of the family {self.policy.family}"):
                    return self._generate([rendered[p] for p, _ in some], keys, max_new_tokens)

            generated = in_halves(generate, batch, "responses are sampled", "--sampling_batch_size")
            responses.update(zip(batch, generated))
            progress(len(batch))
        return [
            Group(prompt, rendered[p], [responses[p, k] for k in range(responses_per_prompt)])
            for p, prompt in enumerate(prompts)
        ]

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

    @torch.no_grad()
    def _difference(self) -> float:
        """Returns the largest difference between sampled and scored log-probs of a few responses.

        In nats, divided by the square root of a response's number of tokens.
        """
        policy = self.policy
        size = policy.head_rows
        prompts = [
            [(7 * i + 3 * length) % size for i in range(length)]
            for length in PROBE_LENGTHS
            for _ in range(2)
            if length + PROBE_TOKENS <= policy.safe_length
        ]
        if not prompts:
            return 0.0
        policy.model.eval()
        groups: list[Group] = []
        with policy.in_float32(), computing(f"a model of the family {policy.family}"):
            for batch in self._batches(range(len(prompts)), lambda p: len(prompts[p])):
                chosen = [prompts[p] for p in batch]
                keys = _keys([[p] for p in batch], policy.device)
                responses = self._generate(chosen, keys, PROBE_TOKENS)
                groups += [Group([], prompt, [one]) for prompt, one in zip(chosen, responses)]
            scored = torch.cat(score(policy, groups, len(prompts) * (max(PROBE_LENGTHS) + PROBE_TOKENS)))
        sampled = torch.tensor([group.responses[0].logp for group in groups], dtype=torch.float64)
        tokens = torch.tensor([len(group.responses[0].tokens) for group in groups])
        difference = ((sampled - scored).abs() / tokens.sqrt()).max()
        return float(difference.nan_to_num(math.inf))

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
        draw = _Draw(keys, self.config.temperature, self.config.top_p)
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
        eos = self.policy.eos_tokens
        end = next((i for i, token in enumerate(tokens) if token in eos), None)
        kept = tokens if end is None else tokens[: end + 1]
        text = self.policy.tokenizer.decode(kept, skip_special_tokens=True)
        return Response(text, kept, "length" if end is None else "eos", float(logps[: len(kept)].sum()))


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


class _Draw(LogitsProcessor):
    """Draws the next token of every row, makes it the argmax of the logits, and records its log-prob."""

    def __init__(self, keys: Tensor, temperature: float, top_p: float) -> None:
        self.keys = keys  # (batch,) int64
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.draw = _draw_function(keys.device)
        self.logps: list[Tensor] = []  # (batch,) log-probs at temperature 1 per step, nats

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = None
        if self.nucleus is not None:
            allowed = self.nucleus(input_ids, scores / self.temperature) > -torch.inf
        with torch.cuda.device_of(scores):
            tokens, logps = self.draw(scores, self.keys, len(self.logps), self.temperature, allowed)
        self.logps.append(logps)
        return scores.scatter_(1, tokens[:, None], torch.inf)


def _draw_function(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the Triton kernel on a GPU that runs it, else numpy's function. triton is imported only if it is used."""
    if choose_backend("auto", device, torch.float32) == "triton":
        from .kernels import sampled_tokens

        return sampled_tokens.draw
    return noise.draw


def _keys(seeds: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Returns the keys of random streams, (n,) int64: hashes of n sequences of non-negative integers."""
    keys = [np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] for seed in seeds]
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64)).to(device)
