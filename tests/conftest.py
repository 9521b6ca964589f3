"""Fixtures that tests share: a tiny random model, the real small model, files of JSON lines. Nothing asks a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: the suite asks no hub

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.stopping import pytest_configure, pytest_runtest_protocol  # noqa: F401

collect_ignore = ["support"]  # helpers, not tests

if TYPE_CHECKING:
    from onpo_fast.models.policy import Policy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take more than 15 seconds come first: at the end, one of two processes would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and a tokenizer of bytes with a ChatML template, as a directory."""
    from support.tiny_models import make_model

    directory = tmp_path_factory.mktemp("tiny") / "model"
    make_model(directory)
    return directory


@pytest.fixture(scope="session")
def policy(tiny_model: Path) -> Policy:
    """The tiny model, loaded. Shared: a test that trains it loads its own."""
    from onpo_fast.config import Config
    from onpo_fast.models.loading import load

    return load(tiny_model, Config())


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, for tests in which a real model matters.

    Processes of pytest-xdist share one: its conversion takes 20 s.
    """
    from filelock import FileLock

    from onpo_fast.config import Config
    from onpo_fast.models.loading import load

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder) / "model"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            load("smollm2", Config()).save(folder / "smollm2")
    return folder / "smollm2"


@pytest.fixture(scope="session")
def real_policy(model_directory: Path) -> Policy:
    """SmolLM2-135M-Instruct, loaded. Shared: a test that trains it loads its own."""
    from onpo_fast.config import Config
    from onpo_fast.models.loading import load

    return load(model_directory, Config())


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves plots empty, which take half of the time of a small run, in tests that are not of plots."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write("<svg></svg>"))


@pytest.fixture
def write_lines(tmp_path: Path):
    """Writes records as JSON lines (strings as they are) and returns the path."""

    def write(name: str, *records) -> Path:
        path = tmp_path / name
        lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write
