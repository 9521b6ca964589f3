"""What the theorems promise for the averaged policy, and what was corrected in them.

D = max_π KL(π ‖ π_1) is ``divergence``; T counts policies, as ``GameTrace`` does. Results are duality gaps.
"""

from __future__ import annotations

import numpy as np


def divergence(init: np.ndarray) -> np.ndarray:
    """D of π_1 (…, n): −log of its least probability, in nats; log n if it is uniform."""
    with np.errstate(divide="ignore"):
        return -np.log(np.min(init, axis=-1))


def tuned_eta(D: float, T: int) -> float:
    """√(D/T): the step of mirror descent for which Theorem 1 holds."""
    return float(np.sqrt(D / T))


def theorem_1(D: float, T: np.ndarray) -> np.ndarray:
    """OMD with η = √(D/T): 4√(D/T). arXiv 2502.16852, Theorem 1."""
    return 4 * np.sqrt(D / T)


def theorem_2(D: float, T: np.ndarray, eta: float = 0.5) -> np.ndarray:
    """ONPO with η ≤ ½: (2/T)(D/η + η), which is what the proof of Theorem 2 shows; (4D + 1)/T at η = ½."""
    return 2 / np.asarray(T) * (D / eta + eta)


def theorem_2_printed(D: float, T: np.ndarray) -> np.ndarray:
    """4√D/T, as Theorem 2 is printed: wrong for D > ¼. One action that beats nine tied ones breaks it at T = 50."""
    return 4 * np.sqrt(D) / np.asarray(T)
