"""The Triton backend against float64: every option, both modes, one chunk and several."""

from __future__ import annotations

import pytest
import torch
from support.loss_cases import CASES, Case, relative_error

from onpo_fast import fused_linear_pair_loss, linear_logprobs
from onpo_fast.kernels import exponentials, fused, launch, weight_gradient
from onpo_fast.kernels.groups import PairLayout
from onpo_fast.kernels.plan import choose_plan
from onpo_fast.kernels.rescale import rescale
from onpo_fast.kernels.variants import EPILOGUES, Variant, using
from onpo_fast.objectives import Dpo, Onpo

# mode and workspace: a roomy one is one chunk; in a small one each group is a chunk and dW is carried between them
WAYS = {"one chunk": ("fast", None), "chunks": ("fast", "least"), "lean": ("lean", None), "lean, narrow": ("lean", 1)}


def least_workspace(case: Case, dtype: torch.dtype) -> int:
    """The bytes that the largest group of the case needs in fast mode."""
    values = case.tensors(dtype)
    layout = PairLayout.of(values["cu_seqlens"], _pairs(case))
    groups = [group for group in layout.groups if group.pairs]
    low, high = 0, 2**30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            choose_plan(groups, tuple(values["weight"].shape), dtype, True, "fast", middle, None)
            high = middle
        except ValueError:
            low = middle
    return high


def _pairs(case: Case) -> torch.Tensor:
    pairs = case.pairs or [(i, i + 1) for i in range(0, len(case.lengths), 2)]
    return torch.tensor(pairs).view(-1, 2)


def run(case: Case, way: str, dtype: torch.dtype, device: str, **overrides) -> dict[str, torch.Tensor]:
    mode, workspace = WAYS[way]
    if workspace == "least":
        workspace = least_workspace(case, dtype)
    return case.run(dtype, device, backend="triton", mode=mode, workspace_bytes=workspace, **overrides)


