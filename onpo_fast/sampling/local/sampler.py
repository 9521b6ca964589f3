"""Sampling with a decode loop of our own: rows that finish leave the batch, and waiting responses take their place.

A prompt is computed once. Its keys and values are copied to the rows of its responses, whose first step computes the
prompt's last token again, so that every token is drawn in the same way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from ...config import SamplingConfig
from ...data import Group, Messages, Response
from ...errors import UserError
from ...models.attention import cached_attention_arguments, limits_unknown_here, window_of
from ...models.checks import computing
from ...models.layouts import PROBE_WINDOW, narrow_window
from ...models.policy import LOGP_TOLERANCE, Policy, pad_token
from ...models.scoring import backbone
from ...out_of_memory import with_fewer
from ...run.progress import Progress
from ..draw import Draw, stream_keys
from ..gathering import Gathering, make_response
from ..interface import OnGroup
from .linears import fast_linears
from .probe import difference
from .slots import SlotCache

PROMPT_TOKENS = 512  # tokens of prompts, with padding, in one forward pass; a longer prompt goes alone
REFILL = 16  # waiting responses enter when one slot in so many is free, so that their prompts go together
PROBE_SLOTS = 4  # fewer than the probe has responses: some enter when others have left
COLUMNS = 8  # attention reads a multiple of so many columns, as its kernels on GPUs want

Finish = Callable[[tuple[int, int], Response], None]  # given the place of a request, and its response


@dataclass(frozen=True, eq=False)
class Request:
    """A response to be sampled."""

    prompt: Sequence[int]  # the same object for all responses of a prompt
    key: int  # of its random stream
    place: tuple[int, int]  # index of the prompt, and of the response


@dataclass
class Row:
    """A response that is being sampled."""

    request: Request
    position: int  # of the token that goes into the model next
    token: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class LocalSampler:
    """Samples with continuous batching and a KV cache, on the policy's device.

    Args:
        policy: the policy to sample from.
        config: its ``sampling_batch_size``, which must be set, is the number of rows.
    """

    def __init__(self, policy: Policy, config: SamplingConfig) -> None:
        self.policy, self.config = policy, config

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
        gathering = Gathering(prompts, rendered, responses_per_prompt, progress, first, on_group)
        places = gathering.places()
        keys = stream_keys([[*seed, first + p, k] for p, k in places], torch.device("cpu")).tolist()
        requests = [Request(rendered[p], key, (p, k)) for (p, k), key in zip(places, keys)]
        boundary = self.policy.rotary_boundary or math.inf  # rows on its two sides are never in one batch
        for alike in (
            [one for one in requests if len(one.prompt) <= boundary],
            [one for one in requests if len(one.prompt) > boundary],
        ):

            def sample(slots: int, alike: list[Request] = alike) -> None:
                missing = [one for one in alike if one.place not in gathering.responses]
                self._decode(missing, slots, max_new_tokens, gathering.add)

            if alike:
                slots = min(self.config.sampling_batch_size, len(alike))
                with_fewer(sample, slots, "responses are sampled", "--sampling_batch_size")
        return gathering.groups()

    def close(self) -> None:
        """Does nothing: the policy is the caller's."""

    def why_not(self) -> str | None:
        """Returns why this loop cannot sample from the policy; None if it gives the log-probs it is scored by."""
        model, family = self.policy.model, self.policy.family
        if limits := limits_unknown_here(model.config):
            return f"{family} limits what a token sees in a way that is not known here ({', '.join(limits)})"
        try:
            found = self._difference()
            if window_of(model.config):  # most windows are longer than the probe
                with narrow_window(model.config.get_text_config(), PROBE_WINDOW):
                    found = max(found, self._difference())
        except UserError as error:  # families without such a cache fail in their own ways
            return str(error)
        if found > LOGP_TOLERANCE[torch.float32]:
            return f"{family} gives log-probs there that are up to {found:.2g} nats a token off"
        return None

    def _difference(self) -> float:
        """Returns the largest difference between sampled and scored log-probs of a few responses; see ``probe``."""

        def generate(prompts: list[list[int]], keys: list[int], max_new_tokens: int) -> list[Response]:
            requests = [Request(prompt, key, (i, 0)) for i, (prompt, key) in enumerate(zip(prompts, keys))]
            found: dict[tuple[int, int], Response] = {}
            self._decode(requests, PROBE_SLOTS, max_new_tokens, found.__setitem__)
            return [found[request.place] for request in requests]

        return difference(self.policy, generate)

    def _decode(self, requests: Sequence[Request], slots: int, max_new_tokens: int, finish: Finish) -> None:
        """Samples responses and hands each over as it ends. Requests of one prompt are next to each other."""
        policy = self.policy
        policy.model.eval()
        draw = Draw(policy.device, self.config.temperature, self.config.top_p)
        with policy.autocast(), policy.generating(masked=True), fast_linears(policy.model, policy.autocast_dtype):
            DecodeLoop(policy, draw, requests, slots, max_new_tokens).run(finish)


