"""The public functions of the loss, which never forms a [tokens, vocabulary] tensor.

``fused_linear_pair_loss`` computes the pairwise loss of a batch of preference groups from hidden states and LM head,
``linear_logprobs`` the per-token log-probs of which other losses can be made. This module checks their arguments
(``loss_checks.py``), chooses the backend and does autograd; ``kernels/`` computes.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import loss_checks as check
from .kernels import chunked, reference
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
    options = _head_options(logit_scale, softcap, temperature)
    dtype = check.head(hidden, weight, bias)
    targets = check.targets(hidden, weight, targets, validate)
    kernels = _load_backend(choose_backend(backend, hidden.device, dtype))
    check.workspace(workspace_bytes)
    return _TokenLogps.apply(hidden, weight, bias, targets, kernels, options, dtype, workspace_bytes)


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
        weight: the LM head, in the dtype of ``hidden``. Under autocast the matrix products are in autocast's dtype, and
            gradients are in the dtypes of the tensors, without rounding in between.
        targets: the response tokens.
        cu_seqlens: response boundaries in N, from 0 to N. Keep ``cu_seqlens`` and ``pairs`` on the CPU, where the work
            is planned; a GPU tensor costs a host synchronisation.
        pairs: (winner, loser) indices into the S responses; default (0, 1), (2, 3), …
        objective: an objective such as ``objectives.Onpo(eta=…)``.
        ref_logps: summed log-probs of the anchor, float32 or float64, best from the same backend, because rounding
            errors then cancel. Give either these or ``ref_hidden``.
        ref_hidden: hidden states of the anchor. No gradient flows to the anchor.
        ref_weight, ref_bias: the anchor's LM head; default the policy's.
        preference: P(winner ≻ loser) in [0, 1] for soft labels; default 1.
        pair_weight: non-negative weights w; the loss is Σ w·ℓ / Σ w. Default 1.
        bias, logit_scale, softcap, temperature: logit = softcap·tanh(logit_scale·(h·w + b)/softcap) / temperature,
            for policy and anchor; no tanh without ``softcap``.
        backend: "triton" (NVIDIA GPUs from Ampere on; float32, bfloat16, float16), "torch" (chunked, any device),
            "reference" (float64, all logits at once) or "auto" (the fastest that runs here). With "triton", float32
            products follow ``torch.set_float32_matmul_precision``: three TF32 products ("highest", the default) or one.
        mode: "fast" computes every logit once and keeps a chunk of exponentials, "lean" computes logits twice and keeps
            a slice of the vocabulary, "auto" is fast if the largest preference group fits the workspace or if lean
            would take as much memory. The logger "onpo_fast" reports the choice and its reason at level DEBUG. With
            "triton", fp16 is always lean. With "torch", the mode sets only the default of ``workspace_bytes``, and a
            group that does not fit is computed twice.
        workspace_bytes: approximate memory beside inputs and gradients, in bytes. Default on a GPU: for fast a quarter
            of the free memory (more with mode="fast" if the largest preference group needs it), for lean about 10·H
            bytes a token in bf16 (never less than 6·H); on a CPU 144 MiB for fast and 18 MiB for lean. The number of
            chunks affects rounding: set this for bit-identical results that do not depend on the free memory.
        validate: also check the values of GPU tensors, which costs a host synchronisation. Without it, a target outside
            the vocabulary makes the loss NaN on a GPU.

    Returns:
        Loss, log-probs and margins in fp32 (float64 for float64 inputs). Gradients flow from the loss to hidden, weight
        and bias if they require one; they are computed in forward, and ``backward`` scales and returns them.

    Raises:
        ValueError: if the shape, dtype, device or value of an argument is wrong; the message names the argument.
    """
    options = _head_options(logit_scale, softcap, temperature)
    dtype, device = check.head(hidden, weight, bias), hidden.device
    kernels = _load_backend(choose_backend(backend, device, dtype))
    check.one_of("mode", mode, MODES)
    check.workspace(workspace_bytes)
    targets = check.targets(hidden, weight, targets, validate)
    cu_seqlens = check.boundaries(cu_seqlens, len(hidden))
    pairs = check.pairs(pairs, len(cu_seqlens) - 1)
    check.objective(objective)
    preference = check.per_pair("preference", preference, len(pairs), device, validate, highest=1.0)
    pair_weight = check.per_pair("pair_weight", pair_weight, len(pairs), device, validate, highest=math.inf)
    check.anchor(hidden, weight, dtype, len(cu_seqlens) - 1, ref_logps, ref_hidden, ref_weight, ref_bias)

    layout = PairLayout.of(cu_seqlens, pairs)
    if ref_logps is not None:
        ref_logps = ref_logps.detach().double()
    elif ref_weight is None or (_same_memory(ref_weight, weight) and _same_memory(ref_bias, bias)):
        ref_hidden = ref_hidden.detach().to(dtype)  # goes through the head with the policy's hidden states
    else:
        ref_logps = _response_logps(
            kernels, layout, ref_hidden, ref_weight, ref_bias, targets, options, dtype, workspace_bytes
        )
        ref_hidden = None
    call = _PairCall(
        kernels,
        options,
        dtype,
        ref_logps,
        ref_hidden,
        targets=targets,
        layout=layout,
        objective=objective,
        preference=preference,
        pair_weight=pair_weight,
        mode=mode,
        workspace=workspace_bytes,
    )
    return PairLossOutput(*_PairLoss.apply(hidden, weight, bias, call, torch.is_grad_enabled()))


