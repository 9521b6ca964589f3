"""The value of --oracle: names, and mixtures of them."""

from __future__ import annotations

import math

from ..errors import UserError

FORMULAS = ("openings", "population")  # need neither a model nor a server
NAMES = (*FORMULAS, "pair-model", "reward-model", "judge")


def terms(expression: str) -> list[tuple[float | None, str]]:
    """Parses a panel such as "0.7*population+0.3*module:function" into weights and names.

    A weight that is not given is None.

    >>> terms("0.7*population + 0.3*module:function")
    [(0.7, 'population'), (0.3, 'module:function')]
    >>> terms("population")
    [(None, 'population')]

    Raises:
        UserError: if a weight is not positive and finite, or a name is missing.
    """
    members: list[tuple[float | None, str]] = []
    for term in expression.split("+"):
        weight, star, name = term.rpartition("*")
        name = name.strip()
        if not name:
            raise UserError(f"--oracle {expression}: expected WEIGHT*NAME, or several joined by +")
        try:
            value = float(weight) if star else None
        except ValueError:
            raise UserError(f"--oracle {expression}: the weight {weight.strip()!r} is not a number") from None
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--oracle {expression}: a weight must be positive and finite, not {weight.strip()}")
        members.append((value, name))
    return members