class DecodeLoop:
    """The rows of one batch, from the first request to the last."""

    def __init__(
        self, policy: Policy, draw: Draw, requests: Sequence[Request], slots: int, max_new_tokens: int
    ) -> None:
        self.policy, self.draw, self.slots, self.max_new_tokens = policy, draw, slots, max_new_tokens
        self.waiting = deque(requests)
        self.rows: list[Row] = []  # each in the slot of its index
        self.prompt: tuple[Sequence[int], DynamicCache, int] | None = None  # the last one, its cache and row there
        longest = max((len(one.prompt) for one in requests), default=0)
        self.cache = SlotCache(slots, longest + max_new_tokens, policy.compute_dtype)

    def run(self, finish: Finish) -> None:
        """Samples all responses."""
        while self.waiting or self.rows:
            with computing(f"a model of the family {self.policy.family}"):
                if self.waiting and (not self.rows or self.slots - len(self.rows) >= max(1, self.slots // REFILL)):
                    self._enter()
                self._step()
            self._leave(finish)

    def _enter(self) -> None:
        """Gives the free slots to waiting responses, whose prompts are computed."""
        free = self.slots - len(self.rows)
        entering = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        slots: dict[int, list[int]] = {}  # by the identity of the prompt
        for request in entering:
            slots.setdefault(id(request.prompt), []).append(len(self.rows))
            self.rows.append(Row(request, len(request.prompt) - 1, request.prompt[-1]))
        prompts = {id(request.prompt): request.prompt for request in entering}
        known = self.prompt and self.prompt[0]
        new = [prompt for prompt in prompts.values() if prompt is not known]
        if self.prompt is not None and id(known) in slots:
            self.cache.fill(slots[id(known)], *self.prompt[1:], len(known))
        for some in _together(new):
            cache = self._prefill(some)
            for row, prompt in enumerate(some):
                self.cache.fill(slots[id(prompt)], cache, row, len(prompt))
                self.prompt = prompt, cache, row  # the next response to enter may be of this one
        if not self.waiting:
            self.prompt = None

    def _prefill(self, prompts: list[Sequence[int]]) -> DynamicCache:
        """Computes prompts, padded on the right: what follows a token does not change it."""
        policy, width = self.policy, max(map(len, prompts))
        pad = pad_token(policy.model, policy.tokenizer)
        input_ids = torch.tensor([[*prompt] + [pad] * (width - len(prompt)) for prompt in prompts])
        cache = DynamicCache()
        positions = torch.arange(width, device=policy.device).expand(len(prompts), -1)
        backbone(policy.model)(
            input_ids=input_ids.to(policy.device), position_ids=positions, past_key_values=cache, use_cache=True
        )
        return cache

    def _step(self) -> None:
        """Computes one token of every row and draws the next."""
        policy, rows = self.policy, self.rows
        table = [[row.token, row.position, row.request.key, len(row.tokens)] for row in rows]
        tokens, positions, keys, drawn_before = torch.tensor(table).to(policy.device).unbind(1)
        columns = -(-(max(row.position for row in rows) + 1) // COLUMNS) * COLUMNS
        self.cache.expect(positions, columns)
        logits = policy.model(
            input_ids=tokens[:, None],
            past_key_values=self.cache,
            use_cache=True,
            **cached_attention_arguments(policy.model, positions, columns),
        ).logits[:, -1]
        drawn = torch.stack([one.double() for one in self.draw(logits, keys, drawn_before)])
        for row, token, logp in zip(rows, *drawn.tolist()):  # the only wait for a GPU
            row.token = int(token)
            row.position += 1
            row.tokens.append(row.token)
            row.logps.append(logp)

    def _leave(self, finish: Finish) -> None:
        """Hands over the responses that have ended; the last rows move to their slots."""
        eos = self.policy.eos_tokens
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if row.token in eos or len(row.tokens) == self.max_new_tokens:
                last = self.rows.pop()
                if last is not row:
                    self.rows[slot] = last
                    self.cache.move(len(self.rows), slot)
                finish(row.request.place, make_response(row.tokens, sum(row.logps), self.policy.tokenizer, eos))


def _together(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yields prompts that are computed in one forward pass."""
    some: list[Sequence[int]] = []
    for prompt in prompts:
        if some and (len(some) + 1) * max(len(prompt), *map(len, some)) > PROMPT_TOKENS:
            yield some
            some = []
        some = [*some, prompt]
    if some:
        yield some
