"""The public functions of the loss, which never forms a [tokens, vocabulary] tensor.

``fused_linear_pair_loss`` computes the pairwise loss of a batch of preference groups from hidden states and LM head,
``linear_logprobs`` the per-token log-probs of which other losses can be made, ``linear_response_logprobs`` the sums
that a cached anchor consists of. This module checks their arguments (``loss_checks.py``), chooses the backend and does
autograd; ``kernels/`` computes.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import loss_checks as check
from .kernels import chunked, reference
from .kernels.footprint import Footprint, LossShape, footprint
from .kernels.groups import PairLayout
from .kernels.head import Head
from .kernels.problem import (
    Backend,
    Gradients,
    LeafDtypes,
    NeedsGradient,
    PairProblem,
    PairResult,
    TokenProblem,
    accumulation_dtype,
)
from .objectives import Objective

__all__ = [
    "Footprint",
    "LossShape",
    "PairLossOutput",
    "choose_backend",
    "footprint",
    "fused_linear_pair_loss",
    "linear_logprobs",
    "linear_response_logprobs",
]

BACKENDS = ("auto", "triton", "torch", "reference")
MODES = ("auto", "fast", "lean")


class PairLossOutput(NamedTuple):
    """The results of ``fused_linear_pair_loss``. Only ``loss`` carries a gradient."""

    loss: Tensor  # scalar, weighted mean over pairs
    logps: Tensor  # (S,) summed log-probs of the responses under the policy, nats
    ref_logps: Tensor  # (S,) summed log-probs of the responses under the anchor, nats
    margins: Tensor  # (P,) log-ratio of the winner minus that of the loser, nats


@torch.compiler.disable  # a graph break, because the work is planned on the host
def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    validate: bool = False,
) -> Tensor:
    """Compute the log-probs of the target tokens, differentiable by hidden, weight and bias.

    The backward pass computes the logits again, a workspace at a time, because the upstream gradient of every token may
    be different; ``fused_linear_pair_loss`` avoids that for pairwise losses. See there for the other arguments and the
    errors raised.

    Returns:
        (N,) log-probs in nats, fp32 (float64 for float64 inputs).
    """
    settings = _Settings.checked(hidden, weight, bias, logit_scale, softcap, temperature, backend, workspace_bytes)
    targets = check.targets(hidden, weight, targets, validate)
    return _TokenLogps.apply(hidden, weight, bias, targets, settings)


@torch.no_grad()
@torch.compiler.disable
def linear_response_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    cu_seqlens: Tensor,  # (S+1,) int32
    pairs: Tensor | None = None,  # (P, 2) int64
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    mode: str = "auto",
    workspace_bytes: int | None = None,
    validate: bool = False,
) -> Tensor:
    """Compute the summed log-probs of responses as ``fused_linear_pair_loss`` computes them from the same arguments.

    They are the ``ref_logps`` of a cached anchor: a policy with the anchor's weights then has margins of 0, up to the
    order of sums in the head. See ``fused_linear_pair_loss`` for the arguments and the errors raised.

    Returns:
        (S,) float64, nats, without a gradient.
    """
    settings = _Settings.checked(hidden, weight, bias, logit_scale, softcap, temperature, backend, workspace_bytes)
    check.one_of("mode", mode, MODES)
    targets = check.targets(hidden, weight, targets, validate)
    layout = _layout(cu_seqlens, pairs, len(hidden))
    with _device_without_autocast(hidden.device):
        problem = settings.token_problem(hidden, weight, bias, targets, mode=mode)
        return settings.kernels.response_logps(problem, layout)


@torch.compiler.disable
def fused_linear_pair_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    cu_seqlens: Tensor,  # (S+1,) int32
    pairs: Tensor | None = None,  # (P, 2) int64
    *,
    objective: Objective,
    ref_logps: Tensor | None = None,  # (S,)
    ref_hidden: Tensor | None = None,  # (N, H_ref)
    ref_weight: Tensor | None = None,  # (V, H_ref)
    ref_bias: Tensor | None = None,  # (V,)
    preference: Tensor | None = None,  # (P,)
    pair_weight: Tensor | None = None,  # (P,)
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    mode: str = "auto",
    workspace_bytes: int | None = None,
    validate: bool = False,
) -> PairLossOutput:
    """Compute the weighted mean of ``objective`` over pairs of responses (arXiv 2502.16852, Algorithm 1).

    Args:
        hidden: hidden states that predict the response tokens, responses back to back.
        weight, bias: the LM head, in the dtype of ``hidden``. Under autocast the tensors may have other dtypes.
        targets: the response tokens.
        cu_seqlens: response boundaries in N, from 0 to N; best on the CPU, like ``pairs``: reading them synchronises.
        pairs: (winner, loser) indices into the S responses; default (0, 1), (2, 3), …
        ref_logps: summed log-probs of the anchor, float32 or float64, best from the same backend; or else
        ref_hidden, ref_weight, ref_bias: the anchor's hidden states and, unless it is the policy's, its LM head.
        preference: P(winner ≻ loser) in [0, 1] for soft labels; default 1.
        pair_weight: non-negative weights w; the loss is Σ w·ℓ / Σ w. Default 1.
        logit_scale, softcap, temperature: logit = softcap·tanh(logit_scale·(h·w + b)/softcap) / temperature, for policy
            and anchor; no tanh without ``softcap``.
        backend: "triton" (NVIDIA GPUs from Ampere on), "torch" (chunked), "reference" (float64, all logits) or "auto".
        mode: "fast" computes every logit once, "lean" saves memory; "auto" chooses by the workspace (docs/kernels.md).
        workspace_bytes: about the memory beside inputs and gradients. The default depends on a GPU's free memory and
            affects rounding: set it for bit-identical results.
        validate: also check the values of GPU tensors, which synchronises. Otherwise a wrong target gives a NaN loss.

    Returns:
        Loss, log-probs and margins in fp32 (float64 for float64 inputs). Gradients flow from the loss to hidden, weight
        and bias if they require one, not to the anchor; forward computes them, ``backward`` scales them.

    Raises:
        ValueError: if the shape, dtype, device or value of an argument is wrong; the message names the argument.
    """
    settings = _Settings.checked(hidden, weight, bias, logit_scale, softcap, temperature, backend, workspace_bytes)
    check.one_of("mode", mode, MODES)
    check.objective(objective)
    targets = check.targets(hidden, weight, targets, validate)
    layout = _layout(cu_seqlens, pairs, len(hidden))
    labels = check.labels(preference, pair_weight, len(layout.pairs), hidden.device, validate)
    anchor = _anchor(settings, (hidden, weight, bias), targets, layout, ref_logps, ref_hidden, ref_weight, ref_bias)
    call = _PairCall(settings, targets, layout, objective, *labels, mode, anchor)
    return PairLossOutput(*_PairLoss.apply(hidden, weight, bias, call, torch.is_grad_enabled()))


# ---------------------------------------------------------------------------------------------------------------------
# Problems for a backend
# ---------------------------------------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """What tokens and pairs have in common: the backend, and how it computes logits."""

    kernels: Backend
    options: Head  # without weight and bias
    dtype: torch.dtype  # dtype of the matrix products, which is autocast's under autocast
    workspace: int | None

    @classmethod
    def checked(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        temperature: float,
        backend: str,
        workspace_bytes: int | None,
    ) -> _Settings:
        """Check these arguments of a public function and load the backend."""
        check.logit_options(logit_scale, softcap, temperature)
        check.workspace(workspace_bytes)
        dtype = check.head(hidden, weight, bias)
        options = Head(None, None, float(logit_scale), softcap, float(temperature))
        return cls(_load_backend(choose_backend(backend, hidden.device, dtype)), options, dtype, workspace_bytes)

    def cast(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Head]:
        """Return hidden states and head in the dtype of the matrix products."""
        weight, bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        return hidden.to(self.dtype), self.options._replace(weight=weight, bias=bias)

    def token_problem(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        needs_gradient: NeedsGradient = (False, False, False),
        mode: str = "auto",
    ) -> TokenProblem:
        states, head = self.cast(hidden, weight, bias)
        return TokenProblem(states, head, targets, needs_gradient, _dtypes(hidden, weight, bias), self.workspace, mode)

    def rounded(self, values: Tensor) -> Tensor:
        """Round float64 results to the dtype of the output."""
        return values.to(accumulation_dtype(self.dtype))


def _layout(cu_seqlens: Tensor, pairs: Tensor | None, tokens: int) -> PairLayout:
    """Check the responses and their pairs, and plan by them on the CPU."""
    boundaries = check.boundaries(cu_seqlens, tokens)
    return PairLayout.of(boundaries, check.pairs(pairs, len(boundaries) - 1))


class _Anchor(NamedTuple):
    """What margins are measured from; one of the two is None."""

    logps: Tensor | None  # (S,) float64, nats
    hidden: Tensor | None  # (N, H), which goes through the head with the policy's hidden states


def _anchor(
    settings: _Settings,
    leaves: tuple[Tensor, Tensor, Tensor | None],  # the policy's hidden states, weight and bias
    targets: Tensor,
    layout: PairLayout,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> _Anchor:
    """Check the anchor. Compute its log-probs if it has a head of its own."""
    hidden, weight, bias = leaves
    responses = len(layout.edges) - 1
    check.anchor(hidden, weight, settings.dtype, responses, ref_logps, ref_hidden, ref_weight, ref_bias)
    if ref_logps is not None:
        return _Anchor(ref_logps.detach().double(), None)
    if ref_weight is None or (_same_memory(ref_weight, weight) and _same_memory(ref_bias, bias)):
        return _Anchor(None, ref_hidden.detach().to(settings.dtype))
    with torch.no_grad(), _device_without_autocast(hidden.device):
        problem = settings.token_problem(ref_hidden, ref_weight, ref_bias, targets)
        return _Anchor(settings.kernels.response_logps(problem, layout), None)


@dataclass(eq=False)
class _PairCall:
    """The arguments of one call of the loss, for a second backward pass, without the leaves, which autograd keeps."""

    settings: _Settings
    targets: Tensor
    layout: PairLayout
    objective: Objective
    preference: Tensor
    pair_weight: Tensor
    mode: str
    anchor: _Anchor

    def evaluate(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_gradient: NeedsGradient
    ) -> PairResult:
        with _device_without_autocast(hidden.device):
            states, head = self.settings.cast(hidden, weight, bias)
            problem = PairProblem(
                hidden=states,
                head=head,
                targets=self.targets,
                layout=self.layout,
                objective=self.objective,
                ref_logps=self.anchor.logps,
                ref_hidden=self.anchor.hidden,
                preference=self.preference,
                pair_weight=self.pair_weight,
                needs_gradient=needs_gradient,
                leaf_dtypes=_dtypes(hidden, weight, bias),
                mode=self.mode,
                workspace=self.settings.workspace,
            )
            result = self.settings.kernels.pair_loss(problem)
        self.anchor = _Anchor(result.ref_logps, None)  # frees the anchor's hidden states
        return result


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors are the same view of the same memory."""
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _dtypes(*leaves: Tensor | None) -> LeafDtypes:
    return tuple(None if x is None else x.dtype for x in leaves)


