"""The fused loss against an independent float64 computation, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.loss_cases import CASES, Case, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from onpo_fast import fused_linear_pair_loss, linear_logprobs
from onpo_fast.kernels import chunked, reference
from onpo_fast.objectives import Onpo

WORKSPACES = {"roomy": None, "some blocks": 4 * 97 * 14, "tight": 1}


@pytest.mark.parametrize("workspace", WORKSPACES.values(), ids=WORKSPACES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fp32_is_exact(case: Case, workspace: int | None) -> None:
    got, want = case.run(workspace_bytes=workspace), case.exact(torch.float32)
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        if case.vocabulary == 1 and name != "loss":
            assert got[name].abs().max() < 1e-6  # the only token is certain
        else:
            assert relative_error(got[name], value) < 2e-5, name


@pytest.mark.parametrize("workspace", [None, 4 * 97 * 14, 1])
@pytest.mark.parametrize("name", ["pairs", "groups with all pairs", "everything", "a prime vocabulary"])
def test_bf16_accumulates_in_fp32(name: str, workspace: int | None) -> None:
    """No further from float64 than 1.5 times what materialised PyTorch in bf16 is, on the same rounded inputs."""
    case = CASES[name]
    got, plain = case.run(torch.bfloat16, workspace_bytes=workspace), case.materialised(torch.bfloat16)
    want = case.exact(torch.bfloat16)
    for key, value in want.items():
        assert relative_error(got[key], value) <= 1.5 * relative_error(plain[key], value) + 1e-7, key
    assert got["hidden gradient"].dtype == got["weight gradient"].dtype == torch.bfloat16
    assert got["logps"].dtype == torch.float32


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_backend_is_the_definition(case: Case) -> None:
    got, want = case.run(torch.float64, backend="reference"), case.exact(torch.float64)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("workspace", [None, 8 * 97 * 14, 1])
def test_float64_stays_float64(workspace: int | None) -> None:
    case = CASES["everything"]
    got, want = case.run(torch.float64, workspace_bytes=workspace), case.exact(torch.float64)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11)


def test_one_long_pair_without_a_second_pass() -> None:
    """A pair larger than the workspace gathers dW apart if that fits: the head is passed over once."""
    case = Case([40, 50], vocabulary=97, features=8, bias=True)
    workspace = 4 * 97 * 20  # 20 rows of logits: 8 for dW, 12 for the blocks
    want = case.exact(torch.float32)
    got = case.run(workspace_bytes=workspace)
    for name, value in want.items():
        assert relative_error(got[name], value) < 2e-5, name

    def products_with_the_head(case: Case) -> int:
        with _Recorder() as recorder:
            case.run(workspace_bytes=workspace)
        return recorder.products_of_width(97)

    several_pairs = Case([40, 50, 3], [(0, 1), (0, 2)], vocabulary=97, features=8, bias=True)
    assert products_with_the_head(case) == 8 + 8  # anchor and policy in blocks of 12 rows
    assert products_with_the_head(several_pairs) == 5 + 2 * 5  # the policy's five blocks twice


class _Recorder(TorchDispatchMode):
    """Sees every operation: the largest result, and the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[torch.Size] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.mkldnn._linear_pointwise):
                self.products.append(result.shape)
        return result

    def products_of_width(self, width: int) -> int:
        return sum(shape[1] == width for shape in self.products)


@pytest.mark.parametrize("call", ["loss", "scoring", "token gradients"])
def test_never_all_the_logits(call: str) -> None:
    case = Case([30] * 20, vocabulary=211, features=8)
    workspace = 4 * 211 * 64
    values = case.tensors(torch.float32)
    with _Recorder() as recorder:
        if call == "loss":
            case.run(workspace_bytes=workspace)
        else:
            hidden = values["hidden"].requires_grad_(call == "token gradients")
            logps = linear_logprobs(hidden, values["weight"], values["targets"], workspace_bytes=workspace)
            if call == "token gradients":
                logps.sum().backward()
    assert recorder.largest <= 64 * 211 < 600 * 211


