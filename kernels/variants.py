"""Variants of the exponentials kernel, for benchmarks on a GPU. Without ``using``, the default one runs.

    with using(Variant(epilogue="persistent", stages=3)):
        fused_linear_pair_loss(...)

Results agree within rounding. ``python -m bench sweep`` times the variants; the fastest is to be the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EPILOGUES = ("light", "masked", "persistent")


@dataclass(frozen=True)
class Variant:
    """How the product of hidden states and head is launched. None stands for the value of ``launch.TILES``.

    - "light": one tile a program; targets and padding are masked only in tiles that contain one.
    - "masked": one tile a program; every element is tested for target and padding, and exponentiated with ``exp``.
    - "persistent": as many programs as multiprocessors, each looping over tiles; E is stored in half tiles, so that the
      loads of the next tile overlap with the epilogue of this one.
    """

    epilogue: str = "light"
    rows: int | None = None  # rows of a tile
    columns: int | None = None
    depth: int | None = None  # elements of the summed dimension in one step
    warps: int | None = None
    stages: int | None = None  # stages of the software pipeline
    tile_group: int | None = None  # row tiles that run side by side

    def __post_init__(self) -> None:
        if self.epilogue not in EPILOGUES:
            raise ValueError(f"epilogue must be one of {', '.join(EPILOGUES)}, not {self.epilogue!r}")


_current = Variant()


def current() -> Variant:
    """Return the variant that kernels are launched with now."""
    return _current


@contextmanager
def using(variant: Variant) -> Iterator[None]:
    """Launch kernels inside with ``variant``. Not thread-safe: the choice is global to the process."""
    global _current
    before, _current = _current, variant
    try:
        yield
    finally:
        _current = before
