"""Configuration arguments that several families of zoo.py share: width 64, two layers, a vocabulary of 272."""

from __future__ import annotations

from typing import Any

from .tiny_checkpoints import IMAGE_TOKEN, VOCABULARY


def text(**changes) -> dict[str, Any]:
    """Arguments of most configurations, with ``changes``; an argument that is None is left out."""
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {name: value for name, value in {**shared, **changes}.items() if value is not None}


def gpt(**changes) -> dict[str, Any]:
    """Arguments of configurations with the names of GPT-2's, with ``changes``."""
    shared = {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**shared, **changes}


def encoder_decoder(**changes) -> dict[str, Any]:
    """Arguments of configurations with the names of BART's, with ``changes``."""
    shared = {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**shared, **changes}


WINDOW = {"sliding_window": 8}
SLIDING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
# 16 heads, since with few heads many scores are exactly 0, and which are kept then depends on the length of the row.
SPARSE = {**DEEPSEEK, "index_topk": 16, "index_head_dim": 8, "index_n_heads": 16}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
DELTA = {  # the gated delta rule in every other layer
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
GRANITE = {
    "logits_scaling": 6.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.25,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
PICTURES = {"image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN + 1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
GEMMA3 = text(head_dim=16, query_pre_attn_scalar=16, **SLIDING)
