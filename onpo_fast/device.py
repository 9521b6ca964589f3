"""The device of a run, and copies to it."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .errors import UserError


def device_of(name: str, option: str = "device") -> torch.device:
    """Returns the device of this name; "auto" is a GPU if there is one.

    Args:
        name: the value of an option.
        option: name of the option, for messages.

    Raises:
        UserError: if there is no such device, or torch cannot compute on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--{option} {name} is not a device; try auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--{option} {name}: no GPU is available to torch here")
    try:
        torch.ones(1, dtype=torch.float64, device=device).item()  # sums of log-probs are float64 everywhere
    except Exception as error:  # devices raise their own types
        reason = re.split(r"\n|\. ", str(error))[0]
        raise UserError(f"--{option} {name}: torch cannot compute there ({reason}); try auto, cpu or cuda") from None
    return device


def same_device(one: torch.device, other: torch.device) -> bool:
    """Returns whether two devices are the same; "cuda" is the current GPU."""

    def index(device: torch.device) -> int:
        current = torch.cuda.current_device() if device.type == "cuda" else 0
        return current if device.index is None else device.index

    return one.type == other.type and index(one) == index(other)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device. To a GPU the copy goes through pinned memory, without a host synchronisation."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
