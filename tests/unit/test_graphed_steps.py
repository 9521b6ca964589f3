"""Decode steps as CUDA graphs, with a stand-in for a graph: it may only do again what was done when it was captured."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.tiny_models import make_tokenizer, randomise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import GPT2Config, GPT2LMHeadModel

from onpo_fast.config import Config, SamplingConfig
from onpo_fast.errors import UserError
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy
from onpo_fast.sampling import LocalSampler
from onpo_fast.sampling.local import sampler as local
from onpo_fast.sampling.local import slots, steps
from onpo_fast.sampling.local.steps import GraphedSteps

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", "Is it far? " * 30, "a", "Why not? " * 9)]


class Recorded(TorchDispatchMode):
    """Records operators, their numbers, and the addresses of the tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.made: list[Tensor] = []  # kept, so that no address is given twice

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        values, _ = tree_flatten((args, kwargs or {}))
        made = {_address(tensor) for tensor in self.made}
        read = [_address(v) for v in values if isinstance(v, Tensor) and _address(v) not in made]
        self.calls.append((str(function), read, [repr(v) for v in values if not isinstance(v, Tensor)]))
        found = function(*args, **(kwargs or {}))
        self.made += [v for v in tree_flatten(found)[0] if isinstance(v, Tensor) and _address(v) not in read]
        return found


def _address(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class StandIn:
    """Captures what a CUDA graph would, and fails where a replay would do something else."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1
        with Recorded() as first:
            found = compute()

        def replay() -> Tensor:
            self.replayed += 1
            with Recorded() as again:
                values = compute()
            assert again.calls == first.calls
            return found.copy_(values)

        return replay


def test_the_stand_in_notices_what_a_graph_would_not_do() -> None:
    """A number of the host that has changed, and a tensor that has moved."""
    state = {"number": 1, "tensor": torch.ones(3)}
    replay = StandIn()(lambda: state["tensor"] + state["number"])
    replay()
    state["number"] = 2
    with pytest.raises(AssertionError):
        replay()
    state |= {"number": 1, "tensor": torch.ones(3)}
    with pytest.raises(AssertionError):
        replay()


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    policy = load(tiny_model, Config())
    policy.model.generation_config.eos_token_id = list(range(2, policy.head_rows, 25))
    return policy


def sampled(policy: Policy, monkeypatch: pytest.MonkeyPatch, capture: object, **options) -> list[list[list[int]]]:
    """Tokens of responses that are sampled with this stand-in for graphs; None: without graphs."""
    sampler = LocalSampler(policy, SamplingConfig(**{"max_new_tokens": 24, "sampling_batch_size": 8, **options}))
    if capture is not None:
        make = partial(GraphedSteps, device=policy.device, tolerance=1e-3, new_capture=lambda device: capture)
        monkeypatch.setattr(LocalSampler, "_steps", lambda self: make)
    return [[r.tokens for r in group.responses] for group in sampler(PROMPTS, 5, [0, 7])]


@pytest.mark.parametrize("size", [8, 7, 1])
def test_the_same_responses(policy: Policy, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Few captures, many replays, and nothing in them that changes from step to step."""
    want = sampled(policy, monkeypatch, None, sampling_batch_size=size)
    capture = StandIn()
    assert sampled(policy, monkeypatch, capture, sampling_batch_size=size) == want
    assert capture.captured <= 2 * {8: 4, 7: 1, 1: 1}[size]  # the long prompt needs another number of columns
    assert capture.replayed > 10 * capture.captured


def test_under_autocast(policy: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights that autocast converts stay where they are, in a family whose linear layers are no ``nn.Linear``."""
    sizes = {"vocab_size": 272, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    randomise(model)
    model.save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    mixed = replace(load(tmp_path / "gpt2", Config()), compute_dtype=torch.bfloat16)
    want = sampled(mixed, monkeypatch, None)
    capture = StandIn()
    got = sampled(mixed, monkeypatch, capture)
    pairs = [(a, b) for one, other in zip(want, got) for a, b in zip(one, other)]
    assert sum(a == b for a, b in pairs) > len(pairs) // 2  # rounding, which columns change, may choose another token
    assert capture.replayed > 10 * capture.captured


def test_a_cache_that_grows_drops_the_graphs(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    want = sampled(policy, monkeypatch, None, max_new_tokens=100)
    monkeypatch.setattr(steps, "GRAPH_COLUMNS", 64)
    monkeypatch.setitem(slots.GROWTH, "cpu", 64)
    capture = StandIn()
    assert sampled(policy, monkeypatch, capture, max_new_tokens=100) == want
    assert capture.captured > 2


def test_graphs_and_cache_are_freed_with_the_last_response(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, before the fit that needs the memory, in bfloat16 too, where nothing else looks for garbage."""
    mixed = replace(policy, compute_dtype=torch.bfloat16)
    caches = []
    make = slots.SlotCache.__init__

    def noted(self: slots.SlotCache, *arguments: object) -> None:
        caches.append(weakref.ref(self))
        make(self, *arguments)

    monkeypatch.setattr(slots.SlotCache, "__init__", noted)
    gc.disable()
    try:
        for capture in (None, StandIn()):
            sampled(mixed, monkeypatch, capture)
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()


def test_a_capture_that_fails_ends_the_run(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    message = r"as a CUDA graph \(operation not permitted when stream is capturing\): set --cuda_graphs false"
    with pytest.raises(UserError, match=message):
        sampled(policy, monkeypatch, capture)


@pytest.mark.parametrize("fault", ["other logits", "nothing is done", "a constant"])
def test_a_graph_with_other_logits_ends_the_run(policy: Policy, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        found = compute()
        replays = {"other logits": lambda: compute() + 0.5, "nothing is done": lambda: found, "a constant": found.clone}
        return replays[fault]

    with pytest.raises(UserError, match=r"a CUDA graph gives logits that are up to .* off"):
        sampled(policy, monkeypatch, capture)


def test_steps_that_do_not_fit_have_half_the_rows(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    want = sampled(policy, monkeypatch, None)
    forward = local._forward

    def limited(policy: Policy, cache: slots.SlotCache, tokens: Tensor, positions: Tensor, columns: int) -> Tensor:
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(policy, cache, tokens, positions, columns)

    monkeypatch.setattr(local, "_forward", limited)
    capture = StandIn()
    assert sampled(policy, monkeypatch, capture) == want
    assert capture.replayed


def test_where_they_cannot_be_used(policy: Policy) -> None:
    with pytest.raises(UserError, match="--cuda_graphs needs a GPU"):
        LocalSampler(policy, SamplingConfig(cuda_graphs=True))
    with pytest.raises(UserError, match="--cuda_graphs needs --sampler local"):
        SamplingConfig(cuda_graphs=True, sampler="vllm")
    with pytest.raises(UserError, match="--cuda_graphs is for one policy, and --objective nash_md mixes two"):
        Config(cuda_graphs=True, objective="nash_md")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tiny_model: Path) -> None:
    policy = load(tiny_model, Config(device="cuda", dtype="float32"))
    config = SamplingConfig(max_new_tokens=24, sampling_batch_size=8)
    want, got = (LocalSampler(policy, replace(config, cuda_graphs=on))(PROMPTS, 5, [0, 7]) for on in (False, True))
    assert [[r.tokens for r in g.responses] for g in got] == [[r.tokens for r in g.responses] for g in want]


def test_a_capture_without_memory_takes_fewer_rows(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    want = sampled(policy, monkeypatch, None)
    stand_in, failed = StandIn(), []

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return stand_in(compute)

    assert sampled(policy, monkeypatch, capture) == want
    assert failed
    assert stand_in.replayed
