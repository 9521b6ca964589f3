"""The decode loop: rows that come and go change no response, and it leaves the model as it was."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support.tiny_models import make_family

from onpo_fast.config import Config, SamplingConfig
from onpo_fast.data import Group
from onpo_fast.errors import UserError
from onpo_fast.models.attention import window_of
from onpo_fast.models.loading import load
from onpo_fast.models.policy import LOGP_TOLERANCE, Policy, score
from onpo_fast.sampling import LocalSampler, TransformersSampler
from onpo_fast.sampling.draw import Draw
from onpo_fast.sampling.local import linears, slots
from onpo_fast.sampling.local import sampler as local
from onpo_fast.sampling.local.linears import fast_linears
from onpo_fast.sampling.local.slots import SlotLayer

PROMPTS = [
    [{"role": "user", "content": text}] for text in ("Hi", "Is it far? " * 20, "Name a fruit.", "a", "Why not? " * 9)
]


@pytest.fixture(scope="module")
def ending(tiny_model) -> Policy:
    """A policy whose responses end at different steps: every 25th token ends one."""
    policy = load(tiny_model, Config())
    policy.model.generation_config.eos_token_id = list(range(2, policy.head_rows, 25))
    return policy


def sample(policy: Policy, size: int, responses: int = 5, **options) -> list[Group]:
    config = SamplingConfig(**{"max_new_tokens": 24, "sampling_batch_size": size, **options})
    return LocalSampler(policy, config)(PROMPTS, responses, [0, 7])


def tokens(groups: list[Group]) -> list[list[list[int]]]:
    return [[r.tokens for r in g.responses] for g in groups]


@pytest.fixture(scope="module")
def batches(ending: Policy) -> list[Group]:
    """What transformers' ``generate`` samples with the same seed."""
    config = SamplingConfig(max_new_tokens=24, sampling_batch_size=8)
    return TransformersSampler(ending, config)(PROMPTS, 5, [0, 7])


@pytest.fixture(scope="module")
def many(ending: Policy) -> list[Group]:
    """As ``batches``, of 70 responses."""
    config = SamplingConfig(max_new_tokens=24, sampling_batch_size=35)
    return TransformersSampler(ending, config)(PROMPTS, 14, [0, 7])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_rows_that_leave_and_enter_change_nothing(ending: Policy, many: list[Group], size: int) -> None:
    groups = sample(ending, size, 14)
    assert tokens(groups) == tokens(many)
    lengths = {len(r.tokens) for g in groups for r in g.responses}
    assert len(lengths) > 5
    assert {r.stop_reason for g in groups for r in g.responses} == {"eos", "length"}
    check_log_probs(ending, groups, 1e-4)


def check_log_probs(policy: Policy, groups: list[Group], allowed: float) -> None:
    """Log-probs are those of the scorer, up to ``allowed`` nats times the root of the number of tokens."""
    for group, scores in zip(groups, score(policy, groups, 4000)):
        for response, scored in zip(group.responses, scores.tolist()):
            assert abs(response.logp - scored) < allowed * len(response.tokens) ** 0.5


@pytest.mark.parametrize("size", [1, 3, 64])
def test_responses_of_one_token(ending: Policy, many: list[Group], size: int) -> None:
    groups = sample(ending, size, 14, max_new_tokens=1)
    assert tokens(groups) == [[response[:1] for response in group] for group in tokens(many)]


def test_a_cache_that_grows_while_rows_are_decoded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prompts, whose responses pass the columns that the cache begins with, once and again."""
    monkeypatch.setitem(slots.GROWTH, "cpu", growth := 128)
    prompts = [PROMPTS[0], PROMPTS[3]]
    config = SamplingConfig(max_new_tokens=2 * growth, sampling_batch_size=3)
    groups = LocalSampler(policy, config)(prompts, 2, [1])
    assert tokens(groups) == tokens(TransformersSampler(policy, config)(prompts, 2, [1]))
    assert all(len(group.prompt_tokens) < growth for group in groups)
    assert max(len(g.prompt_tokens) + len(r.tokens) for g in groups for r in g.responses) > 2 * growth
    check_log_probs(policy, groups, 1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows(family: str, tmp_path: Path) -> None:
    """Layers that see 16 tokens, of contexts of hundreds: all of them, and every other one."""
    make_family(family, tmp_path / family)
    policy = load(tmp_path / family, Config())
    assert window_of(policy.model.config) == 16
    assert LocalSampler(policy, SamplingConfig(sampling_batch_size=4)).why_not() is None
    want, *others = (sample(policy, size, 3) for size in (7, 1, 15))
    assert all(tokens(groups) == tokens(want) for groups in others)
    check_log_probs(policy, want, 1e-4)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "weights too"])
def test_in_bfloat16_rounding_may_choose_another_token(tiny_model: Path, weights: torch.dtype) -> None:
    """Log-probs are the scorer's up to rounding for any batch, and most responses are the same."""
    loaded = load(tiny_model, Config())
    policy = replace(loaded, model=loaded.model.to(weights), compute_dtype=torch.bfloat16)
    some, others = sample(policy, 1), sample(policy, 25)
    for groups in (some, others):
        check_log_probs(policy, groups, LOGP_TOLERANCE[torch.bfloat16])
    pairs = [(a, b) for one, other in zip(tokens(some), tokens(others)) for a, b in zip(one, other)]
    assert sum(a == b for a, b in pairs) > len(pairs) // 2


