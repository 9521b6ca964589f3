"""LoRA through peft: policies as adapters over one frozen base, and adapters that are merged into their base.

A run with ``--lora_rank`` keeps one base in memory. Its policies differ only in the weights of the LoRA layers, which
``Adapter`` reads, writes and switches off: then the model is π_1, bit for bit.
"""

from __future__ import annotations

import math
import random
import re
import reprlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config.sections import LARGEST_RANK, ModelConfig
from ..errors import UserError, nearest
from ..files import MODEL_CARD
from ..sources import quiet
from .checkpoint import ADAPTER_CONFIG, adapter_settings, adapter_weights, loading_errors

LARGEST_ALPHA = 2**20  # beyond any use; a product with it stays finite in float32


class Adapter:
    """The LoRA layers of a model. New layers are off.

    Args:
        model: the base, on its device. Its layers are wrapped in place, and its own weights frozen.
        base: where the base is: a directory or a Hugging Face id.
        config: rank, scale and targets.

    Raises:
        UserError: if peft is not installed, the scale is too large or a target is not a linear layer; names the
            option.
    """

    def __init__(self, model: PreTrainedModel, base: str | Path, config: ModelConfig) -> None:
        self.model, self.base, self.config = model, base, config
        self.alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        if self.alpha > LARGEST_ALPHA:
            raise UserError(f"--lora_alpha must be at most {LARGEST_ALPHA}, not {self.alpha:g}")
        self.peft_model = self._wrap()
        self.switch(on=False)

    def _wrap(self) -> nn.Module:
        """Puts LoRA layers, in float32, into the model; returns peft's wrapper, which saves and removes them."""
        peft = peft_package("--lora_rank")
        names = self.config.lora_targets
        targets = names if names == "all-linear" else [name.strip() for name in names.split(",")]
        check_targets(self.model, targets)
        settings = peft.LoraConfig(
            r=self.config.lora_rank, lora_alpha=self.alpha, target_modules=targets, task_type="CAUSAL_LM"
        )
        try:
            with quiet():
                wrapper = peft.PeftModel(self.model, settings)
        except ValueError as error:  # layers that a family computes without their forward, as Mamba's
            raise UserError(f"--lora_targets {names}: {str(error).partition('. ')[0]}") from error
        settings.target_modules = sorted(settings.target_modules)  # a set, which would be saved in any order
        return wrapper

    def switch(self, on: bool) -> None:
        """Turns the layers on, with gradients, or off, which makes the model its base."""
        self.on = on
        tuner = self.peft_model.base_model
        tuner.enable_adapter_layers() if on else tuner.disable_adapter_layers()

    @torch.no_grad()
    def initialise(self, seed: str) -> None:
        """Turns the layers on with new weights: B = 0, and A as peft draws it, from this seed on any device."""
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        for name, parameter in self.peft_model.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
            elif ".lora_A." in name:
                drawn = torch.empty(parameter.shape)
                parameter.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
        self.switch(on=True)

    def load(self, directory: Path) -> None:
        """Turns the layers on with the weights that ``save`` wrote to a directory.

        Raises:
            UserError: if there are none, or they were trained with other options of LoRA.
        """
        import peft

        settings, tensors = adapter_settings(str(directory)), _read_tensors(str(directory))
        own = peft.get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        if settings.get("lora_alpha") != self.alpha or _shapes(own) != _shapes(tensors):
            raise UserError(
                f"the adapter {directory} was trained with another --lora_rank, --lora_alpha or --lora_targets"
            )
        peft.set_peft_model_state_dict(self.peft_model, tensors)
        self.switch(on=True)

    def save(self, directory: Path) -> None:
        """Writes the layers to a directory, as ``PeftModel.from_pretrained`` reads them."""
        is_directory = Path(self.base).is_dir()
        settings = self.peft_model.peft_config["default"]
        settings.base_model_name_or_path = str(Path(self.base).resolve() if is_directory else self.base)
        self.peft_model.save_pretrained(str(directory), save_embedding_layers=False)  # "auto" would ask the hub
        (directory / MODEL_CARD).unlink()  # peft's, which says nothing

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Takes the layers out of the model within the block, as saving the base needs. Their weights are lost."""
        self.peft_model.unload()
        try:
            yield
        finally:
            self.peft_model = self._wrap()
            self.switch(on=False)

    def merge(self) -> None:
        """Adds the layers to the weights of the model for good, which is then an ordinary one."""
        self.peft_model.merge_and_unload(safe_merge=True)


def peft_package(option: str) -> ModuleType:
    """Imports peft.

    Raises:
        UserError: if it is not installed; names the option that needs it.
    """
    try:
        with quiet():  # it imports torchao, which may complain of its own extensions
            import peft
    except ImportError:
        raise UserError(f"{option} needs the package peft: pip install 'onpo_fast[lora]'") from None
    return peft


def check_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    """Checks that every target names linear layers other than the LM head, before peft is asked.

    Args:
        targets: "all-linear", or names as peft takes them: a module's name, or the end of it after a dot.

    Raises:
        UserError: names the option, and the target that does not fit.
    """
    head = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, one in modules.items() if isinstance(one, (nn.Linear, Conv1D)) and one is not head]
    family = model.config.model_type
    if not linear:
        raise UserError(f"--lora_rank: a model of the family {family} has no linear layers: leave it out")
    if targets == "all-linear":
        return
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found:
            hint = nearest(target, known) or f"; it has {', '.join(known)}"
            raise UserError(f"--lora_targets {target}: a model of the family {family} has no layer of this name{hint}")
        if any(modules[name] is head for name in found):
            raise UserError(
                f"--lora_targets {target} is the LM head, which stays frozen under LoRA: its gradient is as large as "
                "the head. Leave it out, or leave out --lora_rank to train all weights"
            )
        if other := [name for name in found if name not in linear]:
            kind = type(modules[other[0]]).__name__
            raise UserError(f"--lora_targets {target}: {other[0]} is no linear layer ({kind}); take {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------------------------
# Adapters of other programs
# ---------------------------------------------------------------------------------------------------------------------

TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")  # with the name of the layer
MERGED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # settings that decide what is added
# settings that decide nothing once there are weights, beside those whose value is peft's default
WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern "
    "layers_to_transform lora_dropout peft_type peft_version revision target_modules task_type".split()
)
PLAIN_PATTERN = re.compile(r"[\w.^$\\-]*")  # of layers' names: without repetition, so that a search ends


def merge_into_base(model: PreTrainedModel, source: str) -> None:
    """Adds the LoRA adapter of a directory to the weights of its base model, which stays an ordinary model.

    Settings that are not known here are refused rather than ignored, and none of them runs code: the layers are those
    that have weights in the directory, and no module that the settings name is imported.

    Args:
        model: the base, on the CPU.

    Raises:
        UserError: if the adapter is not plain LoRA or does not fit the model; names the directory.
    """
    peft = peft_package(f"--model {source}, an adapter,")
    settings, tensors = _plain_settings(source, peft), _read_tensors(source)
    if unknown := sorted(name for name in tensors if not TENSOR.fullmatch(name)):
        raise UserError(f"{source} has {unknown[0]}, which is no weight of a LoRA layer: {_merge_yourself(source)}")
    layers = sorted({TENSOR.fullmatch(name)[1] for name in tensors})
    _check_layers(model, layers, source)
    with loading_errors("the adapter", source), warnings.catch_warnings(record=True):
        config = peft.LoraConfig(**settings, target_modules=layers, task_type="CAUSAL_LM")
        wrapper = peft.PeftModel(model, config, low_cpu_mem_usage=True)  # no memory for ranks that are only claimed
        own = peft.get_peft_model_state_dict(wrapper, save_embedding_layers=False)
        if _shapes(own) != _shapes(tensors):
            raise ValueError("its weights do not have the ranks of its settings, or the sizes of its base's layers")
        peft.set_peft_model_state_dict(wrapper, tensors, low_cpu_mem_usage=True)
        wrapper.merge_and_unload(safe_merge=True)
    model.requires_grad_(True)


def _plain_settings(source: str, peft: ModuleType) -> dict[str, Any]:
    """Returns the settings in ``MERGED``. Raises ``UserError`` if another one would change what is added."""
    settings, default = adapter_settings(source), peft.LoraConfig().to_dict()
    file = f"{source}/{ADAPTER_CONFIG}"
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{source} is an adapter of the kind {settings.get('peft_type')!r}, and only LORA is read")
    for name, value in settings.items():
        if name in MERGED or name in WITHOUT_EFFECT or not value or value == default.get(name):
            continue
        if name == "init_lora_weights" and value == "gaussian":
            continue  # other ways change the base
        raise UserError(f"{file} has {name}, which is not known here: {_merge_yourself(source)}")
    chosen = {name: settings[name] for name in MERGED if settings.get(name) is not None}
    if not isinstance(chosen.get("use_rslora", False), bool):
        raise UserError(f"{file}: use_rslora must be true or false, not {_shortly(chosen['use_rslora'])}")
    for name, pattern_name, is_valid, wanted in (
        ("r", "rank_pattern", _is_rank, f"an integer from 1 to {LARGEST_RANK}"),
        ("lora_alpha", "alpha_pattern", _is_scale, f"a positive number up to {LARGEST_ALPHA}"),
    ):
        if not is_valid(chosen.get(name)):
            raise UserError(f"{file}: {name} must be {wanted}, not {_shortly(chosen.get(name))}")
        patterns = chosen.get(pattern_name, {})
        if not isinstance(patterns, dict):
            raise UserError(f"{file}: {pattern_name} must be an object, not {_shortly(patterns)}")
        for key, value in patterns.items():
            if not PLAIN_PATTERN.fullmatch(key):
                raise UserError(f"{file} has the pattern {_shortly(key)}: {_merge_yourself(source)}")
            if not is_valid(value):
                raise UserError(f"{file}: {pattern_name}[{_shortly(key)}] must be {wanted}, not {_shortly(value)}")
    return chosen


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_RANK


def _is_scale(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= LARGEST_ALPHA


def _shortly(value: object) -> str:
    """Returns a value of somebody else's file for a message."""
    return reprlib.repr(value)


def _check_layers(model: PreTrainedModel, layers: list[str], source: str) -> None:
    """Raises ``UserError`` if the model does not have these linear layers, or shares one with its embedding."""
    modules, embedding = dict(model.named_modules()), model.get_input_embeddings()
    for name in layers:
        if not isinstance(modules.get(name), (nn.Linear, Conv1D)):
            raise UserError(f"{source} does not fit its base model, which has no linear layer {name}")
        if modules[name].weight is embedding.weight:
            raise UserError(f"{source} adapts {name}, whose weight is also the embedding: {_merge_yourself(source)}")


def _merge_yourself(source: str) -> str:
    return f"merge it with peft (PeftModel.from_pretrained(base, {source!r}).merge_and_unload()), and save the model"


def _read_tensors(source: str) -> dict[str, Tensor]:
    """Returns the tensors of an adapter's safetensors file in float32, by name."""
    with loading_errors("the adapter", source):
        return {name: tensor.float() for name, tensor in load_file(adapter_weights(source)).items()}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
