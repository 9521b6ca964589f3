"""Loads a policy from a directory, a Hugging Face id or "smollm2", and refuses models that cannot be trained here."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config import ModelConfig
from ..device import device_of
from ..device_memory import release_freed
from ..errors import UserError
from .adapters import merge_into_base
from .attention import FLEX
from .checkpoint import (
    base_of,
    generation_settings,
    has_float32,
    loading_errors,
    locate,
    naming_adapter,
    processor_files,
    tensor_names,
    weight_files,
)
from .checks import check_log_probs, computing
from .execution import apply_liger, checkpoint_layers, without_cudnn_attention
from .layouts import choose_layout
from .policy import Policy, pad_token
from .precision import convert_parameters, weights_dtype, weights_in


def load(source: str | Path, config: ModelConfig) -> Policy:
    """Loads a policy. An adapter's directory is loaded as its base with the adapter merged into it.

    Args:
        source: a directory, a Hugging Face id or "smollm2"; ``config.model`` is not read.

    Raises:
        UserError: if there is no model, or one that cannot be trained here; names it.
    """
    name, device, base = str(source), device_of(config.device), base_of(str(source))
    if config.attention == FLEX and device.type != "cuda":
        raise UserError(f"--attention {FLEX} needs a GPU: it has no backward pass on the device {device}")
    location, is_adapter = locate(base), base != name
    is_gguf = "gguf_file" in location
    tokenizer = _read_tokenizer(name, _tokenizer_location(name, location, config) if is_adapter else location, config)
    with naming_adapter(name) if is_adapter else nullcontext():
        model, model_config, dequantised = _read_model(base, location, config, device)
    if is_adapter:
        with weights_in(model, torch.float32):
            merge_into_base(model, name)
    own_generation = {} if is_gguf else generation_settings(base)
    _prepare_tokens(model, tokenizer, name, is_gguf)
    if getattr(model.config, "rescale_every", 0):  # RWKV scales its weights in evaluation mode, and would save them so
        model.config.rescale_every = 0
    _prepare_execution(model, device, config, name)
    weights = weights_dtype(config.weights)
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else weights}.get(config.dtype)
    save_dtype = weights if config.save_dtype == "auto" else getattr(torch, config.save_dtype)
    policy = Policy(
        model,
        tokenizer,
        device,
        dtype or getattr(torch, config.dtype),
        "separate",
        converted=dequantised or is_adapter,
        generation_config=own_generation,
        processor_files={} if is_gguf else processor_files(base),
        notes=[] if is_gguf else _left_out(model, model_config, base),
        template_variables=config.chat_template_kwargs or {},
        save_dtype=None if save_dtype == weights else save_dtype,
    )
    if weights == torch.bfloat16 and not is_gguf and not dequantised and has_float32(base):
        policy.notes.append(
            f"the weights of {base} are float32 on disk and rounded to bfloat16: what a small learning rate changed in "
            "them is lost (docs/tuning.md). Save them with --save_dtype bfloat16, or take --weights fp32"
        )
    if is_adapter:
        policy.notes.append(f"{name} is an adapter: merged into its base model {base}, in {str(weights)[6:]}")
    _check_template(policy, name)
    with policy.in_float32(), computing(f"the model {name} ({policy.family})"):
        check_log_probs(policy, name)
    choose_layout(policy, config.attention, name)
    return policy


def check_saved(directory: Path, policy: Policy, config: ModelConfig) -> None:
    """Reads a saved policy back.

    Raises:
        UserError: if its weights are not those in memory, bit for bit.
    """
    saved, _, _ = _read_model(str(directory), locate(str(directory)), config, torch.device("cpu"))
    there = dict(saved.named_parameters())
    for name, parameter in policy.model.named_parameters():
        if not torch.equal(there[name], parameter.detach().cpu()):
            raise UserError(
                f"{directory} was not saved as it is in memory ({name}): its files may be damaged, --resume"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def _tokenizer_location(adapter: str, base: dict[str, str], config: ModelConfig) -> dict[str, str]:
    """Returns where an adapter's tokenizer is: in its directory or, as arguments of ``from_pretrained``, in its base.

    Raises:
        UserError: if --trust_remote_code is set, which would also trust whoever made the base.
    """
    if config.trust_remote_code:
        raise UserError(
            f"{adapter} is an adapter, and --trust_remote_code would also run the code of any base model that it "
            "names: merge it into its base first"
        )
    own = (Path(adapter) / "tokenizer_config.json").is_file()
    return {"pretrained_model_name_or_path": adapter} if own else base


def _read_tokenizer(name: str, location: dict[str, str], config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer. Raises ``UserError`` if it has no chat template."""
    with loading_errors("the tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=config.trust_remote_code)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {name} has no chat template, which is needed to render prompts")
    return tokenizer


def _prepare_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, is_gguf: bool) -> None:
    """Checks the vocabulary, and sets the tokens that end and pad rows.

    Raises:
        UserError: if model and tokenizer do not fit each other.
    """
    _check_vocabulary(model, tokenizer, name)
    if is_gguf:
        # the token comes from the file; transformers 5.17 gives the tokenizer another one
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    _keep_only_tokens(model, tokenizer, name)


