"""Shared by the tests: the real small model, converted once, and no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: the suite asks no hub

import json
from pathlib import Path

import pytest

from onpo_fast.config import Config
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("model") / "smollm2"
    load("smollm2", Config()).save(directory)
    return directory


@pytest.fixture(scope="session")
def policy(model_directory) -> Policy:
    """The real small model. Shared: tests that train it load their own."""
    return load(model_directory, Config())


@pytest.fixture
def write_lines(tmp_path):
    """Writes records as JSON lines (strings as they are) and returns the path."""

    def write(name: str, *records) -> Path:
        path = tmp_path / name
        lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def shallow_model(model_directory, tmp_path_factory) -> Path:
    """The same model cut to its first two layers: real tokenizer, template and weights, in a tenth of the time."""
    directory = tmp_path_factory.mktemp("shallow") / "model"
    whole = load(model_directory, Config())
    whole.model.model.layers = whole.model.model.layers[:2]
    whole.model.config.num_hidden_layers = 2
    whole.model.config.layer_types = None
    whole.save(directory)
    return directory