@pytest.mark.parametrize("budget", [1, 10**6], ids=["prompts alone", "prompts together"])
def test_how_prompts_are_computed_changes_nothing(
    ending: Policy, batches: list[Group], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(local.PROMPT_TOKENS, "cpu", budget)
    assert tokens(sample(ending, 16)) == tokens(batches)


@pytest.mark.parametrize("size", [3, 6, 64])
def test_a_prompt_is_computed_once(
    ending: Policy, many: list[Group], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its 14 responses enter in several refills."""
    computed = []
    prefill = local.DecodeLoop._prefill
    monkeypatch.setattr(local.DecodeLoop, "_prefill", lambda self, some: computed.extend(some) or prefill(self, some))
    groups = sample(ending, size, 14)
    assert computed == [group.prompt_tokens for group in groups]
    assert tokens(groups) == tokens(many)


def test_one_response_a_prompt_and_the_nucleus(ending: Policy) -> None:
    options = {"temperature": 0.7, "top_p": 0.8}
    config = SamplingConfig(max_new_tokens=24, sampling_batch_size=8, **options)
    want = TransformersSampler(ending, config)(PROMPTS, 1, [0, 7])
    assert tokens(sample(ending, 2, 1, **options)) == tokens(want)


def test_groups_are_handed_over_as_they_finish(ending: Policy) -> None:
    handed: list[tuple[int, Group]] = []
    done: list[int] = []
    still_missing = []

    def on_group(index: int, group: Group) -> None:
        handed.append((index, group))
        still_missing.append(len(PROMPTS) * 2 - sum(done))

    sampler = LocalSampler(ending, SamplingConfig(max_new_tokens=24, sampling_batch_size=2))
    groups = sampler(PROMPTS, 2, [0], done.append, 10, on_group)
    assert {index: group for index, group in handed} == {10 + i: group for i, group in enumerate(groups)}
    assert len(handed) == len(PROMPTS)
    assert still_missing[0] >= 2 * (len(PROMPTS) - 2)
    assert sum(done) == 2 * len(PROMPTS)


def greedy(self: Draw, logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> tuple:
    best = logits.argmax(1)
    return best, logits.log_softmax(1).gather(1, best[:, None])[:, 0]


def test_greedy_is_that_of_transformers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draw, "__call__", greedy)
    for group in sample(policy, 3, 1):
        row = torch.tensor([group.prompt_tokens])
        want = policy.model.generate(row, do_sample=False, max_new_tokens=24, pad_token_id=0)[0, row.shape[1] :]
        assert group.responses[0].tokens == want.tolist()


def test_tokens_follow_the_models_distribution(policy: Policy) -> None:
    """First tokens, and second tokens after the most frequent first one."""
    count = 6000
    sampler = LocalSampler(policy, SamplingConfig(max_new_tokens=2, sampling_batch_size=500))
    group = sampler(PROMPTS[:1], count, [3])[0]
    first = Counter(r.tokens[0] for r in group.responses)
    (most, _), *_ = first.most_common()
    second = Counter(r.tokens[1] for r in group.responses if r.tokens[0] == most and len(r.tokens) > 1)
    for seen, row in ((first, group.prompt_tokens), (second, [*group.prompt_tokens, most])):
        with torch.no_grad():
            chances = policy.model(torch.tensor([row])).logits[0, -1].double().softmax(0).numpy()
        total = seen.total()
        common = np.flatnonzero(chances * total >= 5)
        observed, expected = np.array([seen[t] for t in common]), chances[common] * total
        rest = np.array([total - observed.sum()]), np.array([total - expected.sum()])
        assert len(common) > 5
        result = stats.chisquare(np.append(observed, rest[0]), np.append(expected, rest[1]))
        assert result.pvalue > 1e-3


@contextmanager
def memory(policy: Policy, monkeypatch: pytest.MonkeyPatch, fits: Callable[[int], bool]) -> Iterator[Counter]:
    """A second layer that runs out of memory in the calls, counted from 1, that do not fit.

    Yields the number of tokens that have been drawn, by key and position.
    """
    calls = itertools.count(1)
    drawn: Counter = Counter()
    draw = Draw.__call__

    def counted(self: Draw, logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> tuple:
        drawn.update(zip(keys.tolist(), positions.tolist()))
        return draw(self, logits, keys, positions)

    def check(module: torch.nn.Module, inputs: tuple) -> None:
        if not fits(next(calls)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = policy.model.model.layers[1].mlp.register_forward_pre_hook(check)
    monkeypatch.setattr(Draw, "__call__", counted)
    try:
        yield drawn
    finally:
        handle.remove()


@pytest.mark.parametrize("calls", [(1,), (2,), (3,), (9, 12), (4, 5, 40), (1, 2, 3)], ids=str)
def test_out_of_memory_nothing_sampled_is_lost(
    ending: Policy, batches: list[Group], calls: tuple[int, ...], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In computations of prompts and in steps: the same tokens, each drawn once, and all responses counted once."""
    sampler = LocalSampler(ending, SamplingConfig(max_new_tokens=24, sampling_batch_size=8))
    done: list[int] = []
    handed: list[int] = []
    with memory(ending, monkeypatch, lambda call: call not in calls) as drawn:
        groups = sampler(PROMPTS, 5, [0, 7], done.append, 0, lambda index, group: handed.append(index))
    assert tokens(groups) == tokens(batches)
    check_log_probs(ending, groups, 1e-4)
    assert set(drawn.values()) == {1}
    assert drawn.total() == sum(len(r.tokens) for g in groups for r in g.responses)
    assert done == [1] * 25
    assert sorted(handed) == [0, 1, 2, 3, 4]
    assert sampler.slots == 8 >> len(calls)
    said = [line for line in capsys.readouterr().out.splitlines() if "--sampling_batch_size" in line]
    assert [f"--sampling_batch_size {8 >> i + 1} " in line for i, line in enumerate(said)] == [True] * len(calls)
    assert not [module for module in ending.model.modules() if "forward" in vars(module)]


def test_the_number_of_rows_that_fit_is_kept(
    ending: Policy, batches: list[Group], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that may have 1200 columns in all rows together, in which rows of about 300 tokens fit."""
    reserve = SlotLayer._reserve

    def limited(self: SlotLayer, columns: int) -> None:
        reserve(self, columns)
        if self.keys.shape[0] * self.keys.shape[2] > 1200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SlotLayer, "_reserve", limited)
    sampler = LocalSampler(ending, SamplingConfig(max_new_tokens=24, sampling_batch_size=25))
    assert tokens(sampler(PROMPTS, 5, [0, 7])) == tokens(batches)
    assert sampler.slots == 3
    assert capsys.readouterr().out.count("out of memory") == 3
    assert tokens(sampler(PROMPTS, 5, [0, 7])) == tokens(batches)
    assert sampler.slots == 3
    assert "out of memory" not in capsys.readouterr().out


def test_one_row_that_does_not_fit_names_options(ending: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        memory(ending, monkeypatch, lambda call: call < 9),
        pytest.raises(UserError, match="--max_new_tokens") as error,
    ):
        sample(ending, 8)
    assert "\n" not in str(error.value)
    assert not [module for module in ending.model.modules() if "forward" in vars(module)]


def test_the_model_is_left_as_it_was(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    parameters = list(policy.model.parameters())
    sample(policy, 4)

    def fail(self: Draw, *arguments: object) -> tuple:
        raise RuntimeError("of the test")

    monkeypatch.setattr(Draw, "__call__", fail)
    with pytest.raises(Exception, match="of the test"):
        sample(policy, 4)
    assert not [module for module in policy.model.modules() if "forward" in vars(module)]
    assert [*map(id, policy.model.parameters())] == [*map(id, parameters)]
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("change", ["missing", "signature", "values"])
def test_another_build_of_torch_uses_its_own_product(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: object) -> torch.Tensor:
        if change == "missing":
            raise AttributeError
        if change == "signature":
            raise RuntimeError("expected at most 5 arguments")
        return torch.zeros(1, 2)

    linears._has_onednn.cache_clear()
    monkeypatch.setattr(linears, "_onednn", other)
    try:
        linear = torch.nn.Linear(4, 3)
        with fast_linears(linear, None):
            assert "forward" not in vars(linear)
    finally:
        linears._has_onednn.cache_clear()


def test_linear_layers_compute_the_same(policy: Policy) -> None:
    row = torch.tensor([[5, 6, 7, 8]])
    biased = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 3, bias=False))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, plain = policy.model(row).logits, biased(x)
        with fast_linears(policy.model, None), fast_linears(biased, None):
            assert "forward" in vars(biased[0])
            torch.testing.assert_close(policy.model(row).logits, want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(biased(x), plain, rtol=1e-5, atol=1e-6)


def test_under_autocast_weights_are_converted_once(tiny_model) -> None:
    """The numbers are those of autocast; float32 weights stay."""
    policy = replace(load(tiny_model, Config()), compute_dtype=torch.bfloat16)
    row = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), policy.autocast():
        want = policy.model(row).logits
        with fast_linears(policy.model, policy.autocast_dtype):
            kept = policy.model.lm_head.forward.keywords["weight"]
            assert kept.dtype == torch.bfloat16
            assert torch.equal(policy.model(row).logits, want)
    assert policy.model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_adapters(tiny_model, weights: torch.dtype) -> None:
    """LoRA layers in float32 over a base in either dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    policy = load(tiny_model, Config())
    model = copy.deepcopy(policy.model).to(weights)
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    adapted = replace(policy, model=model, compute_dtype=weights)
    plain, groups = sample(policy, 4), sample(adapted, 4)
    assert tokens(groups) != tokens(plain)
    check_log_probs(adapted, groups, LOGP_TOLERANCE[weights])
