"""The one door to the kernels: the loss that never forms a [tokens, vocabulary] tensor.

``fused_linear_pair_loss`` is the pairwise loss of a batch of preference groups, from hidden states and LM head;
``linear_logprobs`` the per-token log-probs that other losses are made of. Both check their arguments and name the one
that is wrong. Checks that would wait for a GPU (the values of tensors that live there) are made only on request.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import chunked, reference
from .kernels.groups import Layout
from .kernels.head import Head
from .objectives import Objective

BACKENDS = ("auto", "triton", "torch", "reference")
MODES = ("auto", "fast", "lean")
Wanted = tuple[bool, bool, bool]  # gradients for hidden, weight, bias


class PairLossOutput(NamedTuple):
    """What ``fused_linear_pair_loss`` returns. Only ``loss`` carries a gradient."""

    loss: Tensor  # scalar, weighted mean over pairs
    logps: Tensor  # (S,) summed log-probs of the responses under the policy, nats
    ref_logps: Tensor  # (S,) the same under the anchor
    margins: Tensor  # (P,) log-ratio of the winner minus that of the loser, nats


@torch.compiler.disable  # a clean break in the graph: the work is planned on the host
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
    """Per-token log-probs: (N,) nats, fp32 (float64 for float64 inputs), differentiable by hidden, weight and bias.

    The backward pass computes the logits again, a workspace at a time, since the upstream gradient is arbitrary; where
    it is a pairwise loss, ``fused_linear_pair_loss`` does without. See there for the other arguments and errors.
    """
    dtype = _check_head(hidden, weight, bias, logit_scale, softcap, temperature)
    targets = _check_targets(hidden, weight, targets, validate)
    backend = choose_backend(backend, hidden.device, dtype)
    _check_workspace(workspace_bytes)
    options = Head(None, None, float(logit_scale), softcap, float(temperature))
    if backend == "reference":
        return _rounded(reference.token_logps(*_cast(dtype, hidden, weight, bias, options), targets), dtype)
    return _TokenLogps.apply(hidden, weight, bias, targets, options, dtype, backend, workspace_bytes)


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
    """The weighted mean of ``objective`` over pairs of responses (arXiv 2502.16852, Algorithm 1).

    Args:
        hidden: the hidden states that predict the response tokens, responses back to back.
        weight: the LM head, in the dtype of ``hidden``. Under autocast the products are in its dtype, and gradients
            come in the tensors' own, not rounded in between.
        targets: the response tokens.
        cu_seqlens: response boundaries in N, from 0 to N. Best kept on the CPU, with ``pairs``: the work is planned
            there, and a GPU tensor costs a wait for the device.
        pairs: (winner, loser) indices into the S responses; default (0, 1), (2, 3), …
        objective: ``objectives.Onpo(eta=…)`` or another.
        ref_logps: cached summed log-probs of the anchor, best from the same backend, whose errors they share; or else
        ref_hidden, ref_weight, ref_bias: the anchor's own hidden states and head (default: the policy's head). No
            gradient flows to the anchor.
        preference: P(winner ≻ loser) in [0, 1] for soft labels; default 1.
        pair_weight: non-negative; default 1. The loss is Σ w·ℓ / Σ w.
        bias, logit_scale, softcap, temperature: logit = softcap·tanh(logit_scale·(h·w + b)/softcap) / temperature,
            for policy and anchor alike.
        backend: "triton" (NVIDIA GPUs from Ampere on; float32, bfloat16, float16), "torch" (chunked, any device),
            "reference" (float64, everything materialised), "auto" (the fastest that runs here). With "triton", float32
            products are as exact as ``torch.set_float32_matmul_precision`` says: three TF32 products each ("highest",
            the default) or one.
        mode: "fast" computes every logit once and keeps a chunk of exponentials, "lean" computes them again and keeps
            a slice; "auto" is fast where the largest preference group fits the workspace, or lean would take as much.
            The logger "onpo_fast" says at level DEBUG which it was, and why. With "triton", fp16 is always lean; with
            "torch", a mode is only a default of ``workspace_bytes``, and what does not fit is computed again.
        workspace_bytes: memory beside inputs and gradients, about. The default is a quarter of the free memory for fast
            on a GPU (more with mode="fast" where the largest preference group needs it), about 10·H bytes a token for
            lean (in bf16; it never takes less than 6·H), and 144 or 18 MiB on a CPU. The number of chunks decides how
            sums are rounded: give it for the same bits whatever else is in the memory.
        validate: check the values of GPU tensors too, which waits for the device. Unchecked, a target outside of the
            vocabulary makes the loss NaN there.

    Returns:
        Loss, log-probs and margins, fp32 (float64 for float64 inputs). Gradients flow from the loss to hidden, weight
        and bias, each only if it asks for one; they are computed with the loss and handed over by ``backward``.

    Raises:
        ValueError: names the argument whose shape, dtype, device or value does not fit.
    """
    dtype = _check_head(hidden, weight, bias, logit_scale, softcap, temperature)
    backend = choose_backend(backend, hidden.device, dtype)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    _check_workspace(workspace_bytes)
    targets = _check_targets(hidden, weight, targets, validate)
    cu_seqlens = _check_boundaries(cu_seqlens, len(hidden))
    responses = len(cu_seqlens) - 1
    pairs = _check_pairs(pairs, responses)
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must be one of onpo_fast.objectives, such as Onpo(eta=1.0), not {objective!r}")
    device = hidden.device
    preference = _per_pair("preference", preference, len(pairs), device, validate, highest=1.0)
    pair_weight = _per_pair("pair_weight", pair_weight, len(pairs), device, validate, highest=math.inf)

    if (ref_logps is None) == (ref_hidden is None):
        raise ValueError("ref_logps or ref_hidden: give the anchor's log-probs or its hidden states, one of the two")
    if ref_hidden is None:
        if ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias go with ref_hidden, not with ref_logps")
        _expect("ref_logps", ref_logps, (responses,), device)
        if ref_logps.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"ref_logps must be float32 or float64, not {ref_logps.dtype}: they are long sums")
    else:
        if ref_weight is None and ref_bias is not None:
            raise ValueError("ref_bias goes with ref_weight; without either, the policy's head is the anchor's too")
        shared = ref_weight is None or (_same(ref_weight, weight) and _same(ref_bias, bias))
        if shared:
            ref_weight, ref_bias = weight, bias
        ref_dtype = _check_head(ref_hidden, ref_weight, ref_bias, logit_scale, softcap, temperature, prefix="ref_")
        if len(ref_hidden) != len(hidden):
            raise ValueError(f"ref_hidden must have {len(hidden)} rows like hidden, not {len(ref_hidden)}")
        if ref_hidden.device != device:
            raise ValueError(f"ref_hidden is on {ref_hidden.device}, hidden on {device}")
        if ref_dtype != dtype:
            raise ValueError(f"ref_hidden is {ref_dtype}, hidden {dtype}: they must agree")
        if len(ref_weight) != len(weight):
            raise ValueError(f"ref_weight must have {len(weight)} rows like weight, not {len(ref_weight)}")

    options = Head(None, None, float(logit_scale), softcap, float(temperature))
    layout = Layout.of(cu_seqlens, pairs)
    kernels = chunked if backend == "torch" else _fused() if backend == "triton" else reference
    if ref_logps is not None:
        anchor = ref_logps.detach().double()
    elif shared and backend != "reference":
        anchor = ref_hidden.detach().to(dtype)  # goes through the head with the policy
    else:
        with torch.no_grad(), _alone_on(device):
            own = _cast(dtype, ref_hidden, ref_weight, ref_bias, options)
            anchor = kernels.response_logps(*own, targets, layout, workspace_bytes)
            del own  # a head's copy in another dtype has the head's size

    if backend == "reference":
        own = _cast(dtype, hidden, weight, bias, options)
        logps = reference.response_logps(*own, targets, layout, workspace_bytes)
        loss, margins = reference.pair_loss(logps, anchor, pairs.to(device), objective, preference, pair_weight)
        return PairLossOutput(*(_rounded(x, dtype) for x in (loss, logps.detach(), anchor, margins.detach())))

    def evaluate(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted):
        nonlocal anchor
        dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
        with _alone_on(hidden.device):
            result = kernels.PairLoss(
                *_cast(dtype, hidden, weight, bias, options),
                targets,
                layout,
                objective,
                anchor,
                preference,
                pair_weight,
                wanted,
                dtypes,
                mode,
                workspace_bytes,
            ).run()
        anchor = result.ref_logps  # all that a second evaluation needs of it
        return result

    return PairLossOutput(*_PairLoss.apply(hidden, weight, bias, evaluate, dtype, torch.is_grad_enabled()))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same memory, read the same way."""
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _cast(
    dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Head
) -> tuple[Tensor, Head]:
    """Hidden states and head in the dtype of the products: under autocast that is not the tensors' own."""
    return hidden.to(dtype), options._replace(weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))


