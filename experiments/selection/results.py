"""Results of both games: the error of the last step against the labels that it took."""

from __future__ import annotations

from dataclasses import dataclass

ALL = "all pairs"


@dataclass(frozen=True)
class Result:
    """A step with one selection.

    Attributes:
        seed: of the run.
        selection: a name of ``SELECTIONS``, or ``ALL``.
        draws: N, an iteration.
        labels: different pairs that the oracle was asked about.
        error: of the fitted step: total variation from the exact one (neural), or the root mean square over classes of
            the error of their logarithms' movement, nats (language).
    """

    seed: int
    selection: str
    draws: int
    labels: int
    error: float
