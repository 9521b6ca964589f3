"""The real small model's hidden states and head, on real text: SmolLM2 reads the bundled prompts, end to end.

    python -m bench inputs FILE

keeps them in a file (47 MB), so that a machine without the model and the packages
that load it can measure on them: ``python -m bench kernels --inputs FILE``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROWS, TOKENS = 8192, 1024  # what the text shapes need at most


class Unavailable(RuntimeError):
    """Inputs that cannot be had here; the message says why."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="NumPy file (.npz) to write, 47 MB.")


def main(options: argparse.Namespace) -> None:
    save(options.file, *text_inputs(ROWS, TOKENS, "cpu"))
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.0f} MB")


def save(path: Path, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """In bfloat16, compressed: (N, H), (V, H), (N,). High bytes apart from low ones: they alone have a pattern."""
    planes = {
        f"{name}_{part}": x.bfloat16().view(torch.uint8)[:, byte::2].numpy()
        for name, x in (("hidden", hidden), ("weight", weight))
        for byte, part in enumerate(("low", "high"))
    }
    with open(path, "wb") as file:  # given a name, numpy would add to it
        np.savez_compressed(file, targets=targets.numpy(), **planes)


def text_inputs(
    rows: int, tokens: int, device: str | torch.device, file: Path | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, H) and head (V, H), fp32, and the N tokens that follow, of sequences of ``tokens`` tokens.

    From ``file`` if given (its sequences are longer, and the first N rows are taken), otherwise from the model itself.

    Raises:
        Unavailable: if neither can be had.
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
    """On the CPU in fp32, wherever the benchmark runs: the inputs owe nothing to what is measured."""
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
    while len(ids) < rows + 1:  # the same prompts again in another order, should they not suffice
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
