"""Plots of the lab's results. Each is a function of an experiment's results, as its JSON file holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..reports.page import COLOURS, INK, Plot, new_axes, plot

Results = dict[str, Any]

ORDER = (
    "onpo",
    "omd",
    "inpo",
    "iterative_dpo",
    "sppo",
    "egpo",
    "nash_md",
    "online_ipo",
    "ipo",
    "dpo",
    "branches",
    "onpo_direct",
    "onpo_from_policy",
    "omd_two_fits",
    "onpo_direct_from_policy",
)
# colour and line style of a method, the same in every plot
LOOK = {name: (COLOURS[i % 7], ("-", (0, (4, 1.5)), (0, (1, 1.5)))[i // 7]) for i, name in enumerate(ORDER)}
SMALLEST_DRAWN_GAP = 1e-14  # smaller ones are rounding errors, and drawn at this height
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def label(name: str) -> str:
    """Return an algorithm's name as it is written: nash_md → Nash-MD."""
    known = {
        "onpo_direct": "ONPO, direct",
        "onpo_from_policy": "ONPO, from π_t",
        "onpo_direct_from_policy": "ONPO, direct, from π_t",
        "omd_two_fits": "OMD, two fits",
        "nash_md": "Nash-MD",
        "online_ipo": "online IPO",
        "iterative_dpo": "iterative DPO",
        "branches": "ONPO, branches compared",
    }
    return known.get(name, name.upper())


def average_gap(results: Results) -> Plot | None:
    """Plot the gap of the averaged policies against T, on logarithmic axes, with the bounds of the theorems."""
    figure, axes = new_axes("T, policies", "duality gap of their average", height=3.4)
    said = _curves(axes, results["T"], results["algorithms"], "average_gap", "slope")
    tuned = results["omd_tuned"]
    axes.plot(
        tuned["T"],
        tuned["average"]["median"],
        "s",
        color=LOOK["omd"][0],
        markersize=3.5,
        markerfacecolor="none",
        label="OMD, η tuned to T",
    )
    if tuned["slope"] is not None:
        said.append(f"OMD tuned to each T: slope {tuned['slope']:.2f}")
    if results["theorem_2"]:
        axes.plot(
            results["T"], results["theorem_2"], ":", color=LOOK["onpo"][0], linewidth=1, label="Theorem 2, corrected"
        )
    axes.plot(tuned["T"], tuned["theorem_1"], ":", color=LOOK["omd"][0], linewidth=1, label="Theorem 1")
    _logarithmic(axes, "xy")
    return plot(figure, said)


def last_gap(results: Results) -> Plot | None:
    """Plot the gap of π_t."""
    return _methods(results, "algorithms", "last_gap", "t", "duality gap of π_t")


def regularised_gap(results: Results) -> Plot | None:
    """Plot the regularised gap of π_t."""
    return _methods(results, "algorithms", "last_regularised_gap", "t", "regularised duality gap of π_t")


def cycling(results: Results) -> Plot | None:
    """Plot the gap of π_t on rock-paper-scissors; on a semi-logarithmic axis linear convergence is a straight line."""
    figure, axes = new_axes("t", "duality gap of π_t", height=3.4)
    said = []
    for run, style in zip(results["cycling"], 2 * ((0, (1, 1.5)), (0, (4, 1.5)), "-")):
        gap = np.maximum(run["gap"], SMALLEST_DRAWN_GAP)
        name = f"{label(run['algorithm'])}, η = {run['eta']:g}"
        axes.plot(run["t"], gap, color=LOOK[run["algorithm"]][0], linestyle=style, linewidth=1.3, label=name)
        said.append(f"{name}: {run['at_1000']:.2g} at t = 1000")
    _logarithmic(axes, "y")
    return plot(figure, said)


def hard(results: Results) -> Plot | None:
    """Plot the gaps on ``hard_game`` against t·δ: the last policy comes back to a large gap at a round of order 1/δ."""
    figure, axes = new_axes("t·δ", "duality gap", height=3.4)
    said = []
    for game, style in zip(results["hard"]["games"], ((0, (1, 1.5)), (0, (4, 1.5)), "-")):
        time, name = np.array(game["t"]) * game["delta"], f"δ = {game['delta']:g}"
        axes.plot(
            time, game["last_gap"], color=LOOK["onpo"][0], linestyle=style, linewidth=1.3, label=f"ONPO, π_t, {name}"
        )
        said.append(f"{name}: above {results['hard']['large_gap']:g} again from t = {game['from']:,} to {game['to']:,}")
    axes.plot(time, game["omd_last_gap"], color=LOOK["omd"][0], linewidth=1, label=f"OMD, π_t, {name}")
    axes.plot(time, game["average_gap"], color=INK, linewidth=1.3, label=f"ONPO, average, {name}")
    _logarithmic(axes, "y")
    return plot(figure, said)


