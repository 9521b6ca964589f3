"""The drop-ins for Liger's fused DPO loss: beside Liger where both define the same, beside plain float64 where not."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from torch import Tensor

from onpo_fast.integrations.liger import (
    FusedLinearDPOLoss,
    FusedLinearIPOLoss,
    FusedLinearONPOLoss,
    FusedLinearPairLoss,
)

PAIRS, LENGTH, FEATURES, VOCABULARY = 3, 11, 24, 97
OUTPUTS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logits_mean",
    "rejected_logits_mean",
    "nll_loss",
    "chosen_rewards",
    "rejected_rewards",
)


def problem(bias: bool = True, ignore_index: int = -100, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A seeded call: prompts and padding without labels, in the middle too."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    rows = 2 * PAIRS
    target = torch.randint(VOCABULARY, (rows, LENGTH), generator=g)
    start = torch.randint(1, 4, (rows, 1), generator=g)
    end = torch.randint(5, LENGTH + 1, (rows, 1), generator=g)
    at = torch.arange(LENGTH)
    target[(at < start) | (at >= end)] = ignore_index
    target[0, 3] = ignore_index
    return {
        "lin_weight": normal(VOCABULARY, FEATURES, scale=0.3),
        "_input": normal(rows, LENGTH, FEATURES),
        "target": target,
        "bias": normal(VOCABULARY) if bias else None,
        "ref_input": normal(rows, LENGTH, FEATURES),
        "ref_weight": normal(VOCABULARY, FEATURES, scale=0.3),
        "ref_bias": normal(VOCABULARY) if bias else None,
    }


def run(loss_function: Callable, call: dict, **more) -> dict[str, Tensor]:
    """Outputs and gradients by name, called by position as Liger is."""
    leaves = {k: call[k].detach().requires_grad_() for k in ("lin_weight", "_input", "bias") if call[k] is not None}
    loss, outputs = loss_function(*{**call, **leaves}.values(), **more)
    (2 * loss).backward()  # an upstream gradient that is not 1
    assert len(outputs) == len(OUTPUTS)
    assert not any(x.requires_grad for x in outputs)
    gradients = {f"{name} gradient": x.grad for name, x in leaves.items()}
    return {"loss": loss.detach(), **dict(zip(OUTPUTS, outputs)), **gradients}


def plain(
    call: dict,
    objective: Callable[[Tensor, Tensor], Tensor],
    average=False,
    alpha=0.0,
    scale=1.0,
    cap=None,
    preference=1.0,
) -> dict[str, Tensor]:
    """Everything materialised, in float64."""
    call = {k: x.double() if x is not None and x.is_floating_point() else x for k, x in call.items()}
    leaves = {k: call[k].requires_grad_() for k in ("lin_weight", "_input", "bias") if call[k] is not None}
    kept = call["target"] != -100

    def logps(hidden, weight, bias):
        logits = scale * F.linear(hidden, weight, bias)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        per_token = logits.log_softmax(-1).gather(-1, call["target"].clamp(min=0)[..., None])[..., 0]
        return (per_token * kept).sum(1)

    policy = logps(call["_input"], call["lin_weight"], call["bias"])
    with torch.no_grad():
        reference = logps(call["ref_input"], call["ref_weight"], call["ref_bias"])
    nll = -policy[:PAIRS].sum() / kept[:PAIRS].sum()
    count = kept.sum(1) if average else 1
    chosen, rejected = ((policy - reference) / count).chunk(2)
    loss = objective(chosen - rejected, torch.as_tensor(preference)).mean() + alpha * nll
    (2 * loss).backward()
    values = {"loss": loss, "chosen_logps": (policy / count)[:PAIRS], "rejected_logps": (policy / count)[PAIRS:]}
    return {**values, **{f"{k} gradient": x.grad for k, x in leaves.items()}}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    for name, value in want.items():
        error = (got[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: {float(error):.2g}"
        assert got[name].shape == value.shape, name


SAME_AS_LIGER = {
    "defaults": {},
    "as TRL called it": {"beta": 0.3, "ignore_index": -1, "use_ref_model": True, "average_log_prob": False},
    "with the NLL": {"beta": 0.3, "compute_nll_loss": True, "alpha": 0.7},
    "averaged": {"beta": 2.0, "average_log_prob": True},
    "averaged with the NLL": {"beta": 2.0, "average_log_prob": True, "compute_nll_loss": True},
    "without a reference": {"beta": 0.02, "use_ref_model": False},
    "averaged without a reference": {"beta": 2.0, "use_ref_model": False, "average_log_prob": True},
    "its knobs": {"chunk_size": 2, "loss_type": "sigmoid"},
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", SAME_AS_LIGER.values(), ids=SAME_AS_LIGER)
def test_dpo_is_ligers(options: dict, bias: bool) -> None:
    call = problem(bias, options.get("ignore_index", -100))
    options = {**options, "compiled": False}  # compiling takes longer than all these tests
    close(run(FusedLinearDPOLoss(**options), call), run(LigerFusedLinearDPOLoss(**options), call))


def test_the_call_is_ligers() -> None:
    ours, theirs = (
        list(inspect.signature(c.forward).parameters) for c in (FusedLinearPairLoss, LigerFusedLinearDPOLoss)
    )
    assert ours[: len(theirs)] == theirs
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (FusedLinearPairLoss, LigerFusedLinearDPOLoss))
    assert set(theirs) <= set(ours)


OBJECTIVES = {
    "ONPO": (FusedLinearONPOLoss(eta=3.0), lambda g, p: (g - 3.0 * (p - 0.5)) ** 2),
    "IPO": (FusedLinearIPOLoss(tau=0.2), lambda g, p: (g - (2 * p - 1) / 0.4) ** 2),
}


@pytest.mark.parametrize(
    ("options", "more", "exact"),
    [
        ({}, {}, {}),
        ({}, {"preference": 0.8}, {"preference": 0.8}),
        (
            {"average_log_prob": True},
            {"preference": torch.tensor([0.9, 0.5, 0.1])},
            {"average": True, "preference": [0.9, 0.5, 0.1]},
        ),
        ({"compute_nll_loss": True, "alpha": 0.4}, {}, {"alpha": 0.4}),
        (
            {"logit_scale": 0.5, "softcap": 2.0},
            {"preference": torch.tensor([1.0, 0.7, 0.0])},
            {"scale": 0.5, "cap": 2.0, "preference": [1.0, 0.7, 0.0]},
        ),
    ],
    ids=["hard labels", "one soft label", "averaged, soft labels", "with the NLL", "scaled and capped"],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_exact(name: str, options: dict, more: dict, exact: dict) -> None:
    like, objective = OBJECTIVES[name]
    loss_function = FusedLinearPairLoss(like.objective, beta=like.beta, **options)
    close(run(loss_function, problem(), **more), plain(problem(), objective, **exact))


def test_the_two_ways_agree() -> None:
    """By response, and by token: a weight of the NLL next to nothing takes the other way to the same loss."""
    call = problem()
    got, want = (run(FusedLinearONPOLoss(eta=3.0, **o), call) for o in ({"compute_nll_loss": True, "alpha": 0.0}, {}))
    del want["nll_loss"]
    close(got, want)


def test_bf16_is_no_further_from_exact_than_liger() -> None:
    call, options = problem(dtype=torch.bfloat16), {"beta": 0.3, "compiled": False}
    exact = plain(call, lambda g, p: F.softplus(-0.3 * g))
    ours, ligers = run(FusedLinearDPOLoss(**options), call), run(LigerFusedLinearDPOLoss(**options), call)
    assert ours["loss"].dtype == ours["chosen_logps"].dtype == ours["chosen_logits_mean"].dtype == torch.float32
    for name, value in exact.items():
        error, theirs = ((x[name].double() - value.double()).norm() / value.double().norm() for x in (ours, ligers))
        assert error <= 1.2 * theirs + 1e-6, f"{name}: {error:.2g}, Liger {theirs:.2g}"


def test_the_reference_may_share_the_policys_head() -> None:
    call = problem()
    shared = {**call, "ref_weight": call["lin_weight"], "ref_bias": call["bias"]}
    for options in ({}, {"average_log_prob": True}):
        loss_function = FusedLinearONPOLoss(eta=3.0, **options)
        close(run(loss_function, {**call, "ref_weight": None, "ref_bias": None}), run(loss_function, shared))


def test_a_response_without_labels_has_log_prob_0() -> None:
    call = problem()
    call["target"][PAIRS] = -100
    for options in ({}, {"average_log_prob": True}):
        got = run(FusedLinearONPOLoss(eta=3.0, **options), call)
        assert got["rejected_logps"][0] == got["rejected_rewards"][0] == 0
        assert all(x.isfinite().all() for x in got.values())


def test_only_the_gradients_asked_for() -> None:
    call = problem()
    hidden = call["_input"].requires_grad_()
    loss, _ = FusedLinearONPOLoss(eta=3.0)(*call.values())
    loss.backward()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[call["target"] == -100] == 0).all()
    assert call["lin_weight"].grad is None
    with torch.no_grad():
        assert not FusedLinearONPOLoss(eta=3.0)(*call.values())[0].requires_grad


def test_beta_is_the_pull_towards_the_reference() -> None:
    assert FusedLinearONPOLoss(beta=0.01).objective == FusedLinearONPOLoss(eta=100.0).objective
    assert FusedLinearONPOLoss().objective.eta == pytest.approx(10.0)  # Liger's default beta
    assert FusedLinearONPOLoss(eta=100.0, beta=0.01).beta == pytest.approx(0.01)
    assert FusedLinearIPOLoss(beta=0.2).objective == FusedLinearIPOLoss(tau=0.2).objective
    for loss_function in (FusedLinearONPOLoss(eta=4.0), FusedLinearIPOLoss(tau=0.7)):
        margin = loss_function.objective.target(torch.ones(()))
        assert loss_function.beta * margin == pytest.approx(0.5)  # in the unit of the rewards
    assert repr(FusedLinearONPOLoss(eta=4.0)) == "FusedLinearONPOLoss(Onpo(eta=4.0))"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta must be a positive"),
        ({"beta": -1.0}, "beta must be a positive"),
        ({"eta": 4.0, "beta": 0.1}, "eta=4 means beta=0.25"),
        ({"loss_type": "sigmoid"}, "loss_type='sigmoid'"),
        ({"label_smoothing": 0.1}, "preference=0.9"),
        ({"discopop_tau": 0.05}, "discopop_tau"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearONPOLoss(**options)


BAD = {
    "an odd batch": ({"_input": torch.zeros(3, LENGTH, FEATURES)}, "_input must have shape"),
    "a flat batch": ({"_input": torch.zeros(6, FEATURES)}, "_input must have shape"),
    "an empty batch": ({"_input": torch.zeros(0, LENGTH, FEATURES)}, "_input must have shape"),
    "targets of another shape": ({"target": torch.zeros(6, LENGTH - 1, dtype=torch.long)}, "target must have shape"),
    "targets beyond the vocabulary": ({"target": torch.full((6, LENGTH), VOCABULARY)}, r"targets\[0\] is 97"),
    "a transposed head": ({"lin_weight": torch.zeros(FEATURES, VOCABULARY)}, "lin_weight must have shape"),
    "a head in another dtype": ({"lin_weight": torch.zeros(VOCABULARY, FEATURES).double()}, "weight is torch.float64"),
    "a head elsewhere": ({"lin_weight": torch.zeros(VOCABULARY, FEATURES, device="meta")}, "lin_weight is on meta"),
    "a short bias": ({"bias": torch.zeros(5)}, "bias must have shape"),
    "no reference": ({"ref_input": None}, "ref_input is needed"),
    "a shorter reference": ({"ref_input": torch.zeros(6, LENGTH - 1, FEATURES)}, "ref_input must have shape"),
    "another vocabulary": ({"ref_weight": torch.zeros(5, FEATURES)}, "ref_weight must have shape"),
    "a reference bias alone": ({"ref_weight": None}, "ref_bias goes with ref_weight"),
    "a preference of 2": ({"preference": 2.0}, r"preference must be in \[0, 1\]"),
    "a preference too many": ({"preference": torch.ones(PAIRS + 1)}, "preference must have shape"),
}


@pytest.mark.parametrize("options", [{}, {"average_log_prob": True}], ids=["by response", "by token"])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(change: dict, message: str, options: dict) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearONPOLoss(eta=1.0, **options)(**{**problem(), **change})
