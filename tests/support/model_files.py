"""Damage to the files of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edit_template(directory: Path, template: str, **settings: str) -> None:
    """Replaces the chat template, and settings of the tokenizer."""
    path = directory / "tokenizer_config.json"
    record = {**json.loads(path.read_text(encoding="utf-8")), **settings}
    record.pop("chat_template", None)
    path.write_text(json.dumps(record), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def edit_config(directory: Path, **values: object) -> None:
    """Sets values in config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the weights by a function of their dictionary."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
