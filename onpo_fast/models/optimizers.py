"""The optimizer of a fit: PyTorch's AdamW, or torchao's for bfloat16 weights and for quantised moments."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..config.sections import FitConfig
from ..errors import UserError
from ..sources import quiet
from .policy import Policy

TORCHAO = {"adamw": "_AdamW", "adamw-8bit": "AdamW8bit", "adamw-4bit": "AdamW4bit"}  # --optimizer → class of torchao
PART = ":"  # between the names of an optimizer state and of a tensor of it


def check_optimizer(weights: str, optimizer: str, ranks: int = 1) -> None:
    """Checks values of --weights, "auto" resolved, and --optimizer.

    Args:
        ranks: number of processes that the weights are sharded over.

    Raises:
        UserError: if they need torchao, which is not installed, or do not work together on several ranks.
    """
    if weights == "bf16-sr" and optimizer != "adamw" and ranks > 1:
        raise UserError(
            f"--optimizer {optimizer} with --weights bf16-sr runs on one device only (torchao's step fails on sharded "
            "bfloat16 weights): take --optimizer adamw, or --weights fp32"
        )
    if optimizer != "adamw":
        _torchao_class(optimizer, f"--optimizer {optimizer}")
    elif weights == "bf16-sr":
        _torchao_class(optimizer, "--weights bf16-sr")


def make_optimizer(policy: Policy, config: FitConfig) -> Optimizer:
    """Returns the optimizer of a policy's weights, of those that are not frozen.

    It rounds bfloat16 weights stochastically with torch's global random numbers; seed them for each step with
    ``precision.random_stream``.

    Raises:
        UserError: if it needs torchao, which is not installed.
    """
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    rounds = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    if config.optimizer == "adamw" and not rounds:
        fused = policy.device.type == "cuda"  # fused AdamW avoids temporaries the size of the gradients
        return torch.optim.AdamW(parameters, **options, fused=fused)
    option = "--weights bf16-sr" if config.optimizer == "adamw" else f"--optimizer {config.optimizer}"
    kind = _torchao_class(config.optimizer, option)
    return kind(parameters, **options, bf16_stochastic_round=rounds)


def _torchao_class(optimizer: str, option: str) -> type[Optimizer]:
    """Returns torchao's class for a value of --optimizer; ``option`` is what an error says needs it."""
    try:
        with quiet():
            import torchao.optim
    except ImportError:
        raise UserError(f"{option} needs the package torchao: pip install torchao") from None
    return type("AdamW", (_FloatRates, getattr(torchao.optim, TORCHAO[optimizer])), {})


class _FloatRates:
    """Keeps learning rates as floats, as PyTorch's optimizers do, and as tensors only within a step of torchao's.

    Schedules, metrics and saved states then need not know which optimizer it is. On a CPU the step runs eagerly:
    torchao compiles it for every shape of a weight, which takes minutes there.
    """

    def add_param_group(self, group: dict[str, Any]) -> None:
        rate = group.get("lr", self.defaults["lr"])
        super().add_param_group(group)
        self.param_groups[-1]["lr"] = rate

    def step(self, closure: None = None) -> None:
        rates = [group["lr"] for group in self.param_groups]
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        try:
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
            with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
                super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = rate


def plain_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the optimizer state of a parameter with each quantised tensor as its parts, such as "exp_avg:codes".

    Of a sharded tensor that is quantised, the parts are those of this rank.
    """
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        if is_traceable_wrapper_subclass(local):
            plain |= {f"{name}{PART}{part}": getattr(local, part) for part in local.__tensor_flatten__()[0]}
        else:
            plain[name] = value
    return plain


def joined_tensors(plain: Mapping[str, Tensor], parameter: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer state of a parameter from ``plain_tensors`` of it.

    Raises:
        AttributeError, KeyError, RuntimeError: if it is the state of another parameter or optimizer.
    """
    state = {name: value for name, value in plain.items() if PART not in name}
    for name in {name.partition(PART)[0] for name in plain if PART in name}:
        value = optimizer._new_buffer(parameter, signed=name == "exp_avg")
        local = value.to_local() if isinstance(value, DTensor) else value
        for part in local.__tensor_flatten__()[0]:
            getattr(local, part).copy_(plain[f"{name}{PART}{part}"])
        state[name] = value
    return state
