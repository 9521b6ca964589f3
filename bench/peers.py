"""Methods that compute the same loss: this package's backends and their peers in other libraries.

A method supports one or more tasks. It is called with the problem, the task, and hidden states and head that require
the task's gradients; it returns the loss, for ``backward``, and the responses' summed log-probs. For peers that compute
only per-token log-probs, the pairwise loss is added through autograd, as a user would do.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onpo_fast import fused_linear_pair_loss, linear_logprobs
from onpo_fast.objectives import Objective

from .problems import DPO, ONPO, Problem

TRL_CHUNK = 32768  # vocabulary entries per chunk, as in TRL's trainers


@dataclass(frozen=True)
class Task:
    """What is computed, and the number of products through the head that it needs if nothing is recomputed."""

    name: str
    logits: int  # X Wᵀ
    hidden: int  # dX
    weight: int  # dW

    @property
    def gemms(self) -> int:
        return self.logits + self.hidden + self.weight

    @property
    def trains(self) -> bool:
        return self.hidden + self.weight > 0


FULL = Task("policy + reference", 2, 1, 1)
CACHED = Task("cached reference", 1, 1, 1)
FROZEN = Task("frozen head", 1, 1, 0)  # with a cached reference
SCORING = Task("scoring", 1, 0, 0)  # log-probs of responses without gradients
TASKS = (FULL, CACHED, FROZEN, SCORING)


class Outcome(NamedTuple):
    """Result of a forward pass."""

    loss: Tensor | None  # scalar with a graph; None when scoring
    logps: Tensor  # (S,) nats, under the policy


Forward = Callable[[Problem, Task, Tensor, Tensor], Outcome]  # hidden (N, H), weight (V, H)
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]  # (N, H), (V, H), (N,) -> (N,) nats


@dataclass(frozen=True)
class Method:
    """A way to compute the loss."""

    name: str
    forward: Forward
    tasks: tuple[Task, ...] = TASKS
    absent: Callable[[Problem], str | None] = lambda problem: None  # why it cannot run here
    objective: Objective = ONPO


class Result(NamedTuple):
    """Result of a forward and a backward pass, without a graph."""

    loss: Tensor | None
    logps: Tensor  # (S,)
    hidden_gradient: Tensor | None  # (N, H)
    weight_gradient: Tensor | None  # (V, H)


class Passes:
    """The forward and the backward pass of a method, to be called one after the other."""

    def __init__(self, method: Method, task: Task, problem: Problem) -> None:
        self.method, self.task, self.problem = method, task, problem
        self.hidden = problem.hidden.detach().requires_grad_(task.hidden > 0)
        self.weight = problem.weight.detach().requires_grad_(task.weight > 0)

    def forward(self) -> None:
        with torch.set_grad_enabled(self.task.trains):
            self.outcome = self.method.forward(self.problem, self.task, self.hidden, self.weight)

    def backward(self) -> None:
        if self.outcome.loss is not None:
            self.outcome.loss.backward()

    @property
    def result(self) -> Result:
        loss, logps = self.outcome
        return Result(loss if loss is None else loss.detach(), logps.detach(), self.hidden.grad, self.weight.grad)


def run(method: Method, task: Task, problem: Problem, mark: Callable[[], None] = lambda: None) -> Result:
    """Runs both passes. ``mark`` is called before the forward pass, between the passes and after the backward pass."""
    step = Passes(method, task, problem)
    mark()
    step.forward()
    mark()
    step.backward()
    mark()
    return step.result


# ---------------------------------------------------------------------------------------------------------------------
# This package's methods
# ---------------------------------------------------------------------------------------------------------------------


def ours(backend: str, mode: str | None = None) -> Forward:
    """A backend of this package as a method's forward pass."""
    options = {"backend": backend} if mode is None else {"backend": backend, "mode": mode}

    def forward(problem: Problem, task: Task, hidden: Tensor, weight: Tensor) -> Outcome:
        if task is SCORING:
            return Outcome(None, problem.sums(linear_logprobs(hidden, weight, problem.targets, backend=backend)))
        if task is FULL:
            anchor = {"ref_hidden": problem.ref_hidden, "ref_weight": problem.ref_weight}
        else:
            anchor = {"ref_logps": problem.ref_logps}
        out = fused_linear_pair_loss(
            hidden, weight, problem.targets, problem.cu_seqlens, problem.pairs, objective=ONPO, **anchor, **options
        )
        return Outcome(out.loss, out.logps)

    return forward


# ---------------------------------------------------------------------------------------------------------------------
# Peers that compute per-token log-probs
# ---------------------------------------------------------------------------------------------------------------------


