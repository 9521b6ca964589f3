"""Decode steps as CUDA graphs, with a stand-in for a graph: it may only do again what was done when it was captured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from onpo_fast.config import Config, SamplingConfig
from onpo_fast.errors import UserError
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy
from onpo_fast.run import tracking
from onpo_fast.sampling import LocalSampler
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
        make = partial(GraphedSteps, device=policy.device, tolerance=1e-3, capture=capture)
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


def test_a_cache_that_grows_drops_the_graphs(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    want = sampled(policy, monkeypatch, None, max_new_tokens=100)
    monkeypatch.setattr(steps, "GRAPH_COLUMNS", 64)
    monkeypatch.setitem(slots.GROWTH, "cpu", 64)
    capture = StandIn()
    assert sampled(policy, monkeypatch, capture, max_new_tokens=100) == want
    assert capture.captured > 2


def test_a_capture_that_fails(policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Once, with its reason; the responses are sampled without graphs."""

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(tracking, "announced", set())
    want = sampled(policy, monkeypatch, None)
    assert sampled(policy, monkeypatch, capture) == want
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "CUDA graphs" in line]
    assert said.endswith("operation not permitted when stream is capturing")


def test_a_graph_with_other_logits_is_not_used(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            replays.append(1)
            return compute() + 0.5

        return replay

    want = sampled(policy, monkeypatch, None)
    assert sampled(policy, monkeypatch, capture) == want
    assert len(replays) == 1


def test_a_graph_that_does_not_fit_halves_the_rows(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(StandIn):
        def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
            if compute().shape[0] == 8:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().__call__(compute)

    want = sampled(policy, monkeypatch, None)
    capture = Full()
    assert sampled(policy, monkeypatch, capture) == want
    assert capture.replayed


def test_they_need_a_gpu_and_the_local_sampler() -> None:
    with pytest.raises(UserError, match="--cuda_graphs on needs a GPU"):
        Config(cuda_graphs="on", device="cpu")
    with pytest.raises(UserError, match="--cuda_graphs needs --sampler local"):
        SamplingConfig(cuda_graphs="on", sampler="vllm")
