"""Variants of the kernel that takes hidden states through the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EPILOGUES = ("light", "masked", "persistent")


@dataclass(frozen=True)
class Variant:
    epilogue: str = "light"
    rows: int | None = None  # of a tile of the logits product; None: the table's
    columns: int | None = None
    depth: int | None = None
    warps: int | None = None
    stages: int | None = None
    group: int | None = None  # tiles that run side by side


@contextmanager
def using(variant: Variant) -> Iterator[None]:
    """The launches inside take it."""
    yield
