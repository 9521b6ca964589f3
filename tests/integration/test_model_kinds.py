"""Kinds of models beside the usual one: what a run computes with them, and what it saves. Tiny and random, but of the
real architecture classes; `python -m bench families` looks at many more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from onpo_fast import console, train
from onpo_fast.batches import plan_steps
from onpo_fast.config import Config
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.files import checksum
from onpo_fast.fit import fit
from onpo_fast.models.checkpoint import weight_files
from onpo_fast.models.loading import load
from onpo_fast.models.policy import disagreement, score
from onpo_fast.objectives import Onpo
from onpo_fast.run.fingerprint import changes, model_fingerprint
from onpo_fast.sampling import LocalSampler, make_sampler
from onpo_fast.sampling.draw import Draw
from onpo_fast.sampling.local import sampler as local

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MESSAGES = [[{"role": "user", "content": text}] for text in ("Tea?", "Will it rain tomorrow, and where?")]


@pytest.fixture(scope="module")
def build(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny model of a class with seeded random weights, and SmolLM2's tokenizer beside it."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    special = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}

    def write(config_class: str, model_class: str = "", **options: object) -> Path:
        config = getattr(transformers, config_class)(**{"vocab_size": len(tokenizer), **special, **options})
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config) if model_class else AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # larger than they begin, so that attention and logits matter
            if parameter.dim() >= 2:
                parameter.data += 0.6 / parameter.shape[-1] ** 0.5 * torch.randn(parameter.shape)
        directory = tmp_path_factory.mktemp(config_class) / "model"
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return write


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def groups_of(policy, sizes: tuple[int, ...] = (3, 9)) -> list[Group]:
    texts = ["Yes.", "No, thank you very much!", "Perhaps."]
    responses = [Response(text, policy.tokenizer(text)["input_ids"], "eos", 0.0) for text in texts]
    return [Group([], [7 + 11 * i % 500 for i in range(size)], responses) for size in sizes]


@torch.no_grad()
def plain_scores(directory: Path, groups: list[Group], model_class: type = AutoModelForCausalLM) -> torch.Tensor:
    """Summed log-probs of all responses by transformers alone, a row at a time."""
    model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    for parameter in model.parameters():  # transformers 5.17 leaves dequantised ones in bfloat16
        parameter.data = parameter.data.float()
    sums = []
    for group in groups:
        for response in group.responses:
            row = torch.tensor([group.prompt_tokens + response.tokens])
            logps = model(input_ids=row).logits[0, len(group.prompt_tokens) - 1 : -1].double().log_softmax(-1)
            sums.append(logps.gather(1, torch.tensor(response.tokens)[:, None]).sum())
    return torch.stack(sums)


def first_step(policy, groups: list[Group], **options: object) -> dict:
    """The metrics of a fit's one step, which starts at its anchor."""
    anchor = score(policy, groups, 1000)
    pairs = [Pair(g, winner, loser, 1.0) for g in range(len(groups)) for winner, loser in ((0, 1), (2, 0))]
    config = Config(learning_rate=1e-12, batch_pairs=len(pairs), **options)
    records: list[dict] = []
    fit(
        policy,
        groups,
        plan_steps(pairs, 1, len(pairs), [0]),
        anchor,
        Onpo(eta=2.0),
        config,
        records.append,
        starts_at_anchor=True,
    )
    return records[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is computed
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {
    "softcap": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0}),
    "softcap by another name": (
        "RecurrentGemmaConfig",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 16,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
    "scaled up": ("HyperCLOVAXConfig", {"logits_scaling": 0.125}),
    "scaled down": ("GraniteConfig", {"logits_scaling": 8.0}),
    "ALiBi": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "chunked attention": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "num_hidden_layers": 4,
        },
    ),
    "state space": (
        "Mamba2Config",
        {
            "state_size": 16,
            "head_dim": 8,
            "num_heads": 8,
            "expand": 2,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "attention sinks": (
        "GptOssConfig",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "sliding_window": 8,
            "rope_scaling": None,
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_each_row_alone(build, kind: str) -> None:
    config_class, options = KINDS[kind]
    directory = build(config_class, **{**SMALL, **options})
    policy = load(directory, Config())
    groups = groups_of(policy, (3, 24, 9))
    expected = plain_scores(directory, groups)
    torch.testing.assert_close(torch.cat(score(policy, groups, 1000)), expected, atol=1e-3, rtol=0)


def test_a_softcap_that_is_not_known_is_seen(build, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build("Gemma2Config", **SMALL, head_dim=8, final_logit_softcapping=30.0)
    monkeypatch.setattr("onpo_fast.models.heads.logit_options", lambda config: {"logit_scale": 1.0, "softcap": None})
    with pytest.raises(UserError, match=r"gemma2\) shapes its logits in a way that is not known here"):
        load(directory, Config())


def test_log_probs_that_change_from_one_time_to_the_next_are_refused(build, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build("LlamaConfig", **SMALL)
    forward = transformers.LlamaModel.forward

    def noisy(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.last_hidden_state = torch.nn.functional.dropout(output.last_hidden_state, 0.1, training=True)
        return output

    monkeypatch.setattr(transformers.LlamaModel, "forward", noisy)
    with pytest.raises(UserError, match="from one time to the next"):
        load(directory, Config())


def test_attention_that_a_family_lacks_is_named_with_the_flag(build) -> None:
    directory = build("Gemma2Config", **SMALL, head_dim=8)
    assert load(directory, Config()).attention in ("eager", "sdpa")  # what the model prefers, by version
    mamba = build("MambaConfig", hidden_size=32, num_hidden_layers=2, state_size=8)
    with pytest.raises(UserError, match=r"cannot load the model .*Leave out --attention") as error:
        load(mamba, Config(attention="sdpa"))
    assert "\n" not in str(error.value)


def test_flex_attention_needs_a_gpu(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="--attention flex_attention needs a GPU"):
        load(tiny_model, Config(attention="flex_attention", device="cpu"))


RANDOM_IN_TRAINING = {
    "functional dropout": ("Starcoder2Config", {"residual_dropout": 0.3, "embedding_dropout": 0.3}),
    "dropout of attention": ("LlamaConfig", {"attention_dropout": 0.3}),
    "layer dropout": ("OPTConfig", {"dropout": 0.3, "layerdrop": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "router noise": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}),
}


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("kind", RANDOM_IN_TRAINING)
def test_nothing_is_random_in_a_fit(build, kind: str, gradient_checkpointing: bool) -> None:
    config_class, options = RANDOM_IN_TRAINING[kind]
    directory = build(config_class, **{**SMALL, **options})
    config = {"gradient_checkpointing": gradient_checkpointing}
    once, again = (
        first_step(load(directory, Config(**config)), groups, **config)
        for groups in [groups_of(load(directory, Config()))] * 2
    )
    assert once["gradient_norm"] == again["gradient_norm"] > 0
    for name in ("margin", "log_ratio_winner", "log_ratio_loser"):
        assert once[name] == pytest.approx(0, abs=1e-4)


def test_activations_are_recomputed(build) -> None:
    directory = build("Starcoder2Config", **SMALL, residual_dropout=0.3)
    plain, recomputed = (load(directory, Config(gradient_checkpointing=on)) for on in (False, True))
    calls = []
    recomputed.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    groups = groups_of(plain)
    expected = first_step(plain, groups)["gradient_norm"]
    score(recomputed, groups, 1000)
    before = len(calls)
    assert first_step(recomputed, groups)["gradient_norm"] == pytest.approx(expected, rel=1e-6)
    scored = before  # the same passes of scoring again, and two a micro-batch of the fit
    assert len(calls) - before - scored == 2


def test_a_fit_that_does_not_start_at_its_anchor_stops(build, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(build("Starcoder2Config", **SMALL, residual_dropout=0.3), Config())
    monkeypatch.setattr(type(policy), "begin_fit", lambda self: self.model.train())
    with pytest.raises(UserError, match=r"step 1 of 1: the fit starts at its anchor, but .* starcoder2"):
        first_step(policy, groups_of(policy))


# ---------------------------------------------------------------------------------------------------------------------
# Sampled against scored
# ---------------------------------------------------------------------------------------------------------------------


def sampled_and_scored(policy, sampler) -> tuple[torch.Tensor, torch.Tensor]:
    groups = sampler(MESSAGES, 2, [0])
    sampled = torch.tensor([response.logp for group in groups for response in group.responses], dtype=torch.float64)
    return sampled, torch.cat(score(policy, groups, 1000))


def test_prompts_of_different_lengths_are_not_padded_where_that_is_wrong(
    build, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "announced", set())
    config_class, options = KINDS["softcap by another name"]
    config = Config(max_new_tokens=8, sampling_batch_size=8)
    policy = load(build(config_class, **{**SMALL, **options}), config)
    sampler = make_sampler(policy, config)
    assert not sampler.pads
    assert "recurrent_gemma" in capsys.readouterr().out
    torch.testing.assert_close(*sampled_and_scored(policy, sampler), atol=1e-3, rtol=0)
    sampler.pads = True
    sampled, scored = sampled_and_scored(policy, sampler)
    assert (sampled - scored).abs().max() > 0.01  # else the test would show nothing


def test_one_response_at_a_time_where_a_batch_is_wrong(
    build, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "announced", set())
    config = Config(max_new_tokens=8, sampling_batch_size=8)
    policy = load(build("RwkvConfig", hidden_size=32, num_hidden_layers=2, context_length=512), config)
    sampler = make_sampler(policy, config)
    assert sampler.batch_size == 1
    make_sampler(policy, config)
    assert capsys.readouterr().out.count("one response is sampled at a time") == 1
    torch.testing.assert_close(*sampled_and_scored(policy, sampler), atol=1e-3, rtol=0)


@pytest.mark.parametrize("blind", [False, True])
def test_the_decode_loop_knows_a_sliding_window(build, blind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its check sees masks without the window, although the window is longer than its rows."""
    config = Config(max_new_tokens=40, sampling_batch_size=3)
    policy = load(build("MistralConfig", **{**SMALL, "sliding_window": 48}), config)
    if blind:
        monkeypatch.setattr(local, "cached_attention_arguments", without_window)
        assert "log-probs there" in LocalSampler(policy, config).why_not()
        return
    sampler = make_sampler(policy, config)
    assert isinstance(sampler, LocalSampler)
    groups = sampler([MESSAGES[0], [{"role": "user", "content": "Will it rain? " * 9}]], 2, [0])
    assert len(groups[1].prompt_tokens) > 48
    sampled = torch.tensor([r.logp for group in groups for r in group.responses], dtype=torch.float64)
    torch.testing.assert_close(sampled, torch.cat(score(policy, groups, 1000)), atol=1e-3, rtol=0)


def without_window(model, positions: torch.Tensor, columns: int) -> dict[str, object]:
    sees = torch.arange(columns) <= positions[:, None, None, None]
    return {"attention_mask": sees, "position_ids": positions[:, None]}


def test_a_family_that_generates_from_another_distribution_is_refused(build, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(build("LlamaConfig", **SMALL), Config())
    draw = Draw.__call__

    def biased(self, *arguments):
        tokens, logps = draw(self, *arguments)
        return tokens, logps + 0.02

    monkeypatch.setattr(Draw, "__call__", biased)
    with pytest.raises(UserError, match=r"the family llama .* differ by up to 0\.0"):
        make_sampler(policy, Config())


def test_a_run_stops_where_its_samples_are_not_what_is_scored(
    build, write_lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_lines("prompts.jsonl", *({"prompt": f"What is {i}?"} for i in range(6)))
    config = Config(
        model=str(build("LlamaConfig", **SMALL)),
        prompts=str(prompts),
        out=str(tmp_path / "run"),
        max_new_tokens=4,
        iterations=1,
        prompts_per_iteration=4,
        report_to="none",
    )
    call = LocalSampler.__call__

    def off(self, *arguments):
        def shifted(r: Response) -> Response:
            return Response(r.text, r.tokens, r.stop_reason, r.logp - 0.3)

        return [Group(g.prompt, g.prompt_tokens, [shifted(r) for r in g.responses]) for g in call(self, *arguments)]

    monkeypatch.setattr(LocalSampler, "__call__", off)
    with pytest.raises(UserError, match=r"family llama\) generates with differ .* in 16 of 16 responses"):
        train.train(config)
    assert not (tmp_path / "run/iteration_01/preferences.jsonl").exists()


def test_a_tolerance_grows_with_the_root_of_the_length_and_allows_few_outliers() -> None:
    tokens = torch.full((200,), 100.0)
    zeros = torch.zeros(200, dtype=torch.float64)
    assert disagreement(zeros + 0.009, zeros, tokens, torch.float32) is None
    assert "in 200 of 200 responses" in disagreement(zeros + 0.011, zeros, tokens, torch.float32)
    assert disagreement(zeros + 1.9, zeros, tokens, torch.bfloat16) is None
    assert disagreement(zeros + 2.1, zeros, tokens, torch.bfloat16) is not None
    few = zeros.clone()
    few[:2] = 9.0
    assert disagreement(few, zeros, tokens, torch.float32) is None
    few[2] = float("nan")
    assert "in 3 of 200" in disagreement(few, zeros, tokens, torch.float32)


def longrope(build) -> Path:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 5.0, 7.0]}
    return build("Phi3Config", **SMALL, original_max_position_embeddings=40, rope_scaling=scaling)


def test_rows_of_one_scaling_go_together(build) -> None:
    directory = longrope(build)
    policy = load(directory, Config(max_new_tokens=6))
    assert policy.rotary_boundary == 40
    groups = groups_of(policy, (3, 60, 9, 41))
    expected = plain_scores(directory, groups)
    torch.testing.assert_close(torch.cat(score(policy, groups, 10000)), expected, atol=1e-3, rtol=0)
    alone = torch.cat([score(policy, [group], 10000)[0] for group in groups])
    torch.testing.assert_close(alone, expected, atol=1e-3, rtol=0)


def test_samples_of_one_scaling_go_together(build) -> None:
    config = Config(max_new_tokens=6)
    policy = load(longrope(build), config)
    long = [{"role": "user", "content": "Will it rain? " * 20}]
    groups = make_sampler(policy, config)([MESSAGES[0][:], long], 2, [0])
    assert len(groups[0].prompt_tokens) + 6 <= 40 < len(groups[1].prompt_tokens)
    sampled = torch.tensor([response.logp for group in groups for response in group.responses], dtype=torch.float64)
    torch.testing.assert_close(sampled, torch.cat(score(policy, groups, 1000)), atol=1e-3, rtol=0)


def test_a_response_that_may_cross_into_another_scaling_is_refused(build) -> None:
    policy = load(longrope(build), Config())
    with pytest.raises(UserError, match="may cross the 40 tokens at which the model's rotary embedding"):
        policy.renderer.render(MESSAGES[0], 30)


# ---------------------------------------------------------------------------------------------------------------------
# What is saved
# ---------------------------------------------------------------------------------------------------------------------


def in_fp8(directory: Path) -> None:
    """Turns a checkpoint into blocks of float8 with a scale each, as DeepSeek-V3's is."""
    tensors = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if "proj" not in name or "visual" in name or any(size % 16 for size in weight.shape):
            tensors[name] = weight
            continue
        blocks = weight.unflatten(1, (-1, 16)).unflatten(0, (-1, 16))  # (rows / 16, 16, columns / 16, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        quantised = blocks / scale[:, None, :, None]
        tensors[name] = quantised.flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    rewrite(directory / "config.json", quantization_config=method)


def in_mxfp4(directory: Path) -> None:
    """Turns the experts into four-bit numbers with a shared exponent, as gpt-oss's are."""
    tensors = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        torch.manual_seed(1)
        tensors[name + "_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[name + "_scales"] = torch.full((experts, outputs, inputs // 32), 122, dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(directory / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": plain})


QUANTISED = {
    "fp8": (in_fp8, "LlamaConfig", {}),
    "mxfp4": (
        in_mxfp4,
        "GptOssConfig",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "sliding_window": 8,
            "rope_scaling": None,
            "intermediate_size": 32,
        },
    ),
}


@pytest.mark.parametrize("form", QUANTISED)
def test_a_quantised_checkpoint_is_saved_as_plain_weights(build, tmp_path: Path, form: str) -> None:
    quantise, config_class, options = QUANTISED[form]
    directory = build(config_class, **{**SMALL, **options})
    quantise(directory)
    policy = load(directory, Config())
    assert policy.converted
    groups = groups_of(policy)
    before = torch.cat(score(policy, groups, 1000))
    torch.testing.assert_close(before, plain_scores(directory, groups), atol=1e-3, rtol=0)
    policy.save(tmp_path / "saved")
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved/model.safetensors").values()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert torch.equal(torch.cat(score(load(tmp_path / "saved", Config()), groups, 1000)), before)


def test_a_quantised_part_of_a_model_is_saved_as_plain_weights(build, tmp_path: Path) -> None:
    directory = build_qwen(build)
    in_fp8(directory)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    policy = load(directory, Config())
    assert policy.converted
    groups = groups_of(policy)
    before = torch.cat(score(policy, groups, 1000))
    policy.save(tmp_path / "saved")
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved/model.safetensors").values()} == {torch.float32}
    assert "quant" not in (tmp_path / "saved/config.json").read_text()
    assert torch.equal(torch.cat(score(load(tmp_path / "saved", Config()), groups, 1000)), before)


def test_buffers_of_early_checkpoints_are_passed_over(build) -> None:
    directory = build("GPT2Config", n_embd=32, n_layer=2, n_head=4)
    tensors = load_file(directory / "model.safetensors")
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert load(directory, Config()).notes == []


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_other_quantised_checkpoints_are_refused(build, method: str) -> None:
    directory = build("LlamaConfig", **SMALL)
    rewrite(directory / "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    with pytest.raises(UserError, match=rf"is quantised \({method}\), and training needs plain weights"):
        load(directory, Config())


def test_scales_without_their_quantisation_are_an_error(build) -> None:
    directory = build("LlamaConfig", **SMALL)
    in_fp8(directory)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has 14 weights that its config.json does not know, as .*weight_scale_inv"):
        load(directory, Config())


def build_qwen(build) -> Path:
    """A model that takes images, too."""
    return build(
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        text_config={
            **SMALL,
            "vocab_size": 49152,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        image_token_id=440,
        video_token_id=441,
        vision_start_token_id=442,
        vision_end_token_id=443,
    )


@pytest.mark.parametrize("architectures", [["Qwen3_5ForConditionalGeneration"], None, ["NoClass"]])
def test_a_model_that_also_sees_is_kept_whole(build, tmp_path: Path, architectures: list[str] | None) -> None:
    directory = build_qwen(build)
    rewrite(directory / "config.json", architectures=architectures)
    (directory / "preprocessor_config.json").write_text('{"size": 8}')
    policy = load(directory, Config())
    groups = groups_of(policy)
    expected = plain_scores(directory, groups, transformers.Qwen3_5ForConditionalGeneration)
    torch.testing.assert_close(torch.cat(score(policy, groups, 1000)), expected, atol=1e-3, rtol=0)
    first_step(policy, groups)
    policy.save(tmp_path / "saved")
    there, kept = (load_file(place / "model.safetensors") for place in (directory, tmp_path / "saved"))
    assert there.keys() == kept.keys()
    assert any("visual" in name for name in kept)
    assert all(torch.equal(there[name], kept[name]) for name in kept if "visual" in name)
    assert (tmp_path / "saved/preprocessor_config.json").read_text() == '{"size": 8}'
    load(tmp_path / "saved", Config())


def test_a_part_that_sees_is_not_lost_without_a_word(build) -> None:
    directory = build_qwen(build)
    rewrite(directory / "config.json", architectures=["Qwen3_5ForCausalLM"])
    with pytest.raises(UserError, match=r"tensors, as .*visual.* leaves out, and every policy would lack them: name"):
        load(directory, Config())


def test_tensors_that_a_class_leaves_out_are_named(build) -> None:
    directory = build(
        "Qwen3NextConfig",
        **SMALL,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    tensors = load_file(directory / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.ones(4, 4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    left_out, not_shared = load(directory, Config()).notes
    assert left_out.startswith("1 tensors of ")
    assert "mtp.fc.weight" in left_out
    assert "linear_attention" in not_shared


def test_recommended_sampling_is_kept_and_not_used(build, tmp_path: Path) -> None:
    directory = build("LlamaConfig", **SMALL)
    own = {
        "do_sample": True,
        "temperature": 0.6,
        "repetition_penalty": 1.5,
        "eos_token_id": 2,
        "pad_token_id": 7,
        "max_window_size": 6144,
        "watermarking_config": {"greenlist_ratio": 0.5},
    }
    rewrite(directory / "generation_config.json", **own)
    policy = load(directory, Config())
    assert policy.model.generation_config.repetition_penalty is None
    policy.save(tmp_path / "saved")
    load(tmp_path / "saved", Config()).save(tmp_path / "again")
    for name in ("saved", "again"):
        kept = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert own | {"eos_token_id": [2]} == {key: kept[key] for key in own}


def test_generation_settings_that_cannot_be_read_are_named(build) -> None:
    directory = build("LlamaConfig", **SMALL)
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json is not JSON"):
        load(directory, Config())


def test_padding_needs_no_row_of_its_own(build) -> None:
    directory = build("LlamaConfig", **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(directory)
    config = Config(max_new_tokens=4)
    policy = load(directory, config)
    assert policy.tokenizer.pad_token_id == 49152
    torch.testing.assert_close(*sampled_and_scored(policy, make_sampler(policy, config)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{"max_position_embeddings": 16}, {"max_position_embeddings": -1}])
def test_a_context_that_is_small_or_not_said(build, options: dict) -> None:
    policy = load(build("LlamaConfig", **{**SMALL, **options}), Config())
    assert policy.context == (16 if options["max_position_embeddings"] == 16 else None)
    make_sampler(policy, Config())


def test_a_token_beyond_the_embedding_is_refused_where_a_prompt_has_it(build) -> None:
    directory = build("LlamaConfig", **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(directory)
    policy = load(directory, Config())
    assert policy.renderer.render(MESSAGES[0])
    with pytest.raises(UserError, match=r"has the token '<image_soft_token>' \(49152\), but .* 49152 rows"):
        policy.renderer.render([{"role": "user", "content": "What is in <image_soft_token>?"}])


def test_a_template_that_needs_such_a_token_does_not_fit(build) -> None:
    directory = build("LlamaConfig", **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    with pytest.raises(UserError, match="does not fit its model: it has tokens up to 49152"):
        load(directory, Config())


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def sharded(build, rename: Callable[[str], str]) -> Path:
    directory = build("LlamaConfig", **SMALL)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = {name: rename("model-1.safetensors") for name in tensors}
    shard = directory / names["model.norm.weight"]
    shard.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, shard, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return directory


def test_shards_may_be_in_a_folder_of_the_model(build) -> None:
    directory = sharded(build, lambda name: f"parts/{name}")
    shard = directory / "parts/model-1.safetensors"
    assert weight_files(str(directory)) == [shard]
    load(directory, Config())
    before = model_fingerprint(str(directory), None, checksum)
    with open(shard, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert changes(before, model_fingerprint(str(directory), None, checksum)) == ["parts/model-1.safetensors"]


@pytest.mark.parametrize("name", ["../stolen.safetensors", "model-1.bin", "a/../../stolen.safetensors"])
def test_shards_that_leave_the_directory_or_are_no_safetensors_are_refused(build, name: str) -> None:
    directory = sharded(build, lambda _: name)
    with pytest.raises(UserError, match=r"index.json lists .* must be a .safetensors file in"):
        load(directory, Config())


def test_weights_of_another_name_are_refused(build) -> None:
    directory = build("LlamaConfig", **SMALL)
    rewrite(directory / "config.json", transformers_weights="other.safetensors.index.json")
    with pytest.raises(UserError, match=r"config.json names the file of its weights \(transformers_weights\)"):
        load(directory, Config())


def test_a_file_that_is_no_safetensors_is_one_line(build) -> None:
    directory = build("LlamaConfig", **SMALL)
    (directory / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cannot load the model .*"):
        load(directory, Config())


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', "{", '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_a_damaged_index_is_one_line(build, content: str) -> None:
    directory = sharded(build, lambda name: name)
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index.json is (damaged|not JSON|not a JSON object)"):
        load(directory, Config())