@pytest.mark.parametrize("asked", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
@pytest.mark.parametrize("workspace", [None, 1])
def test_gradients_only_where_asked(asked: tuple[str, ...], workspace: int | None) -> None:
    case = CASES["everything"]
    values, want = case.tensors(torch.float32), case.exact(torch.float32)
    for name in asked:
        values[name].requires_grad_()
    output = fused_linear_pair_loss(
        **values,
        objective=case.objective,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        temperature=case.temperature,
        workspace_bytes=workspace,
    )
    assert relative_error(output.loss, want["loss"]) < 2e-5
    assert not output.logps.requires_grad
    assert not output.margins.requires_grad
    assert output.loss.requires_grad == bool(asked)
    if asked:
        output.loss.backward()
    for name in ("hidden", "weight", "bias"):
        assert (values[name].grad is not None) == (name in asked)
        if name in asked:
            assert relative_error(values[name].grad, want[f"{name} gradient"]) < 2e-5


def test_no_gradients_under_no_grad() -> None:
    values = CASES["pairs"].tensors(torch.float32)
    values["hidden"].requires_grad_()
    with torch.no_grad():
        output = fused_linear_pair_loss(**values, objective=Onpo(eta=2.0))
    assert not output.loss.requires_grad


def test_upstream_gradients_and_a_second_backward() -> None:
    case = CASES["pairs"]
    want = case.exact(torch.float32)
    values = case.tensors(torch.float32)
    hidden, weight = values["hidden"].requires_grad_(), values["weight"].requires_grad_()
    loss = fused_linear_pair_loss(**values, objective=case.objective).loss
    (gradient,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    assert relative_error(gradient, 3 * want["hidden gradient"]) < 2e-5
    (-loss).backward()
    assert relative_error(hidden.grad, -want["hidden gradient"]) < 2e-5
    assert relative_error(weight.grad, -want["weight gradient"]) < 2e-5


def test_cached_anchor_equals_live_anchor() -> None:
    case = CASES["groups with all pairs"]
    live = case.run()
    values = {k: v for k, v in case.tensors(torch.float32).items() if not k.startswith("ref_")}
    cached = fused_linear_pair_loss(**values, ref_logps=live["ref_logps"], objective=case.objective)
    torch.testing.assert_close(cached.loss, live["loss"], rtol=1e-5, atol=0)


def test_the_anchor_may_share_the_policys_head() -> None:
    case = Case([5, 7, 3, 9], bias=True)
    values = case.tensors(torch.float32)
    shared = {**values, "ref_weight": None, "ref_bias": None}
    spelled = {**values, "ref_weight": values["weight"], "ref_bias": values["bias"]}
    a, b = (fused_linear_pair_loss(**v, objective=case.objective) for v in (shared, spelled))
    assert torch.equal(a.margins, b.margins)


def test_non_contiguous_inputs() -> None:
    case = CASES["pairs"]
    values = case.tensors(torch.float32)
    want = fused_linear_pair_loss(**values, objective=case.objective).loss
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        values[name] = values[name].T.contiguous().T
    torch.testing.assert_close(fused_linear_pair_loss(**values, objective=case.objective).loss, want)


def test_autocast_casts_as_a_linear_layer_would() -> None:
    case = CASES["pairs"]
    values = case.tensors(torch.float32)
    hidden = values["hidden"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fused_linear_pair_loss(**values, objective=case.objective)
    output.loss.backward()
    rounded = fused_linear_pair_loss(
        **{k: x.bfloat16() if x is not None and x.dtype == torch.float32 else x for k, x in values.items()},
        objective=case.objective,
    )
    torch.testing.assert_close(output.loss, rounded.loss)
    assert hidden.grad.dtype == torch.float32


def test_no_tokens_and_no_pairs() -> None:
    empty = {"hidden": torch.zeros(0, 4, requires_grad=True), "weight": torch.randn(7, 4), "objective": Onpo(eta=1.0)}
    none = torch.zeros(0, dtype=torch.int64)
    output = fused_linear_pair_loss(
        **empty, targets=none, cu_seqlens=torch.zeros(1, dtype=torch.int32), ref_logps=torch.zeros(0)
    )
    assert output.loss == 0
    assert output.logps.shape == output.margins.shape == (0,)
    output = fused_linear_pair_loss(
        **empty, targets=none, cu_seqlens=torch.zeros(3, dtype=torch.int32), ref_logps=torch.zeros(2)
    )
    assert output.loss.item() == pytest.approx(0.25)  # two empty responses: margin 0, target ½
    output.loss.backward()
    assert empty["hidden"].grad.shape == (0, 4)


class TestTokenLogprobs:
    @pytest.mark.parametrize("name", ["pairs", "everything", "sure of most tokens"])
    @pytest.mark.parametrize("workspace", [None, 4 * 97 * 5])
    def test_values_and_gradients(self, name: str, workspace: int | None) -> None:
        case = CASES[name]
        values = case.tensors(torch.float32)
        options = {"logit_scale": case.logit_scale, "softcap": case.softcap, "temperature": case.temperature}
        upstream = torch.randn(len(values["targets"]), generator=torch.Generator().manual_seed(0))

        def run(dtype, backend):
            tensors = {
                k: None if values[k] is None else values[k].to(dtype, copy=True).requires_grad_()
                for k in ("hidden", "weight", "bias")
            }
            logps = linear_logprobs(
                **tensors, targets=values["targets"], backend=backend, workspace_bytes=workspace, **options
            )
            logps.backward(upstream.to(logps.dtype))
            return [logps, *(t.grad for t in tensors.values() if t is not None)]

        for got, want in zip(run(torch.float32, "torch"), run(torch.float64, "reference")):
            assert relative_error(got, want) < 2e-5

    def test_a_sure_token_keeps_its_small_logp(self) -> None:
        """log p near 0 would be all rounding if it were taken as logit − logsumexp."""
        hidden, weight = torch.tensor([[1.0]]), torch.tensor([[30.0], [5.0], [4.0]])
        exact = torch.log_softmax(torch.tensor([30.0, 5.0, 4.0], dtype=torch.float64), 0)[0]
        got = linear_logprobs(hidden, weight, torch.tensor([0]))
        assert relative_error(got[0], exact) < 1e-6


GOOD = {
    "hidden": torch.randn(6, 4),
    "weight": torch.randn(7, 4),
    "targets": torch.tensor([0, 1, 2, 3, 4, 5]),
    "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32),
    "ref_logps": torch.zeros(2),
    "objective": Onpo(eta=1.0),
}
BAD = {
    "targets beyond the vocabulary": ({"targets": torch.tensor([0, 1, 2, 3, 4, 7])}, r"targets\[5\] is 7"),
    "negative target": ({"targets": torch.tensor([0, -100, 2, 3, 4, 5])}, r"targets\[1\] is -100"),
    "targets of another length": ({"targets": torch.tensor([0])}, "targets must have shape"),
    "targets in int32": ({"targets": torch.zeros(6, dtype=torch.int32)}, "targets must be int64"),
    "hidden of three dimensions": ({"hidden": torch.randn(1, 6, 4)}, "hidden must have shape"),
    "weight of another width": ({"weight": torch.randn(7, 5)}, "weight must have shape"),
    "weight of another dtype": ({"weight": torch.randn(7, 4).double()}, "weight is torch.float64"),
    "weight elsewhere": ({"weight": torch.randn(7, 4, device="meta")}, "weight is on meta"),
    "no vocabulary": ({"weight": torch.randn(0, 4)}, "weight must have at least one row"),
    "bias of another length": ({"bias": torch.randn(6)}, "bias must have shape"),
    "boundaries that end early": ({"cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32)}, "cu_seqlens must rise"),
    "boundaries that fall": ({"cu_seqlens": torch.tensor([0, 7, 6], dtype=torch.int32)}, "cu_seqlens must rise"),
    "an odd number of responses": (
        {"cu_seqlens": torch.tensor([0, 2, 4, 6], dtype=torch.int32), "ref_logps": torch.zeros(3)},
        "pairs is needed",
    ),
    "a pair outside": ({"pairs": torch.tensor([[0, 2]])}, r"pairs\[0\] is \[0, 2\]"),
    "a pair of one": ({"pairs": torch.tensor([[0, 1], [1, 1]])}, r"pairs\[1\] compares response 1 with itself"),
    "pairs of another shape": ({"pairs": torch.tensor([0, 1])}, "pairs must be int64 of shape"),
    "a preference above one": ({"preference": torch.tensor([1.5])}, r"preference\[0\] is 1.5"),
    "a preference that is NaN": ({"preference": torch.tensor([float("nan")])}, r"preference\[0\] is nan"),
    "preferences of another length": ({"preference": torch.ones(2)}, "preference must have shape"),
    "a negative weight": ({"pair_weight": torch.tensor([-1.0])}, r"pair_weight\[0\]"),
    "no weight at all": ({"pair_weight": torch.tensor([0.0])}, "pair_weight sums to 0"),
    "no anchor": ({"ref_logps": None}, "ref_logps or ref_hidden"),
    "two anchors": ({"ref_hidden": torch.randn(6, 4)}, "ref_logps or ref_hidden"),
    "anchor of another length": ({"ref_logps": torch.zeros(3)}, "ref_logps must have shape"),
    "anchor states of another length": ({"ref_logps": None, "ref_hidden": torch.randn(5, 4)}, "ref_hidden must have 6"),
    "temperature zero": ({"temperature": 0.0}, "temperature must be"),
    "softcap NaN": ({"softcap": float("nan")}, "softcap must be"),
    "unknown backend": ({"backend": "numpy"}, "backend must be one of"),
    "an objective by name": ({"objective": "onpo"}, "objective must be one of"),
    "no workspace": ({"workspace_bytes": 0}, "workspace_bytes must be positive"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    fused_linear_pair_loss(**GOOD)
    with pytest.raises(ValueError, match=message):
        fused_linear_pair_loss(**{**GOOD, **change})


@pytest.mark.parametrize(("backend", "module"), [("torch", chunked), ("reference", reference)])
def test_gradients_are_scaled_by_the_backend_that_computed_them(backend, module, monkeypatch) -> None:
    called = []
    scale = module.scale_in_place
    monkeypatch.setattr(module, "scale_in_place", lambda *arguments: (called.append(backend), scale(*arguments)))
    gradients = []
    for factor in (1.0, -0.25):
        hidden = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output = fused_linear_pair_loss(
            hidden,
            torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
            torch.tensor([0, 1, 2, 3]),
            torch.tensor([0, 2, 4], dtype=torch.int32),
            objective=Onpo(eta=2.0),
            ref_logps=torch.zeros(2),
            backend=backend,
        )
        (factor * output.loss).backward()
        gradients.append(hidden.grad)
    assert called == [backend, backend]
    assert torch.equal(gradients[1], -0.25 * gradients[0])
