"""Packed rows against plain transformers, by family, layout and attention; what is chosen when a model is loaded."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
import transformers
import transformers.integrations.flex_attention as flex
import transformers.modeling_flash_attention_utils as flash
from support.tiny_models import randomise
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import PreTrainedModel

from onpo_fast.batches import MicroBatch
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.models.attention import FLEX, attention_arguments
from onpo_fast.models.execution import checkpoint_layers
from onpo_fast.models.layouts import choose_layout
from onpo_fast.models.policy import Policy
from onpo_fast.models.scoring import PairLossOptions
from onpo_fast.objectives import Onpo
from onpo_fast.packing import pack

SIZES = {
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "smollm2": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 6, "layer_types": LAYERS}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 6, "layer_types": LAYERS}),  # eager attention
}
GEMMA3N = (
    "Gemma3nTextConfig",
    {
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": LAYERS,
        "vocab_size_per_layer_input": 272,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
)
CHUNKED = ("Llama4TextConfig", {"attention_chunk_size": 16, "intermediate_size_mlp": 64, "num_local_experts": 2})


def make_policy(config: str, options: dict) -> Policy:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SIZES, **options)).float()
    randomise(model)
    return Policy(model.eval(), None, torch.device("cpu"), torch.float32, "separate")


def ragged_groups() -> list[Group]:
    chance = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [chance.randrange(3, 272) for _ in range(chance.randint(low, high))]

    return [
        Group([], tokens(1, longest), [Response("", tokens(1, longest), "eos", 0.0) for _ in range(count)])
        for count, longest in [(3, 20), (2, 4), (4, 16), (2, 5), (3, 12), (2, 20), (2, 2)]
    ]


GROUPS = ragged_groups()
ALL_PAIRS = {
    g: [Pair(g, i, j, 0.5 + 0.1 * i) for i, j in combinations(range(len(group.responses)), 2)]
    for g, group in enumerate(GROUPS)
}
ANCHOR = [torch.linspace(-60, -50, len(group.responses), dtype=torch.float64) for group in GROUPS]
OBJECTIVE = Onpo(eta=20.0)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(model: PreTrainedModel) -> Tensor:
    """The mean loss of all pairs, from the model's own logits for each response alone in a row."""
    losses = []
    for g, group in enumerate(GROUPS):
        ratios = []
        for response, anchor in zip(group.responses, ANCHOR[g]):
            row, n = group.prompt_tokens + response.tokens, len(response.tokens)
            logits = model(input_ids=torch.tensor([row])).logits[0, -n - 1 : -1].double()
            ratios.append(logits.log_softmax(-1).gather(1, torch.tensor(response.tokens)[:, None]).sum() - anchor)
        for pair in ALL_PAIRS[g]:
            preference = torch.tensor(pair.preference, dtype=torch.float64)
            losses.append(OBJECTIVE.loss(ratios[pair.winner] - ratios[pair.loser], preference))
    return torch.stack(losses).mean()


def packed_loss(policy: Policy) -> Tensor:
    microbatch = MicroBatch.prepare(GROUPS, ALL_PAIRS, ANCHOR, policy.layout)
    return policy.scoring(microbatch.packed, microbatch.labelled, PairLossOptions(OBJECTIVE)).loss


