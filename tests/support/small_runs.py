"""Runs of a second or two, and damage to their files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from onpo_fast.config import Config

SMALL = {
    "prompts_per_iteration": 3,
    "responses_per_prompt": 3,
    "max_new_tokens": 6,
    "eval_samples": 1,
    "batch_pairs": 3,
    "iterations": 2,
    "checkpoint_steps": 1,
    "learning_rate": 1e-3,
    "eval_fraction": 0.4,
    "sampling_batch_size": 3,
    "tokens_per_microbatch": 1024,
}


def prepare(work: Path, model: Path) -> None:
    """Copies the model to "model" in ``work``, and writes ten prompts to "prompts.jsonl"."""
    shutil.copytree(model, work / "model")
    prompts = "".join(json.dumps({"prompt": f"What is {i} plus {i}?"}) + "\n" for i in range(10))
    (work / "prompts.jsonl").write_text(prompts)


def small_run(work: Path, name: str) -> Config:
    """A run of two iterations in ``work``, after ``prepare``."""
    return Config(model=str(work / "model"), prompts=str(work / "prompts.jsonl"), out=str(work / name), **SMALL)


def cut(path: Path) -> None:
    """Removes the second half of a file."""
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def append(path: Path) -> None:
    """Appends half of a record, as a crash leaves it."""
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"time": 1')
