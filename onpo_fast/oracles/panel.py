"""A weighted panel of oracles, P = Σ weight·P_member: the preference of a population whose members differ.

The mean of transitive preferences need not be transitive, as in Condorcet's paradox.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

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
