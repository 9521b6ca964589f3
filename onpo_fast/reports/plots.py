"""The plots of a run.

Each function draws one plot on the given axes and returns its values in words, for readers who cannot see it. An empty
list means that the run has no values for the plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from .formatting import duration, percent, policy_symbol
from .page import COLOURS, INK, Plot, new_axes, plot
from .reading import STAGES
from .run_data import RunData

STAGE_COLOURS = dict(zip(STAGES, COLOURS))  # the same in every plot
MAX_POINTS = 200  # of one fit: more enlarge the file and make the line no clearer
MAX_POINTS_OF_ALL_FITS = 4000
HEIGHTS = {"stage_seconds": 3.0, "peak_memory": 3.0, "throughput": 3.0}  # inches, other than the default

Draw = Callable[[RunData, Axes], list[str]]


def draw_all(run: RunData) -> dict[str, Plot | None]:
    """All plots of a run as inline SVG, by name; None for a plot without values."""
    return {draw.__name__: _draw_alone(run, draw) for draw in PLOTS}


def _draw_alone(run: RunData, draw: Draw) -> Plot | None:
    height = 1 + 0.36 * min(len(run.shown_policies), 8) if draw is win_rates else HEIGHTS.get(draw.__name__, 2.6)
    figure, axes = new_axes("", "", height=height)
    return plot(figure, draw(run, axes))


# --- Did it work? -----------------------------------------------------------------------------------------------------


def win_rates(run: RunData, axes: Axes) -> list[str]:
    shown = run.shown_policies
    if len(shown) < 2:
        return []
    rates = np.array(run.evaluation["win_rate"])[np.ix_(shown, shown)]
    names = [policy_symbol(run.evaluation["policies"][index]) for index in shown]
    axes.pcolormesh(rates, cmap="PuOr", vmin=0, vmax=1)  # pale at ½; readable with colour blindness
    for (row, column), rate in np.ndenumerate(rates if len(names) <= 10 else np.empty((0, 0))):
        colour = "white" if abs(rate - 0.5) > 0.35 else "black"
        axes.text(column + 0.5, row + 0.5, f"{100 * rate:.0f} %", ha="center", va="center", color=colour)
    ticks = np.arange(len(names)) + 0.5
    axes.set(xlabel="the policy that it is compared with", ylabel="policy")
    axes.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names, ylim=(len(names), 0))
    axes.grid(visible=False)
    return [f"{names[-1]} against {name}: {percent(rate)}" for name, rate in zip(names[:-1], rates[-1])]


def duality_gap(run: RunData, axes: Axes) -> list[str]:
    policies, gap = run.evaluation.get("policies", []), run.evaluation.get("duality_gap", [])
    gaps = {policy_symbol(policies[index]): gap[index] for index in run.shown_policies}
    axes.set(xlabel="policy", ylabel="restricted duality gap")
    axes.bar(list(gaps), list(gaps.values()), color=COLOURS[0], width=0.6)
    return [f"{name}: {gap:.3g}" for name, gap in gaps.items()]


# --- Is it healthy? ---------------------------------------------------------------------------------------------------


def loss(run: RunData, axes: Axes) -> list[str]:
    _fit_axes(run, axes, "normalised loss")
    values = _draw_fits(axes, run, "loss_normalised")
    untrained = run.column("pair", "untrained_loss")
    for fit in run.shown_fits if values else ():
        if (value := untrained.get(fit.iteration)) is not None:
            steps = (fit.steps_before + 0.5, fit.steps_before + fit.rows[-1]["step"] + 0.5)
            axes.plot(steps, (value, value), color=INK, linestyle="--", linewidth=0.9, label="untrained")
    values += [f"iteration {t}, untrained: {value:.3g}" for t, value in untrained.items() if value is not None]
    for fit in run.shown_fits:
        if skipped := fit.skipped_steps:
            steps = fit.steps_before + np.array(skipped)[:: math.ceil(len(skipped) / MAX_POINTS)]
            axes.plot(steps, 0 * steps, "x", color=INK, markersize=5, clip_on=False, label="skipped steps")
            values.append(f"iteration {fit.iteration}, {fit.name}: {len(skipped)} steps skipped")
    axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
    return values


def margin(run: RunData, axes: Axes) -> list[str]:
    _fit_axes(run, axes, "nats")
    values = _draw_fits(axes, run, "margin")
    return values + _draw_fits(axes, run, "target", "target", color=INK, linestyle="--", linewidth=0.9)


def pair_accuracy(run: RunData, axes: Axes) -> list[str]:
    _fit_axes(run, axes, "share of pairs")
    axes.axhline(0.5, color=INK, linestyle="--", linewidth=0.9)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    return _draw_fits(axes, run, "pair_accuracy")


def log_ratios(run: RunData, axes: Axes) -> list[str]:
    _fit_axes(run, axes, "nats")
    values = _draw_fits(axes, run, "log_ratio_winner", "preferred", color=COLOURS[2])
    return values + _draw_fits(axes, run, "log_ratio_loser", "other", color=COLOURS[3])


def gradient_norm(run: RunData, axes: Axes) -> list[str]:
    _fit_axes(run, axes, "gradient norm")
    return _draw_fits(axes, run, "gradient_norm", reduce=np.max)  # a mean would hide a spike


def divergence(run: RunData, axes: Axes) -> list[str]:
    axes.set(xlabel="t of the policy π_t", ylabel="nats a response")
    initial, anchor = run.column("iteration", "kl_to_initial"), run.column("iteration", "kl_to_anchor")
    series = {"to π₁": initial, "to the anchor": anchor, f"to π₁, {_held_out(run)}": run.evaluated("kl_to_initial")}
    return _draw_iterations(axes, series)


def response_length(run: RunData, axes: Axes) -> list[str]:
    axes.set(xlabel="t of the policy π_t", ylabel="tokens a response")
    training, held_out = run.column("sample", "response_tokens_mean"), run.evaluated("response_tokens_mean")
    sampled = "training, first turn" if run.turns else "training"
    return _draw_iterations(axes, {sampled: training, _held_out(run): held_out})


def _held_out(run: RunData) -> str:
    """The name of a line of the evaluation, whose responses are whole conversations where a run has several turns."""
    return "held out, whole conversations" if run.turns else "held out"


def shares(run: RunData, axes: Axes) -> list[str]:
    axes.set(xlabel="iteration", ylabel="share")
    cyclic, cut = run.column("judge", "cyclic_triples"), run.column("sample", "stopped_by_length")
    values = _draw_iterations(axes, {"cyclic triples": cyclic, "responses cut off": cut})
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    return values


# --- Where did the time go? -------------------------------------------------------------------------------------------


def stage_seconds(run: RunData, axes: Axes) -> list[str]:
    axes.set(xlabel="iteration", ylabel="seconds")
    rows = run.seconds
    stages = dict.fromkeys(stage for row in rows.values() for stage in row)
    heights = {stage: np.array([row.get(stage, 0.0) for row in rows.values()]) for stage in stages}
    bottom = 0.0
    for stage, height in heights.items():
        axes.bar(list(rows), height, bottom=bottom, width=0.6, color=STAGE_COLOURS.get(stage), label=stage)
        bottom = bottom + height
    if rows:
        _iteration_axis(axes, rows)
    return [f"{stage}: {duration(height.sum())}" for stage, height in heights.items()]


def peak_memory(run: RunData, axes: Axes) -> list[str]:
    axes.set(xlabel="iteration", ylabel="GiB")
    return _draw_iterations(axes, run.by_stage("peak_memory_bytes", lambda some: max(some) / 2**30))


def throughput(run: RunData, axes: Axes) -> list[str]:
    axes.set(xlabel="iteration", ylabel="tokens a second")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return _draw_iterations(axes, run.by_stage("tokens_per_second", np.median))


PLOTS: list[Draw] = [
    *(win_rates, duality_gap),
    *(loss, margin, pair_accuracy, log_ratios, gradient_norm, divergence, response_length, shares),
    *(stage_seconds, peak_memory, throughput),
]


# --- Shared by the plots ----------------------------------------------------------------------------------------------


def _fit_axes(run: RunData, axes: Axes, y: str) -> None:
    """Set up axes for all fits side by side, with a line where an iteration starts."""
    axes.set(xlabel="fit step, all fits in a row", ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's power of ten would overlap the names of the iterations
    fits = run.shown_fits
    if fits:
        axes.set_xlim(0.5, fits[-1].steps_before + fits[-1].rows[-1]["step"] + 0.5)
    starts = {fit.iteration: fit.steps_before for fit in reversed(fits)}
    for number, (iteration, start) in enumerate(sorted(starts.items()), 1):
        axes.axvline(start + 0.5, color=INK, alpha=0.4, linewidth=0.7)
        if number % math.ceil(len(starts) / 8) == 0:
            axes.annotate(f" it. {iteration}", (start + 0.5, 1), xycoords=("data", "axes fraction"), va="bottom")


def _draw_fits(
    axes: Axes, run: RunData, column: str, label: str = "", reduce: Any = np.mean, **style: Any
) -> list[str]:
    """Draw one field of the fits by step; a long fit is reduced to means (or ``reduce``) of neighbouring steps.

    Without a label, a line has the name and the colour of its fit. Returns, for each label, the first and the last
    value of its last fit in words.
    """
    values_in_words = {}
    most = max(2, min(MAX_POINTS, MAX_POINTS_OF_ALL_FITS // max(1, len(run.shown_fits))))
    for fit in run.shown_fits:
        steps, values = (np.array([row.get(name) for row in fit.rows], dtype=float) for name in ("step", column))
        known, name = np.isfinite(values), label or fit.name  # None is NaN here
        steps, values = steps[known], values[known]
        if len(values):
            parts = np.array_split(np.arange(len(values)), min(len(values), most))
            x, y = [fit.steps_before + steps[part].mean() for part in parts], [reduce(values[part]) for part in parts]
            marker = "o" if len(values) == 1 else ""  # one point makes no line
            look = {"color": STAGE_COLOURS[f"fit {fit.name}"], "linewidth": 1.4} | style
            axes.plot(x, y, label=name, marker=marker, markersize=4, **look)
            values_in_words[name] = f"iteration {fit.iteration}, {name}: from {values[0]:.3g} to {values[-1]:.3g}"
    return list(values_in_words.values())


def _draw_iterations(axes: Axes, series: dict[str, dict[int, float | None]]) -> list[str]:
    """Draw series of iteration → value from zero up, one line each. Returns their values in words."""
    values_in_words = []
    for (label, points), marker, colour in zip(series.items(), "osD^vP", COLOURS):
        if points := {t: value for t, value in points.items() if value is not None}:
            colour = STAGE_COLOURS.get(label, colour)
            axes.plot(points.keys(), points.values(), marker=marker, markersize=4, color=colour, label=label)
            values_in_words.append(f"{label}: " + ", ".join(f"{value:.3g}" for value in points.values()))
    if values_in_words:
        _iteration_axis(axes, [t for points in series.values() for t in points])
    low, high = axes.get_ylim()
    low = min(0, low)  # an estimated KL may be negative
    axes.set_ylim(low, high + 0.04 * (high - low))
    return values_in_words


def _iteration_axis(axes: Axes, numbers: Collection[int]) -> None:
    """Use whole numbers on the x-axis, also for a single iteration."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
