"""Linear layers as a decode loop, with few rows and the same weights at every step, computes them fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def fast_linears(model: nn.Module, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Changes how the linear layers of a model compute within the block; their weights stay as they are.

    Under autocast, which would convert weights at every step or keep them converted, they are converted once, and the
    copies are freed at the end. Without it, layers in float32 on a CPU use oneDNN, where PyTorch would use MKL: with 32
    rows it is about twice as fast on AMD's processors.

    Only ``nn.Linear`` is changed. Other products with weights (``Conv1D`` in GPT-2, the experts of a mixture in one
    tensor) are computed as ever: under autocast, their float32 weights are converted at every step.

    Args:
        autocast_dtype: the dtype that autocast converts to within the block; None where it is off.
    """
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                forward = _forward(module, autocast_dtype)
                if forward is not None:
                    module.forward = forward
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(linear: nn.Linear, autocast_dtype: torch.dtype | None) -> Callable[[Tensor], Tensor] | None:
    """Returns a faster forward of a linear layer; None where its own is as good, or its weight is of a kind apart."""
    weight, bias = linear.weight, linear.bias
    if type(weight.data) is not Tensor or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if autocast_dtype is not None:
        converted = None if bias is None else bias.to(autocast_dtype)
        return partial(F.linear, weight=weight.to(autocast_dtype), bias=converted)
    if weight.dtype == torch.float32 and weight.device.type == "cpu" and _has_onednn():
        return partial(_onednn, weight.detach(), bias)
    return None


@cache
def _has_onednn() -> bool:
    """Returns whether oneDNN's operator, which is not public, is in this build of PyTorch and computes as it should."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0.0, 1.0])
    try:
        found = [_onednn(weight, bias, x), _onednn(weight, None, x)]
    except (AttributeError, RuntimeError, TypeError):  # another build, or another signature
        return False
    return [one.tolist() for one in found] == [[[11.0, 18.0]], [[11.0, 17.0]]]


def _onednn(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
