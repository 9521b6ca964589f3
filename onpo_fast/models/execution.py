"""How a model's layers execute: Liger's kernels, cuDNN's, gradient checkpointing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UserError


def without_cudnn_attention() -> None:
    """Turns off cuDNN's kernels in PyTorch's attention, its first choice on Hopper and Blackwell, for this process.

    With a mask they give NaN gradients (https://github.com/pytorch/pytorch/issues/196678) and other tokens
    (https://github.com/pytorch/pytorch/issues/193893), and they plan anew for every length, of which there are many.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def apply_liger(model: PreTrainedModel, device: torch.device, wanted: str) -> None:
    """Replaces layers of the model by Liger's kernels.

    Args:
        wanted: the value of --liger: "auto", "on" or "off".

    Raises:
        UserError: if they are "on" and cannot be used here.
    """
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
    # only the layers below the head, as the loss is computed by this package; rotary embeddings are a function of the
    # module that all its models share
    with _own_layers():
        _apply_liger_kernel_to_instance(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)


@contextmanager
def _own_layers() -> Iterator[None]:
    """Takes back what is replaced in transformers' modules within the block, so that other models keep their layers.

    Liger replaces the classes of layers there too. The memory of a fit is counted with a model on tensors without data,
    whose null pointers Liger's kernels would read, and an oracle's model may be on a device that they cannot use.
    """
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("transformers.models.") and ".modeling" in name
    ]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, own in zip(modules, before):
            vars(module).update(own)


def checkpointed_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the layers with gradient checkpointing, which recompute their activations in training mode."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]


def checkpoint_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Turns on gradient checkpointing and returns its layers, none if the model does not support it.

    transformers checkpoints only in training mode, in which a layer also draws dropout. So each layer is recomputed
    with its own mode set to evaluation.
    """
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    layers = checkpointed_layers(model)
    for layer in layers:
        layer._gradient_checkpointing_func = partial(
            _checkpoint_in_evaluation, layer, layer._gradient_checkpointing_func
        )
    return layers


def _checkpoint_in_evaluation(layer: nn.Module, checkpoint: Callable, forward: Callable, *inputs: object) -> object:
    def in_evaluation(*arguments: object) -> object:
        layer.training = False
        try:
            return forward(*arguments)
        finally:
            layer.training = True

    return checkpoint(in_evaluation, *inputs)