@contextmanager
def _alone_on(device: torch.device) -> Iterator[None]:
    """Kernels launch on the tensors' device, and no autocast casts what they accumulate in."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        yield


class _PairLoss(torch.autograd.Function):
    """The loss; its gradients are by-products, kept for the first backward pass, which gives them away."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, evaluate, dtype, gradients):
        wanted = tuple(gradients and needed for needed in ctx.needs_input_grad[:3])
        result = evaluate(hidden, weight, bias, wanted)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.evaluate, ctx.wanted = evaluate, wanted
        ctx.gradients = result.gradients
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        results = (result.loss, result.logps, result.ref_logps, result.margins)
        outputs = tuple(_rounded(x, dtype) for x in results)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # Scaled in place and given away, so that a [V, H] gradient never exists twice. With retain_graph=True a second
        # backward pass finds them gone and computes them again, from inputs that autograd has checked to be the same.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = ctx.evaluate(*ctx.saved_tensors, ctx.wanted).gradients
        scaled = [g if g is None else _scaled(g, grad_loss).to(dtype) for g, dtype in zip(gradients, ctx.dtypes)]
        return *scaled, None, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """In place, and not at all where the factor is 1: a pass over a [V, H] tensor is time."""
    if gradient.device.type == "cpu":
        return gradient if factor == 1 else gradient.mul_(factor)
    if gradient.dtype != torch.float64 and _has_triton(gradient.device):  # the kernel multiplies in float32
        from .kernels.rescale import rescale

        with _alone_on(gradient.device):
            return rescale(gradient, factor)  # the kernel looks at the factor, so that the host need not wait
    return gradient.mul_(factor)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options, dtype, backend, workspace_bytes):
        ctx.options, ctx.dtype, ctx.backend, ctx.workspace_bytes = options, dtype, backend, workspace_bytes
        with _alone_on(hidden.device):
            states, head = _cast(dtype, hidden, weight, bias, options)
            if backend == "triton":
                logps = _fused().token_logps(states, head, targets)
            else:
                logps = chunked.token_logps(states, head, targets, workspace_bytes)
        ctx.save_for_backward(hidden, weight, bias, targets, logps)
        return _rounded(logps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        *leaves, targets, logps = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        with _alone_on(upstream.device):
            states, head = _cast(ctx.dtype, *leaves, ctx.options)
            if ctx.backend == "triton":
                dtypes = tuple(None if x is None else x.dtype for x in leaves)
                gradients = _fused().token_gradients(
                    states, head, targets, logps, upstream, wanted, dtypes, ctx.workspace_bytes
                )
            else:
                gradients = chunked.token_gradients(states, head, targets, upstream, wanted, ctx.workspace_bytes)
        return *(g if g is None else g.to(x.dtype) for g, x in zip(gradients, leaves)), *[None] * 5


# ---------------------------------------------------------------------------------------------------------------------
# Backends
# ---------------------------------------------------------------------------------------------------------------------


def _fused():
    """The Triton backend. Imported where it is used: triton comes only with the builds of torch that can use it."""
    from .kernels import fused

    return fused


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
            f"{name} has compute capability {version}: the Triton kernels need 8.0 (Ampere), the torch backend is used",
            stacklevel=2,
        )
        return False
    return True


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """What "auto" stands for; ``ValueError`` where what is asked for does not run."""
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
                f"the device is {device}; backend='torch' runs there (TRITON_INTERPRET=1, set before the start, "
                "executes the kernels on a CPU, slowly)"
            )
    return backend


