"""A step of a fit leaves the device to its work: the host neither waits for it nor sends it anything on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from onpo_fast import fit as fitting
from onpo_fast.batches import MicroBatch, plan_steps
from onpo_fast.config import Config
from onpo_fast.data import Group, Pair, Response
from onpo_fast.fit import fit
from onpo_fast.fit_metrics import StepMetrics
from onpo_fast.loss import PairLossOutput
from onpo_fast.models import scoring
from onpo_fast.models.policy import Policy, score
from onpo_fast.objectives import Onpo

VOCABULARY = 300


def make_policy(device: str, dtype: torch.dtype = torch.float32) -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return Policy(LlamaForCausalLM(config).to(device), None, torch.device(device), dtype, "shared")


def make_groups(count: int) -> list[Group]:
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=draw).tolist()

    return [
        Group([], tokens(3 + g), [Response("", tokens(length), "length", 0.0) for length in (5, 2 + g, 9)])
        for g in range(count)
    ]


GROUPS = make_groups(4)
PAIRS = [Pair(g, winner, loser, 0.8) for g in range(len(GROUPS)) for winner, loser in ((0, 1), (2, 0))]
CACHED = [torch.full((3,), -9.0, dtype=torch.float64)] * len(GROUPS)

# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU. On a CPU, tensors made from Python's numbers show; on "meta", whose tensors have no values for the host
# to read, every copy from the host does.
# ---------------------------------------------------------------------------------------------------------------------

WAITS = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select")


class Watch(TorchDispatchMode):
    """Lists operators that would wait for a GPU, make a tensor from Python's numbers, or take or make one elsewhere."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        by_mask = "index" in str(operator) and any(_is_mask(leaf) for leaf in tree_leaves(args[1]))
        if by_mask or any(name in str(operator) for name in WAITS):
            self.seen.append(str(operator))
        result = operator(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != self.device for tensor in tensors):
            self.seen.append(str(operator))
        return result


def _is_mask(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


class PlainPolicy(Policy):
    def autocast(self, cached: bool = True) -> AbstractContextManager:
        return nullcontext()  # torch knows none for "meta"


def plain(device: str) -> Policy:
    return PlainPolicy(**vars(make_policy(device)))


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, pairs: Tensor, **given):
    """In place of the loss, whose backend for a GPU does not run here. Its arguments are where that one wants them."""
    assert {cu_seqlens.device.type, pairs.device.type} == {"cpu"}
    on_device = [targets, given["preference"], given["pair_weight"]]
    on_device += [given["ref_logps"]] if "ref_logps" in given else [given["ref_hidden"], given["ref_weight"]]
    assert {tensor.device for tensor in on_device} == {hidden.device}
    logps = hidden.new_zeros(len(cu_seqlens) - 1, dtype=torch.float64)
    return PairLossOutput((hidden @ weight.T).sum(), logps, logps, hidden.new_zeros(len(pairs), dtype=torch.float64))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_wait_and_no_copy_between_forward_and_backward(device: str, live: bool, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "fused_linear_pair_loss", plain_loss)
    policy, objective = plain(device), Onpo(eta=2.0)
    anchor = plain(device).frozen() if live else None
    (batch,) = plan_steps(PAIRS, 1, 100, [0])
    microbatch = MicroBatch.prepare(GROUPS, batch, None if live else CACHED, policy.layout).to(policy.device)
    loss = scoring.PairLossOptions(objective, anchor.scoring if live else None)
    metrics = StepMetrics(objective)
    with Watch(device) as watch:
        output = fitting._forward(policy, microbatch, loss)
        output.loss.backward()
        metrics.add(microbatch, output)
    assert watch.seen == []
    assert all(parameter.grad is not None for parameter in policy.model.base_model.parameters())


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x[[0, 1]],
        lambda x: x + torch.ones(2).to(x.device),
    ],
)
def test_what_would_be_one_is_seen(wait: Callable[[Tensor], object]) -> None:
    seen = []
    for device in ("cpu", "meta"):
        values = torch.zeros(2, device=device)
        with Watch(device) as watch, suppress(RuntimeError, NotImplementedError):  # "meta" refuses most of them
            wait(values)
        seen += watch.seen
    assert seen


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: torch itself says what waits
# ---------------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("live", [False, True])
def test_a_step_on_a_gpu_waits_for_its_metrics_alone(live: bool, monkeypatch) -> None:
    """Two micro-batches a step; the first step compiles kernels and is not watched."""
    policy = make_policy("cuda", torch.bfloat16)
    anchor = make_policy("cuda", torch.bfloat16).frozen() if live else None
    logps = None if live else CACHED
    forward, summary = fitting._forward, StepMetrics.summary
    records: list[dict] = []
    watched = []

    def watch(*arguments) -> PairLossOutput:
        if records:
            watched.append(len(records))
            torch.cuda.set_sync_debug_mode("error")
        return forward(*arguments)

    def read(*arguments, **more) -> dict:
        torch.cuda.set_sync_debug_mode("default")
        return summary(*arguments, **more)

    monkeypatch.setattr(fitting, "_forward", watch)
    monkeypatch.setattr(StepMetrics, "summary", read)
    config = Config(device="cuda", tokens_per_microbatch=50)
    try:
        batches = plan_steps(PAIRS, 2, 100, [0])
        fit(policy, GROUPS, batches, logps, Onpo(eta=2.0), config, records.append, live_anchor=anchor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(records) == 2
    assert watched == [1, 1]


@gpu
def test_scoring_on_a_gpu_waits_once() -> None:
    policy = make_policy("cuda", torch.bfloat16)
    score(policy, GROUPS, 50)  # compiles kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            score(policy, GROUPS, 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(warning.message) for warning in seen) == 1
