"""Checks of numeric arguments. Each returns the number, or raises a ``ValueError`` that names the argument."""

from __future__ import annotations

import math
import operator
from numbers import Real


def positive(name: str, value: float) -> float:
    """Return a positive, finite number as float."""
    if not (_finite(value) and value > 0):
        raise ValueError(f"{name} must be a positive, finite number, not {value!r}")
    return float(value)


def non_negative(name: str, value: float) -> float:
    """Return a finite number of 0 or more as float."""
    if not (_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number, 0 or more, not {value!r}")
    return float(value)


def whole_number(name: str, value: int, least: int = 1) -> int:
    """Return an integer of at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")
    return number


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
