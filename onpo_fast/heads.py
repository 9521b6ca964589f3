"""The LM head of a model, as the loss takes it."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel


def head_arguments(model: PreTrainedModel) -> dict[str, Tensor | float | None]:
    """weight, bias, logit_scale and softcap of ``fused_linear_pair_loss`` and ``linear_logprobs``."""
    output = model.get_output_embeddings()
    return {"weight": output.weight, "bias": getattr(output, "bias", None), **logit_options(model.config)}


def logit_options(config: PretrainedConfig) -> dict[str, float | None]:
    """How the model's family scales and caps its logits."""
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        scale *= getattr(text, name, None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
    return {"logit_scale": scale, "softcap": getattr(text, "final_logit_softcapping", None)}