# ---------------------------------------------------------------------------------------------------------------------
# Problems for a backend
# ---------------------------------------------------------------------------------------------------------------------


def _head_options(logit_scale: float, softcap: float | None, temperature: float) -> Head:
    """Return a head without weight and bias."""
    check.logit_options(logit_scale, softcap, temperature)
    return Head(None, None, float(logit_scale), softcap, float(temperature))


def _cast(
    dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Head
) -> tuple[Tensor, Head]:
    """Return hidden states and head in the dtype of the matrix products, which is autocast's under autocast."""
    return hidden.to(dtype), options._replace(weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))


def _token_problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Head,
    dtype: torch.dtype,
    workspace: int | None,
    needs_gradient: NeedsGradient = (False, False, False),
) -> TokenProblem:
    states, head = _cast(dtype, hidden, weight, bias, options)
    return TokenProblem(states, head, targets, needs_gradient, _dtypes(hidden, weight, bias), workspace)


@torch.no_grad()
def _response_logps(kernels: Backend, layout: PairLayout, hidden: Tensor, *problem: Any) -> Tensor:
    """Compute the (S,) log-probs of an anchor with a head of its own. Casts of its head are freed on return."""
    with _device_without_autocast(hidden.device):
        return kernels.response_logps(_token_problem(hidden, *problem), layout)


class _PairCall:
    """The arguments of one call of the loss, for a second backward pass, without the leaves, which autograd keeps."""

    def __init__(
        self,
        kernels: Backend,
        options: Head,
        dtype: torch.dtype,  # dtype of the matrix products
        ref_logps: Tensor | None,
        ref_hidden: Tensor | None,
        **fields: Any,  # the other fields of PairProblem
    ) -> None:
        self.kernels, self.options, self.dtype, self.fields = kernels, options, dtype, fields
        self.ref_logps, self.ref_hidden = ref_logps, ref_hidden

    def evaluate(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_gradient: NeedsGradient
    ) -> PairResult:
        with _device_without_autocast(hidden.device):
            states, head = _cast(self.dtype, hidden, weight, bias, self.options)
            problem = PairProblem(
                states,
                head,
                ref_logps=self.ref_logps,
                ref_hidden=self.ref_hidden,
                needs_gradient=needs_gradient,
                leaf_dtypes=_dtypes(hidden, weight, bias),
                **self.fields,
            )
            result = self.kernels.pair_loss(problem)
        self.ref_logps, self.ref_hidden = result.ref_logps, None  # frees the anchor's hidden states
        return result


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors are the same view of the same memory."""
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _dtypes(*leaves: Tensor | None) -> LeafDtypes:
    return tuple(None if x is None else x.dtype for x in leaves)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 results to the dtype of the output, given the dtype of the matrix products."""
    return values.to(accumulation_dtype(dtype))


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
        outputs = tuple(_rounded(x, call.dtype) for x in results)
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
        scaled = tuple(g if g is None else _scale_in_place(g, grad_loss) for g in gradients)
        return *_in_dtypes(scaled, ctx.leaf_dtypes), None, None


class _TokenLogps(torch.autograd.Function):
    """Per-token log-probs. Backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, kernels, options, dtype, workspace):
        ctx.kernels, ctx.settings = kernels, (options, dtype, workspace)
        with _device_without_autocast(hidden.device):
            logps = kernels.token_logps(_token_problem(hidden, weight, bias, targets, *ctx.settings))
        ctx.save_for_backward(hidden, weight, bias, targets, logps)
        return _rounded(logps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        *leaves, targets, logps = ctx.saved_tensors
        with _device_without_autocast(upstream.device):
            problem = _token_problem(*leaves, targets, *ctx.settings, ctx.needs_input_grad[:3])
            gradients = ctx.kernels.token_gradients(problem, logps, upstream)
        return *_in_dtypes(gradients, _dtypes(*leaves)), *[None] * 5


def _in_dtypes(gradients: Gradients, dtypes: LeafDtypes) -> Gradients:
    return tuple(g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes))


def _scale_in_place(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a scalar, unless it is 1: that saves a pass over a [V, H] tensor."""
    if gradient.device.type == "cpu":
        return gradient if factor == 1 else gradient.mul_(factor)
    if gradient.dtype != torch.float64 and _has_triton(gradient.device):  # the kernel multiplies in float32
        from .kernels.rescale import rescale

        with _device_without_autocast(gradient.device):
            return rescale(gradient, factor)  # compares the factor on the device, without host synchronisation
    return gradient.mul_(factor)


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