def _keep_only_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Drops the model's generation settings except its tokens: a repetition penalty would change the policy."""
    own = model.generation_config
    eos = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    eos = [token for token in [*eos, tokenizer.eos_token_id] if token is not None]
    for name, token in [("eos_token_id", token) for token in eos] + [("bos_token_id", own.bos_token_id)]:
        if token is not None and not (isinstance(token, int) and 0 <= token < 2**31):
            raise UserError(f"the generation_config.json of {source} has the {name} {token!r}, which is not a token")
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(set(eos)),
        pad_token_id=pad_token(model, tokenizer),
    )


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Raises ``UserError`` if a token of the tokenizer's own vocabulary has no row in the embedding.

    A token that was added may lie beyond: text-only Gemma-3 has one for images. ``_check_template`` and
    ``PromptRenderer.render`` refuse such a token where it would reach the model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    added = set(tokenizer.added_tokens_decoder)
    highest = max((token for token in tokenizer.get_vocab().values() if token not in added), default=-1)
    if highest >= rows:
        raise _too_few_rows(source, highest, rows)


def _check_template(policy: Policy, source: str) -> None:
    """Raises ``UserError`` if a token that the chat template adds has no row in the embedding."""
    try:
        hello = [{"role": "user", "content": "Hello"}]
        tokens = policy.renderer.apply_template(hello, None, return_dict=True)["input_ids"]
    except Exception:  # a template may refuse this conversation; each prompt is checked when it is rendered
        return
    if tokens and max(tokens) >= policy.vocabulary:
        raise _too_few_rows(source, max(tokens), policy.vocabulary)


def _too_few_rows(source: str, highest: int, rows: int) -> UserError:
    return UserError(
        f"the tokenizer of {source} does not fit its model: it has tokens up to {highest}, and the embedding has "
        f"{rows} rows. Take the tokenizer that the model was trained with, or resize_token_embeddings and save"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def _read_model(
    name: str, location: dict[str, str], config: ModelConfig, device: torch.device
) -> tuple[PreTrainedModel, PretrainedConfig, bool]:
    """Loads the model on the CPU; where several ranks do, on the GPU of each, past the host's memory.

    Returns:
        The model with weights in the dtype of --weights, its configuration, and whether the weights were quantised on
        disk.

    Raises:
        UserError: if it, or a part of it, cannot be read.
    """
    is_gguf, trust = "gguf_file" in location, {"trust_remote_code": config.trust_remote_code}
    shares_host = dist.is_initialized() and not is_gguf  # with other ranks, which load too
    attention = config.attention
    if attention == "auto":
        attention = "sdpa" if is_gguf else None  # None: what the model prefers
    if not is_gguf:
        weight_files(name)  # refuses weights that are not safetensors of the model's own, also those of the hub
    with loading_errors("the model", name):
        model_config = AutoConfig.from_pretrained(**location, **trust)
        kind = model_class(model_config, name)
        quantised = is_gguf or _request_dequantised(model_config, name)
        model, found = kind.from_pretrained(
            **location,
            **trust,
            **({} if is_gguf else {"config": model_config}),
            dtype=weights_dtype(config.weights),
            attn_implementation=attention,
            device_map=torch.cuda.current_device() if shares_host and device.type == "cuda" else None,
            use_safetensors=None if is_gguf else True,  # reading a pickle may run code
            ignore_mismatched_sizes=True,  # so that _check_complete names them
            output_loading_info=True,
        )
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int) and layers < 0:  # transformers loads it without layers
            raise ValueError(f"its config.json says num_hidden_layers: {layers}")
    _check_complete(found, name)
    if device.type == "cpu" and not is_gguf:
        _copy_from_file(model)
    _make_plain(model, quantised, weights_dtype(config.weights), name)
    return model, model_config, quantised


