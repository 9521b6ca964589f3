"""Models of a few thousand weights, for tests in which only their kind matters."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # tokens 0, 1 and 2: padding, begin, end
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens, the special ones and the 256 bytes, with a ChatML template."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.chat_template = CHATML
    return fast


def make_model(directory: Path) -> None:
    """Writes a Llama of two layers, whose weights come from a generator of integers, and a tokenizer of bytes."""
    make_tokenizer().save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randint(-100, 101, parameter.shape, generator=generator) / 256
            parameter.copy_(1 + values / 4 if parameter.dim() == 1 else values)
    model.save_pretrained(directory)


_SHARED = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": ("LlamaConfig", {**_SHARED, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**_SHARED, "num_key_value_heads": 2, "sliding_window": 16}),
    "gemma2": (  # every other layer has the window
        "Gemma2Config",
        {**_SHARED, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **_SHARED,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "lru_width": 64,
            "attention_window_size": 32,
            "block_types": ("recurrent", "recurrent", "attention"),
        },
    ),
    "rwkv": (
        "RwkvConfig",
        {
            "vocab_size": 272,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "context_length": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Makes weights larger than a fresh model's and biases not 0, so that a mistake in any shows in the log-probs."""
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() >= 2 else 0.1
        parameter.add_(torch.randn(parameter.shape), alpha=scale)


def make_family(name: str, directory: Path) -> None:
    """Writes a causal language model of a family with seeded random weights, and a tokenizer of bytes."""
    config, arguments = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments)).float()
    randomise(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # padding embeddings have no gradient, so training keeps 0
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
