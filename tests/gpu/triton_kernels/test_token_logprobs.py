"""Scoring, and per-token log-probs as other losses use them."""

from __future__ import annotations

import pytest
import torch
from support.loss_cases import CASES, Case, relative_error

from onpo_fast import linear_logprobs
from onpo_fast.kernels import exponentials, fused
from onpo_fast.kernels.head import Head
from onpo_fast.kernels.target_logits import target_logits
from onpo_fast.kernels.variants import EPILOGUES, Variant, using


def run(case: Case, dtype: torch.dtype, device: str, backend: str, upstream: torch.Tensor, **options):
    values = case.tensors(dtype)
    names = ("hidden", "weight", "bias")
    leaves = {k: None if values[k] is None else values[k].to(device).requires_grad_() for k in names}
    if backend == "reference":
        leaves = {k: None if x is None else x.detach().double().requires_grad_() for k, x in leaves.items()}
    logps = linear_logprobs(
        **leaves,
        targets=values["targets"].to(device),
        backend=backend,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        temperature=case.temperature,
        **options,
    )
    logps.backward(upstream.to(logps))
    return [logps.detach().cpu(), *(x.grad.cpu() for x in leaves.values() if x is not None)]


@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("name", ["pairs", "everything", "a prime vocabulary", "sure of most tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(name: str, dtype: torch.dtype, workspace: int | None, device: str) -> None:
    case = CASES[name]
    upstream = torch.randn(sum(case.lengths), generator=torch.Generator().manual_seed(0))
    got = run(case, dtype, device, "triton", upstream, workspace_bytes=workspace)
    want = run(case, dtype, "cpu", "reference", upstream)
    assert got[0].dtype == torch.float32
    assert relative_error(got[0], want[0]) < 1e-5  # log-probs are fp32's whatever the inputs are
    plain = [torch.zeros(())] * len(got) if dtype == torch.float32 else _materialised(case, dtype, upstream)
    for mine, exact, theirs in zip(got[1:], want[1:], plain[1:]):
        limit = 2e-5 if dtype == torch.float32 else 1.5 * relative_error(theirs, exact) + 1e-6
        assert relative_error(mine, exact) < limit


def _materialised(case: Case, dtype: torch.dtype, upstream: torch.Tensor) -> list[torch.Tensor]:
    values = case.tensors(dtype)
    leaves = [values[k].requires_grad_() for k in ("hidden", "weight", "bias") if values[k] is not None]
    logits = torch.nn.functional.linear(*leaves) * case.logit_scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logps = (logits / case.temperature).log_softmax(-1).gather(1, values["targets"][:, None])[:, 0]
    logps.backward(upstream.to(dtype))
    return [logps.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    ("options", "bias"),
    [({}, 0.0), ({}, 30.0), ({"softcap": 20.0}, 0.0), ({"softcap": 20.0}, 30.0), ({"logit_scale": -1.0}, 0.0)],
    ids=str,
)
def test_what_tensor_cores_lose_is_made_up_for(options: dict, bias: float, epilogue: str, device, monkeypatch) -> None:
    """A head whose products are too small by a known share gives the probabilities of the whole one, if the target's
    logit, which is taken apart from the others, is that of the whole one."""
    share = 1e-3
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 24, generator=generator), torch.randn(70, 24, generator=generator)
    targets = torch.randint(70, (30,), generator=generator)
    offsets = bias + torch.randn(70, generator=generator) if bias else None
    whole = Head(weight.to(device), None if offsets is None else offsets.to(device), **options)
    exact_weight = weight.double().requires_grad_()
    logits = Head(exact_weight, None if offsets is None else offsets.double(), **options).logits(hidden.double())
    want = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    want.sum().backward()
    monkeypatch.setattr(fused, "target_logits", lambda h, head, t: target_logits(h, whole, t))

    def errors(lost: float) -> tuple[float, float]:
        monkeypatch.setattr(exponentials, "lost_share", lambda dtype, terms: lost)
        smaller = (weight * (1 - share)).to(device).requires_grad_()
        with using(Variant(epilogue)):
            got = linear_logprobs(
                hidden.to(device), smaller, targets.to(device), bias=whole.bias, backend="triton", **options
            )
            got.sum().backward()
        return relative_error(got.detach().cpu(), want.detach()), relative_error(smaller.grad.cpu(), exact_weight.grad)

    assert max(errors(share)) < 1e-5
    assert min(errors(0.0)) > 2e-5


def test_more_rows_than_a_grid_dimension_holds(device: str) -> None:
    rows = 66_000
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 8, generator=generator), torch.randn(40, 8, generator=generator)
    targets = torch.randint(40, (rows,), generator=generator)
    got = linear_logprobs(hidden.to(device), weight.to(device), targets.to(device), backend="triton").cpu()
    want = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert relative_error(got, want) < 1e-6


def test_a_sure_token_keeps_its_small_logp(device: str) -> None:
    """log p near 0 would be all rounding if it were taken as logit − logsumexp."""
    hidden, weight = torch.tensor([[1.0]], device=device), torch.tensor([[30.0], [5.0], [4.0]], device=device)
    exact = torch.log_softmax(torch.tensor([30.0, 5.0, 4.0], dtype=torch.float64), 0)[0]
    got = linear_logprobs(hidden, weight, torch.tensor([0], device=device), backend="triton")
    assert relative_error(got[0].cpu(), exact) < 1e-6


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_sure_tokens_down_to_the_smallest(epilogue: str, device: str) -> None:
    """log p from −10⁻⁵ to −10⁻²⁵: 1 + the others' share is 1 in float64 long before."""
    gaps = torch.tensor([12.0, 27.0, 38.0, 46.0, 57.0], dtype=torch.float64)  # nats to the second token
    weight = torch.tensor([[1.0], [0.0], [-1.0]], device=device)
    with using(Variant(epilogue)):
        got = linear_logprobs(
            gaps.float().to(device)[:, None], weight, torch.zeros(5, dtype=torch.int64, device=device), backend="triton"
        )
    exact = -torch.log1p(torch.exp(-gaps) + torch.exp(-2 * gaps))
    torch.testing.assert_close(got.cpu().double(), exact, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", ["hidden", "bias"])
def test_a_row_that_is_not_finite_leaves_the_others_alone(bad: str, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 16, generator=generator), torch.randn(50, 16, generator=generator) * 0.3
    bias, targets = torch.zeros(50), torch.arange(12)
    if bad == "hidden":
        hidden[5, 2] = float("nan")
    else:
        bias[targets[5]] = float("-inf")
    states = hidden.to(device, dtype).requires_grad_()
    logps = linear_logprobs(
        states, weight.to(device, dtype), targets.to(device), bias=bias.to(device, dtype), backend="triton"
    )
    logps.float().sum().backward()
    finite = states.grad.isfinite().all(1).cpu()
    assert finite[torch.arange(12) != 5].all()


def test_no_rows(device: str) -> None:
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.randn(5, 8, device=device, requires_grad=True)
    logps = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64, device=device), backend="triton")
    logps.sum().backward()
    assert logps.shape == (0,)
    assert weight.grad.abs().sum() == 0


def test_float64_is_refused(device: str) -> None:
    hidden, weight = torch.zeros(2, 8, device=device).double(), torch.zeros(3, 8, device=device).double()
    with pytest.raises(ValueError, match="backend='triton' takes float32"):
        linear_logprobs(hidden, weight, torch.zeros(2, dtype=torch.int64, device=device), backend="triton")