def assert_equal_results(policy: Policy, want: tuple[Tensor, dict[str, Tensor]], layouts: list[str]) -> None:
    for layout in layouts:
        policy.layout = layout
        loss = packed_loss(policy)
        got = gradients(policy.model, loss)
        assert float(loss) == pytest.approx(float(want[0]), rel=1e-5)
        assert got.keys() == want[1].keys()
        for name, gradient in want[1].items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), (layout, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(family: str) -> None:
    policy = make_policy(*FAMILIES[family])
    choose_layout(policy, "auto", family)
    assert (policy.layout, policy.notes) == ("shared", [])
    loss = plain_loss(policy.model)
    want = loss, gradients(policy.model, loss)
    assert len(MicroBatch.prepare(GROUPS, ALL_PAIRS, ANCHOR, "shared").packed.input_ids) < len(GROUPS)
    assert_equal_results(policy, want, ["shared", "shared_row", "separate_row", "separate"])

    policy.layout = "shared"
    checkpoint_layers(policy.model)
    policy.begin_fit()
    assert_equal_results(policy, want, ["shared"])


@pytest.mark.parametrize(
    ("family", "attention"), [("gemma3", "sdpa"), ("gemma3", "eager"), ("gemma3n", "sdpa"), ("llama", "sdpa")]
)
def test_padding_has_no_effect(family: str, attention: str) -> None:
    """Rows that are mostly padding give finite numbers, and the padding token changes none of them.

    The embedding of token 0, which is the padding token, is 0, where some norms have no gradient.
    """
    policy = make_policy(*{**FAMILIES, "gemma3n": GEMMA3N}[family])
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[0] = 0.0
    policy.use(attention, "shared_row")
    packed = pack([([3, 4, 5], [[6, 7, 8], [9]])], "shared_row")
    padding = packed.sequence < 0
    assert padding.sum() > 100
    results = []
    for token in (0, 200):
        other = dataclasses.replace(packed, input_ids=packed.input_ids.masked_fill(padding, token))
        logps = policy.scoring(other)
        results.append([logps.detach(), *gradients(policy.model, logps.sum()).values()])
    assert all(tensor.isfinite().all() for tensor in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_each_response_is_computed_once_however_many_pairs() -> None:
    group = Group([], [5] * 20, [Response("", [6] * 10, "eos", 0.0) for _ in range(8)])
    pairs = [Pair(0, i, j, 0.9) for i, j in combinations(range(8), 2)]
    microbatch = MicroBatch.prepare([group], {0: pairs}, [torch.zeros(8)], "shared")
    assert len(microbatch.labelled.pairs) == 28
    assert microbatch.packed.input_ids.numel() == 20 + 8 * 9


# ---------------------------------------------------------------------------------------------------------------------
# What is chosen
# ---------------------------------------------------------------------------------------------------------------------


def test_a_family_without_such_a_mask_has_a_row_for_each_response_and_a_line_that_says_so() -> None:
    policy = make_policy(*CHUNKED)
    choose_layout(policy, "auto", "llama4")
    assert policy.layout == "separate"
    (note,) = policy.notes
    assert "attention_chunk_size" in note


@pytest.mark.parametrize("window", [6, 4096])
def test_a_window_that_a_model_does_not_have_is_not_masked(window: int) -> None:
    """Llama ignores sliding_window. At 4096 no row of the probe is long enough to show it."""
    policy = make_policy("LlamaConfig", {"sliding_window": window})
    choose_layout(policy, "auto", "llama")
    assert (policy.layout, len(policy.notes)) == ("separate", 1)
    assert policy.model.config.sliding_window == window


def test_a_window_that_is_longer_than_the_probe_is_checked(monkeypatch) -> None:
    """A model that counts its window in another way than its configuration says, beyond the probe's rows."""
    policy = make_policy("MistralConfig", {"sliding_window": 4096})
    choose_layout(policy, "auto", "mistral")
    assert policy.layout == "shared"
    modeling = transformers.models.mistral.modeling_mistral
    theirs = modeling.create_sliding_window_causal_mask

    def one_more(config, attention_mask, **inputs) -> Tensor:
        config = type(config)(**{**config.to_dict(), "sliding_window": config.sliding_window + 1})
        config._attn_implementation = "sdpa"
        return theirs(config=config, attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(modeling, "create_sliding_window_causal_mask", one_more)
    choose_layout(policy, "auto", "mistral")
    assert policy.layout == "separate"


# ---------------------------------------------------------------------------------------------------------------------
# Attention of GPUs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flex_on_cpu(monkeypatch) -> None:
    """flex_attention without a compiler: its definition, which has no backward pass on a CPU."""

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options) -> Tensor:
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(flex, "compile_friendly_flex_attention", uncompiled)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_a_block_mask_is_the_dense_mask(family: str, flex_on_cpu: None) -> None:
    policy = make_policy(*FAMILIES[family])
    groups = [(g.prompt_tokens, [r.tokens for r in g.responses]) for g in GROUPS]
    packed = pack(groups, "shared_row")
    want = policy.scoring(packed)
    dense = attention_arguments(policy.model, packed)["attention_mask"]
    policy.use(FLEX, "shared_row")
    sparse = attention_arguments(policy.model, packed)["attention_mask"]
    kinds = dense.keys() if isinstance(dense, dict) else [None]
    for kind in kinds:
        mask, blocks = (dense[kind], sparse[kind]) if kind else (dense, sparse)
        rows, _, length, _ = mask.shape
        assert torch.equal(create_mask(blocks.mask_mod, rows, 1, length, length, "cpu"), mask)
        assert torch.equal(blocks.to_dense().bool(), mask.unfold(2, 128, 128).unfold(3, 128, 128).any(-1).any(-1))
    torch.testing.assert_close(policy.scoring(packed), want, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_that_has_no_gradient_is_refused(flex_on_cpu: None) -> None:
    policy = make_policy(*FAMILIES["llama"])
    policy.use(FLEX, "separate")
    with pytest.raises(UserError, match="--attention flex_attention"):
        choose_layout(policy, FLEX, "llama")


@pytest.fixture
def flash_on_cpu(monkeypatch) -> Iterator[dict[str, bool]]:
    """flash-attention's varlen function, computed by PyTorch; it ignores boundaries when it is told to."""
    faults = {"ignores boundaries": False}

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1),
    ) -> Tensor:  # fmt: skip
        assert (causal, cu_seqlens_q.dtype) == (True, torch.int32)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        lengths = [len(q)] if faults["ignores boundaries"] else cu_seqlens_q.diff().tolist()
        outputs = []
        for query, key, value in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
            back = torch.arange(len(query))[:, None] - torch.arange(len(query))
            mask = (back >= 0) & ((back <= window_size[0]) | torch.tensor(window_size[0] < 0))
            heads = (one.transpose(0, 1)[None] for one in (query, key, value))
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    functions = (None, varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *arguments, **options: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(
        PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *a, **o: name or "sdpa"
    )
    yield faults
    flash._loaded_implementation = None  # so that what comes after loads the real one


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_rows_end_to_end_under_flash_attention(family: str, flash_on_cpu: dict[str, bool]) -> None:
    policy = make_policy(*FAMILIES[family])
    loss = plain_loss(policy.model)
    want = loss, gradients(policy.model, loss)
    policy.use("flash_attention_2", "separate")
    choose_layout(policy, "flash_attention_2", family)
    assert (policy.attention, policy.layout, policy.notes) == ("flash_attention_2", "separate_row", [])
    assert_equal_results(policy, want, ["separate_row", "separate"])
    with policy.in_float32():
        assert (policy.attention, policy.layout) == ("sdpa", "separate")
    flash_on_cpu["ignores boundaries"] = True
    choose_layout(policy, "flash_attention_2", family)
    assert (policy.layout, len(policy.notes)) == ("separate", 1)
