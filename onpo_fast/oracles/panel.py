"""A weighted panel of oracles, P = Σ weight·P_member: the preference of a population whose members differ.

The mean of transitive preferences need not be transitive, as in Condorcet's paradox.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .interface import (
    BatchOracle,
    GroupProgress,
    IndexPairs,
    Oracle,
    Progress,
    PromptAndResponses,
    holds_model,
    judge_texts,
    keeps_files,
    take_counters,
)


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


class Panel(BatchOracle):
    """The weighted mean of oracles, asked one after the other: at most one of them has a model in memory.

    Weights are divided by their sum: 7*a+3*b is 0.7*a+0.3*b.
    """

    def __init__(self, members: Sequence[tuple[float, str, Oracle]]) -> None:
        total = math.fsum(weight for weight, _, _ in members)
        self.members = [(weight / total, name, oracle) for weight, name, oracle in members]
        self.holds_model = any(holds_model(oracle) for _, _, oracle in members)
        self.keeps_files = any(keeps_files(oracle) for _, _, oracle in members)

    def compare(
        self,
        groups: Sequence[PromptAndResponses],
        pairs: Sequence[IndexPairs] | None,
        progress: Progress = lambda n: None,
    ) -> list[np.ndarray]:
        count = GroupProgress(progress, len(groups), len(groups) * len(self.members))
        sums = [np.zeros((len(texts), len(texts))) for _, texts in groups]
        for weight, name, oracle in self.members:
            for total, matrix in zip(sums, judge_texts(oracle, groups, f"member {name}", count, 0, pairs)):
                total += weight * matrix
        return [np.clip(total, 0, 1) for total in sums]  # the weights sum to 1 up to rounding

    def take_counters(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for _, _, oracle in self.members:
            total.update(take_counters(oracle))  # the operator + would drop counts of 0
        return dict(total)
