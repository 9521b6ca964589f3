"""The LM head of a model, as the loss takes it: one weight, whatever is wrapped around it, or a line saying why not."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel


def head_arguments(model: PreTrainedModel) -> dict[str, Tensor | float | None]:
    """weight, bias, logit_scale and softcap of ``fused_linear_pair_loss`` and ``linear_logprobs``.

    Call it where the loss is called, before each: it reads the state of the head (adapters, gathered or not) as it is.
    Under DDP and FSDP2 both belong inside the forward of the wrapped module (docs/distributed.md).

    A LoRA adapter on the head is folded in: weight is W + Σ scaling·B·A over the active adapters, differentiable by W,
    A and B. That forms one [V, H] tensor (from a half-precision W, in float32 on the way), and its gradient is another.
    The sum is rounded to the dtype of W, and under autocast, in the loss, to autocast's: in half precision a change
    below half a spacing of W does not show until it has grown. peft's own forward keeps the products apart and shows
    it at once.

    Args:
        model: a causal language model, or a PeftModel around one; not wrapped for data parallelism.

    Returns:
        weight: (V, H), a floating-point tensor that gradients flow through; bias: (V,) or None; logit_scale, softcap:
        see ``logit_options``.

    Raises:
        ValueError: names the head and why it cannot be taken: no LM head, no 2-D weight, quantised, sharded and not
            gathered, or an adapter that is no constant low-rank term (dropout in training, DoRA, other tuners).
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"{type(model).__name__} must go around the module whose forward is the loss, not around the model alone: "
            "gradients of a loss that is computed outside are never reduced (docs/distributed.md)"
        )
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        raise ValueError(f"{type(model).__name__} has no LM head: its get_output_embeddings gives none")
    weight, bias = _weight_and_bias(output)
    return {"weight": weight, "bias": bias, **logit_options(model.config)}


def logit_options(config: PretrainedConfig) -> dict[str, float | None]:
    """How the model's family scales and caps its logits."""
    text = config.get_text_config()
    scale = 1.0
    if text.model_type != "mpt":  # its own code does not use the field of that name
        for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1, Muse
            scale *= getattr(text, name, None) or 1.0
    if scaling := getattr(text, "logits_scaling", None):  # Granite divides by it, HyperCLOVAX multiplies
        scale *= scaling if text.model_type.startswith("hyperclovax") else 1 / scaling
    scale /= getattr(text, "logits_mup_width_multiplier", None) or 1.0  # Inkling
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    cap = next((value for name in caps if (value := getattr(text, name, None))), None)
    return {"logit_scale": scale, "softcap": cap}


def _weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(V, H) and (V,) or None: what the head multiplies by and adds, through peft's wrappers.

    peft is an extra. Where it has not been imported, no module is one of its own.
    """
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if isinstance(head, BaseTunerLayer):
            return _with_adapters(head)
        if isinstance(head, ModulesToSaveWrapper):
            # as its forward chooses
            own = not head.disable_adapters and all(name in head.modules_to_save for name in head.active_adapters)
            chosen = head.modules_to_save[head.active_adapters[0]] if own and head.active_adapters else None
            return _weight_and_bias(head.original_module if chosen is None else chosen)
        if isinstance(head, AuxiliaryTrainingWrapper):
            raise ValueError(f"the LM head is wrapped in peft's {type(head).__name__}, which is not supported")
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    name = f"the LM head, {type(head).__name__},"
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name} has no weight: it is quantised, or not linear")
    if weight.dim() != 2:
        raise ValueError(
            f"{name} has a weight of shape {tuple(weight.shape)}, not (V, H): it is quantised, not linear, or sharded "
            "and not gathered here (FSDP1, ZeRO-3)"
        )
    for tensor in (weight, bias):
        if tensor is not None:
            _expect_plain(name, tensor)
    return weight, bias


def _expect_plain(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, DTensor):
        placements = ", ".join(map(str, tensor.placements))
        raise ValueError(
            f"{name} is sharded here ({placements}): call the loss inside the forward of the module that fully_shard "
            "wraps, which gathers the head, and unshard() a head in a group of its own (docs/distributed.md); "
            "tensor-parallel heads are not supported"
        )
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name} holds a {type(tensor).__name__}, not an ordinary tensor: dequantise the head")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} is quantised ({tensor.dtype}): leave the head out of the quantisation")


def _with_adapters(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(V, H) and (V,) or None of a head in peft's hands."""
    from peft.tuners.lora.layer import Linear

    weight, bias = _weight_and_bias(head.get_base_layer())
    if head.merged:
        if head.disable_adapters:
            raise ValueError("the LM head's adapters are disabled and merged: call unmerge_adapter() on the model")
        return weight, bias
    if head.disable_adapters:
        return weight, bias
    kind = f"peft's {type(head).__module__.removeprefix('peft.tuners.')}.{type(head).__name__}"
    if type(head) is not Linear or head.fan_in_fan_out:
        raise ValueError(f"the LM head is wrapped in {kind}; only LoRA over a linear layer is folded in")
    active = [name for name in head.active_adapters if name in head.lora_A]
    for name in active:
        if name in head.lora_variant:
            raise ValueError(
                f"adapter {name!r} of the LM head is a LoRA variant, {type(head.lora_variant[name]).__name__}: only "
                "plain LoRA is folded in; leave the head out of its target_modules"
            )
        dropout = head.lora_dropout[name]
        if dropout.training and getattr(dropout, "p", 0) > 0:
            raise ValueError(
                f"adapter {name!r} of the LM head has dropout {dropout.p}, which differs by token, so that no weight "
                "has it in: set lora_dropout to 0, or leave the head out of its target_modules"
            )
    if not active:
        return weight, bias
    # float32 at least, and rounded once: autocast would multiply in half precision
    with torch.autocast(weight.device.type, enabled=False):
        total, shift = _wide(weight), None if bias is None else _wide(bias)
        for name in active:
            a, b = head.lora_A[name].weight, head.lora_B[name].weight
            for part in (a, b):
                _expect_plain(f"adapter {name!r} of the LM head", part)
            total = torch.addmm(total, b.to(total.dtype), a.to(total.dtype), alpha=head.scaling[name])
            if head.lora_B[name].bias is not None:
                step = head.lora_B[name].bias.to(total.dtype) * head.scaling[name]
                shift = step if shift is None else shift + step
        return total.to(weight.dtype), None if shift is None else shift.to(weight.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
