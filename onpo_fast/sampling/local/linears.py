"""Linear layers as a decode loop, with few rows and the same weights at every step, computes them fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...device_memory import release_freed

PRODUCT_ROWS = 32  # of the products that the order of weights suits best
PART = 4096  # rows of a weight that are multiplied at a time


@contextmanager
def fast_linears(model: nn.Module, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Changes how the linear layers of a model compute within the block; afterwards their weights are as they were.

    Under autocast, which would convert weights at every step or keep them converted, they are converted once, and the
    copies are freed at the end. Without it, layers in float32 on a CPU use oneDNN, where PyTorch would use MKL: with 32
    rows it is more than twice as fast on AMD's processors. Their weights are in oneDNN's order within the block; those
    that another module has too, as an embedding that is tied to the LM head, stay as they are.

    Only ``nn.Linear`` is changed. Other products with weights (``Conv1D`` in GPT-2, the experts of a mixture in one
    tensor) are computed as ever: under autocast, their float32 weights are converted at every step.

    Args:
        autocast_dtype: the dtype that autocast converts to within the block; None where it is off.
    """
    users = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    changed: list[nn.Linear] = []
    reordered: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module in model.modules():
            if type(module) is not nn.Linear or "forward" in vars(module):
                continue
            weight, bias = module.weight, module.bias
            if type(weight.data) is not Tensor or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                continue
            if autocast_dtype is not None:
                converted = None if bias is None else bias.to(autocast_dtype)
                module.forward = partial(F.linear, weight=weight.to(autocast_dtype), bias=converted)
            elif weight.dtype != torch.float32 or weight.device.type != "cpu" or not _has_onednn():
                continue
            elif users[id(weight)] > 1:
                module.forward = partial(_onednn_as_it_is, weight.detach(), bias)
            else:
                values = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PRODUCT_ROWS)
                reordered.append((weight, values))
                weight.data = weight.new_empty(0)
                module.forward = partial(_onednn, values, bias)
                del values
            changed.append(module)
        if reordered:
            release_freed()
        yield
    finally:
        for module in changed:
            del module.forward
        restored = bool(reordered)
        while reordered:
            weight, values = reordered.pop()
            weight.data = values.to_dense()
            del values  # before the next is restored
        if restored:
            release_freed()


@cache
def _has_onednn() -> bool:
    """Returns whether oneDNN's operator, which is not public, is in this build of PyTorch and computes as it should."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0.0, 1.0])
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PRODUCT_ROWS)
        found = [_onednn(weight, bias, x), _onednn(packed, None, x)]
        if not torch.equal(packed.to_dense(), weight):
            return False
    except (AttributeError, RuntimeError, TypeError):  # another build, or another signature
        return False
    return [one.tolist() for one in found] == [[[11.0, 18.0]], [[11.0, 17.0]]]


def _onednn(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_as_it_is(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Returns the product with a weight that is not in oneDNN's order: the product's transpose, some rows at a time.

    The rows of ``x`` take the place of the weight, so that it is they that are put in order, and they are few.
    """
    rows = x.reshape(-1, x.shape[-1])
    outputs = rows.new_empty(len(rows), len(weight))
    for start in range(0, len(weight), PART):
        part = slice(start, start + PART)
        outputs[:, part] = _onednn(rows, None, weight[part]).T
    if bias is not None:
        outputs += bias
    return outputs.view(*x.shape[:-1], -1)
