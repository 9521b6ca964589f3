"""Tiny checkpoints with random weights, of the real model classes of transformers.

The tokenizer has one token per byte and a ChatML template. Weights are larger than a new model's and biases are not 0,
so that a mistake in attention, routing or the head shows in the log-probs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # tokens 0, 1 and 2: padding, begin, end
VOCABULARY = 272  # rows of the embedding: 256 bytes, special tokens, and unused tokens
IMAGE_TOKEN = 264  # the first of the placeholder tokens for images
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How to make a tiny checkpoint of a model family."""

    config: str  # name of the configuration class in transformers
    arguments: dict[str, Any]  # arguments of the configuration class
    about: str = ""  # special features, for the table
    model: str = ""  # name of the model class; default: the choice of AutoModelForCausalLM
    causal: bool = True  # whether it is a causal language model; if not, loading must be refused
    quantise: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict]] | None = field(default=None, repr=False)

    @property
    def exists(self) -> bool:
        """Whether this version of transformers has the family."""
        return hasattr(transformers, self.config) and (not self.model or hasattr(transformers, self.model))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of 259 tokens: three special tokens and 256 bytes."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.chat_template = CHATML
    return fast


def make_model(family: Family) -> PreTrainedModel:
    """Makes a model in float32 with seeded random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.arguments)
    if family.model:
        model = getattr(transformers, family.model)(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() >= 2 else 0.1
            parameter.add_(torch.randn(parameter.shape), alpha=scale)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # it has no gradient, and some models set it to 0 when loaded
    return model


def build(family: Family, directory: Path) -> None:
    """Writes model and tokenizer as published checkpoints have them, quantised if the family is."""
    model = make_model(family)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    if family.model.endswith("ForConditionalGeneration"):  # a file that must be kept beside the policy
        (directory / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}\n')
    if family.quantise:
        tensors, description = family.quantise(load_file(directory / "model.safetensors"))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": description}))
