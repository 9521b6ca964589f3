"""Responses from a policy.

A sampler takes prompts and gives groups; ``TransformersSampler`` uses transformers' own generation. Randomness is tied
to the seed, the prompt's index, the response's index and the position, never to the batch: the next token is the
argmax of logits plus Gumbel noise (an exact draw from the softmax), and the noise is a function of those four and of
the token (``kernels/noise.py``). So a batch size changes a response only where rounding decides a tie between two
tokens; on a CPU in float32 that has not been seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import TopPLogitsWarper

from .config import SamplingConfig
from .data import Group, Messages, Response
from .errors import UserError
from .kernels import noise
from .loss import choose_backend
from .models.checks import computing
from .models.policy import TOLERANCE, Policy, pad_token, score
from .run.tracking import say, say_once

Progress = Callable[[int], None]  # told the responses done, a batch at a time
Job = TypeVar("Job")

PROBE_LENGTHS = (3, 9, 22)  # of the prompts that a sampler is checked with, in tokens
PROBE_TOKENS = 6  # sampled after each


class TruncationWarning:
    """Says once that every response that was sampled together was cut off, and what may help."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, what: str, policy: Policy, groups: Sequence[Group], max_new_tokens: int) -> None:
        if not self.said and all_truncated(groups):
            self.said = True
            say(
                f"warning: every response of {what} was cut off at {max_new_tokens} tokens: "
                f"{policy.truncation_remedy(max_new_tokens)}"
            )


def all_truncated(groups: Sequence[Group]) -> bool:
    """Whether every response stopped by length."""
    return all(response.stop_reason == "length" for group in groups for response in group.responses)


class Sampler(Protocol):
    """The interface: K responses to every prompt; ``first`` is the index of the first one, for the seed."""

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress,
        first: int = 0,
    ) -> list[Group]: ...


def make_sampler(policy: Policy, config: SamplingConfig) -> Sampler:
    """The sampler that the configuration asks for.

    Raises:
        UserError: if the policy's implementation generates from another distribution than it is scored by.
    """
    sampler = TransformersSampler(
        policy,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        batch_size=config.sampling_batch_size,
    )
    sampler.check()
    return sampler


class TransformersSampler:
    """Batched generation with a KV cache on the policy's own device."""

    def __init__(
        self, policy: Policy, *, max_new_tokens: int, temperature: float, top_p: float, batch_size: int
    ) -> None:
        self.policy, self.batch_size = policy, batch_size
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.pads = True  # prompts of different lengths may be in one batch, padded on the left

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress = lambda n: None,
        first: int = 0,
    ) -> list[Group]:
        """Groups in the order of the prompts.

        Args:
            prompts: conversations that end with the user.
            responses_per_prompt: K.
            seed: a sequence of non-negative integers; the same one gives the same responses.
            progress: told the responses done.
            first: the index of the first prompt among all those of the seed: a part of them gets the same responses.

        Raises:
            UserError: if a prompt and a response do not fit the model's context.
        """
        rendered = [self.policy.render(prompt, self.max_new_tokens) for prompt in prompts]
        self.policy.model.eval()
        jobs = [(p, k) for p in range(len(prompts)) for k in range(responses_per_prompt)]
        responses: dict[tuple[int, int], Response] = {}
        for batch in self._batches(jobs, lambda job: len(rendered[job[0]])):
            keys = _keys([[*seed, first + p, k] for p, k in batch], self.policy.device)
            chosen = [rendered[p] for p, _ in batch]
            with computing(f"a model of the family {self.policy.family}"):
                generated = self._generate(chosen, keys, self.max_new_tokens)
            responses.update(zip(batch, generated))
            progress(len(batch))
        return [
            Group(prompt, rendered[p], [responses[p, k] for k in range(responses_per_prompt)])
            for p, prompt in enumerate(prompts)
        ]

    def check(self) -> None:
        """Compares the log-probs of a few sampled tokens with those that the policy is scored by, in float32.

        Where they agree only without padding (left padding is wrong in transformers for some recurrent families), no
        batch has any from here on; where they agree only without a batch, one response is sampled at a time.

        Raises:
            UserError: if they never agree; names the family and the difference.
        """
        family, allowed = self.policy.family, TOLERANCE[torch.float32]
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
        """How far sampled and scored log-probs of a few responses are apart, in nats over the root of their tokens."""
        policy = self.policy
        size = len(policy.head["weight"])
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
        """Jobs in batches, the shortest prompts first; ``length`` is that of a job's prompt in tokens."""
        boundary = self.policy.rotary_boundary or math.inf

        def kind(job: Job) -> tuple[bool, int]:  # what must not differ in a batch
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
        draw = _Draw(keys, self.temperature, self.top_p)
        with policy.autocast():
            output = policy.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([draw]),
                generation_config=GenerationConfig(
                    do_sample=False,  # the draw is in the processor: what is left is an argmax
                    max_new_tokens=max_new_tokens,
                    eos_token_id=policy.eos_tokens,
                    pad_token_id=pad,
                ),
            )
        logps = torch.stack(draw.logps, 1).double().cpu()
        return [self._response(row, lp) for row, lp in zip(output[:, width:].tolist(), logps)]

    def _response(self, tokens: list[int], logps: Tensor) -> Response:
        eos = self.policy.eos_tokens
        end = next((i for i, token in enumerate(tokens) if token in eos), None)
        kept = tokens if end is None else tokens[: end + 1]
        text = self.policy.tokenizer.decode(kept, skip_special_tokens=True)
        return Response(text, kept, "length" if end is None else "eos", float(logps[: len(kept)].sum()))


class _Draw(LogitsProcessor):
    """Draws every row's next token and makes it the only argmax; keeps the log-probs of what it drew."""

    def __init__(self, keys: Tensor, temperature: float, top_p: float) -> None:
        self.keys = keys  # (batch,) int64
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.draw = _drawing(keys.device)
        self.logps: list[Tensor] = []  # a (batch,) tensor a step: log-probs at temperature 1, nats

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = None
        if self.nucleus is not None:
            allowed = self.nucleus(input_ids, scores / self.temperature) > -torch.inf
        with torch.cuda.device_of(scores):
            tokens, logps = self.draw(scores, self.keys, len(self.logps), self.temperature, allowed)
        self.logps.append(logps)
        return scores.scatter_(1, tokens[:, None], torch.inf)


def _drawing(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """The Triton kernel where there is a GPU for it, numpy elsewhere. triton is imported only where it is used."""
    if choose_backend("auto", device, torch.float32) == "triton":
        from .kernels import sampled_tokens

        return sampled_tokens.draw
    return noise.draw


def _keys(seeds: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Keys of random streams, (n,) int64: hashes of n sequences of non-negative integers."""
    keys = [np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] for seed in seeds]
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64)).to(device)
