"""The precision of a policy's weights: the choice of --weights auto, conversion, and stochastic rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..config.sections import FitConfig, ModelConfig
from ..device import device_of

# Below it the forward pass in bfloat16 does not see a fit of float32 weights, and rounding to nearest bfloat16 removes
# the fit from what is saved (docs/tuning.md).
SMALL_LEARNING_RATE = 1e-5
# bytes a parameter with float32 weights: 4 of the weights, 4 of gradients, and two moments by --optimizer
FP32_STATE_BYTES = {"adamw": 16, "adamw-8bit": 10, "adamw-4bit": 9}
HALF = (torch.bfloat16, torch.float16)


def choose_weights(
    model: ModelConfig, fit: FitConfig, parameters: Callable[[], int], ranks: int = 1, memory: int | None = None
) -> tuple[str, str]:
    """Resolves --weights auto.

    Args:
        parameters: counts the parameters of the model; called only if the choice depends on it.
        ranks: that share weights, gradients and states.
        memory: bytes of a GPU to choose for, whatever device there is; None: --device and its own memory.

    Returns:
        "fp32" or "bf16-sr", and the reason in words.
    """
    if memory is None:
        device = device_of(model.device)
        if device.type != "cuda":
            return "fp32", f"the device is {device.type}"
        memory = torch.cuda.get_device_properties(device).total_memory
    if model.dtype == "float32":
        return "fp32", "--dtype is float32"
    if model.lora_rank is not None:
        return "bf16-sr", "the base is frozen, and its adapters are float32"
    if fit.learning_rate < SMALL_LEARNING_RATE:
        return "bf16-sr", (
            f"a bfloat16 forward pass does not see float32 weights change at a learning rate of {fit.learning_rate:g}"
        )
    needed = FP32_STATE_BYTES[fit.optimizer] * parameters() // ranks
    if needed > memory:
        return "bf16-sr", (
            f"float32 weights, gradients and optimizer states take {needed / 2**30:.0f} GiB"
            f"{' on each rank' if ranks > 1 else ''}, and the device has {memory / 2**30:.0f} GiB"
        )
    return "fp32", f"the learning rate is {fit.learning_rate:g}, and {needed / 2**30:.0f} GiB of states fit the device"


def weights_dtype(weights: str) -> torch.dtype:
    """Returns the dtype of a value of --weights; float32 for "auto", which a run that trains has resolved before."""
    return torch.bfloat16 if weights == "bf16-sr" else torch.float32


def convert_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Converts the floating-point parameters in place. Buffers, such as rotary frequencies, keep their dtype."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Converts weights within the block, and back at its end: to the same bits if ``dtype`` can hold their values.

    Args:
        dtype: float32, to which weights and buffers in half precision are converted, or a half precision, to which
            float32 weights are.
    """
    if dtype == torch.float32:
        tensors = [one for one in itertools.chain(model.parameters(), model.buffers()) if one.dtype in HALF]
    else:
        tensors = [one for one in model.parameters() if one.dtype == torch.float32]
    dtypes = [one.dtype for one in tensors]
    try:
        for one in tensors:
            one.data = one.data.to(dtype)
        yield
    finally:
        for one, before in zip(tensors, dtypes):
            one.data = one.data.to(before)


@torch.no_grad()
def round_to_bfloat16(model: nn.Module, seed: Sequence[int]) -> None:
    """Rounds float32 weights in place to values of bfloat16, stochastically: up or down, keeping the mean.

    They stay float32. Rounding to nearest would undo every change of less than half the spacing of bfloat16.

    Args:
        seed: of the random numbers.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in model.parameters():
        if parameter.dtype != torch.float32:
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(stream_seed(seed))
        # the upper 16 bits of a float32 are a bfloat16; the carry out of the lower 16 rounds away from zero
        bits = parameter.data.view(torch.int32)
        noise = torch.randint(
            0, 1 << 16, bits.shape, generator=generators[parameter.device], dtype=torch.int32, device=bits.device
        )
        bits.add_(noise).bitwise_and_(-(1 << 16))


@contextmanager
def random_stream(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """Seeds torch's global random numbers within the block; they continue afterwards as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(stream_seed(seed))  # torch.manual_seed would seed all GPUs
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(stream_seed(seed))
        yield


def stream_seed(seed: Sequence[int]) -> int:
    """Returns a hash of non-negative integers, to seed a generator of torch with."""
    return int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> np.uint64(1))