def from_token_logps(token_logps: TokenLogps) -> Forward:
    """A forward pass with the pairwise loss on top of a peer's per-token log-probs."""

    def forward(problem: Problem, task: Task, hidden: Tensor, weight: Tensor) -> Outcome:
        logps = problem.sums(token_logps(hidden, weight, problem.targets))
        if task is SCORING:
            return Outcome(None, logps)
        ref_logps = problem.ref_logps
        if task is FULL:
            with torch.no_grad():
                ref_logps = problem.sums(token_logps(problem.ref_hidden, problem.ref_weight, problem.targets))
        return Outcome(problem.loss(logps, ref_logps), logps)

    return forward


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Straightforward PyTorch: materialises all logits, in float32 for the softmax as in transformers."""
    return F.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets[:, None])[:, 0]


def compiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _compiled()(hidden, weight, targets)


@cache
def _compiled() -> TokenLogps:
    return torch.compile(materialised)  # static for the first shape, dynamic from the second on


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # bias, targets, temperature, chunk size, softcap, logit scale, extra outputs
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]


def liger_hopper(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def cce_exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """CCE that skips no gradient; versions with the implementation "cce_exact" also accumulate in fp32."""
    from cut_cross_entropy import linear_cross_entropy

    named = "accum_e_fp32" in inspect.signature(linear_cross_entropy).parameters
    exact = {"impl": "cce_exact"} if named else {"filter_eps": None}
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", **exact)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's linear cross-entropy in chunks; without options it materialises the logits."""
    chunked = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=chunked)


# ---------------------------------------------------------------------------------------------------------------------
# Peers with their own loss
# ---------------------------------------------------------------------------------------------------------------------


def liger_dpo(problem: Problem, task: Task, hidden: Tensor, weight: Tensor) -> Outcome:
    """Liger's fused DPO loss. It takes winners before losers, and a response once for every pair it is in."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    order = problem.device_pairs.T.flatten()  # (2P,)

    def stacked(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, problem.shape.tokens)).index_select(0, order)

    # compiled chunks are Liger's default, but do not help on a CPU
    loss = LigerFusedLinearDPOLoss(beta=DPO.beta, compiled=hidden.is_cuda)
    value, (chosen, rejected, *_) = loss(
        weight,
        stacked(hidden),
        stacked(problem.targets),
        ref_input=stacked(problem.ref_hidden),
        ref_weight=problem.ref_weight,
    )
    by_pair = torch.cat([chosen, rejected]).detach().double()
    logps = by_pair.new_zeros(len(problem.cu_seqlens) - 1)
    logps[order] = by_pair
    return Outcome(value, logps)


def quack(problem: Problem, task: Task, hidden: Tensor, weight: Tensor) -> Outcome:
    """QuACK's linear cross-entropy. It reduces to one number, so it is called once per response."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    length = problem.shape.tokens
    sums = [
        -chunked_linear_cross_entropy(x, weight, t, reduction="sum")
        for x, t in zip(hidden.split(length), problem.targets.split(length))
    ]
    return Outcome(None, torch.stack(sums).double())


# ---------------------------------------------------------------------------------------------------------------------
# All methods
# ---------------------------------------------------------------------------------------------------------------------


def needs(
    *modules: str, gpu: bool = False, bfloat16: bool = False, capability: tuple[int, int] | None = None
) -> Callable[[Problem], str | None]:
    """Makes a function that returns why a method cannot run on a problem, or None if it can."""

    def absent(problem: Problem) -> str | None:
        if gpu and problem.device.type != "cuda":
            return "needs a GPU"
        if capability and torch.cuda.get_device_capability(problem.device) != capability:
            own = torch.cuda.get_device_capability(problem.device)
            return f"needs compute capability {'.'.join(map(str, capability))}, here it is {'.'.join(map(str, own))}"
        if bfloat16 and problem.hidden.dtype != torch.bfloat16:
            return "needs bfloat16"
        return next(filter(None, map(_not_importable, modules)), None)

    return absent


@cache
def _not_importable(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # packages built for other versions raise errors of any type
        return f"import {module}: {type(error).__name__}: {error}".split("\n")[0]
    return None


def _no_linear_cross_entropy(problem: Problem) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none (2.13 has)"


FAST = Method("onpo_fast fast", ours("triton", "fast"), absent=needs("triton", gpu=True))
LEAN = Method("onpo_fast lean", ours("triton", "lean"), (FULL, CACHED), needs("triton", gpu=True))
TORCH = Method("onpo_fast torch", ours("torch"))
MATERIALISED = Method("PyTorch, materialised", from_token_logps(materialised))
COMPILED = Method("torch.compile of it", from_token_logps(compiled))
TRL = Method("TRL", from_token_logps(trl), absent=needs("trl.kernels", "trl.trainer.utils"))
LIGER_DPO = Method("Liger FusedLinearDPO", liger_dpo, (FULL,), needs("liger_kernel.chunked_loss"), DPO)
LIGER_HOPPER = Method(
    "Liger Hopper CE",
    from_token_logps(liger_hopper),
    absent=needs(
        "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", gpu=True, bfloat16=True, capability=(9, 0)
    ),
)
CCE = Method("CCE", from_token_logps(cce), absent=needs("cut_cross_entropy", gpu=True, bfloat16=True))
CCE_EXACT = Method("CCE exact", from_token_logps(cce_exact), absent=CCE.absent)
LINEAR_CE = Method(
    "F.linear_cross_entropy", from_token_logps(torch_linear_cross_entropy), absent=_no_linear_cross_entropy
)
QUACK = Method("QuACK", quack, (SCORING,), needs("quack.linear_cross_entropy", gpu=True, bfloat16=True))

OURS = (FAST, LEAN, TORCH)
SLOW = (LIGER_HOPPER, QUACK, COMPILED)  # these compile for long
METHODS = (
    *OURS,
    MATERIALISED,
    TRL,
    LIGER_DPO,
    CCE,
    CCE_EXACT,
    LINEAR_CE,
    *SLOW,
)  # those that the targets name come first
