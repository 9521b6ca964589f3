"""Language models without weights: from a directory, a Hugging Face id's config.json, or a shape by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from ..models.checkpoint import loading_errors, locate
from ..models.loading import model_class

# shapes that need no file: those of the paper's models
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama3-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
    "mistral-7b": lambda: MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
}


def read_config(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Returns the configuration of a named shape, a directory, a Hugging Face id or "smollm2".

    Raises:
        UserError: if there is none.
    """
    if model in SHAPES:
        return SHAPES[model]()
    with loading_errors("the configuration of", model):
        return AutoConfig.from_pretrained(**locate(model), trust_remote_code=trust_remote_code)


def builder(config: PretrainedConfig, model: str, attention: str = "sdpa") -> Callable[[torch.dtype], PreTrainedModel]:
    """Returns a function that makes a model of this configuration, with weights of a dtype."""
    kind = model_class(config, model)

    def build(dtype: torch.dtype) -> PreTrainedModel:
        make = getattr(kind, "from_config", None) or kind._from_config
        return make(config, dtype=dtype, attn_implementation=attention)

    return build


def cache_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int | None:
    """Returns the bytes that sampling keeps for a token of a response or prompt; None if the shape does not say."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    layers, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    size = getattr(text, "head_dim", None) or (width // text.num_attention_heads if width and heads else None)
    return 2 * layers * heads * size * dtype.itemsize if layers and heads and size else None
