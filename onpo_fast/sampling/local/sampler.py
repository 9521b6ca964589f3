"""Sampling with a decode loop of our own: rows that finish leave the batch, and waiting responses take their place.

A prompt is computed once. Its keys and values are copied to the rows of its responses, whose first step computes the
prompt's last token again, so that every token is drawn in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from ...config import SamplingConfig
from ...console import Progress, say
from ...data import Group, Messages, Response
from ...errors import UserError
from ...models.attention import cached_attention_arguments, limits_unknown_here, window_of
from ...models.checks import computing
from ...models.layouts import PROBE_WINDOW, narrow_window
from ...models.policy import LOGP_TOLERANCE, Policy, pad_token
from ...models.scoring import backbone
from ...out_of_memory import free, is_out_of_memory, naming_settings
from ..draw import Draw, stream_keys
from ..gathering import Gathering, make_response
from ..interface import OnGroup
from .linears import fast_linears
from .probe import difference
from .slots import SlotCache, States
from .steps import COLUMN_MULTIPLE, GraphedSteps, Steps, rounded

# Tokens of prompts, with padding, in one forward pass; a longer prompt goes alone. That of GPUs is not measured.
PROMPT_TOKENS = {"cpu": 128, "cuda": 8192}
REFILL = 16  # waiting responses enter when one slot in so many is free, so that their prompts go together
PROBE_SLOTS = 4  # fewer than the probe has responses: some enter when others have left

Finish = Callable[[tuple[int, int], Response], None]  # given the place of a request, and its response


@dataclass(eq=False)
class Row:
    """A response that waits or is being sampled."""

    prompt: Sequence[int]
    key: int  # of its random stream
    place: tuple[int, int]  # index of the prompt, and of the response
    tokens: list[int] = field(default_factory=list)  # sampled so far
    logps: list[float] = field(default_factory=list)  # of these, nats

    @property
    def context(self) -> list[int]:
        """What the next token follows."""
        return [*self.prompt, *self.tokens]

    @property
    def last(self) -> int:
        """The last token of the context, which goes into the model next."""
        return (self.tokens or self.prompt)[-1]

    @property
    def position(self) -> int:
        """The position of this token."""
        return len(self.prompt) + len(self.tokens) - 1


class LocalSampler:
    """Samples with continuous batching and a KV cache, on the policy's device.

    Args:
        policy: the policy to sample from.
        config: its ``sampling_batch_size``, which must be set, is the number of rows.

    Attributes:
        slots: the most rows at a time. It falls where their cache does not fit the memory.

    Raises:
        UserError: if there are CUDA graphs to capture and no GPU.
    """

    def __init__(self, policy: Policy, config: SamplingConfig) -> None:
        self.policy, self.config = policy, config
        self.slots = config.sampling_batch_size
        if config.cuda_graphs and policy.device.type != "cuda":
            raise UserError("--cuda_graphs needs a GPU")

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
            UserError: if a prompt and a response exceed the model's context, or one row does not fit the memory.
        """
        max_new_tokens, renderer = self.config.max_new_tokens, self.policy.renderer
        rendered = [renderer.render(prompt, max_new_tokens) for prompt in prompts]
        gathering = Gathering(prompts, rendered, responses_per_prompt, progress, first, on_group)
        places = gathering.places()
        keys = stream_keys([[*seed, first + p, k] for p, k in places], torch.device("cpu")).tolist()
        waiting = [Row(rendered[p], key, (p, k)) for (p, k), key in zip(places, keys)]
        boundary = self.policy.rotary_boundary or math.inf  # rows on its two sides are never in one batch
        for alike in (
            [row for row in waiting if len(row.prompt) <= boundary],
            [row for row in waiting if len(row.prompt) > boundary],
        ):
            if alike:
                slots = min(self.slots, len(alike))
                fitting = self._decode(alike, slots, max_new_tokens, gathering.add)
                if fitting < slots:
                    self.slots = fitting
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
            rows = [Row(prompt, key, (i, 0)) for i, (prompt, key) in enumerate(zip(prompts, keys))]
            found: dict[tuple[int, int], Response] = {}
            self._decode(rows, PROBE_SLOTS, max_new_tokens, found.__setitem__)
            return [found[row.place] for row in rows]

        return difference(self.policy, generate)

    def _decode(self, waiting: Sequence[Row], slots: int, max_new_tokens: int, finish: Finish) -> int:
        """Samples responses, hands each over as it ends, and returns the number of slots that fit the memory."""
        policy = self.policy
        policy.model.eval()
        draw = Draw(policy.device, self.config.temperature, self.config.top_p)
        with (
            naming_settings("the sampling of a single response"),
            policy.autocast(),
            policy.generating(masked=True),
            fast_linears(policy.model, policy.autocast_dtype),
        ):
            return DecodeLoop(policy, draw, waiting, slots, max_new_tokens, self._steps()).run(finish)

    def _steps(self) -> Callable[..., Steps]:
        """Returns what makes the steps of a loop, given the arguments of ``Steps``."""
        policy = self.policy
        if not self.config.cuda_graphs:
            return Steps
        return partial(GraphedSteps, device=policy.device, tolerance=LOGP_TOLERANCE[policy.compute_dtype])