# ---------------------------------------------------------------------------------------------------------------------
# Checks. Shapes, dtypes and devices always; values where they can be read without waiting for a device, or on request.
# ---------------------------------------------------------------------------------------------------------------------


def _check_workspace(workspace_bytes: int | None) -> None:
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be positive, not {workspace_bytes}")


def _expect(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    fits = tensor.dim() == len(shape) and all(b is None or a == b for a, b in zip(tensor.shape, shape))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), not {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected on {device}")


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    prefix: str = "",
) -> torch.dtype:
    """The dtype of the products: the tensors' own, or under autocast its dtype, as a linear layer would have it."""
    _expect(f"{prefix}hidden", hidden, (None, None), hidden.device)
    _expect(f"{prefix}weight", weight, (None, hidden.shape[1]), hidden.device)
    if len(weight) == 0:
        raise ValueError(f"{prefix}weight must have at least one row: the vocabulary is empty")
    if bias is not None:
        _expect(f"{prefix}bias", bias, (len(weight),), hidden.device)
    for name, value in (("logit_scale", logit_scale), ("temperature", temperature), ("softcap", softcap)):
        positive = name != "logit_scale"
        if value is None and name == "softcap":
            continue
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"{name} must be a {'positive, ' if positive else ''}finite number, not {value!r}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{prefix}{name} must be floating point, not {tensor.dtype}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{prefix}{name} is {tensor.dtype}, {prefix}hidden {hidden.dtype}: they must agree")
    return hidden.dtype