def check(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in want.items():
        if name in got:
            assert relative_error(got[name], value) < tolerance, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_fp32(name: str, way: str, device: str) -> None:
    case = CASES[name]
    got, want = run(case, way, torch.float32, device), case.exact(torch.float32)
    if case.vocabulary == 1:
        assert max(got[key].abs().max() for key in want if key != "loss") < 1e-6  # the only token is certain
        return
    check(got, want, 2e-5)
    assert all(x.dtype == torch.float32 for x in got.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name",
    [
        "pairs",
        "groups with all pairs",
        "arbitrary pairs",
        "one head for both",
        "everything",
        "a prime vocabulary",
        "sure of most tokens",
    ],
)
def test_bf16(name: str, way: str, device: str) -> None:
    """No further from float64 than 1.5 times what materialised PyTorch in bf16 is, on the same rounded inputs."""
    case = CASES[name]
    got = run(case, way, torch.bfloat16, device)
    plain, want = case.materialised(torch.bfloat16), case.exact(torch.bfloat16)
    for key, value in want.items():
        assert relative_error(got[key], value) <= 1.5 * relative_error(plain[key], value) + 1e-6, key
    assert relative_error(got["logps"], want["logps"]) < 1e-6  # the log-probs are fp32's, not bf16's
    assert got["hidden gradient"].dtype == got["weight gradient"].dtype == torch.bfloat16
    assert got["logps"].dtype == torch.float32


@pytest.mark.parametrize("name", ["pairs", "everything"])
def test_fp16(name: str, device: str) -> None:
    case = CASES[name]
    got = run(case, "lean", torch.float16, device)
    plain, want = case.materialised(torch.float16), case.exact(torch.float16)
    for key, value in want.items():
        assert relative_error(got[key], value) <= 1.5 * relative_error(plain[key], value) + 1e-6, key


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_tensor_descriptors(dtype: torch.dtype, way: str, device: str, monkeypatch) -> None:
    """As on GPUs older than Hopper: the same numbers through pointers. A GPU may sum them in another order then."""
    case = CASES["everything"]
    want = run(case, way, dtype, device)
    monkeypatch.setattr(launch, "uses_descriptors", lambda: False)
    got = run(case, way, dtype, device)
    if device == "cpu":
        assert all(torch.equal(got[key], want[key]) for key in want)
    else:
        check(got, want, 2e-5 if dtype == torch.float32 else 5e-3)


def test_autocast(device: str) -> None:
    """Products in bf16, gradients in the leaves' fp32: closer to exact than bf16 gradients can be."""
    case = CASES["groups with all pairs"]
    values = on_device(case, torch.bfloat16, device)
    values = {k: x.float() if x is not None and x.is_floating_point() else x for k, x in values.items()}
    hidden, weight = values["hidden"].requires_grad_(), values["weight"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        output = fused_linear_pair_loss(
            **values, objective=case.objective, backend="triton", workspace_bytes=least_workspace(case, torch.bfloat16)
        )
    output.loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    want = case.exact(torch.bfloat16)
    rounded = run(case, "one chunk", torch.bfloat16, device)
    assert relative_error(output.logps.cpu(), want["logps"]) < 1e-6
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        key = f"{name} gradient"
        assert relative_error(leaf.grad.cpu(), want[key]) < relative_error(rounded[key], want[key])


def test_fp16_gradients_survive_a_loss_scale(device: str) -> None:
    """A loss with small gradients times 2¹⁴: what fp16 would lose before the scale must be there after it."""
    case = Case([5, 7, 3, 9], objective=Dpo(beta=1e-5), vocabulary=3000, spread=0.05)
    values = on_device(case, torch.float16, device)
    hidden, weight = values["hidden"].requires_grad_(), values["weight"].requires_grad_()
    loss = fused_linear_pair_loss(**values, objective=case.objective, backend="triton").loss
    (loss * 2.0**14).backward()
    want = case.exact(torch.float16)
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        assert relative_error(leaf.grad.cpu(), 2.0**14 * want[f"{name} gradient"]) < 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_targets_far_from_likely(way: str, dtype: torch.dtype, device: str) -> None:
    """Targets 100 nats and more below the likeliest token: exponentials relative to them would overflow."""
    case = Case([9, 8, 7, 6], spread=30.0, bias=True)
    got, want = run(case, way, dtype, device), case.exact(dtype)
    assert want["logps"].min() < -1000
    check(got, want, 2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("mode", ["fast", "lean"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_some_rows_far_from_likely(epilogue: str, mode: str, scale: float, device: str) -> None:
    """One row's shift moves by 300 nats and more: the rows beside it keep their values."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=generator), torch.randn(300, 16, generator=generator)
    hidden[7] *= 40
    targets = torch.randint(300, (40,), generator=generator)
    targets[7] = (scale * weight @ hidden[7]).argmin()
    edges = torch.tensor([0, 15, 40], dtype=torch.int32)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.clone().to(device, dtype).requires_grad_() for x in (hidden, weight)]
        with using(Variant(epilogue)):
            out = fused_linear_pair_loss(
                *leaves,
                targets.to(device),
                edges,
                objective=Onpo(eta=1.0),
                backend=backend,
                mode=mode,
                ref_logps=torch.zeros(2, device=device),
                logit_scale=scale,
            )
            scored = linear_logprobs(*leaves, targets.to(device), backend=backend, logit_scale=scale)
        out.loss.backward()
        results.append([scored.detach().cpu(), out.loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    assert results[1][0][7] < -300
    for got, want in zip(*results):
        assert relative_error(got, want) < 2e-5
    unlikely = torch.arange(40) != 7
    torch.testing.assert_close(results[0][0][unlikely].double(), results[1][0][unlikely], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["fast", "lean"])
@pytest.mark.parametrize("distance", [59, 61, 88, 89, 300])
def test_many_tokens_above_the_target(distance: int, mode: str, device: str) -> None:
    """Just below and above the distance from which a row's shift moves: 20,000 exponentials of this size are added."""
    vocabulary = 20_000
    weight = torch.zeros(vocabulary, 8)
    weight[:, 0] = distance
    weight[7] = 0.0
    weight[:, 1:] = torch.randn(vocabulary, 7, generator=torch.Generator().manual_seed(0)) * 0.1
    hidden = torch.ones(4, 8)
    targets = torch.tensor([7, 7, 8, 7])
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.clone().to(device, dtype).requires_grad_() for x in (hidden, weight)]
        out = fused_linear_pair_loss(
            *leaves,
            targets.to(device),
            torch.tensor([0, 2, 4], dtype=torch.int32),
            objective=Dpo(beta=0.01),
            ref_logps=torch.zeros(2, device=device),
            backend=backend,
            mode=mode,
        )
        out.loss.backward()
        results.append([out.logps.cpu(), out.loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for got, want in zip(*results):
        assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("way", ["one chunk", "lean"])
def test_a_scale_of_zero(way: str, device: str) -> None:
    """Every token is as likely as any other; padding of a tile is not a token."""
    case = Case([5, 7], vocabulary=97, logit_scale=0.0)
    got, want = run(case, way, torch.float32, device), case.exact(torch.float32)
    for name in ("loss", "logps", "margins"):
        torch.testing.assert_close(got[name].double(), want[name].detach(), rtol=1e-6, atol=1e-5)
    assert got["hidden gradient"].abs().max() == got["weight gradient"].abs().max() == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asked", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids=" ".join)
def test_gradients_only_where_asked(asked: tuple[str, ...], way: str, device: str) -> None:
    case = CASES["everything"]
    got = run(case, way, torch.float32, device, asked=asked)
    check(got, case.exact(torch.float32), 2e-5)
    assert {k for k in got if "gradient" in k} == {f"{k} gradient" for k in asked}


def test_no_gradients(device: str) -> None:
    case = CASES["groups with all pairs"]
    values = on_device(case, torch.bfloat16, device)
    output = fused_linear_pair_loss(**values, objective=case.objective, backend="triton")
    assert not output.loss.requires_grad
    check({k: x.cpu() for k, x in output._asdict().items()}, case.exact(torch.bfloat16), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_every_time(way: str, device: str) -> None:
    case = CASES["arbitrary pairs"]
    first, second = (run(case, way, torch.bfloat16, device) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_modes_agree_on_log_probs(device: str) -> None:
    """Both take them from the same sums; a chunk of few rows has smaller tiles, which a GPU sums in another order."""
    case = CASES["groups with all pairs"]
    results = [run(case, way, torch.bfloat16, device) for way in WAYS]
    for result in results:
        torch.testing.assert_close(result["logps"], results[0]["logps"], rtol=1e-6, atol=0)


def test_many_chunks_lose_nothing(device: str) -> None:
    """A bf16 gradient summed over 16 chunks is as exact as one that is rounded once."""
    case = Case([3, 4] * 16, vocabulary=64, features=32)
    want = case.exact(torch.bfloat16)["weight gradient"]
    whole, carried = (
        relative_error(run(case, way, torch.bfloat16, device)["weight gradient"], want)
        for way in ("one chunk", "chunks")
    )
    values = case.tensors(torch.bfloat16)
    groups = PairLayout.of(values["cu_seqlens"], _pairs(case)).groups
    workspace = least_workspace(case, torch.bfloat16)
    assert len(choose_plan(groups, (64, 32), torch.bfloat16, True, "fast", workspace, None).chunks) == 16
    assert carried < 1.05 * whole


def test_upstream_gradients_and_a_second_backward(device: str) -> None:
    case = CASES["one head for both"]
    want = case.exact(torch.float32)
    values = on_device(case, torch.float32, device)
    hidden, weight = values["hidden"].requires_grad_(), values["weight"].requires_grad_()
    loss = fused_linear_pair_loss(**values, objective=case.objective, backend="triton").loss
    (gradient,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    assert relative_error(gradient.cpu(), 3 * want["hidden gradient"]) < 2e-5
    (-loss).backward()
    assert relative_error(weight.grad.cpu(), -want["weight gradient"]) < 2e-5


def test_several_calls_alive_at_once(device: str) -> None:
    cases = [CASES["pairs"], CASES["everything"], CASES["pairs"]]
    losses, leaves = [], []
    for case in cases:
        values = on_device(case, torch.float32, device)
        leaves.append(values["weight"].requires_grad_())
        options = {"logit_scale": case.logit_scale, "softcap": case.softcap, "temperature": case.temperature}
        losses.append(fused_linear_pair_loss(**values, objective=case.objective, backend="triton", **options).loss)
    for loss in reversed(losses):
        loss.backward()
    for case, leaf in zip(cases, leaves):
        assert relative_error(leaf.grad.cpu(), case.exact(torch.float32)["weight gradient"]) < 2e-5


def test_non_contiguous_inputs(device: str) -> None:
    case = CASES["pairs"]
    values = on_device(case, torch.bfloat16, device)
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        values[name] = values[name].T.contiguous().T
    wide = torch.zeros(len(values["hidden"]), 100, dtype=torch.bfloat16, device=device)
    wide[:, 3:27] = values["hidden"]
    values["hidden"] = wide[:, 3:27].requires_grad_()
    output = fused_linear_pair_loss(**values, objective=case.objective, backend="triton")
    output.loss.backward()
    assert relative_error(output.loss.cpu(), case.exact(torch.bfloat16)["loss"]) < 1e-5


def test_nothing_to_do(device: str) -> None:
    empty = {"hidden": torch.zeros(0, 4, device=device, requires_grad=True), "weight": torch.randn(7, 4, device=device)}
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for responses in (0, 2):
        output = fused_linear_pair_loss(
            **empty,
            targets=none,
            cu_seqlens=torch.zeros(responses + 1, dtype=torch.int32),
            objective=Onpo(eta=1.0),
            ref_logps=torch.zeros(responses, device=device),
            backend="triton",
        )
        assert output.loss.item() == (0.25 if responses else 0)  # two empty responses: margin 0, target ½
    output.loss.backward()
    assert empty["hidden"].grad.shape == (0, 4)


def test_nan_is_not_hidden(device: str) -> None:
    case = CASES["pairs"]
    values = on_device(case, torch.bfloat16, device)
    values["hidden"][3, 2] = float("nan")
    weight = values["weight"].requires_grad_()
    output = fused_linear_pair_loss(
        **values,
        objective=case.objective,
        backend="triton",
        mode="fast",
        workspace_bytes=least_workspace(case, torch.bfloat16),
    )
    output.loss.backward()
    assert output.loss.isnan()
    assert weight.grad.isnan().any()


LONG_PAIR = Case([40, 50])  # of which recomputing takes less than keeping


def test_a_group_that_does_not_fit(device: str) -> None:
    with pytest.raises(ValueError, match="workspace_bytes"):
        LONG_PAIR.run(device=device, backend="triton", mode="fast", workspace_bytes=1)
    lean = LONG_PAIR.run(device=device, backend="triton", mode="lean", workspace_bytes=1)
    auto = LONG_PAIR.run(device=device, backend="triton", mode="auto", workspace_bytes=1)
    assert torch.equal(lean["weight gradient"], auto["weight gradient"])


def test_it_says_what_it_chose(device: str, caplog) -> None:
    with caplog.at_level("DEBUG", logger="onpo_fast"):
        LONG_PAIR.run(device=device, backend="triton")
        LONG_PAIR.run(device=device, backend="triton", workspace_bytes=1)
    assert "fast: everything fits one chunk" in caplog.messages[0]
    assert "lean: the largest preference group, 90 tokens, needs" in caplog.messages[1]


def test_scoring_plans_nothing(device: str) -> None:
    """Without gradients nothing is kept, so that nothing can be too much."""
    values = on_device(CASES["pairs"], torch.bfloat16, device)
    with torch.no_grad():
        out = fused_linear_pair_loss(
            **values, objective=Onpo(eta=2.0), backend="triton", mode="fast", workspace_bytes=1
        )
    assert relative_error(out.logps.cpu(), CASES["pairs"].exact(torch.bfloat16)["logps"]) < 1e-6


class TestManyTiles:
    """Tiles as small as a dot allows: as many of them as a GPU has of large ones, and every edge."""

    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch, device: str) -> None:
        def small(dtype: torch.dtype, problem: tuple[int, int, int]) -> launch.Tile:
            return launch.Tile(16, 32, 16, 1 if device == "cpu" else 4, 1)

        for module in (exponentials, weight_gradient):
            monkeypatch.setattr(module, "choose_tile", small)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        "case",
        [
            Case([9, 8], vocabulary=2600, features=16, bias=True),  # more column tiles than are merged at a time
            Case([140, 150], vocabulary=40, features=16),  # more row tiles than run side by side
            Case([9, 8, 5, 4], vocabulary=40, features=600),  # of the weight's gradient too
            Case([1500, 30], vocabulary=20, features=16),  # a response longer than a block of its sum
        ],
        ids=["vocabulary", "rows", "features", "a long response"],
    )
    def test_fp32(self, case: Case, way: str, device: str) -> None:
        check(run(case, way, torch.float32, device), case.exact(torch.float32), 3e-5)

    def test_scoring_in_pieces(self, device: str, monkeypatch) -> None:
        monkeypatch.setattr(fused, "ROWS_PER_SCORING_PASS", 16)
        case = CASES["one head for both"]
        check(run(case, "lean", torch.float32, device), case.exact(torch.float32), 2e-5)


def on_device(case: Case, dtype: torch.dtype, device: str) -> dict:
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in case.tensors(dtype).items()}


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_a_vocabulary_that_is_masked(mode: str, device: str) -> None:
    """Logits of −∞ in whole tiles, with a target far below 0: nothing is 0·∞."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = 5000
    hidden, weight = torch.randn(12, 16, generator=generator), torch.randn(vocabulary, 16, generator=generator)
    bias = torch.full((vocabulary,), float("-inf"))
    bias[:40] = -900.0
    targets = torch.randint(40, (12,), generator=generator)
    edges = torch.tensor([0, 5, 12], dtype=torch.int32)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.clone().to(device, dtype).requires_grad_() for x in (hidden, weight)]
        out = fused_linear_pair_loss(
            *leaves,
            targets.to(device),
            edges,
            objective=Onpo(eta=1.0),
            ref_logps=torch.zeros(2, device=device),
            bias=bias.to(device, dtype),
            backend=backend,
            mode=mode,
        )
        out.loss.backward()
        results.append([out.loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for got, want in zip(*results):
        assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_a_token_without_alternatives(mode: str, device: str) -> None:
    """One token in the vocabulary, with a logit that no exponential could hold."""
    hidden = torch.full((4, 8), -30.0, device=device, requires_grad=True)
    weight = torch.full((1, 8), 10.0, device=device, requires_grad=True)
    out = fused_linear_pair_loss(
        hidden,
        weight,
        torch.zeros(4, dtype=torch.int64, device=device),
        torch.tensor([0, 2, 4], dtype=torch.int32),
        objective=Onpo(eta=1.0),
        ref_logps=torch.zeros(2, device=device),
        backend="triton",
        mode=mode,
    )
    out.loss.backward()
    assert out.loss.item() == 0.25
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


def test_strided_targets(device: str) -> None:
    case = CASES["one head for both"]
    values = on_device(case, torch.float32, device)
    values["targets"] = torch.stack([values["targets"], torch.zeros_like(values["targets"])], 1)[:, 0]
    hidden = values["hidden"].requires_grad_()
    for mode in ("fast", "lean"):
        hidden.grad = None
        fused_linear_pair_loss(**values, objective=case.objective, backend="triton", mode=mode).loss.backward()
        assert relative_error(hidden.grad.cpu(), case.exact(torch.float32)["hidden gradient"]) < 2e-5


def test_the_same_head_given_twice_is_stacked(device: str) -> None:
    case = CASES["one head for both"]
    values = on_device(case, torch.float32, device)
    want = fused_linear_pair_loss(**values, objective=case.objective, backend="triton")
    values |= {"ref_weight": values["weight"].detach(), "ref_bias": values["bias"].view(-1)}
    got = fused_linear_pair_loss(**values, objective=case.objective, backend="triton")
    assert torch.equal(got.margins, want.margins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rescale(dtype: torch.dtype, device: str) -> None:
    values = torch.randn(10_000, dtype=dtype, device=device)
    for factor in (1.0, -0.25):
        got = rescale(values.clone(), torch.tensor(factor, device=device))
        assert torch.equal(got, values * factor)
