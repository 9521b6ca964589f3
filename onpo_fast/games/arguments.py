"""Numbers that a caller gave, or a ``ValueError`` that names the argument."""

from __future__ import annotations

import math
import operator
from numbers import Real


def positive(name: str, value: float) -> float:
    if not (_finite(value) and value > 0):
        raise ValueError(f"{name} must be a positive, finite number, not {value!r}")
    return float(value)


def at_least_zero(name: str, value: float) -> float:
    if not (_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number, 0 or more, not {value!r}")
    return float(value)


def count(name: str, value: int, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")
    return number


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