def _copy_from_file(model: PreTrainedModel) -> None:
    """Copies weights that are a file mapped into memory, so that nothing depends on the file or keeps its pages."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    release_freed()


def model_class(config: PretrainedConfig, source: str) -> type:
    """Chooses the class that loads the model: a causal language model, or the whole model that contains one.

    A model that also takes images or sound is loaded whole: as a causal language model alone, it would be saved without
    the rest (``_left_out``).

    Raises:
        UserError: if it is an encoder with a decoder.
    """
    if config.is_encoder_decoder:
        raise UserError(
            f"{source} ({config.model_type}) is an encoder with a decoder: a policy is a causal language model, a "
            "decoder alone"
        )
    if config.get_text_config() is config:
        return AutoModelForCausalLM
    names = config.architectures if isinstance(config.architectures, list) else []
    named = getattr(transformers, str(names[0]), None) if names else None
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate()
    if is_model and isinstance(config, named.config_class):
        return named
    is_known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if is_known and not is_model else AutoModelForCausalLM


DEQUANTISED = ("fp8", "mxfp4")  # quant_method of the formats that transformers dequantises while loading


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Returns a configuration and those of its parts, each of which may have a quantization_config."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for part in parts if isinstance(part, PretrainedConfig))]


def _request_dequantised(config: PretrainedConfig, source: str) -> bool:
    """Sets the configuration of a quantised checkpoint to be dequantised; returns whether it is one.

    Raises:
        UserError: if its format cannot be dequantised.
    """
    found = [one for part in _configs(config) if (one := getattr(part, "quantization_config", None)) is not None]
    if not found:
        return False
    quantisation = found[0] if isinstance(found[0], dict) else found[0].to_dict()
    method = str(quantisation.get("quant_method", "by no method that it names")).lower()
    if method not in DEQUANTISED:
        raise UserError(
            f"{source} is quantised ({method}), and training needs plain weights: take the model that it was made "
            f"from, or dequantise it and save that (of quantised ones, {' and '.join(DEQUANTISED)} are read)"
        )
    for part in _configs(config)[1:]:
        part.__dict__.pop("quantization_config", None)
    config.quantization_config = {**quantisation, "quant_method": method, "dequantize": True}
    return True


def _make_plain(model: PreTrainedModel, dequantised: bool, dtype: torch.dtype, source: str) -> None:
    """Prepares a dequantised model to be saved with plain weights.

    Raises:
        UserError: if the model is still quantised.
    """
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not dequantised:
        raise UserError(f"{source} is quantised, and training needs plain weights: dequantise it and save that")
    if not dequantised:
        return
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    model._weight_conversions = None  # the quantisation's would convert saved weights into its format again
    for part in _configs(model.config):
        part.__dict__.pop("quantization_config", None)
    convert_parameters(model.float(), dtype)


def _check_complete(found: dict, source: str) -> None:
    """Raises ``UserError`` if files and model do not have the same weights, which would be random or lost."""
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{source} lacks {len(missing)} of the weights that its config.json asks for, as {missing[0]}")
    check_shapes(found, source)
    if unexpected := sorted(name for name in found["unexpected_keys"] if not DERIVED.search(name)):
        raise UserError(
            f"{source} has {len(unexpected)} weights that its config.json does not know, as {unexpected[0]}: they "
            "would be left out of what is computed and saved. If its config.json is of another model, or lacks a "
            "quantization_config, put that right; if they are not needed, drop them once: "
            f"AutoModelForCausalLM.from_pretrained({source!r}).save_pretrained(DIR), and the tokenizer too"
        )


def check_shapes(found: dict, source: str) -> None:
    """Raises ``UserError`` if tensors have other shapes than the model; ``found`` is transformers' loading info."""
    if mismatched := sorted(found["mismatched_keys"], key=str):
        name, there, wanted = mismatched[0]
        raise UserError(
            f"the weights of {source} do not fit its config.json: {name} is {tuple(there)} where it says "
            f"{tuple(wanted)}{'' if len(mismatched) == 1 else f', and {len(mismatched) - 1} more'}"
        )


# buffers that are computed, never trained; some early checkpoints have them
DERIVED = re.compile(r"(inv_freq|position_ids|attn\.bias|attention\.bias|masked_bias|causal_mask)$")


def _left_out(model: PreTrainedModel, config: PretrainedConfig, source: str) -> list[str]:
    """Returns a note on tensors of the checkpoint that the model's class leaves out on purpose; none without them.

    Raises:
        UserError: if they belong to a part that takes images or sound.
    """
    patterns = model._keys_to_ignore_on_load_unexpected
    left_out = [
        name
        for name in tensor_names(source)
        if any(re.search(pattern, name) for pattern in patterns) and not DERIVED.search(name)
    ]
    if not left_out:
        return []
    if config.get_text_config() is not config:
        raise UserError(
            f"{source} has {len(left_out)} tensors, as {sorted(left_out)[0]}, that {type(model).__name__} leaves out, "
            "and every policy would lack them: name the class of the whole model under architectures in its config.json"
        )
    return [
        f"{len(left_out)} tensors of {source}, as {sorted(left_out)[0]}, are no part of {type(model).__name__}, and no "
        "policy of this run will have them"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Device and kernels
# ---------------------------------------------------------------------------------------------------------------------


def _prepare_execution(model: PreTrainedModel, device: torch.device, config: ModelConfig, name: str) -> None:
    """Moves the model to its device, with the attention, gradient checkpointing and kernels that are asked for.

    Raises:
        UserError: if the model or the device does not support them.
    """
    without_cudnn_attention()
    model.to(device).requires_grad_(True)
    if device.index is not None:
        torch.cuda.set_device(device)  # kernels of Triton run on the current GPU
    if config.gradient_checkpointing:
        with loading_errors("with --gradient_checkpointing the model", name):
            layers = checkpoint_layers(model)
        if not layers:
            raise UserError(
                f"--gradient_checkpointing: {name} ({model.config.model_type}) has no layers that support it: leave it "
                "out"
            )
    apply_liger(model, device, config.liger)
