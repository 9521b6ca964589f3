"""Plots of the page. Each is a function of the reported runs of one oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from onpo_fast.reports.page import COLOURS, INK, Plot, new_axes, plot

from .recipe import ARMS
from .results import Run

STYLES = ("-", (0, (4, 1.5)))
LOOK = {arm: (COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS)]) for i, arm in enumerate(ARMS)}  # in every plot


def gap(runs: Sequence[Run]) -> Plot | None:
    """Plots the gap of π_t for each arm: every seed thinly, the median thickly."""
    return _curves(runs, "gap", "duality gap of π_t")


def average_gap(runs: Sequence[Run]) -> Plot | None:
    """Plots the gap of the mean of π_1 … π_t for each arm, in the same way."""
    return _curves(runs, "average_gap", "duality gap of the mean of π_1 … π_t")


def _curves(runs: Sequence[Run], name: str, label: str) -> Plot | None:
    figure, axes = new_axes("t", label, height=3.4)
    said = []
    for arm, own in by_arm(runs).items():
        colour, style = LOOK[arm]
        curves = [getattr(run, name) for run in own]
        for curve in curves:
            axes.plot(_times(curve), curve, color=colour, linestyle=style, linewidth=0.6, alpha=0.35)
        median = np.median(curves, axis=0)
        axes.plot(_times(median), median, color=colour, linestyle=style, linewidth=1.8, label=ARMS[arm].label)
        said.append(f"{ARMS[arm].label}: from {median[0]:.2f} to {median[-1]:.2f}")
    axes.set_ylim(bottom=0)
    return plot(figure, said)


def gap_against_kl(runs: Sequence[Run]) -> Plot | None:
    """Plots the gap of every policy against its KL divergence from π_1, a mark for each policy of each seed."""
    figure, axes = new_axes("KL(π_t ‖ π_1), nats", "duality gap of π_t", height=3.4)
    said = []
    for arm, own in by_arm(runs).items():
        kl = np.concatenate([run.raw["kl_to_initial"] for run in own])
        gaps = np.concatenate([run.gap for run in own])
        axes.plot(kl, gaps, "o", color=LOOK[arm][0], markersize=2.5, alpha=0.6, label=ARMS[arm].label)
        said.append(f"{ARMS[arm].label}: KL up to {kl.max():.2f}")
    axes.set_ylim(bottom=0)
    return plot(figure, said)


def simplex(runs: Sequence[Run]) -> Plot | None:
    """Plots the class shares of π_1, π_2, … in a triangle: of each arm the seed with the median last gap.

    Shares are those of the three classes among responses that have one. None with another number of classes.
    """
    if not runs or len(runs[0].raw["classes"]) != 3:
        return None
    figure, axes = new_axes("", "", height=3.6)
    corners = np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]])
    axes.plot(*corners[[0, 1, 2, 0]].T, color=INK, linewidth=0.8, alpha=0.5)
    said = []
    for arm, own in by_arm(runs).items():
        middle = sorted(own, key=lambda run: run.last(run.gap))[(len(own) - 1) // 2]
        three = middle.shares[:, :3] / np.maximum(middle.shares[:, :3].sum(1, keepdims=True), 1e-9)
        path = three @ corners
        axes.plot(*path.T, color=LOOK[arm][0], linestyle=LOOK[arm][1], linewidth=0.9, label=ARMS[arm].label)
        axes.plot(*path[-1], "o", color=LOOK[arm][0], markersize=4)
        said.append(f"{ARMS[arm].label} ends at " + ", ".join(f"{share:.2f}" for share in three[-1]))
    _name_corners(axes, corners, runs[0].raw["classes"])
    return plot(figure, said)


def _name_corners(axes: Axes, corners: np.ndarray, names: Sequence[str]) -> None:
    for corner, offset, align, name in zip(corners, ((0, -12), (0, -12), (0, 6)), ("left", "right", "center"), names):
        axes.annotate(name, corner, offset, textcoords="offset points", ha=align)
    axes.set(aspect="equal", xlim=(-0.08, 1.08), ylim=(-0.14, 0.98))
    axes.set_axis_off()


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs by their arm, in the order in which arms occur."""
    return {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}


def _times(values: np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)
