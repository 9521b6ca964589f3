"""Errors of a result against a float64 reference, which is computed from the same inputs a few rows at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from onpo_fast.objectives import Objective

from .peers import Result
from .problems import Problem, Shape

PIECE_BYTES = 2**29  # size of one piece of float64 logits
TOKENS = 1000  # response length to which errors of summed log-probs are scaled


@dataclass
class Exact:
    """The float64 reference of a problem."""

    problem: Problem
    logps: Tensor  # (S,) float64, policy
    ref_logps: Tensor  # (S,) float64, anchor
    gradients: dict[Objective, tuple[Tensor, Tensor]]  # gradients of hidden (N, H) and weight (V, H), float32

    @classmethod
    @torch.no_grad()
    def of(cls, problem: Problem, objectives: Iterable[Objective]) -> Exact:
        """Computes log-probs and the gradients of each objective; gradients are accumulated in float64."""
        ref_normalisers = _normalisers(problem.ref_hidden, problem.ref_weight, problem.targets)
        ref_logps = problem.sums(ref_normalisers[1])
        weight = problem.weight.double()
        normalisers, token_logps = _normalisers(problem.hidden, weight, problem.targets)
        logps = problem.sums(token_logps)
        coefficients = {o: _coefficients(problem, logps, ref_logps, o) for o in objectives}  # (N, 1)

        hidden_gradients = {o: torch.empty_like(problem.hidden, dtype=torch.float32) for o in coefficients}
        weight_gradients = {o: torch.zeros_like(weight) for o in coefficients}
        for part in _parts(problem.hidden, weight):
            hidden = problem.hidden[part].double()
            p = (hidden @ weight.T).sub_(normalisers[part, None]).exp_()
            p.scatter_add_(1, problem.targets[part, None], p.new_full((len(p), 1), -1.0))
            back = p @ weight
            for o, c in coefficients.items():
                hidden_gradients[o][part] = (-c[part] * back).float()
                weight_gradients[o].addmm_(p.T, -c[part] * hidden)
        gradients = {o: (hidden_gradients[o], weight_gradients.pop(o).float()) for o in coefficients}
        return cls(problem, logps, ref_logps, gradients)

    def errors(self, result: Result, objective: Objective) -> dict[str, float]:
        """Errors of a result by name.

        ``logps_nats_max`` and ``logps_nats_rms`` are the largest error and the root mean square over the responses, in
        nats per 1000 tokens. ``hidden_gradient`` and ``weight_gradient`` are relative errors in the Frobenius norm.
        """
        nats = nats_off(result.logps, self.logps, self.problem)
        errors = {"logps_nats_max": float(nats.max()), "logps_nats_rms": float(nats.square().mean().sqrt())}
        got = {"hidden_gradient": result.hidden_gradient, "weight_gradient": result.weight_gradient}
        for (name, gradient), exact in zip(got.items(), self.gradients[objective]):
            if gradient is not None:
                errors[name] = relative_error(gradient, exact)
        return errors


@torch.no_grad()
def exact_logps(problem: Problem) -> Tensor:
    """Summed log-probs under the policy, (S,) float64, without the rest of ``Exact``."""
    return problem.sums(_normalisers(problem.hidden, problem.weight, problem.targets)[1])


def nats_off(logps: Tensor, exact: Tensor, problem: Problem) -> Tensor:
    """Absolute errors of summed log-probs, in nats per 1000 tokens: (S,), (S,) -> (S,) float64."""
    return (logps.double() - exact).abs() * (TOKENS / problem.shape.tokens)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative error ‖got − want‖ / ‖want‖ in float64, computed in pieces to save memory."""
    difference = norm = 0.0
    for rows in torch.arange(len(want)).split(max(1, PIECE_BYTES // (8 * want[0].numel()))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        exact = want[part].double()
        difference += float((got[part].double() - exact).square_().sum())
        norm += float(exact.square_().sum())
    return math.sqrt(difference / norm)


def seconds(problem: Problem, objectives: int) -> float:
    """Estimated seconds of ``Exact.of`` on this device: three passes over the logits, and the gradients."""
    return (4 + objectives) * product_seconds(problem)


def product_seconds(problem: Problem) -> float:
    """Estimated seconds of one float64 product through the head on this device; ``exact_logps`` takes little more."""
    a = torch.randn(1024, 2048, dtype=torch.float64, device=problem.device)
    a @ a.T  # the first product initialises the BLAS library
    samples = []
    for _ in range(3):  # the minimum is used, since other processes may share the device
        _wait(problem.device)
        start = time.perf_counter()
        a @ a.T
        _wait(problem.device)
        samples.append(time.perf_counter() - start)
    return min(samples) * problem.shape.gemm_flops / (2 * 1024 * 1024 * 2048)


def bytes_kept(shape: Shape) -> int:
    """Bytes of the float32 gradients of hidden and weight that ``Exact`` keeps per objective."""
    return 4 * (shape.rows + shape.vocabulary) * shape.features


def bytes_while_made(shape: Shape) -> int:
    """Peak bytes of ``Exact.of`` for one objective.

    These are the head and its gradient in float64, the pieces of logits with their temporaries, and ``bytes_kept``.
    """
    return 2 * 8 * shape.vocabulary * shape.features + 4 * PIECE_BYTES + bytes_kept(shape)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, PIECE_BYTES // (8 * len(weight)))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _normalisers(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and log-prob of the target of every row: (N, H), (V, H), (N,) -> (N,), (N,) float64, nats."""
    weight = weight.double()
    normaliser = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    chosen = torch.empty_like(normaliser)
    for part in _parts(hidden, weight):
        logits = hidden[part].double() @ weight.T
        chosen[part] = logits.gather(1, targets[part, None])[:, 0]
        peak = logits.amax(1)
        normaliser[part] = logits.sub_(peak[:, None]).exp_().sum(1).log_() + peak
    return normaliser, chosen - normaliser


def _coefficients(problem: Problem, logps: Tensor, ref_logps: Tensor, objective: Objective) -> Tensor:
    """Derivative of the loss with respect to the log-prob of every token, (N, 1) float64."""
    margins = problem.margins(logps, ref_logps)
    derivative = objective.derivative(margins, torch.ones_like(margins)) / len(margins)
    winner, loser = problem.device_pairs.T
    by_response = torch.zeros_like(logps).index_add_(0, winner, derivative).index_add_(0, loser, -derivative)
    return by_response.repeat_interleave(problem.shape.tokens)[:, None]
