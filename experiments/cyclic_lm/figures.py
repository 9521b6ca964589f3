"""Plots of the page. Each is a function of the reported runs of one oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from onpo_fast.reports.page import COLOURS, INK, Plot, new_axes, plot

from .comparison import by_arm_and_step
from .recipe import ARMS
from .results import Run

STYLES = (("-", "o"), ((0, (4, 1.5)), "s"), ((0, (1, 1)), "^"), ((0, (6, 1, 1, 1)), "D"), ((0, (2, 2, 6, 2)), "v"))


@dataclass(frozen=True)
class Group:
    """The runs of an arm with one step, and how they look: the arm has a colour, the step a dash and a mark."""

    label: str
    colour: str
    dash: str | tuple
    mark: str
    runs: list[Run]


def groups(runs: Sequence[Run]) -> list[Group]:
    """Groups runs by arm and step. Labels name the step where an arm has several."""
    found, together = [], by_arm_and_step(runs)
    for arm, eta in together:
        i, etas = list(ARMS).index(arm), sorted(other for name, other in together if name == arm)
        label = ARMS[arm].label + (f", η = {eta:g}" if len(etas) > 1 else "")
        dash, mark = STYLES[(i // len(COLOURS) + etas.index(eta)) % len(STYLES)]
        found.append(Group(label, COLOURS[i % len(COLOURS)], dash, mark, together[arm, eta]))
    return found


def gap(runs: Sequence[Run]) -> Plot | None:
    """Plots the gap of π_t for each arm: every seed thinly, the median thickly."""
    return _curves(runs, "gap", "gap of π_t")


def average_gap(runs: Sequence[Run]) -> Plot | None:
    """Plots the gap of the mean of π_1 … π_t for each arm, in the same way."""
    return _curves(runs, "average_gap", "gap of the mean of π_1 … π_t")


def _curves(runs: Sequence[Run], name: str, label: str) -> Plot | None:
    figure, axes = new_axes("t", label, height=3.4)
    said = []
    for group in groups(runs):
        look = {"color": group.colour, "linestyle": group.dash}
        curves = [getattr(run, name) for run in group.runs]
        for curve in curves:
            axes.plot(_times(curve), curve, linewidth=0.6, alpha=0.35, **look)
        median = np.median(curves, axis=0)
        axes.plot(_times(median), median, linewidth=1.8, label=group.label, **look)
        said.append(f"{group.label}: from {median[0]:.2f} to {median[-1]:.2f}")
    axes.set_ylim(bottom=0)
    return plot(figure, said)


def gap_against_kl(runs: Sequence[Run]) -> Plot | None:
    """Plots the gap of every policy against its KL divergence from π_1, a mark for each policy of each seed."""
    figure, axes = new_axes("KL(π_t ‖ π_1), nats", "gap of π_t", height=3.4)
    said = []
    for group in groups(runs):
        kl = np.concatenate([run.raw["kl_to_initial"] for run in group.runs])
        gaps = np.concatenate([run.gap for run in group.runs])
        axes.plot(kl, gaps, group.mark, color=group.colour, markersize=2.5, alpha=0.6, label=group.label)
        said.append(f"{group.label}: KL up to {kl.max():.2f}")
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
    for group in groups(runs):
        middle = sorted(group.runs, key=lambda run: run.last(run.gap))[(len(group.runs) - 1) // 2]
        three = middle.shares[:, :3] / np.maximum(middle.shares[:, :3].sum(1, keepdims=True), 1e-9)
        path = three @ corners
        axes.plot(*path.T, color=group.colour, linestyle=group.dash, linewidth=0.9, label=group.label)
        axes.plot(*path[-1], group.mark, color=group.colour, markersize=4)
        said.append(f"{group.label} ends at " + ", ".join(f"{share:.2f}" for share in three[-1]))
    _name_corners(axes, corners, runs[0].raw["classes"])
    return plot(figure, said)


def _name_corners(axes: Axes, corners: np.ndarray, names: Sequence[str]) -> None:
    for corner, offset, align, name in zip(corners, ((0, -12), (0, -12), (0, 6)), ("left", "right", "center"), names):
        axes.annotate(name, corner, offset, textcoords="offset points", ha=align)
    axes.set(aspect="equal", xlim=(-0.08, 1.08), ylim=(-0.14, 0.98))
    axes.set_axis_off()


def _times(values: np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)