@contextmanager
def _device_without_autocast(device: torch.device) -> Iterator[None]:
    """Make ``device`` current, where kernels are launched, and disable autocast, which would cast accumulators."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


class _PairLoss(torch.autograd.Function):
    """The loss. Gradients are computed in forward; the first backward scales and returns them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call, grad_enabled):
        needs_gradient = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        result = call.evaluate(hidden, weight, bias, needs_gradient)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.call, ctx.needs_gradient, ctx.gradients = call, needs_gradient, result.gradients
        ctx.leaf_dtypes = _dtypes(hidden, weight, bias)
        results = (result.loss, result.logps, result.ref_logps, result.margins)
        outputs = tuple(map(call.settings.rounded, results))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # Gradients are scaled in place and not kept, so that a [V, H] gradient never exists twice. With
        # retain_graph=True, a second backward pass computes them again, from inputs that autograd has checked.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = ctx.call.evaluate(*ctx.saved_tensors, ctx.needs_gradient).gradients
        with _device_without_autocast(grad_loss.device):
            ctx.call.settings.kernels.scale_in_place(gradients, grad_loss)
        return *_in_dtypes(gradients, ctx.leaf_dtypes), None, None


class _TokenLogps(torch.autograd.Function):
    """Per-token log-probs. Backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings):
        with _device_without_autocast(hidden.device):
            logps = settings.kernels.token_logps(settings.token_problem(hidden, weight, bias, targets))
        ctx.settings = settings
        ctx.save_for_backward(hidden, weight, bias, targets, logps)
        return settings.rounded(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        *leaves, targets, logps = ctx.saved_tensors
        with _device_without_autocast(upstream.device):
            problem = ctx.settings.token_problem(*leaves, targets, ctx.needs_input_grad[:3])
            gradients = ctx.settings.kernels.token_gradients(problem, logps, upstream)
        return *_in_dtypes(gradients, _dtypes(*leaves)), None, None


def _in_dtypes(gradients: Gradients, dtypes: LeafDtypes) -> Gradients:
    return tuple(g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes))


# ---------------------------------------------------------------------------------------------------------------------
# Backends
# ---------------------------------------------------------------------------------------------------------------------


def _load_backend(name: str) -> Backend:
    """Return the module of a backend. Triton is imported only if it is used, because some builds of torch lack it."""
    if name == "triton":
        from .kernels import fused

        return fused
    return {"torch": chunked, "reference": reference}[name]


@cache
def _has_triton(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        from .kernels.launch import INTERPRETED

        return INTERPRETED
    if torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        warnings.warn(
            f"{name} has compute capability {version}, the Triton kernels need 8.0 (Ampere): using the torch backend",
            stacklevel=2,
        )
        return False
    return True


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend to use, with "auto" resolved.

    Raises:
        ValueError: if ``backend`` is unknown, or does not run with this dtype or on this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    fits = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if backend == "auto":
        return "triton" if fits and device.type == "cuda" and _has_triton(device) else "torch"
    if backend == "triton":
        if not fits:
            raise ValueError(f"backend='triton' takes float32, bfloat16 or float16, not {dtype}")
        if not _has_triton(device):
            raise ValueError(
                "backend='triton' needs triton and an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, and "
                f"the device is {device}; use backend='torch' there (TRITON_INTERPRET=1, set before Python starts, "
                "executes the kernels on a CPU, slowly)"
            )
    return backend
