"""Forms of the logits kernel that a benchmark compares on a GPU. The default one is what everybody gets.

    with using(Variant(epilogue="persistent", stages=3)):
        fused_linear_pair_loss(...)

Results agree within rounding. ``python -m bench sweep`` times them; which is fastest decides the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EPILOGUES = ("light", "masked", "persistent")


@dataclass(frozen=True)
class Variant:
    """How the product of hidden states and head is launched. None: what ``launch.TILES`` has for the device.

    - "light": one tile a program; targets and padding are masked only in tiles that hold one.
    - "masked": one tile a program; every element is tested for target and padding, and exponentiated by ``exp``.
    - "persistent": as many programs as multiprocessors, each looping over tiles; E leaves in half tiles, so that the
      loads of the next tile run beside the epilogue of this one.
    """

    epilogue: str = "light"
    rows: int | None = None  # of a tile
    columns: int | None = None
    depth: int | None = None  # of the dimension that is summed over, a step
    warps: int | None = None
    stages: int | None = None  # of the software pipeline
    group: int | None = None  # row tiles that run side by side

    def __post_init__(self) -> None:
        if self.epilogue not in EPILOGUES:
            raise ValueError(f"epilogue must be one of {', '.join(EPILOGUES)}, not {self.epilogue!r}")


_current = Variant()


def current() -> Variant:
    """The variant of launches from here."""
    return _current


@contextmanager
def using(variant: Variant) -> Iterator[None]:
    """Launches inside take ``variant``. For one thread: the choice is the process's."""
    global _current
    before, _current = _current, variant
    try:
        yield
    finally:
        _current = before
