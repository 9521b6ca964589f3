"""A policy whose weights are spread over the ranks while it is fitted, by FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import UserError
from .policy import Policy


@dataclass
class ShardedPolicy(Policy):
    """A policy of which every rank has some rows of each weight, with their gradients and optimizer states.

    Each transformer block is gathered for its own forward and backward pass; embeddings, final norm and head belong to
    the scoring module, which gathers them for both. Blocks are gathered in the dtype of the weights and compute under
    the policy's own autocast, without FSDP2's mixed precision: log-probs are those of the whole model, to the bit.
    Only ``scoring`` computes.

    Attributes:
        skeleton: the model without weights, on rank 0, which puts the fitted ones into it.
    """

    skeleton: PreTrainedModel | None = None

    @classmethod
    def of(cls, policy: Policy, mesh: DeviceMesh) -> ShardedPolicy:
        """Shards a policy that every rank has whole, in place: each rank keeps its rows.

        ``check_shardable`` says whether it can be.
        """
        skeleton = _without_weights(policy.model) if mesh.get_rank() == 0 else None
        sharded = cls(**{one.name: getattr(policy, one.name) for one in fields(policy)}, skeleton=skeleton)
        # gradients of half-precision weights are summed over the ranks in float32
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in _blocks(policy.model):
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(sharded.scoring, mesh=mesh, mp_policy=precision)
        return sharded

    def autocast(self, cached: bool = False) -> torch.autocast:
        """Returns the policy's autocast without its cache, which would keep every gathered weight in half precision."""
        return super().autocast(cached=False)

    def reshard(self) -> None:
        """Frees gathered weights, after which the model's parameters are this rank's rows.

        A forward pass without a backward pass leaves the root gathered. What is read then are copies.
        """
        for module in self.scoring.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def whole(self) -> Policy | None:
        """Gathers the weights, one after the other, and returns the policy whole on rank 0's device; None elsewhere."""
        self.reshard()
        gathered: dict[int, nn.Parameter | None] = {}  # by the parameter's identity: a tied weight once
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) not in gathered:
                value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
                own = None if self.skeleton is None else nn.Parameter(value.cpu(), parameter.requires_grad)
                gathered[id(parameter)] = own
            if self.skeleton is not None:
                module, _, attribute = name.rpartition(".")
                setattr(self.skeleton.get_submodule(module), attribute, gathered[id(parameter)])
        if self.skeleton is None:
            return None
        values = {one.name: getattr(self, one.name) for one in fields(Policy)}
        return replace(Policy(**values), model=self.skeleton.to(self.device))


def check_shardable(policy: Policy) -> None:
    """Raises ``UserError`` if weights do not have one dtype, which FSDP2 needs of those that it gathers together."""
    if len({parameter.dtype for parameter in policy.model.parameters()}) > 1:
        raise UserError(
            f"--weights bf16-sr: a model of the family {policy.family} keeps some weights in float32, which cannot be "
            "sharded with those in bfloat16: take --weights fp32, or one rank"
        )


def _blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yields the transformer blocks, innermost first where one contains another."""
    names = set(model._no_split_modules or ())
    yield from reversed([module for module in model.modules() if type(module).__name__ in names])


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy whose parameters have no storage. Buffers, such as rotary frequencies, are copied."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)
