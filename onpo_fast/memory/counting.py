"""Counts the memory of a forward and backward pass without computing it.

The model runs on fake tensors, which have shapes but no data, and every storage that an operator allocates is counted
while it is alive. What autograd saves, what checkpointing recomputes, copies that autocast makes and gradients are then
the model's own, whatever its family. Only the loss, whose kernels need data, is replaced by its allocations.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.policy import Policy
from ..models.scoring import backbone
from ..packing import Layout, Packed
from ..sources import quiet

ACTIVATIONS, GRADIENTS, LOSS, HEAD = "activations", "gradients", "loss", "head gradient"


class CannotCount(Exception):
    """A family that does not run on fake tensors; the message says why."""


@contextmanager
def cannot_count() -> Iterator[None]:
    """Raises ``CannotCount`` for any exception within the block: families fail in their own ways, with logs.

    A ``UserError`` stays one.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CannotCount(f"{type(error).__name__}: {reason}") from error
    finally:
        logging.disable(before)


def _without_dtype_check(function: Callable) -> Callable:
    """Returns an operator's function for fake tensors; that of grouped products, in experts, knows bfloat16 only."""
    if function is not torch.ops.aten._grouped_mm.default:
        return function

    def grouped(a: Tensor, b: Tensor, *rest: object, **named: object) -> Tensor:
        return function(a.bfloat16(), b.bfloat16(), *rest, **named).to(a.dtype)

    return grouped


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operators allocate within it, by part, and keeps their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ACTIVATIONS  # of storages that are allocated from now on
        self.live: Counter[str] = Counter()  # bytes by part
        self.at_peak: Counter[str] = Counter()
        self.at_loss: Counter[str] = Counter()  # when the loss has its gradients, and its workspace still
        self.peak = 0
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}

    @property
    def total(self) -> int:
        """Bytes that are alive."""
        return sum(self.live.values())

    def assign(self, tensor: Tensor, part: str | None) -> None:
        """Counts a tensor's storage as this part from now on; as nothing with None."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if part else 0
        self._forget(key)

        def forget(_: object) -> None:
            self._forget(key)

        self._storages[key] = weakref.ref(storage, forget), part or ACTIVATIONS, size
        self.live[part or ACTIVATIONS] += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.live.copy()

    def _forget(self, key: int) -> None:
        if key in self._storages:
            _, part, size = self._storages.pop(key)
            self.live[part] -= size

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Counts what is allocated within the block as this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = _without_dtype_check(function)(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._storages:
                self.assign(tensor, self.part)
        return result


class _LossAllocations(torch.autograd.Function):
    """Stands in for the pair loss: allocates its gradients, and returns them in backward. Its workspace is left out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, counter, gradient_dtype):
        leaves = (hidden, weight, bias)
        with counter.counting_as(LOSS):
            ctx.gradients = [_gradient(hidden, gradient_dtype)]
        with counter.counting_as(HEAD):
            ctx.gradients += [_gradient(leaf, gradient_dtype) for leaf in leaves[1:]]
        counter.at_loss = counter.live.copy()
        ctx.counter, ctx.dtypes = counter, [None if leaf is None else leaf.dtype for leaf in leaves]
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        gradients, ctx.gradients = ctx.gradients, None
        with ctx.counter.counting_as(HEAD):
            return *(g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes)), None, None


def _gradient(leaf: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return torch.empty_like(leaf, dtype=dtype) if leaf is not None and leaf.requires_grad else None


class FakeModel:
    """A causal language model without data, in the state that a fit leaves it in after its first micro-batch.

    Args:
        build: makes the model; called where new tensors have no data.
        layout: of its micro-batches.
        compute_dtype: of autocast; float32 turns it off.
        prepare: changes the model, as gradient checkpointing or adapters do.
    """

    def __init__(
        self,
        build: Callable[[], PreTrainedModel],
        layout: Layout,
        compute_dtype: torch.dtype,
        prepare: Callable[[PreTrainedModel], object] = lambda model: None,
    ) -> None:
        self.mode = FakeTensorMode()
        with quiet(), cannot_count():
            with torch.device("meta"):
                model = build()
                prepare(model)
            with self.mode:
                _fill_with_fakes(model)
        self.policy = Policy(model, None, torch.device("cpu"), compute_dtype, layout)
        self.policy.begin_fit()
        self.model = model

    def parameters(self, trained: bool = False) -> list[nn.Parameter]:
        """Returns the parameters, or those that are trained."""
        return [one for one in self.model.parameters() if one.requires_grad or not trained]

    def count(
        self,
        packed: Packed,
        gradient_dtype: torch.dtype,
        masked: bool = True,
        several: bool = True,
        sharded: bool = False,
    ) -> LiveStorages:
        """Counts a forward and backward pass of a micro-batch, without weights and the workspace of the loss.

        Args:
            gradient_dtype: of the gradients that the loss computes.
            masked: whether attention takes the layout's mask; False for kernels that need none, which then keep nothing
                of its size.
            several: whether gradients of an earlier micro-batch are there already.
            sharded: whether a gradient leaves as soon as it is there, to be reduced over ranks. Those that stay are not
                counted then.

        Raises:
            CannotCount: if the family does not run on fake tensors.
        """
        counter = LiveStorages()
        with self.mode, cannot_count():
            for parameter in self.parameters(trained=True):
                if several and not sharded:
                    parameter.grad = torch.empty_like(parameter)
                    counter.assign(parameter.grad, GRADIENTS)
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                counter.assign(tensor, None)
            handles = [self._on_gradient(one, counter, sharded) for one in self.parameters(trained=True)]
            with counter:
                self._pass(self._fake(packed), counter, gradient_dtype, masked)
            for handle in handles:
                handle.remove()
            self.model.zero_grad(set_to_none=True)
        return counter

    @staticmethod
    def _on_gradient(parameter: nn.Parameter, counter: LiveStorages, sharded: bool) -> RemovableHandle:
        def accumulated(one: nn.Parameter) -> None:
            if sharded:
                one.grad = None
            else:
                counter.assign(one.grad, GRADIENTS)

        return parameter.register_post_accumulate_grad_hook(accumulated)

    def _pass(
        self,
        packed: Packed,
        counter: LiveStorages,
        gradient_dtype: torch.dtype,
        masked: bool,
    ) -> None:
        head = self.model.get_output_embeddings()
        with self.policy.autocast(cached=False):  # as in a fit
            if masked:
                hidden = self.policy.scoring.hidden_states(packed)
            else:
                output = backbone(self.model)(input_ids=packed.input_ids, use_cache=False)
                hidden = output.last_hidden_state.flatten(0, 1)[packed.rows]
            bias = getattr(head, "bias", None)
            loss = _LossAllocations.apply(hidden, head.weight, bias, counter, gradient_dtype)
        loss.backward()

    def _fake(self, packed: Packed) -> Packed:
        """Returns the batch on fake tensors, but for the boundaries, which are read on the host."""
        values = {field.name: getattr(packed, field.name) for field in fields(packed) if field.name != "cu_seqlens"}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(packed, **{name: self.mode.from_tensor(value) for name, value in tensors.items()})


def _fill_with_fakes(model: nn.Module) -> None:
    """Replaces parameters and buffers without data by fake tensors on the CPU. Tied weights stay tied."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
        return fakes[id(tensor)]

    originals = []  # keeps them alive, so that no two of them have the same id
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    originals.append(tensor)
                    tensors[name] = fake(tensor)
