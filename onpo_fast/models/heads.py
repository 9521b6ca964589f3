"""The LM head of a model as arguments of the loss, through wrappers such as LoRA."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel


def head_arguments(model: PreTrainedModel) -> dict[str, Tensor | float | None]:
    """Returns weight, bias, logit_scale and softcap for ``fused_linear_pair_loss`` and ``linear_logprobs``.

    Call it before every call of the loss, as it reads the present state of the head: its adapters, and whether it is
    gathered. Under DDP and FSDP2 call both inside the forward of the wrapped module (docs/distributed.md).

    A LoRA adapter on the head is added to the weight, W + Σ scaling·B·A over the active adapters, differentiable by W,
    A and B. The sum is a [V, H] tensor (computed in float32 if W is in half precision), and so is its gradient. It is
    rounded to the dtype of W and, in the loss under autocast, to autocast's: in half precision, a change of less than
    half a spacing of W has no effect until it has grown. In peft's own forward, which keeps the products separate, it
    has an effect at once.

    Args:
        model: a causal language model, or a PeftModel around one; not wrapped for data parallelism.

    Returns:
        weight: (V, H), floating-point and differentiable; bias: (V,) or None; logit_scale and softcap: see
        ``logit_options``.

    Raises:
        ValueError: if the model has no LM head, or one that cannot be used: its weight is not 2-D, quantised, or
            sharded and not gathered, or an adapter is not a constant low-rank term (dropout in training, DoRA, other
            tuners). Names the head.
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
    """Returns logit_scale and softcap as the model's family defines them."""
    text = config.get_text_config()
    scale = 1.0
    if text.model_type != "mpt":  # its own code ignores the field of that name
        for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1, Muse
            scale *= getattr(text, name, None) or 1.0
    if scaling := getattr(text, "logits_scaling", None):  # Granite divides by it, HyperCLOVAX multiplies
        scale *= scaling if text.model_type.startswith("hyperclovax") else 1 / scaling
    scale /= getattr(text, "logits_mup_width_multiplier", None) or 1.0  # Inkling
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    cap = next((value for name in caps if (value := getattr(text, name, None))), None)
    return {"logit_scale": scale, "softcap": cap}


def _weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns the head's weight (V, H) and bias (V,) or None, through peft's wrappers.

    peft is optional: if it has not been imported, no module is one of its wrappers.
    """
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if isinstance(head, BaseTunerLayer):
            return _with_adapters(head)
        if isinstance(head, ModulesToSaveWrapper):
            # the same choice as in its forward
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
    """Raises ``ValueError`` if a tensor of the head is sharded, quantised or of a class of its own."""
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
    """Returns weight (V, H) and bias (V,) or None of a head that peft has wrapped."""
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
    # in float32 or more and rounded once; under autocast the products would be in half precision
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
    """Returns the tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