def _readable(tensor: Tensor, validate: bool) -> bool:
    return tensor.numel() > 0 and (validate or tensor.device.type == "cpu")


def _check_targets(hidden: Tensor, weight: Tensor, targets: Tensor, validate: bool) -> Tensor:
    _expect("targets", targets, (len(hidden),), hidden.device)
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
    vocabulary = len(weight)
    if _readable(targets, validate):
        outside = (targets < 0) | (targets >= vocabulary)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, {vocabulary})")
    return targets.contiguous()


def _check_boundaries(cu_seqlens: Tensor, tokens: int) -> Tensor:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 of shape (S+1,), not {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    cu_seqlens = cu_seqlens.cpu().long()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} rows of hidden, not {cu_seqlens.tolist()[:20]}")
    return cu_seqlens


def _check_pairs(pairs: Tensor | None, responses: int) -> Tensor:
    if pairs is None:
        if responses % 2:
            raise ValueError(f"pairs is needed: {responses} responses do not fall into pairs (0, 1), (2, 3), …")
        return torch.arange(responses).view(-1, 2)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"pairs must be int64 of shape (P, 2), not {pairs.dtype} of shape {tuple(pairs.shape)}")
    pairs = pairs.cpu().long()
    outside = ((pairs < 0) | (pairs >= responses)).any(1)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"pairs[{row}] is {pairs[row].tolist()}, outside the {responses} responses")
    same = pairs[:, 0] == pairs[:, 1]
    if same.any():
        row = int(same.nonzero()[0])
        raise ValueError(f"pairs[{row}] compares response {int(pairs[row, 0])} with itself")
    return pairs


def _per_pair(
    name: str, values: Tensor | None, pairs: int, device: torch.device, validate: bool, highest: float
) -> Tensor:
    """(P,) float64, ones by default."""
    if values is None:
        return torch.ones(pairs, dtype=torch.float64, device=device)
    _expect(name, values, (pairs,), device)
    values = values.detach().double()
    if _readable(values, validate):
        outside = ~((values >= 0) & (values <= highest) & values.isfinite())
        if outside.any():
            row = int(outside.nonzero()[0])
            allowed = "in [0, 1]" if highest == 1 else "non-negative and finite"
            raise ValueError(f"{name}[{row}] is {float(values[row])}; it must be {allowed}")
        if name == "pair_weight" and values.sum() == 0:
            raise ValueError("pair_weight sums to 0: no pair would count")
    return values


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 sums in the dtype that callers see, for products in ``dtype``."""
    return values.to(chunked.accumulation_dtype(dtype))
