"""A policy: a causal language model with its tokenizer. Prompts rendered, hidden states, scores; saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ..conversations import (
    Messages,
    characters,
    has_tool_turns,
    message_text,
    template_forms,
    template_tools,
    tools_of,
)
from ..data import Group, Skipped
from ..errors import UserError
from ..files import atomic_write_directory
from ..loss import linear_logprobs
from ..packing import Layout, Packed, TokenGroup, microbatches, pack
from ..sources import quiet
from .heads import head_arguments

UNCHECKED_CHARACTERS = 2**17  # of a prompt, which are tokenised without a look at their number: 30 MB of memory
PIECE = 2**16  # characters of a longer one that are tokenised at a time
TOKENS_OF_A_CUT = 64  # by which a text's tokens may differ from those of its pieces, at each cut
PINNED_DATE = """--chat_template_kwargs '{"date_string": "01 Jan 2026"}' pins it in templates that take it"""


class Digest(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: bytes) -> None: ...


def _calls(prompt: Messages) -> bool:
    """Whether it has tool calls."""
    return any(message.get("tool_calls") for message in prompt)


class _LeftOut(Exception):
    """A chat template leaves something of a conversation out."""


@dataclass
class Policy:
    """A model on its device, and how to ask it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    compute_dtype: torch.dtype  # of autocast; the weights are float32
    layout: Layout
    converted: bool = False  # its weights on disk are in another format than the one it is saved in
    generation_config: dict[str, object] = field(default_factory=dict)  # the model's own, for whoever uses a policy
    processor_files: dict[str, bytes] = field(default_factory=dict)  # of a model that also takes images or sound
    notes: list[str] = field(default_factory=list)  # what a user should know about how it was loaded
    template_variables: dict[str, Any] = field(default_factory=dict)  # given to the chat template with every prompt

    @property
    def head(self) -> dict[str, object]:
        """The LM head as keyword arguments of ``fused_linear_pair_loss`` and ``linear_logprobs``."""
        return head_arguments(self.model)

    @property
    def eos_tokens(self) -> list[int]:
        """The tokens that end a response."""
        return self.model.generation_config.eos_token_id

    @cached_property
    def context(self) -> int | None:
        """Positions that the model knows, in tokens; None if it does not say."""
        text = self.model.config.get_text_config()
        said = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
        return next((value for value in said if isinstance(value, int) and value > 0), None)

    @property
    def family(self) -> str:
        """What transformers calls the architecture, as "llama"."""
        return self.model.config.model_type

    @property
    def attention(self) -> str:
        """The attention implementation, as transformers calls it."""
        return self.model.config._attn_implementation

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding: the model takes the tokens below."""
        return self.model.get_input_embeddings().weight.shape[0]

    @cached_property
    def rotary_boundary(self) -> int | None:
        """The row length, in tokens, beyond which LongRoPE rotates a whole batch by other angles; None without it."""
        parameters = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        of_layers = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
        boundaries = [
            one["original_max_position_embeddings"] for one in of_layers if one.get("rope_type") == "longrope"
        ]
        return min(boundaries, default=None)

    @cached_property
    def safe_length(self) -> float:
        """The longest row, in tokens, that any model of the family computes alike: within context and boundary."""
        return min((limit for limit in (self.context, self.rotary_boundary) if limit), default=math.inf)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Computes in float32 meanwhile, without flash-attention, which cannot."""
        dtype, attention = self.compute_dtype, self.attention
        other = "sdpa" if self.model._supports_sdpa else "eager"
        self.compute_dtype = torch.float32
        if is_flash(attention):
            self.model.set_attn_implementation(other)
        try:
            yield
        finally:
            self.compute_dtype = dtype
            if is_flash(attention):
                self.model.set_attn_implementation(attention)

    def begin_fit(self) -> None:
        """Puts the model into the mode for training: evaluation mode, where no dropout and no router noise is drawn.

        A policy's log-probs are not random. Only the layers that recompute their activations (gradient checkpointing)
        are marked as training, which is what they look at; see ``_checkpoint_layers``.
        """
        self.model.eval()
        for layer in checkpointed_layers(self.model):
            layer.training = True

    def autocast(self) -> torch.autocast:
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)

    def render(self, prompt: Messages, room: int = 0) -> list[int]:
        """The tokens of a conversation through the chat template, up to where the assistant speaks.

        Raises:
            UserError: if the template refuses it or leaves tool turns out, or it leaves no ``room`` (tokens) for a
                response; says where it was read, if it knows.
        """
        where = getattr(prompt, "where", "")
        about = f"{where}: " if where else ""
        about_prompt = f"the prompt that ends {message_text(prompt[-1])[:60]!r}"
        try:
            messages, tools = self._for_template(prompt), template_tools(prompt)
            long = self.context and characters(prompt) > UNCHECKED_CHARACTERS
            if long and self._exceeds(self._through_template(messages, tools, tokenize=False), self.context - room):
                tokens, length = None, f"more than {max(0, self.context - room)}"
            else:
                tokens = self._through_template(messages, tools, return_dict=True)["input_ids"]
                length = str(len(tokens))
        except _LeftOut:
            raise UserError(
                f"{about}the model's chat template leaves out what tools are told or say in {about_prompt}"
            ) from None
        except Exception as error:  # a template is a program, and not ours
            raise UserError(f"{about}the model's chat template refuses {about_prompt}: {error}") from error
        if tokens == []:
            raise UserError(f"{about}the model's chat template makes nothing of {about_prompt}")
        if tokens is None or (self.context and len(tokens) + room > self.context):
            raise UserError(
                f"{about}{about_prompt} has {length} tokens: with --max_new_tokens {room} it exceeds the model's "
                f"context of {self.context} tokens"
            )
        if (highest := max(tokens)) >= self.vocabulary:
            named = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(
                f"{about}{about_prompt} has the token {named!r} ({highest}), and the model's embedding has "
                f"{self.vocabulary} rows: leave it out of the prompt"
            )
        boundary = self.rotary_boundary
        if boundary and len(tokens) <= boundary < len(tokens) + room - 1:
            raise UserError(
                f"{about}{about_prompt} has {len(tokens)} tokens: with --max_new_tokens {room} a response may cross "
                f"the {boundary} tokens at which the model's rotary embedding (longrope) changes all of its angles, so "
                "that what was sampled is not what is scored; lower --max_new_tokens, or leave the prompt out"
            )
        return tokens

    def _through_template(self, messages: Messages, tools: Sequence[dict] | None, **options: Any) -> Any:
        """``apply_chat_template`` with the configuration's variables of the template."""
        options = {"add_generation_prompt": True, **self.template_variables, **options}
        return self.tokenizer.apply_chat_template(messages, tools=tools, **options)

    def _for_template(self, prompt: Messages) -> Messages:
        """The messages in the form that the chat template takes.

        The role "developer" is OpenAI's newer name of "system". A template that does not name it would refuse it, leave
        the message out, or open a turn that the model has never seen, so it gets "system".

        Raises:
            _LeftOut: if the template writes no form of the calls or results of tools whole.
        """
        tools = template_tools(prompt)
        roles = {message["role"] for message in prompt}
        if "developer" in roles and "developer" not in str(self.tokenizer.chat_template):
            renamed = {"developer": "system"}
            prompt = [{**message, "role": renamed.get(message["role"], message["role"])} for message in prompt]
        if not has_tool_turns(prompt):
            return prompt
        refusals: list[Exception] = []
        for messages, marked, marks in template_forms(prompt):
            try:
                text = self._through_template(marked, tools, tokenize=False)
            except Exception as error:  # the next form may do
                refusals.append(error)
            else:
                if all(mark in text for mark in marks):
                    return messages
                refusals.insert(0, _LeftOut())  # says more than what another form runs into
        raise refusals[0]

    def _exceeds(self, text: str, limit: int) -> bool:
        """Whether a long text has more tokens than the limit, found without tokenising it whole.

        A tokenizer takes about 230 bytes a character. Its longest token times the context is no help as a bound: with
        tokens of 128 characters and a context of 131072 that is 16 million characters, and an unknown token, or blanks
        that a tokenizer drops, stand for any number. So pieces are tokenised, one after the other, until there are
        too many. Cutting a text changes its tokens only near the cuts, for which tokens are allowed.
        """
        count = 0
        for start in range(0, len(text), PIECE):
            with quiet():  # transformers warns of long texts
                piece = self.tokenizer.encode(text[start : start + PIECE], add_special_tokens=False)
            count += max(0, len(piece) - TOKENS_OF_A_CUT)
            if count > limit:
                return True
        return False

    def usable(
        self, prompts: Sequence[Messages], room: int, skipped: Skipped | None, digest: Digest | None = None
    ) -> list[Messages]:
        """The prompts that ``render`` takes; ``skipped`` counts the others, which otherwise are an error.

        Args:
            digest: of ``hashlib``; it is updated with the tokens of every prompt that is returned.

        Raises:
            UserError: what ``render`` says; or if none is left.
        """
        fitting = []
        for prompt in prompts:
            try:
                tokens = self.render(prompt, room)
            except UserError as error:
                if skipped is None:
                    raise
                skipped.add(error)
            else:
                fitting.append(prompt)
                if digest is not None:
                    digest.update(np.array([len(tokens), *tokens], np.int64).tobytes())
        if not fitting:
            raise UserError(f"no prompt is left: {skipped}")
        return fitting

    def template_notices(self, prompts: Sequence[Messages]) -> list[str]:
        """What a user should know of how the chat template writes these prompts, a line each; they are usable."""
        notices, name = [], "the model's chat template"

        def written(prompt: Messages, tools: Sequence[dict] | None, **variables: object) -> str | None:
            """None where the template refuses it."""
            try:
                return self._through_template(self._for_template(prompt), tools, tokenize=False, **variables)
            except Exception:  # a template is a program, and not ours
                return None

        one = next((prompt for prompt in prompts if tools_of(prompt)), None)
        if one and written(one, template_tools(one)) == written(one, None):
            notices.append(f"{name} leaves out the tools that prompts come with: the policy is not told of them")
        one = next((prompt for prompt in prompts if _calls(prompt)), None)
        if one and not _calls(self._for_template(one)):
            notices.append(f"{name} writes no tool calls: the policy reads them as JSON in the assistant's text")
        if written(prompts[0], template_tools(prompts[0]), strftime_now="no function") is None:  # it was called
            notices.append(
                f"{name} writes today's date into prompts: a run of more than a day has several, and --resume refuses "
                f"another one; {PINNED_DATE}"
            )
        return notices

    def truncation_remedy(self, max_new_tokens: int) -> str:
        """What may be wrong where every response is cut off: a turn's end that is no end-of-sequence token, or a limit
        that is too small."""
        small = f"--max_new_tokens {max_new_tokens} may be too small"
        answer = "Fine"
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        try:
            text = self._through_template(turns, None, tokenize=False, add_generation_prompt=False)
        except Exception:  # a template may refuse this conversation
            return small
        after = self.tokenizer.encode(text.partition(answer)[2].lstrip(), add_special_tokens=False)[:1]
        if not after or after[0] in self.eos_tokens or after[0] not in self.tokenizer.added_tokens_decoder:
            return small
        ends = ", ".join(f"{token} ({self.tokenizer.decode([token])!r})" for token in self.eos_tokens) or "nothing"
        return (
            f"the chat template ends a turn of the assistant with the token {after[0]} "
            f"({self.tokenizer.decode(after)!r}), which does not end a response here: only {ends} does. If the model "
            f"has learned to end its turns so, add {after[0]} to eos_token_id in the model's generation_config.json, "
            f"and begin a new run; if not, {small}"
        )

    def hidden_states(self, packed: Packed) -> Tensor:
        """(N, H): the hidden states that predict the response tokens. Differentiable."""
        # rows of their own need no positions, which not every family takes
        positions = {} if packed.layout == "separate" else {"position_ids": packed.position_ids}
        output = backbone(self.model)(
            input_ids=packed.input_ids, attention_mask=packed.attention_mask, use_cache=False, **positions
        )
        return output.last_hidden_state.flatten(0, 1)[packed.rows]

    def frozen(self) -> Policy:
        """The same policy, without gradients: an anchor."""
        self.model.eval().requires_grad_(False)
        return self

    def save(self, directory: Path) -> None:
        """Writes weights (safetensors), configuration, tokenizer and processor files, atomically."""

        def fill(partial: Path) -> None:
            with quiet():
                self.model.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)
            if self.generation_config:  # what is there now has only the tokens: the rest is not for training
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
    """Summed log-probs of every response: a (K,) float64 tensor a group, in nats.

    ``progress`` is told the groups done, a microbatch at a time.
    """
    tokens = [token_group(group) for group in groups]
    order: list[int] = []  # the groups, as they were scored
    sums: list[Tensor] = []  # of their responses, on the device: read once, at the end
    policy.model.eval()
    for chosen in microbatches(tokens, policy.layout, tokens_per_microbatch, policy.rotary_boundary):
        packed = pack([tokens[i] for i in chosen], policy.layout).to(policy.device)
        with policy.autocast():
            per_token = linear_logprobs(policy.hidden_states(packed), targets=packed.targets, **policy.head)
        lengths = packed.cu_seqlens.diff().tolist()
        sums += [part.sum() for part in per_token.double().split(lengths)]
        order += chosen
        progress(len(chosen))
    if not sums:
        return []
    parts = torch.stack(sums).cpu().split([len(groups[i].responses) for i in order])
    scores = dict(zip(order, parts))
    return [scores[i] for i in range(len(groups))]


