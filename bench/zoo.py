"""Tiny checkpoints with random weights, of the real model classes of transformers: one for every entry of ``FAMILIES``.

Two to four layers of width 64, a vocabulary of 272, a tokenizer of bytes with a ChatML template. The weights are larger
than a fresh model's and the biases are not 0, so that attention, routing and the head all matter: a mistake in any of
them shows in the log-probs.
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

from .quantised import to_fp8, to_mxfp4

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # tokens 0, 1 and 2: padding, begin, end
VOCABULARY = 272  # rows of the embedding: 256 bytes, the special tokens, and some that no text uses
IMAGE_TOKEN = 264  # and the next: placeholders of pictures
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How to make a tiny checkpoint of a model family."""

    config: str  # the name of its configuration class in transformers
    arguments: dict[str, Any]  # of that class
    about: str = ""  # what is special about it, for the table
    model: str = ""  # the name of the model class; default: the one that AutoModelForCausalLM chooses
    causal: bool = True  # False: no causal language model, so loading it must be refused
    quantise: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict]] | None = field(default=None, repr=False)

    @property
    def exists(self) -> bool:
        """Whether this version of transformers has it."""
        return hasattr(transformers, self.config) and (not self.model or hasattr(transformers, self.model))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens: the special ones and the 256 bytes."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.chat_template = CHATML
    return fast


def make_model(family: Family) -> PreTrainedModel:
    """The model in float32, with seeded random weights."""
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
                module.weight[module.padding_idx] = 0.0  # as where it gets no gradient; some models clear it at loading
    return model


def build(family: Family, directory: Path) -> None:
    """Writes model and tokenizer, as they are published."""
    model = make_model(family)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    if family.model.endswith("ForConditionalGeneration"):  # of models with pictures: kept beside the policy
        (directory / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}\n')
    if family.quantise:
        tensors, description = family.quantise(load_file(directory / "model.safetensors"))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": description}))


# ---------------------------------------------------------------------------------------------------------------------
# The families
# ---------------------------------------------------------------------------------------------------------------------


def text(**changes) -> dict[str, Any]:
    """Arguments that most configurations share; None leaves one out."""
    shared = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {name: value for name, value in {**shared, **changes}.items() if value is not None}


