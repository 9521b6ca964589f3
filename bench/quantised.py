"""Quantises the tensors of a checkpoint in published formats; returns them with the ``quantization_config``."""

from __future__ import annotations

import torch
from torch import Tensor


def to_fp8(tensors: dict[str, Tensor], block: int = 128) -> tuple[dict[str, Tensor], dict]:
    """Quantises linear layers to float8 with a scale per block, as in DeepSeek-V3."""
    quantised = {}
    for name, weight in tensors.items():
        if weight.dim() != 2 or name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight")):
            quantised[name] = weight
            continue
        rows, columns = (-(-size // block) for size in weight.shape)
        scales = torch.zeros(rows, columns)
        values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scales[i, j] = weight[part].abs().max() / 448  # 448 is the largest float8 e4m3 number
                values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
        quantised[name] = values
        quantised[name + "_scale_inv"] = scales
    return quantised, {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [block, block],
        "activation_scheme": "dynamic",
    }


def to_mxfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """Replaces experts by random MXFP4 numbers with a scale per 32 of them, as in gpt-oss; the rest is bfloat16."""
    quantised = {}
    random = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            quantised[name] = weight.bfloat16()
            continue
        experts, inputs, outputs = weight.shape
        shape = (experts, outputs, inputs // 32)
        quantised[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        quantised[name + "_scales"] = torch.full(shape, 124, dtype=torch.uint8)  # 2^(124 − 127)
    return quantised, {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