def kl_estimate(groups: Sequence[Group], other: Sequence[Tensor]) -> float:
    """KL(π ‖ other) in nats a response, from responses of π and their log-probs (K,) under the other policy.

    Unbiased for responses drawn at temperature 1 without truncation.
    """
    own = torch.tensor([response.logp for group in groups for response in group.responses], dtype=torch.float64)
    return float((own - torch.cat(list(other))).mean())


# What log-probs of the same responses, computed in two ways, may differ by: nats, times the square root of a response's
# number of tokens, as errors of rounding add up. In bfloat16 a logit of 16 is rounded by 1/16.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
OUTLIERS = 0.01  # the share of responses that may differ by more: a mixture of experts may choose others at a tie


def disagreement(ours: Tensor, theirs: Tensor, tokens: Tensor, dtype: torch.dtype) -> str | None:
    """Whether summed log-probs of the same responses differ by more than rounding explains.

    Args:
        ours, theirs: (n,) float64, nats.
        tokens: (n,) of each response.
        dtype: of the computation.

    Returns:
        None if not; else by how much, in words.
    """
    differences = (ours - theirs).abs()
    beyond = ~(differences <= TOLERANCE[dtype] * tokens.clamp(min=1).sqrt())  # NaN is beyond
    if beyond.double().mean() <= OUTLIERS:
        return None
    worst = (differences / tokens.clamp(min=1)).max()
    return f"in {int(beyond.sum())} of {len(beyond)} responses, by up to {worst:.2g} nats a token"


def token_group(group: Group) -> TokenGroup:
    return group.prompt_tokens, [response.tokens for response in group.responses]


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a model below its LM head."""
    body = model.base_model
    if body is model:  # Llama 4 does not say
        body = getattr(model, "model", None) or model.get_decoder()
    return backbone(body) if body is not model and hasattr(body, "lm_head") else body


def pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with, which a mask hides: the tokenizer's, or any that the embedding has a row for."""
    pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
    return pad if pad is not None and pad < rows else 0


def is_flash(attention: str | None) -> bool:
    return "flash" in (attention or "")


def checkpointed_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that recompute their activations in the backward pass, when they are in training mode."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]