def gpt(**changes) -> dict[str, Any]:
    """Arguments of the configurations that name things as GPT-2's does."""
    shared = {
        "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {**shared, **changes}


def encoder_decoder(**changes) -> dict[str, Any]:
    """Arguments of BART's configuration and those like it."""
    shared = {
        "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {**shared, **changes}


WINDOW = {"sliding_window": 8}
SLIDING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK = {
    "num_key_value_heads": 4, "moe_intermediate_size": 48, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# With few heads many scores are exactly 0, and which of them is kept depends on the length of the row.
SPARSE = {**DEEPSEEK, "index_topk": 16, "index_head_dim": 8, "index_n_heads": 16}
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8, "mamba_n_groups": 1,
    "mamba_expand": 2,
}  # fmt: skip
DELTA = {  # gated delta rule in every other layer
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 16,
}  # fmt: skip
GRANITE = {
    "logits_scaling": 6.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
PICTURES = {"image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN + 1}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
GEMMA3 = text(head_dim=16, query_pre_attn_scalar=16, **SLIDING)

FAMILIES = {
    # dense transformers
    "llama": Family("LlamaConfig", text(tie_word_embeddings=False)),
    "llama-tied": Family("LlamaConfig", text(tie_word_embeddings=True), "tied head"),
    "llama-dropout": Family("LlamaConfig", text(attention_dropout=0.1, attention_bias=True), "attention dropout"),
    "llama-yarn": Family("LlamaConfig", text(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                         "original_max_position_embeddings": 128}), "YaRN"),
    "apertus": Family("ApertusConfig", text(), "xIELU"),
    "arcee": Family("ArceeConfig", text()),
    "bitnet": Family("BitNetConfig", text()),
    "biogpt": Family("BioGptConfig", text(num_key_value_heads=None, hidden_dropout_prob=0.1,
                     attention_probs_dropout_prob=0.1, layerdrop=0.1), "learned positions, dropout, layer dropout"),
    "bloom": Family("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4,
                    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.1,
                    "attention_dropout": 0.1}, "ALiBi, functional dropout"),
    "codegen": Family("CodeGenConfig", gpt(rotary_dim=8)),
    "cohere": Family("CohereConfig", text(logit_scale=0.25), "logit scale, tied head"),
    "cohere2": Family("Cohere2Config", text(logit_scale=0.25, **SLIDING, head_dim=16), "sliding window, logit scale"),
    "ctrl": Family("CTRLConfig", {"vocab_size": VOCABULARY, "n_embd": 64, "dff": 96, "n_layer": 2, "n_head": 4,
                   "n_positions": 512}, "sinusoidal positions, dropout"),
    "cwm": Family("CwmConfig", text(head_dim=16, **SLIDING,
                  rope_parameters={"rope_type": "default", "rope_theta": 1e4}), "sliding window"),
    "diffllama": Family("DiffLlamaConfig", text(), "differential attention"),
    "doge": Family("DogeConfig", text(hidden_dropout=0.1), "hidden dropout"),
    "ernie4_5": Family("Ernie4_5Config", text(head_dim=16)),
    "exaone4": Family("Exaone4Config", text(**WINDOW, sliding_window_pattern=2), "sliding window"),
    "falcon": Family("FalconConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.1,
                     "attention_dropout": 0.1}, "functional dropout"),
    "falcon-alibi": Family("FalconConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
                           "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "alibi": True}, "ALiBi"),
    "gemma": Family("GemmaConfig", text(head_dim=16), "tied head"),
    "gemma2": Family("Gemma2Config", text(head_dim=16, query_pre_attn_scalar=16, **WINDOW,
                     final_logit_softcapping=3.0, attn_logit_softcapping=5.0), "sliding window, softcaps"),
    "gemma3_text": Family("Gemma3TextConfig", GEMMA3, "sliding window"),
    "gemma3n_text": Family("Gemma3nTextConfig", text(head_dim=16, **WINDOW, intermediate_size=[96, 96],
                           layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0,
                           vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=16, laurel_rank=8,
                           altup_num_inputs=2, activation_sparsity_pattern=[0.0, 0.0], final_logit_softcapping=3.0),
                           "per-layer embeddings, softcap"),
    "gemma4_text": Family("Gemma4TextConfig", text(head_dim=16, global_head_dim=16, **SLIDING,
                          vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=16), "sliding window"),
    "glm": Family("GlmConfig", text(head_dim=16, attention_dropout=0.1), "attention dropout"),
    "glm4": Family("Glm4Config", text(head_dim=16)),
    "gpt2": Family("GPT2Config", gpt(), "learned positions, dropout"),
    "gpt_bigcode": Family("GPTBigCodeConfig", gpt(), "multi-query, dropout"),
    "gpt_neo": Family("GPTNeoConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
                      "attention_types": [[["global", "local"], 1]], "window_size": 8, "max_position_embeddings": 512,
                      "bos_token_id": 1, "eos_token_id": 2, "resid_dropout": 0.1, "attention_dropout": 0.1},
                      "local attention, dropout"),
    "gpt_neox": Family("GPTNeoXConfig", text(num_key_value_heads=None, hidden_dropout=0.1, attention_dropout=0.1),
                       "dropout"),
    "gpt_neox_japanese": Family("GPTNeoXJapaneseConfig", text(num_key_value_heads=None, hidden_dropout=0.1,
                                attention_dropout=0.1), "functional dropout"),
    "gptj": Family("GPTJConfig", gpt(rotary_dim=8, resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1),
                   "head with a bias, dropout"),
    "granite": Family("GraniteConfig", text(**GRANITE), "logit scale"),
    "granite_swa": Family("GraniteSWAConfig", text(**GRANITE, **WINDOW), "sliding window, logit scale"),
    "helium": Family("HeliumConfig", text(head_dim=16)),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", text(head_dim=16)),
    "hyperclovax": Family("HyperCLOVAXConfig", text(logits_scaling=0.125), "logit scale"),
    "jais2": Family("Jais2Config", text()),
    "minicpm3": Family("MiniCPM3Config", text(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24,
                       qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, dim_model_base=32),
                       "logit scale, latent attention"),
    "ministral": Family("MinistralConfig", text(**WINDOW, head_dim=16), "sliding window"),
    "ministral3": Family("Ministral3Config", text(head_dim=16), "attention scaled by position"),
    "mistral": Family("MistralConfig", text(**WINDOW), "sliding window"),
    "modernbert-decoder": Family("ModernBertDecoderConfig", text(num_key_value_heads=None, local_attention=16,
                                 global_attn_every_n_layers=2, embedding_dropout=0.1, mlp_dropout=0.1),
                                 "sliding window, head with a bias"),
    "mpt": Family("MptConfig", {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2,
                  "max_seq_len": 512, "resid_pdrop": 0.1, "emb_pdrop": 0.1}, "ALiBi, dropout"),
    "nanochat": Family("NanoChatConfig", text(final_logit_softcapping=3.0), "softcap"),
    "nemotron": Family("NemotronConfig", text(hidden_dropout=0.1)),
    "olmo": Family("OlmoConfig", text(clip_qkv=2.0)),
    "olmo2": Family("Olmo2Config", text()),
    "olmo3": Family("Olmo3Config", text(**SLIDING),
                    "sliding window"),
    "openai-gpt": Family("OpenAIGPTConfig", gpt(), "learned positions, dropout"),
    "opt": Family("OPTConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 32,
                  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.1, "layerdrop": 0.1,
                  "do_layer_norm_before": False}, "functional dropout, layer dropout, projected embedding"),
    "persimmon": Family("PersimmonConfig", text(num_key_value_heads=None, hidden_dropout=0.1, attention_dropout=0.1),
                        "dropout"),
    "phi": Family("PhiConfig", text(num_key_value_heads=4, resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1),
                  "head with a bias, dropout"),
    "phi3": Family("Phi3Config", text(resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1, **WINDOW),
                   "sliding window, dropout"),
    "phi3-longrope": Family("Phi3Config", text(original_max_position_embeddings=72, rope_parameters={
                            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                            "long_factor": [1.0 + 2 * i for i in range(8)]}),
                            "LongRoPE; no response crosses its boundary"),
    "phi3-longrope-crossed": Family("Phi3Config", text(original_max_position_embeddings=45, rope_parameters={
                                    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                                    "long_factor": [1.0 + 2 * i for i in range(8)]}),
                                    "LongRoPE; responses cross its boundary"),
    "qwen2": Family("Qwen2Config", text()),
    "qwen2-window": Family("Qwen2Config", text(use_sliding_window=True, **WINDOW, max_window_layers=1),
                           "sliding window in some layers"),
    "qwen3": Family("Qwen3Config", text(head_dim=16, tie_word_embeddings=True), "tied head"),
    "seed_oss": Family("SeedOssConfig", text(head_dim=16, attention_dropout=0.1, residual_dropout=0.1),
                       "functional residual dropout"),
    "smollm3": Family("SmolLM3Config", text(no_rope_layers=[1, 0]), "layers without positions"),
    "stablelm": Family("StableLmConfig", text(hidden_dropout=0.1, attention_dropout=0.1), "dropout"),
    "starcoder2": Family("Starcoder2Config", text(residual_dropout=0.1, embedding_dropout=0.1,
                         attention_dropout=0.1, **WINDOW), "sliding window, functional dropout"),
    "vaultgemma": Family("VaultGemmaConfig", text(head_dim=16, query_pre_attn_scalar=16, **WINDOW,
                         final_logit_softcapping=3.0), "sliding window, softcaps"),
    "xglm": Family("XGLMConfig", {"vocab_size": VOCABULARY, "d_model": 64, "ffn_dim": 96, "num_layers": 2,
                   "attention_heads": 4, "max_position_embeddings": 512, "layerdrop": 0.1},
                   "sinusoidal positions, dropout, layer dropout"),
    "youtu": Family("YoutuConfig", text(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16,
                    qk_rope_head_dim=8, v_head_dim=16), "latent attention"),
    # mixtures of experts
    "afmoe": Family("AfmoeConfig", text(**EXPERTS, num_shared_experts=1, num_dense_layers=1, head_dim=16,
                    **SLIDING), "experts, sliding window"),
    "aria_text": Family("AriaTextConfig", text(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1), "experts"),
    "axk1": Family("AXK1Config", text(**{k: v for k, v in DEEPSEEK.items() if k != "first_k_dense_replace"},
                   mlp_layer_types=["dense", "sparse"]), "experts, latent attention"),
    "cohere2_moe": Family("Cohere2MoeConfig", text(num_experts=4, num_experts_per_tok=2, logit_scale=0.25, head_dim=16,
                          num_shared_experts=1, **SLIDING), "experts, sliding window, logit scale"),
    "dbrx": Family("DbrxConfig", {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2,
                   "max_seq_len": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                   "resid_pdrop": 0.1, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                   "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2,
                                  "moe_jitter_eps": 0.1}}, "experts, router jitter, functional dropout"),
    "deepseek_v2": Family("DeepseekV2Config", {**text(**DEEPSEEK), "q_lora_rank": None}, "experts, latent attention"),
    "deepseek_v3": Family("DeepseekV3Config", text(**{**DEEPSEEK, "n_group": 2}), "experts, latent attention"),
    "deepseek_v32": Family("DeepseekV32Config", text(**SPARSE),
                           "experts, latent attention to the 16 best tokens"),
    "dots1": Family("Dots1Config", text(**{k: v for k, v in DEEPSEEK.items() if "lora" not in k and "head" not in k},
                    num_attention_heads=4, head_dim=16), "experts"),
    "ernie4_5_moe": Family("Ernie4_5_MoeConfig", text(moe_num_experts=4, moe_k=2, moe_intermediate_size=48,
                           moe_num_shared_experts=1, moe_layer_start_index=1), "experts"),
    "exaone_moe": Family("ExaoneMoeConfig", text(**EXPERTS, num_shared_experts=1, first_k_dense_replace=1,
                         n_group=1, topk_group=1, **SLIDING,
                         mlp_layer_types=["dense", "sparse"]), "experts, sliding window"),
    "flint": Family("FlintConfig", text(**EXPERTS, shared_expert_intermediate_size=48, head_dim=16, **SLIDING,
                    mlp_only_layers=[0]), "experts, sliding window"),
    "flex_olmo": Family("FlexOlmoConfig", text(num_experts=4, num_experts_per_tok=2), "experts"),
    "glm4_moe": Family("Glm4MoeConfig", text(head_dim=16, moe_intermediate_size=48, n_routed_experts=4,
                       n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1),
                       "experts"),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", text(**DEEPSEEK), "experts, latent attention"),
    "glm_moe_dsa": Family("GlmMoeDsaConfig", text(**SPARSE),
                          "experts, latent attention to the 16 best tokens"),
    "gpt_oss": Family("GptOssConfig", text(head_dim=16, **LOCAL, **WINDOW, rope_parameters={"rope_type": "default",
                      "rope_theta": 1e4}), "experts, sliding window, attention sinks"),
    "granitemoe": Family("GraniteMoeConfig", text(**LOCAL, **GRANITE), "experts, logit scale"),
    "granitemoeshared": Family("GraniteMoeSharedConfig", text(**LOCAL, **GRANITE, shared_intermediate_size=64),
                               "experts, logit scale"),
    "granitemoe_swa": Family("GraniteMoeSWAConfig", text(**LOCAL, **GRANITE, **SLIDING),
                             "experts, sliding window, logit scale"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", text(num_experts=4, moe_topk=2, head_dim=16), "experts"),
    "hy_v3": Family("HYV3Config", text(**EXPERTS, num_shared_experts=1, first_k_dense_replace=1, head_dim=16),
                    "experts"),
    "jetmoe": Family("JetMoeConfig", text(num_key_value_heads=2, kv_channels=16, num_local_experts=4,
                     num_experts_per_tok=2, num_attention_heads=None), "experts in attention"),
    "kolibri1": Family("Kolibri1Config", text(**EXPERTS, intermediate_size=None, shared_expert_intermediate_size=48,
                       head_dim=16, **SLIDING), "experts, sliding window"),
    "laguna": Family("LagunaConfig", text(**EXPERTS, shared_expert_intermediate_size=48, head_dim=16, **SLIDING,
                     mlp_layer_types=["dense", "sparse"]), "experts, sliding window, gated attention"),
    "llama4_text": Family("Llama4TextConfig", text(head_dim=16, intermediate_size_mlp=96, num_local_experts=4,
                          num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=16,
                          num_hidden_layers=4), "experts, chunked attention"),
    "longcat_flash": Family("LongcatFlashConfig", text(num_layers=1, num_hidden_layers=None, ffn_hidden_size=96,
                            expert_ffn_hidden_size=48, n_routed_experts=4, zero_expert_num=2, moe_topk=2,
                            kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
                            intermediate_size=None, num_key_value_heads=4, head_dim=8), "experts, some of them idle"),
    "mellum": Family("MellumConfig", text(**EXPERTS, head_dim=16, **SLIDING, mlp_layer_types=["dense", "sparse"]),
                     "experts, sliding window"),
    "mimo_v2_flash": Family("MiMoV2FlashConfig", text(n_routed_experts=4, num_experts_per_tok=2,
                            moe_intermediate_size=48, head_dim=16, v_head_dim=16, **SLIDING,
                            mlp_layer_types=["dense", "sparse"]), "experts, sliding window, scaled values"),
    "minimax_m2": Family("MiniMaxM2Config", text(head_dim=16, **LOCAL, router_jitter_noise=0.1, rotary_dim=8),
                         "experts, router jitter"),
    "mixtral": Family("MixtralConfig", text(**LOCAL, router_jitter_noise=0.1), "experts, router jitter"),
    "olmoe": Family("OlmoeConfig", text(num_experts=4, num_experts_per_tok=2), "experts"),
    "phimoe": Family("PhimoeConfig", text(**LOCAL, router_jitter_noise=0.1, input_jitter_noise=0.1, lm_head_bias=True,
                     attention_bias=True, hidden_dropout=0.1), "experts, input and router jitter, head with a bias"),
    "qwen2_moe": Family("Qwen2MoeConfig", text(shared_expert_intermediate_size=64, **EXPERTS), "experts"),
    "qwen3_moe": Family("Qwen3MoeConfig", text(head_dim=16, **EXPERTS), "experts"),
    "solar_open": Family("SolarOpenConfig", text(head_dim=16, moe_intermediate_size=48, n_routed_experts=4,
                         n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1), "experts"),
    # state-space, recurrent and linear attention
    "bailing_hybrid": Family("BailingHybridConfig", text(**{k: v for k, v in DEEPSEEK.items() if k not in (
                             "n_routed_experts", "q_lora_rank")}, num_local_experts=4, head_dim=16, num_mtp_layers=0,
                             layer_types=["linear_attention", "full_attention"]), "linear attention, experts"),
    "bamba": Family("BambaConfig", text(attn_layer_indices=[1], **MAMBA2), "state space and attention"),
    "falcon_h1": Family("FalconH1Config", text(mamba_d_ssm=64, **{**MAMBA2, "mamba_d_head": 8}, head_dim=16,
                        lm_head_multiplier=0.3, embedding_multiplier=5.6), "state space and attention, logit scale"),
    "falcon_mamba": Family("FalconMambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
                           "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "state space"),
    "granitemoehybrid": Family("GraniteMoeHybridConfig", text(**LOCAL, **GRANITE, layer_types=["mamba", "attention"],
                               **MAMBA2, shared_intermediate_size=64), "state space, attention, experts, logit scale"),
    "jamba": Family("JambaConfig", text(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                    expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=4,
                    use_mamba_kernels=False), "state space, attention, experts"),
    "kimi_linear": Family("KimiLinearConfig", text(**{k: v for k, v in DEEPSEEK.items() if k not in (
                          "n_routed_experts", "first_k_dense_replace", "q_lora_rank")}, num_local_experts=4,
                          layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"],
                          linear_head_dim=16, linear_num_heads=4), "linear attention, experts"),
    "lfm2": Family("Lfm2Config", text(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
                   "convolution and attention"),
    "lfm2_moe": Family("Lfm2MoeConfig", text(layer_types=["conv", "full_attention"], **EXPERTS, num_dense_layers=1),
                       "convolution, attention, experts"),
    "lfm3": Family("Lfm3Config", text(head_dim=16, **WINDOW, layer_types=["conv", "sliding_attention"]),
                   "convolution, sliding window"),
    "mamba": Family("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
                    "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "state space"),
    "mamba2": Family("Mamba2Config", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
                     "state_size": 16, "head_dim": 16, "num_heads": 8, "expand": 2, "n_groups": 1, "chunk_size": 8,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "state space"),
    "minimax": Family("MiniMaxConfig", text(head_dim=16, **LOCAL, layer_types=["linear_attention", "full_attention"],
                      block_size=8, router_jitter_noise=0.1), "linear attention, experts, router jitter"),
    "nemotron_h": Family("NemotronHConfig", text(layers_block_type=["mamba", "attention"], num_hidden_layers=None,
                         mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=8, expand=2,
                         head_dim=16), "state space and attention"),
    "olmo_hybrid": Family("OlmoHybridConfig", text(**{**DELTA, "head_dim": None}), "linear attention"),
    "qwen3_5_text": Family("Qwen3_5TextConfig", text(**DELTA), "linear attention"),
    "qwen3_5_moe_text": Family("Qwen3_5MoeTextConfig", text(**DELTA, **EXPERTS, shared_expert_intermediate_size=48),
                               "linear attention, experts"),
    "qwen3_next": Family("Qwen3NextConfig", text(**DELTA, **EXPERTS, shared_expert_intermediate_size=48,
                         decoder_sparse_step=1), "linear attention, experts"),
    "recurrent_gemma": Family("RecurrentGemmaConfig", text(num_hidden_layers=3, num_key_value_heads=1, lru_width=64,
                              attention_window_size=32, block_types=("recurrent", "recurrent", "attention")),
                              "recurrent, sliding window, softcap"),
    "rwkv": Family("RwkvConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
                   "context_length": 512, "bos_token_id": 1, "eos_token_id": 2}, "recurrent"),
    "xlstm": Family("xLSTMConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
                    "num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 8, "pad_token_id": 0,
                    "bos_token_id": 1, "eos_token_id": 2}, "recurrent, softcaps"),
    "zamba": Family("ZambaConfig", text(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2,
                    mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2, num_key_value_heads=4),
                    "state space, one attention layer shared"),
    "zamba2": Family("Zamba2Config", text(num_hidden_layers=4, num_key_value_heads=4,
                     layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=16, mamba_headdim=16,
                     mamba_ngroups=1, n_mamba_heads=8, mamba_expand=2, chunk_size=8, num_mem_blocks=1),
                     "state space, one attention layer shared"),
    # quantised
    "llama-fp8": Family("LlamaConfig", text(hidden_size=128, intermediate_size=256), "float8 with a scale a block",
                        quantise=to_fp8),
    "deepseek_v3-fp8": Family("DeepseekV3Config", text(**DEEPSEEK), "experts in float8 with a scale a block",
                              quantise=to_fp8),
    "gpt_oss-mxfp4": Family("GptOssConfig", text(head_dim=16, **LOCAL, **WINDOW, intermediate_size=64,
                            rope_parameters={"rope_type": "default", "rope_theta": 1e4}), "experts in MXFP4",
                            quantise=to_mxfp4),
    # with a vision tower
    "gemma3": Family("Gemma3Config", {"text_config": {"model_type": "gemma3_text", **GEMMA3},
                     "vision_config": {"model_type": "siglip_vision_model", **VISION}, "mm_tokens_per_image": 4,
                     "image_token_index": IMAGE_TOKEN, "boi_token_index": IMAGE_TOKEN + 1,
                     "eoi_token_index": IMAGE_TOKEN + 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                     "vision tower", "Gemma3ForConditionalGeneration"),
    "gemma4": Family("Gemma4Config", {"text_config": {"model_type": "gemma4_text", **text(head_dim=16,
                     global_head_dim=16, **SLIDING, vocab_size_per_layer_input=VOCABULARY,
                     hidden_size_per_layer_input=16)}, "vision_config": {"model_type": "gemma4_vision", **VISION},
                     "image_token_id": IMAGE_TOKEN, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                     "vision tower, sliding window", "Gemma4ForConditionalGeneration"),
    "llama4": Family("Llama4Config", {"text_config": text(head_dim=16, intermediate_size_mlp=96, num_local_experts=4,
                     num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=16),
                     "vision_config": {**VISION, "intermediate_size": 64, "vision_output_dim": 64,
                                       "projector_input_dim": 64, "projector_output_dim": 64},
                     "image_token_index": IMAGE_TOKEN, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                     "vision tower, experts", "Llama4ForConditionalGeneration"),
    "mistral3": Family("Mistral3Config", {"text_config": {"model_type": "mistral", **text(head_dim=16)},
                       "vision_config": {"model_type": "pixtral", **VISION}, "image_token_index": IMAGE_TOKEN,
                       "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                       "vision tower", "Mistral3ForConditionalGeneration"),
    "qwen2_5_vl": Family("Qwen2_5_VLConfig", {"text_config": text(rope_parameters={"rope_type": "default",
                         "rope_theta": 1e4, "mrope_section": [2, 3, 3]}), "vision_config": {**QWEN_VISION,
                         "out_hidden_size": 64, "fullatt_block_indexes": [0], "window_size": 16}, **PICTURES,
                         "vision_start_token_id": IMAGE_TOKEN + 2, "vision_end_token_id": IMAGE_TOKEN + 3},
                         "vision tower", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": Family("Qwen3VLConfig", {"text_config": text(head_dim=16, rope_parameters={"rope_type": "default",
                       "rope_theta": 1e4, "mrope_section": [3, 3, 2]}), "vision_config": {**QWEN_VISION,
                       "spatial_merge_size": 2, "out_hidden_size": 64, "num_position_embeddings": 16,
                       "deepstack_visual_indexes": [0]}, **PICTURES, "vision_start_token_id": IMAGE_TOKEN + 2,
                       "vision_end_token_id": IMAGE_TOKEN + 3}, "vision tower", "Qwen3VLForConditionalGeneration"),
    "qwen3_5": Family("Qwen3_5Config", {"text_config": text(**DELTA), "vision_config": {**QWEN_VISION,
                      "spatial_merge_size": 2, "out_hidden_size": 64, "num_position_embeddings": 16}, **PICTURES,
                      "vision_start_token_id": IMAGE_TOKEN + 2, "vision_end_token_id": IMAGE_TOKEN + 3},
                      "vision tower, linear attention", "Qwen3_5ForConditionalGeneration"),
    "smolvlm": Family("SmolVLMConfig", {"text_config": {"model_type": "llama", **text()}, "vision_config": VISION,
                      "image_token_id": IMAGE_TOKEN, "scale_factor": 2, "pad_token_id": 0}, "vision tower",
                      "SmolVLMForConditionalGeneration"),
    # not causal language models, or only in part
    "bart-decoder": Family("BartConfig", encoder_decoder(is_decoder=True, is_encoder_decoder=False, dropout=0.1),
                           "the decoder alone, functional dropout", "BartForCausalLM"),
    "roberta-decoder": Family("RobertaConfig", text(num_key_value_heads=None, is_decoder=True),
                              "an encoder with a causal mask, dropout", "RobertaForCausalLM"),
    "reformer": Family("ReformerConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 2,
                       "attention_head_size": 32, "feed_forward_size": 96, "attn_layers": ["local", "lsh"],
                       "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32], "is_decoder": True,
                       "max_position_embeddings": 512, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8,
                       "num_buckets": 4, "pad_token_id": 0, "eos_token_id": 2}, "attention by random hashes",
                       "ReformerModelWithLMHead"),
    "bart": Family("BartConfig", encoder_decoder(), "encoder and decoder", "BartForConditionalGeneration",
                   causal=False),
    "t5": Family("T5Config", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2,
                 "num_heads": 4, "pad_token_id": 0, "eos_token_id": 2}, "encoder and decoder",
                 "T5ForConditionalGeneration", causal=False),
    "bert": Family("BertConfig", text(num_key_value_heads=None), "an encoder: every token sees those after it",
                   "BertForMaskedLM", causal=False),
    "xlm": Family("XLMConfig", {"vocab_size": VOCABULARY, "emb_dim": 64, "n_layers": 2, "n_heads": 4,
                  "max_position_embeddings": 512, "causal": False}, "an encoder", "XLMWithLMHeadModel", causal=False),
}  # fmt: skip
