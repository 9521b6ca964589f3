"""Checks of the arguments of the loss. Every error is a ``ValueError`` that names the argument.

Shapes, dtypes and devices are always checked. Values are checked if reading them needs no host synchronisation (CPU
tensors), or on request.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .objectives import Objective


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def workspace(workspace_bytes: int | None) -> None:
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be positive, not {workspace_bytes}")


def objective(value: Any) -> None:
    if not isinstance(value, Objective):
        raise ValueError(f"objective must be one of onpo_fast.objectives, such as Onpo(eta=1.0), not {value!r}")


def logit_options(logit_scale: float, softcap: float | None, temperature: float) -> None:
    for name, value in (("logit_scale", logit_scale), ("temperature", temperature), ("softcap", softcap)):
        positive = name != "logit_scale"
        if value is None and name == "softcap":
            continue
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"{name} must be a {'positive, ' if positive else ''}finite number, not {value!r}")


def shape_and_device(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Check shape and device; None stands for any size."""
    fits = tensor.dim() == len(shape) and all(b is None or a == b for a, b in zip(tensor.shape, shape))
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), not {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected on {device}")


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> torch.dtype:
    """Check hidden states and LM head; return the dtype of their matrix products.

    That is the tensors' own, or autocast's under autocast, as in a linear layer.
    """
    shape_and_device(f"{prefix}hidden", hidden, (None, None), hidden.device)
    shape_and_device(f"{prefix}weight", weight, (None, hidden.shape[1]), hidden.device)
    if len(weight) == 0:
        raise ValueError(f"{prefix}weight must have at least one row: the vocabulary is empty")
    if bias is not None:
        shape_and_device(f"{prefix}bias", bias, (len(weight),), hidden.device)
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


def anchor(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,  # dtype of the policy's matrix products
    responses: int,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    if (ref_logps is None) == (ref_hidden is None):
        raise ValueError("ref_logps or ref_hidden: give the anchor's log-probs or its hidden states, one of the two")
    if ref_hidden is None:
        if ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias go with ref_hidden, not with ref_logps")
        shape_and_device("ref_logps", ref_logps, (responses,), hidden.device)
        if ref_logps.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"ref_logps must be float32 or float64, not {ref_logps.dtype}: they are long sums")
        return
    if ref_weight is None and ref_bias is not None:
        raise ValueError("ref_bias goes with ref_weight; without both, the anchor has the policy's head")
    ref_dtype = head(ref_hidden, weight if ref_weight is None else ref_weight, ref_bias, prefix="ref_")
    if len(ref_hidden) != len(hidden):
        raise ValueError(f"ref_hidden must have {len(hidden)} rows like hidden, not {len(ref_hidden)}")
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden is on {ref_hidden.device}, hidden on {hidden.device}")
    if ref_dtype != dtype:
        raise ValueError(f"ref_hidden is {ref_dtype}, hidden {dtype}: they must agree")
    if ref_weight is not None and len(ref_weight) != len(weight):
        raise ValueError(f"ref_weight must have {len(weight)} rows like weight, not {len(ref_weight)}")


def _readable(tensor: Tensor, validate: bool) -> bool:
    """Return whether the values may be read."""
    return tensor.numel() > 0 and (validate or tensor.device.type == "cpu")


def targets(hidden: Tensor, weight: Tensor, targets: Tensor, validate: bool) -> Tensor:
    """Check the targets; return them contiguous."""
    shape_and_device("targets", targets, (len(hidden),), hidden.device)
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
    vocabulary = len(weight)
    if _readable(targets, validate):
        outside = (targets < 0) | (targets >= vocabulary)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, {vocabulary})")
    return targets.contiguous()


def boundaries(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Check the response boundaries; return them as int64 on the CPU."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 of shape (S+1,), not {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    cu_seqlens = cu_seqlens.cpu().long()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} rows of hidden, not {cu_seqlens.tolist()[:20]}")
    return cu_seqlens


def pairs(pairs: Tensor | None, responses: int) -> Tensor:
    """Check the pairs; return them, or the default ones, as int64 on the CPU."""
    if pairs is None:
        if responses % 2:
            raise ValueError(f"pairs is needed: {responses} responses cannot be paired as (0, 1), (2, 3), …")
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


def labels(
    preference: Tensor | None, pair_weight: Tensor | None, pairs: int, device: torch.device, validate: bool
) -> tuple[Tensor, Tensor]:
    """Check the labels and weights of the pairs; return them as (P,) float64, ones by default."""
    return (
        per_pair("preference", preference, pairs, device, validate, highest=1.0),
        per_pair("pair_weight", pair_weight, pairs, device, validate, highest=math.inf),
    )


def per_pair(
    name: str, values: Tensor | None, pairs: int, device: torch.device, validate: bool, highest: float
) -> Tensor:
    """Check values that there is one of for each pair; return (P,) float64, ones by default."""
    if values is None:
        return torch.ones(pairs, dtype=torch.float64, device=device)
    shape_and_device(name, values, (pairs,), device)
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
