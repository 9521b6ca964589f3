"""What only a GPU can show: no waiting for it, CUDA graphs, memory."""

from __future__ import annotations

import pytest
import torch
from support.loss_cases import CASES, Case, relative_error

from onpo_fast import fused_linear_pair_loss, linear_logprobs
from onpo_fast.objectives import Onpo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _as_in_training():
    torch.use_deterministic_algorithms(False)  # its mode fills memory, which these tests measure


def on_gpu(case: Case, dtype: torch.dtype = torch.bfloat16) -> dict:
    on_host = ("cu_seqlens", "pairs")
    return {k: x if x is None or k in on_host else x.cuda() for k, x in case.tensors(dtype).items()}


@pytest.mark.parametrize("mode", ["auto", "lean"])
@pytest.mark.parametrize("name", ["arbitrary pairs", "one head for both"])
def test_nothing_waits_for_the_device(name: str, mode: str) -> None:
    values = on_gpu(CASES[name])
    for leaf in ("hidden", "weight"):
        values[leaf].requires_grad_()

    def step() -> None:
        fused_linear_pair_loss(**values, objective=Onpo(eta=1.0), mode=mode).loss.backward()

    step()  # compiles, and copies the layout
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_drawing_tokens_waits_for_nothing(top_p: float) -> None:
    from onpo_fast.sampling.draw import TokenDraw, stream_keys  # needs transformers, as no other test here does

    draw = TokenDraw(stream_keys([[0, row] for row in range(64)], torch.device("cuda")), 0.7, top_p)
    logits = torch.randn(64, 49152, device="cuda")
    draw(None, logits.clone())  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(None, logits.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["auto", "fast", "lean"])
def test_a_cuda_graph(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In mode "auto" the plan asks for the free memory, but not while a graph is being captured."""
    case = CASES["groups with all pairs"]
    values = on_gpu(case)
    hidden, weight = values["hidden"].requires_grad_(), values["weight"].requires_grad_()

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        loss = fused_linear_pair_loss(**values, objective=case.objective, mode=mode).loss
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)

    def asked(*_: object) -> None:
        raise AssertionError("asked for the free memory during a capture")

    graph = torch.cuda.CUDAGraph()
    with monkeypatch.context() as patched, torch.cuda.graph(graph):
        patched.setattr(torch.cuda, "mem_get_info", asked)
        loss = step()
    with torch.no_grad():
        hidden.mul_(0.5)
    graph.replay()
    got = loss.clone(), hidden.grad.clone(), weight.grad.clone()
    want = step(), hidden.grad, weight.grad
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_compiled_model_breaks_its_graph_and_is_right() -> None:
    case = CASES["pairs"]
    values = on_gpu(case)
    layer = torch.nn.Linear(24, 24, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = values.pop("hidden")

    def step(x: torch.Tensor) -> torch.Tensor:
        return fused_linear_pair_loss(layer(x), **values, objective=case.objective).loss

    want = step(hidden)
    (expected,) = torch.autograd.grad(want, layer.weight)
    got = torch.compile(step)(hidden)
    (gradient,) = torch.autograd.grad(got, layer.weight)
    assert relative_error(got, want) < 1e-3
    assert relative_error(gradient, expected) < 1e-2


def test_the_tensor_cores_rounding_does_not_add_up() -> None:
    """A long sum comes out too small; uncorrected, that is 0.016 nats of a response of 1000 tokens at H = 4096."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("known for compute capability 9.0")
    tokens, features, vocabulary = 1000, 4096, 32768
    draw = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, features, generator=draw, device="cuda").bfloat16()
    weight = (torch.randn(vocabulary, features, generator=draw, device="cuda") * 2 / features**0.5).bfloat16()
    targets = torch.randint(vocabulary, (tokens,), generator=draw, device="cuda")
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got = linear_logprobs(hidden, weight, targets, backend="triton")
    assert abs(float((got.double() - exact).sum())) < 0.005


@pytest.mark.parametrize(
    ("mode", "workspace", "limit"),
    [("fast", None, 3e9), ("fast", 2**30, 2**30), ("lean", None, 0.35 * 2**30)],
    ids=["fast, one chunk", "fast, 1 GiB", "lean, 0.35 GiB"],
)
def test_memory_beside_inputs_and_gradients(mode: str, workspace: int | None, limit: float) -> None:
    """Four pairs of 2×1024 tokens, H = 4096, V = 151936."""
    tokens, features, vocabulary = 8192, 4096, 151936
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")

    def normal(rows: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, features, device="cuda") * scale).bfloat16()

    hidden, weight = normal(tokens, 1.0).requires_grad_(), normal(vocabulary, features**-0.5).requires_grad_()
    reference = normal(tokens, 1.0)
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    edges = torch.arange(0, tokens + 1, 1024, dtype=torch.int32)

    def step() -> None:
        hidden.grad = weight.grad = None
        fused_linear_pair_loss(
            hidden,
            weight,
            targets,
            edges,
            objective=Onpo(eta=1.0),
            ref_hidden=reference,
            mode=mode,
            workspace_bytes=workspace,
        ).loss.backward()

    step()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients <= limit
