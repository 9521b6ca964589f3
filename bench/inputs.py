"""Saves hidden states and head of a real model on real text: SmolLM2 on the bundled prompts.

    python -m bench inputs FILE

A machine without the model, or without the packages that load it, can then measure on the file (47 MB) with
``python -m bench kernels --inputs FILE``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROWS, TOKENS = 8192, 1024  # the most that the text shapes need


class Unavailable(RuntimeError):
    """The inputs are not available; the message says why."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="NumPy file (.npz) to write, 47 MB.")


def main(options: argparse.Namespace) -> None:
    save(options.file, *text_inputs(ROWS, TOKENS, "cpu"))
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.0f} MB")


def save(path: Path, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Saves (N, H), (V, H) as bfloat16 and (N,), compressed. High bytes are stored apart, since only they compress."""
    planes = {
        f"{name}_{part}": x.bfloat16().view(torch.uint8)[:, byte::2].numpy()
        for name, x in (("hidden", hidden), ("weight", weight))
        for byte, part in enumerate(("low", "high"))
    }
    with open(path, "wb") as file:  # numpy would append .npz to a file name
        np.savez_compressed(file, targets=targets.numpy(), **planes)


def text_inputs(
    rows: int, tokens: int, device: str | torch.device, file: Path | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, H) and head (V, H), fp32, and target tokens (N,), from sequences of ``tokens`` tokens.

    Reads the first N rows of ``file`` if it is given (its sequences may be longer), otherwise runs the model.

    Raises:
        Unavailable: if the file is too small, or the model cannot be loaded.
    """
    if file is None:
        hidden, weight, targets = _from_model(rows, tokens)
        return hidden.to(device), weight.to(device), targets.to(device)
    with np.load(file) as stored:
        hidden, weight = (
            torch.from_numpy(np.stack([stored[f"{name}_low"], stored[f"{name}_high"]], axis=-1))
            .flatten(1)
            .view(torch.bfloat16)
            for name in ("hidden", "weight")
        )
        targets = torch.from_numpy(stored["targets"])
    if len(hidden) < rows:
        raise Unavailable(f"{file} has {len(hidden)} tokens, {rows} are needed")
    return hidden[:rows].to(device).float(), weight.to(device).float(), targets[:rows].to(device)


@torch.no_grad()
def _from_model(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the model on the CPU in fp32, so that the inputs do not depend on the device that is measured."""
    try:
        from onpo_fast.config import Config
        from onpo_fast.data import split_prompts
        from onpo_fast.errors import UserError
        from onpo_fast.models.checkpoint import SMOLLM2
        from onpo_fast.models.heads import head_arguments
        from onpo_fast.models.loading import load
    except ImportError as error:
        raise Unavailable(f"the real model needs a package that is not here: {error}") from None
    try:
        policy = load(SMOLLM2, Config(device="cpu"))
    except (UserError, ImportError) as error:
        raise Unavailable(f"the real model is not here: {error}") from None
    ids: list[int] = []
    while len(ids) < rows + 1:  # repeats the prompts in another order if they are too few
        train, held_out = split_prompts(None, None, 0.0, seed=len(ids))
        text = "\n".join(prompt[-1]["content"] for prompt in [*train, *held_out])
        ids += policy.tokenizer(text + "\n")["input_ids"]
    sequence = torch.tensor(ids)
    hidden = [
        policy.model.base_model(sequence[start : start + tokens][None]).last_hidden_state[0]
        for start in range(0, rows, tokens)
    ]
    return (
        torch.cat(hidden).float(),
        head_arguments(policy.model)["weight"].detach().float(),
        sequence[1 : rows + 1].clone(),
    )
