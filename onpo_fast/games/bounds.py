"""Bounds on the duality gap of the averaged policy, from the theorems of arXiv 2502.16852, with one correction.

D = max_π KL(π ‖ π_1) is ``divergence``; T is the number of policies, as in ``GameTrace``.
"""

from __future__ import annotations

import numpy as np


def divergence(init: np.ndarray) -> np.ndarray:
    """Return D for π_1, (…, n): −log of its least probability, in nats, which is log n if π_1 is uniform."""
    with np.errstate(divide="ignore"):
        return -np.log(np.min(init, axis=-1))


def tuned_eta(D: float, T: int) -> float:
    """Return √(D/T), the step of mirror descent for which Theorem 1 holds."""
    return float(np.sqrt(D / T))


def theorem_1(D: float, T: np.ndarray) -> np.ndarray:
    """Return 4√(D/T), the bound for OMD with η = √(D/T) (Theorem 1)."""
    return 4 * np.sqrt(D / T)


def theorem_2(D: float, T: np.ndarray, eta: float = 0.5) -> np.ndarray:
    """Return (2/T)(D/η + η), the bound for ONPO with η ≤ ½ that the proof of Theorem 2 gives: (4D + 1)/T at η = ½.

    The constant printed in Theorem 2, 4√D/T, is wrong for D > ¼: one action that beats nine tied ones exceeds it.
    """
    return 2 / np.asarray(T) * (D / eta + eta)