def simplex(results: Results) -> Plot | None:
    """Plot the paths of π_1, π_2, … in the triangle of policies over three actions."""
    figure, axes = new_axes("", "", height=3.4)
    corners = np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]])
    axes.plot(*corners[[0, 1, 2, 0]].T, color=INK, linewidth=0.8, alpha=0.5)
    said = []
    for name, policies in results["simplex"]["policies"].items():
        path = np.array(policies) @ corners
        axes.plot(*path.T, color=LOOK[name][0], linewidth=0.9, label=label(name))
        axes.plot(*path[-1], "o", color=LOOK[name][0], markersize=4)
        said.append(f"{label(name)} ends at " + ", ".join(f"{p:.2f}" for p in policies[-1]))
    nash = np.array(results["simplex"]["nash"]) @ corners
    axes.plot(*nash, "*", color=INK, markersize=9, label="Nash policy")
    for corner, offset, name in zip(corners, ((0, -10), (0, -10), (0, 5)), "123"):
        axes.annotate(f"action {name}", corner, offset, textcoords="offset points", ha="center")
    axes.set(aspect="equal", xlim=(-0.12, 1.12), ylim=(-0.12, 0.98))
    axes.set_axis_off()
    return plot(figure, said)


def transformer_gap(results: Results) -> Plot | None:
    """Plot the gap of π_t in the neural game, with that of exact updates."""
    figure, axes = new_axes("t", "duality gap of π_t", height=3.4)
    t, said = np.arange(1, results["iterations"] + 2), []
    for name, run in results["objectives"].items():
        colour, style = LOOK[name]
        _band(axes, t, run["gap"], color=colour, linestyle=style, label=label(name))
        if run["ideal_gap"]:
            axes.plot(t, np.maximum(run["ideal_gap"]["median"], SMALLEST_DRAWN_GAP), ":", color=colour, linewidth=1)
        said.append(f"{label(name)}: from {run['gap']['median'][0]:.2g} to {run['gap']['median'][-1]:.2g}")
    axes.plot([], [], ":", color=INK, linewidth=1, label="exact updates")
    _logarithmic(axes, "y")
    axes.set_ylim(bottom=1e-3)
    return plot(figure, said)


def transformer_distance(results: Results) -> Plot | None:
    """Plot the distance of each fitted policy from the exact minimiser."""
    figure, axes = new_axes("t", "total variation from the closed form", height=3.4)
    t, said = np.arange(2, results["iterations"] + 2), []
    for name, run in results["objectives"].items():
        if run["distance"]:
            colour, style = LOOK[name]
            _band(axes, t, run["distance"], color=colour, linestyle=style, label=label(name))
            said.append(f"{label(name)}: at most {run['worst_distance']:.3f}")
    axes.axhline(0.02, color=INK, linestyle="--", linewidth=0.9)
    axes.set_ylim(bottom=0)
    return plot(figure, said)


def turns_average(results: Results) -> Plot | None:
    """Plot the gap of the averaged policies with several turns."""
    return _methods(results, "curves", "average_gap", "T, policies", "duality gap of their average")


def turns_last(results: Results) -> Plot | None:
    """Plot the gap of π_t with several turns."""
    return _methods(results, "curves", "last_gap", "t", "duality gap of π_t")


def sampling_error(results: Results) -> Plot | None:
    """Plot the error of the sampled target; None if it is 0 throughout, as where all final states tie."""
    figure, axes = new_axes("samples a state", "error of Q, probability", height=3.4)
    samples, errors = np.array(results["samples"]), np.array(results["sampling_error"])
    if not errors.all():
        return None
    axes.plot(samples, errors, "o-", color=LOOK["onpo"][0], markersize=4, linewidth=1.3, label="three-sample target")
    axes.plot(samples, errors[0] * (samples / samples[0]) ** -0.5, ":", color=INK, linewidth=1, label="1/√samples")
    _logarithmic(axes, "xy")
    return plot(figure, [f"{n:,} samples: {error:.2g}" for n, error in zip(samples, errors)])


FIGURES: dict[str, list[Callable[[Results], Plot | None]]] = {
    "matrix": [average_gap, last_gap, regularised_gap, cycling, simplex, hard],
    "neural": [transformer_gap, transformer_distance],
    "multiturn": [turns_average, turns_last, sampling_error],
}


def _methods(results: Results, runs: str, name: str, x: str, y: str) -> Plot | None:
    """Plot one of the curves of every method, on logarithmic axes."""
    figure, axes = new_axes(x, y, height=3.4)
    said = _curves(axes, results["T"], results[runs], name)
    _logarithmic(axes, "xy")
    return plot(figure, said)


def _curves(axes: Axes, t: list[int], runs: Results, name: str, also: str | None = None) -> list[str]:
    """Draw each method's median over games with its quartiles, and return captions with the last values."""
    said = []
    for method in sorted(runs, key=ORDER.index):
        run = runs[method]
        if name in run:
            colour, style = LOOK[method]
            _band(axes, t, run[name], color=colour, linestyle=style, label=label(method))
            slope = f", slope {run[also]:.2f}" if also and run[also] is not None else ""
            said.append(f"{label(method)}: {run[name]['median'][-1]:.2g} at {t[-1]:,}{slope}")
    return said


def _logarithmic(axes: Axes, which: str) -> None:
    """Make axes logarithmic, with labels such as 10⁻³ in plain text, since the page's SVG has no math text."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: "10" + f"{np.log10(value):.0f}".translate(SUPERSCRIPTS))
        )
        axis.set_minor_locator(NullLocator())


def _band(axes: Axes, t: Any, curve: Results, **look: Any) -> None:
    """Draw the median of a curve, and the range between its quartiles."""
    low, median, high = (np.maximum(curve[name], SMALLEST_DRAWN_GAP) for name in ("low", "median", "high"))
    axes.plot(t, median, linewidth=1.3, **look)
    axes.fill_between(t, low, high, color=look["color"], alpha=0.12, linewidth=0)
