"""Win rates between policies: their intervals, the duality gap among the policies, and what a terminal shows."""

from __future__ import annotations

import numpy as np
from rich.table import Table
from scipy import stats

CONFIDENCE = 0.95


def restricted_gap(win_rate: np.ndarray) -> np.ndarray:
    """(M, M) win rates of rows over columns -> (M,): max_s J(s, t) − min_s J(t, s), at least 0 as J(t, t) = ½."""
    return win_rate.max(0) - win_rate.min(1)


def summary(result: dict) -> str:
    """One sentence: the last policy against the first."""
    rate, (low, high) = result["win_rate"][-1][0], result["interval"][-1][0]
    prompts = f"{result['prompts']} held-out prompt" + "s" * (result["prompts"] != 1)
    return (
        f"{result['policies'][-1]} wins against π_1 in {rate:.1%} of comparisons on {prompts} under the oracle "
        f"{result['oracle']} ({CONFIDENCE:.0%} interval {low:.1%} to {high:.1%})"
    )


def win_rate_table(result: dict) -> Table:
    """The win rates of rows against columns, for a terminal."""
    table = Table("row against column", *result["policies"], title="Win rates on held-out prompts")
    rows = list(zip(result["policies"], result["win_rate"]))
    if chosen := result.get("best_of_nash"):
        rows.append((f"best of Nash, N = {chosen['samples']}", chosen["win_rate"]))
    for name, row in rows:
        table.add_row(name, *(f"{rate:.3f}" for rate in row))
    return table


def win_rates(matrix: np.ndarray, policies: int) -> np.ndarray:
    """The win rates of policies on a prompt, each the mean over pairs of their responses.

    Args:
        matrix: (M·S, M·S) P(y_i ≻ y_j) of S responses of each of M policies, policy by policy.
        policies: M.

    Returns:
        (M, M) win rates of rows over columns, ½ on the diagonal by symmetry.
    """
    samples = len(matrix) // policies
    return matrix.reshape(policies, samples, policies, samples).mean(axis=(1, 3))


def student_intervals(wins: np.ndarray) -> np.ndarray:
    """(prompts, …) -> (…, 2): Student's t over prompts and two imagined ones, a win and a loss.

    The two are what Agresti and Coull add to a proportion: with few prompts that all agree, the spread among them
    would claim a certainty that they cannot give.
    """
    zeros, ones = np.zeros_like(wins[:1]), np.ones_like(wins[:1])
    widened = np.concatenate([wins, zeros, ones])
    count = len(widened)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * widened.std(0, ddof=1) / np.sqrt(count)
    return np.clip(np.stack([widened.mean(0) - half, widened.mean(0) + half], axis=-1), 0, 1)


def intervals(wins: np.ndarray) -> np.ndarray:
    """(prompts, M, M) -> (M, M, 2): those of ``student_intervals``. A policy against itself is ½ exactly."""
    found = student_intervals(wins)
    found[np.diag_indices(wins.shape[1])] = 0.5
    return found