class DecodeLoop:
    """The rows of one batch, from the first to the last.

    Args:
        policy, draw: give the logits, and draw from them.
        waiting: responses to sample, those of one prompt next to each other.
        slots: the most rows at a time.
        max_new_tokens: of a response.
        make_steps: given the arguments of ``Steps``, returns what launches the steps.
    """

    def __init__(
        self,
        policy: Policy,
        draw: Draw,
        waiting: Sequence[Row],
        slots: int,
        max_new_tokens: int,
        make_steps: Callable[..., Steps] = Steps,
    ) -> None:
        self.policy, self.draw, self.slots, self.max_new_tokens = policy, draw, slots, max_new_tokens
        self.make_steps = make_steps
        self.limit = max(len(row.prompt) for row in waiting) + max_new_tokens
        self.waiting = deque(waiting)
        self._begin()

    def _begin(self) -> None:
        """Makes the cache, in which nothing is yet."""
        self.rows: list[Row] = []  # each in the slot of its index
        self.known: States | None = None  # of the context of the next row to enter, where they are computed
        self.cache = SlotCache(self.slots, rounded(self.limit, COLUMN_MULTIPLE), self.policy.compute_dtype)
        self.steps = self.make_steps(partial(_forward, self.policy, self.cache), self.slots, self.limit)

    def run(self, finish: Finish) -> int:
        """Samples all responses and returns the number of slots at the end."""
        while self.waiting or self.rows:
            try:
                with computing(f"a model of the family {self.policy.family}"):
                    if self.waiting and (not self.rows or self.slots - len(self.rows) >= max(1, self.slots // REFILL)):
                        self._enter()
                    self._step()
            except Exception as error:
                if not is_out_of_memory(error) or self.slots == 1:
                    raise
            else:
                self._leave(finish)
                continue
            self._halve()  # outside of the except block, whose traceback holds the tensors
        return self.slots

    def _halve(self) -> None:
        """Begins anew with half the slots. Rows keep their tokens and wait again, to be computed like prompts."""
        self.slots //= 2
        self.waiting.extendleft(reversed(self.rows))
        self._begin()
        free()
        say(
            f"out of memory: from here on at most {self.slots} responses are sampled at a time; "
            f"--sampling_batch_size {self.slots} avoids that"
        )

    def _enter(self) -> None:
        """Gives the free slots to waiting rows. A context that some have in common, their prompt, is computed once."""
        entering = itertools.islice(self.waiting, self.slots - len(self.rows))
        groups = [(context, list(rows)) for context, rows in itertools.groupby(entering, lambda row: row.context)]
        if self.known is not None:
            (_, rows), states = groups.pop(0), self.known
            self._place(rows, states)
        for some in _together(groups, PROMPT_TOKENS.get(self.policy.device.type, PROMPT_TOKENS["cpu"])):
            computed = self._prefill([context for context, _ in some])
            for (_, rows), states in zip(some, computed):
                self._place(rows, states)
        self.known = None
        if self.waiting and self.waiting[0].context == self.rows[-1].context:
            self.known = [(keys.clone(), values.clone()) for keys, values in states]  # without the rest of its batch

    def _place(self, rows: list[Row], states: States) -> None:
        """Moves the first waiting rows, whose context has these states, to the next slots."""
        first = len(self.rows)
        self.cache.fill(range(first, first + len(rows)), states)
        self.rows += rows
        for _ in rows:
            self.waiting.popleft()

    def _prefill(self, contexts: list[list[int]]) -> list[States]:
        """Computes the states of contexts, padded on the right: what follows a token does not change it."""
        policy, width = self.policy, max(map(len, contexts))
        pad = pad_token(policy.model, policy.tokenizer)
        input_ids = torch.tensor([context + [pad] * (width - len(context)) for context in contexts])
        cache = DynamicCache()
        positions = torch.arange(width, device=policy.device).expand(len(contexts), -1)
        backbone(policy.model)(
            input_ids=input_ids.to(policy.device), position_ids=positions, past_key_values=cache, use_cache=True
        )
        return [
            [(layer.keys[i, :, : len(context)], layer.values[i, :, : len(context)]) for layer in cache.layers]
            for i, context in enumerate(contexts)
        ]

    def _step(self) -> None:
        """Computes one token of every row and draws the next."""
        rows = self.rows
        count, columns = self.steps.shape(len(rows), max(row.position for row in rows) + 1)
        table = [[row.last, row.position, row.key, len(row.tokens)] for row in rows]
        table += [[0, 0, 0, 0]] * (count - len(rows))  # in slots that are free, and not drawn for
        tokens, positions, keys, drawn_before = torch.tensor(table).to(self.policy.device).unbind(1)
        logits = self.steps(tokens, positions, columns)[: len(rows)]
        keys, drawn_before = keys[: len(rows)], drawn_before[: len(rows)]
        drawn = torch.stack([one.double() for one in self.draw(logits, keys, drawn_before)])
        for row, token, logp in zip(rows, *drawn.tolist()):  # the only wait for a GPU
            row.tokens.append(int(token))
            row.logps.append(logp)

    def _leave(self, finish: Finish) -> None:
        """Hands over the responses that have ended; the last rows move to their slots."""
        eos = self.policy.eos_tokens
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if row.last in eos or len(row.tokens) == self.max_new_tokens:
                last = self.rows.pop()
                if last is not row:
                    self.rows[slot] = last
                    self.cache.move(len(self.rows), slot)
                finish(row.place, make_response(row.tokens, sum(row.logps), self.policy.tokenizer, eos))


def _forward(policy: Policy, cache: SlotCache, tokens: Tensor, positions: Tensor, columns: int) -> Tensor:
    """Returns the logits of the next token of the first n rows, (n, V); see ``Steps``."""
    cache.expect(positions, columns)
    return policy.model(
        input_ids=tokens[:, None],
        past_key_values=cache,
        use_cache=True,
        **cached_attention_arguments(policy.model, positions, columns),
    ).logits[:, -1]


def _together(groups: Sequence[tuple[list[int], list[Row]]], most: int) -> Iterator[list[tuple[list[int], list[Row]]]]:
    """Yields groups whose contexts, padded to one length, have at most so many tokens, or one context alone."""
    some: list[tuple[list[int], list[Row]]] = []
    for group in groups:
        if some and (len(some) + 1) * max(len(context) for context, _ in [*some, group]) > most:
            yield some
            some = []
        some = [*some, group]
    if some:
        yield some
