"""The formulas, their derivatives, and what minimises them."""

from __future__ import annotations

import math

import pytest
import torch

from onpo_fast.algorithms import ALGORITHMS
from onpo_fast.objectives import Dpo, Inpo, Ipo, Omd, Onpo, Sppo

EXAMPLES = [Onpo(eta=2.0), Omd(eta=0.5), Inpo(eta=0.4, tau=0.1), Ipo(tau=0.25), Sppo(eta=0.5), Dpo(beta=0.3)]


def test_every_objective_has_an_example() -> None:
    assert {type(o) for o in EXAMPLES} == {algorithm.objective for algorithm in ALGORITHMS.values()}


@pytest.mark.parametrize(
    ("objective", "margin", "preference", "loss"),
    [
        (Onpo(eta=2.0), 0.25, 1.0, (0.25 - 1.0) ** 2),
        (Onpo(eta=2.0), 0.25, 0.7, (0.25 - 2 * 0.2) ** 2),
        (Omd(eta=0.5), -1.0, 0.0, (-1.0 + 0.25) ** 2),
        (Inpo(eta=0.4, tau=0.1), 1.0, 1.0, (1.0 - 1 / 0.8) ** 2),
        (Inpo(eta=0.4, tau=0.1), 1.0, 0.75, (1.0 - 0.5 / 0.8) ** 2),
        (Ipo(tau=0.25), 1.0, 1.0, (1.0 - 2.0) ** 2),
        (Ipo(tau=0.25), 1.0, 0.25, (1.0 + 1.0) ** 2),
        (Sppo(eta=0.5), 0.25, 0.9, (0.25 - 0.5 * 0.4) ** 2),
        (Dpo(beta=0.3), 2.0, 1.0, -math.log(1 / (1 + math.exp(-0.6)))),
        (Dpo(beta=0.3), 2.0, 0.2, 0.2 * math.log(1 + math.exp(-0.6)) + 0.8 * math.log(1 + math.exp(0.6))),
    ],
)
def test_formula(objective, margin: float, preference: float, loss: float) -> None:
    got = objective.loss(torch.tensor(margin, dtype=torch.float64), torch.tensor(preference, dtype=torch.float64))
    assert got.item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("objective", EXAMPLES, ids=lambda o: type(o).__name__)
def test_derivative_and_target(objective) -> None:
    margin = torch.linspace(-40, 40, 81, dtype=torch.float64, requires_grad=True)
    preference = torch.linspace(0.01, 0.99, 81, dtype=torch.float64)
    objective.loss(margin, preference).sum().backward()
    torch.testing.assert_close(objective.derivative(margin.detach(), preference), margin.grad)
    at_target = objective.derivative(objective.target(preference), preference)
    torch.testing.assert_close(at_target, torch.zeros_like(at_target), atol=1e-12, rtol=0)


@pytest.mark.parametrize("objective", EXAMPLES[:-1], ids=lambda o: type(o).__name__)
def test_squared_losses_start_at_a_quarter(objective) -> None:
    loss = objective.loss(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert loss.item() / objective.normaliser == pytest.approx(0.25)


def test_the_weight_of_the_initial_policy() -> None:
    assert Inpo(eta=0.4, tau=0.1).initial_share == 0.25


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Onpo, (0.0,)),
        (Onpo, (-1.0,)),
        (Omd, (float("nan"),)),
        (Ipo, (float("inf"),)),
        (Inpo, (0.1, 0.2)),
        (Dpo, ("x",)),
    ],
)
def test_bad_parameters(kind, values) -> None:
    with pytest.raises(ValueError, match="must be"):
        kind(*values)


@pytest.mark.parametrize("objective", [Onpo(eta=0.7), Omd(eta=0.7), Inpo(eta=2.0, tau=0.5)])
def test_the_minimiser_is_the_mirror_descent_step(objective) -> None:
    """Over all pairs of independent draws from π_t, the fitted policy is the closed form: π ∝ anchor·exp(step·r_t)."""
    g = torch.Generator().manual_seed(0)
    n = 6
    upper = torch.rand(n, n, generator=g, dtype=torch.float64).triu(1)
    p = upper + (1 - upper.T).tril(-1) + torch.eye(n, dtype=torch.float64) / 2
    current = torch.randn(n, generator=g, dtype=torch.float64).log_softmax(0)
    initial = torch.randn(n, generator=g, dtype=torch.float64).log_softmax(0)
    share = objective.initial_share if isinstance(objective, Inpo) else 0
    anchor = share * initial + (1 - share) * current
    # least squares for the logits: rows are pairs, weighted by the probability of drawing them
    i, j = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    root = (current[i] + current[j]).exp().sqrt()
    design = (torch.eye(n, dtype=torch.float64)[i] - torch.eye(n, dtype=torch.float64)[j]) * root[:, None]
    wanted = (anchor[i] - anchor[j] + objective.target(p[i, j])) * root
    fitted = torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution[:, 0].log_softmax(0)
    step = 1 / objective.eta if isinstance(objective, Inpo) else objective.eta
    closed = (anchor + step * p @ current.exp()).log_softmax(0)
    torch.testing.assert_close(fitted, closed, atol=1e-10, rtol=0)
