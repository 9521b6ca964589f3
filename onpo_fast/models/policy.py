"""A policy: a causal language model on its device, with its tokenizer. Scores responses; can be saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Group
from ..files import atomic_write_directory
from ..out_of_memory import in_halves
from ..packing import Layout, Packed, TokenGroup, microbatches, pack
from ..sources import quiet
from .adapters import Adapter
from .attention import FLEX, FLEX_COMPILATIONS, is_flash
from .execution import checkpointed_layers
from .heads import head_arguments
from .precision import weights_in
from .rendering import PromptRenderer
from .scoring import ScoringModule, sum_by_response


@dataclass
class Policy:
    """A causal language model with its tokenizer, and how it computes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None  # None where no prompt is rendered
    device: torch.device
    compute_dtype: torch.dtype  # dtype of matrix products, under autocast unless it is that of the weights
    layout: Layout
    converted: bool = False  # whether the weights on disk have another format than those that ``save`` writes
    generation_config: dict[str, object] = field(default_factory=dict)  # the model's own, saved for users of the policy
    processor_files: dict[str, bytes] = field(default_factory=dict)  # by name, of a model that takes images or sound
    notes: list[str] = field(default_factory=list)  # messages for the user on how the model was loaded
    template_variables: dict[str, Any] = field(default_factory=dict)  # variables for the chat template
    save_dtype: torch.dtype | None = None  # dtype of fitted policies on disk, if it is not that of the weights
    adapter: Adapter | None = None  # the LoRA layers of the model, if the policy is an adapter over a frozen base

    @cached_property
    def scoring(self) -> ScoringModule:
        """The module whose forward computes log-probs and losses; call it under ``autocast``."""
        return ScoringModule(self.model)

    @property
    def renderer(self) -> PromptRenderer:
        """Renders prompts for this policy."""
        return PromptRenderer(
            self.tokenizer,
            self.context,
            self.vocabulary,
            self.rotary_boundary,
            self.eos_tokens,
            self.template_variables,
        )

    @property
    def eos_tokens(self) -> list[int]:
        """The tokens that end a response."""
        return self.model.generation_config.eos_token_id

    @cached_property
    def context(self) -> int | None:
        """The number of positions that the model has, in tokens; None if it does not say."""
        text = self.model.config.get_text_config()
        limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
        return next((value for value in limits if isinstance(value, int) and value > 0), None)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weights; a family may keep some of them in float32."""
        return self.model.dtype

    @property
    def saves_rounded(self) -> bool:
        """Whether fitted policies are saved in less precision than that of the weights."""
        return self.save_dtype == torch.bfloat16

    @property
    def family(self) -> str:
        """The architecture by transformers' name, such as "llama"."""
        return self.model.config.model_type

    @property
    def attention(self) -> str:
        """The attention implementation by transformers' name, such as "sdpa"."""
        return self.model.config._attn_implementation

    @cached_property
    def vocabulary(self) -> int:
        """The number of rows of the embedding: tokens are below it."""
        return self.model.get_input_embeddings().weight.shape[0]

    @cached_property
    def head_rows(self) -> int:
        """The number of rows of the LM head, V. Raises ``ValueError`` if ``head_arguments`` refuses the head."""
        return head_arguments(self.model)["weight"].shape[0]

    @property
    def token_bound(self) -> int:
        """Exclusive upper bound of tokens: those below it have a row in the embedding and in the LM head."""
        return min(self.vocabulary, self.head_rows)

    @cached_property
    def rotary_boundary(self) -> int | None:
        """The row length, in tokens, beyond which LongRoPE rotates a whole batch by other angles; None without it."""
        parameters = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        by_layer = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
        boundaries = [one["original_max_position_embeddings"] for one in by_layer if one.get("rope_type") == "longrope"]
        return min(boundaries, default=None)

    @cached_property
    def safe_length(self) -> float:
        """The longest row, in tokens, within both ``context`` and ``rotary_boundary``."""
        return min((limit for limit in (self.context, self.rotary_boundary) if limit), default=math.inf)

    @property
    def plain_attention(self) -> str:
        """An attention implementation that computes in every dtype and on every device: "sdpa", or else "eager"."""
        if self.attention != FLEX and not is_flash(self.attention):
            return self.attention
        return "sdpa" if self.model._supports_sdpa else "eager"

    def use(self, attention: str, layout: Layout) -> None:
        """Sets the attention implementation, by transformers' name, and the layout that goes with it."""
        if attention != self.attention:
            self.model.set_attn_implementation(attention)
        if attention == FLEX:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FLEX_COMPILATIONS)
        self.layout = layout

    @contextmanager
    def using(self, attention: str, layout: Layout) -> Iterator[None]:
        """Uses another attention implementation and layout within the block."""
        before = self.attention, self.layout
        try:
            self.use(attention, layout)
            yield
        finally:
            self.use(*before)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Computes in float32 within the block, with an attention that can: flash-attention cannot.

        Weights in half precision are converted meanwhile.
        """
        dtype, plain = self.compute_dtype, self.plain_attention
        layout: Layout = self.layout if plain == self.attention else "separate"
        self.compute_dtype = torch.float32
        try:
            with self.using(plain, layout), weights_in(self.model, torch.float32):
                yield
        finally:
            self.compute_dtype = dtype

    @contextmanager
    def generating(self, masked: bool = False) -> Iterator[None]:
        """Replaces flex_attention within the block, which would compile for every length of the KV cache.

        Args:
            masked: whether the model is given masks of its rows, which flash-attention does not take either.
        """
        replaced = masked or self.attention == FLEX
        with self.using(self.plain_attention if replaced else self.attention, self.layout):
            yield

    def begin_fit(self) -> None:
        """Puts the model into evaluation mode for training, so that no dropout or router noise is drawn.

        A policy's log-probs are not random. Only layers with gradient checkpointing are marked as training, because
        transformers recomputes activations in no other mode; see ``execution.checkpoint_layers``.
        """
        self.model.eval()
        for layer in checkpointed_layers(self.model):
            layer.training = True

    def autocast(self, cached: bool = True) -> torch.autocast:
        """Returns the context in which the model computes; autocast is off where the weights have its dtype.

        Args:
            cached: whether weights in half precision are kept until its end: for several forward passes.
        """
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cached)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that autocast converts operands of products to; None where it is off."""
        return None if self.compute_dtype == self.weights_dtype else self.compute_dtype

    def frozen(self) -> Policy:
        """Turns gradients off, as a live anchor needs, and returns the same policy."""
        self.model.eval().requires_grad_(False)
        return self

    def save(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """Writes weights (safetensors), configuration, tokenizer and processor files, atomically.

        Of an adapter that is on, its own weights, in float32, and settings; the base's files are not repeated.

        Args:
            dtype: of the saved weights, whose values it must be able to hold; by default that of the weights.
        """
        only_adapter = self.adapter is not None and self.adapter.on

        def fill(partial: Path) -> None:
            with quiet(), nullcontext() if dtype is None else weights_in(self.model, dtype):
                self.tokenizer.save_pretrained(partial)
                if only_adapter:
                    self.adapter.save(partial)
                    return
                with self.adapter.removed() if self.adapter else nullcontext():
                    self.model.save_pretrained(partial)
            if self.generation_config:  # save_pretrained wrote only the tokens, which training needs
                settings = {**self.generation_config, "eos_token_id": self.eos_tokens}
                text = json.dumps(settings, indent=2, sort_keys=True) + "\n"  # as transformers writes it
                (partial / "generation_config.json").write_text(text, encoding="utf-8")
            for name, content in self.processor_files.items():
                (partial / name).write_bytes(content)

        atomic_write_directory(directory, fill)


@torch.no_grad()
def score(
    policy: Policy,
    groups: Sequence[Group],
    tokens_per_microbatch: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Tensor]:
    """Returns the summed log-probs of every response: a (K,) float64 CPU tensor per group, in nats.

    Args:
        tokens_per_microbatch: packed tokens, padding included, in one forward pass.
        progress: called with the number of groups of every micro-batch.
    """

    def sums(packed: Packed) -> list[Tensor]:
        return sum_by_response(policy.scoring(packed), packed.cu_seqlens)

    return _by_response(policy, groups, tokens_per_microbatch, progress, sums)


@torch.no_grad()
def features(
    policy: Policy,
    groups: Sequence[Group],
    tokens_per_microbatch: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Tensor]:
    """Returns the mean of the last hidden states over the tokens of every response: (K, H) float64 on the CPU a group.

    Each is the hidden state that a token was predicted from.

    Args:
        tokens_per_microbatch, progress: as for ``score``.
    """

    def means(packed: Packed) -> list[Tensor]:
        hidden = policy.scoring.hidden_states(packed).double()
        return [part.mean(0) for part in hidden.split(packed.cu_seqlens.diff().tolist())]

    return _by_response(policy, groups, tokens_per_microbatch, progress, means)


def _by_response(
    policy: Policy,
    groups: Sequence[Group],
    tokens_per_microbatch: int,
    progress: Callable[[int], None],
    compute: Callable[[Packed], list[Tensor]],
) -> list[Tensor]:
    """Returns what is computed of every response, stacked for each group; ``compute`` gives a tensor a response."""
    tokens = [token_group(group) for group in groups]
    order: list[int] = []  # indices of the groups in the order in which they were computed
    found: list[Tensor] = []  # one per response on the device, read once at the end
    policy.model.eval()

    def computed(some: Sequence[int]) -> list[list[Tensor]]:
        packed = pack([tokens[i] for i in some], policy.layout).to(policy.device)
        with policy.autocast():
            own = iter(compute(packed))
        return [[next(own) for _ in tokens[i][1]] for i in some]

    for chosen in microbatches(tokens, policy.layout, tokens_per_microbatch, policy.rotary_boundary):
        for group in in_halves(computed, chosen, "responses are scored", "--tokens_per_microbatch"):
            found += group
        order += chosen
        progress(len(chosen))
    if not found:
        return []
    parts = torch.stack(found).cpu().split([len(groups[i].responses) for i in order])
    by_group = dict(zip(order, parts))
    return [by_group[i] for i in range(len(groups))]


def kl_estimate(groups: Sequence[Group], other: Sequence[Tensor]) -> float:
    """Estimates KL(π ‖ other) in nats per response, from responses of π and their log-probs (K,) under the other.

    Unbiased for responses sampled at temperature 1 without truncation.
    """
    own = torch.tensor([response.logp for group in groups for response in group.responses], dtype=torch.float64)
    return float((own - torch.cat(list(other))).mean())


# The most by which log-probs of the same responses, computed in two ways, may differ: nats, times the square root of
# the number of tokens of a response, as rounding errors add up. In bfloat16 a logit of 16 is rounded by 1/16.
LOGP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
OUTLIERS = 0.01  # share of responses that may differ by more, as a mixture of experts may choose others at a tie


def disagreement(ours: Tensor, theirs: Tensor, tokens: Tensor, dtype: torch.dtype) -> str | None:
    """Describes a difference between summed log-probs of the same responses that rounding does not explain.

    Args:
        ours, theirs: (n,) float64, nats.
        tokens: (n,) number of tokens of each response.
        dtype: the dtype that they were computed in.

    Returns:
        None if they agree; otherwise how many differ and by how much, in words.
    """
    differences = (ours - theirs).abs()
    beyond = ~(differences <= LOGP_TOLERANCE[dtype] * tokens.clamp(min=1).sqrt())  # also NaN
    if beyond.double().mean() <= OUTLIERS:
        return None
    worst = (differences / tokens.clamp(min=1)).max()
    return f"in {int(beyond.sum())} of {len(beyond)} responses, by up to {worst:.2g} nats a token"


def token_group(group: Group) -> TokenGroup:
    """Returns a group as prompt tokens and response tokens."""
    return group.prompt_tokens, [response.tokens for response in group.responses]


def pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns a token to pad with under a mask: the tokenizer's, or 0 if the embedding has no row for that."""
    pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
    return pad if pad is not None and pad < rows else 0
