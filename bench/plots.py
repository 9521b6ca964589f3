"""Draws a results file as an SVG with three panels: time and memory against tokens, and error against time."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, NullLocator

from .peers import FULL, METHODS
from .targets import Measured

# A method has the same colour and marker in every panel; those of this package's methods are filled.
STYLES = {
    method.name: {
        "color": f"C{i % 10}",
        "marker": "oDs"[i] if i < 3 else "v^<>xP*dph"[i - 3],
        "linewidth": 1.2,
        "markersize": 5,
        "markerfacecolor": f"C{i % 10}" if i < 3 else "none",
    }
    for i, method in enumerate(METHODS)
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", type=Path, help="Results file of `python -m bench kernels` or `make gpu-check` (JSON)."
    )


def main(options: argparse.Namespace) -> None:
    print(draw(options.results))


def draw(results: Path) -> Path:
    """Writes the figure beside the results and returns its path."""
    data = json.loads(results.read_text(encoding="utf-8"))
    if "results" in data:  # results of the GPU check: "headline" is in part 2, "states" in part 3
        data = data["results"].get("headline") or data["results"].get("states") or {"shapes": []}
    shapes = [record for record in data["shapes"] if measured(record)]
    if not shapes:
        raise ValueError("nothing was measured")
    sweep = sweep_of(shapes)
    figure, (time, memory, error) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    label = f"{sweep[0]['model']}, H {sweep[0]['features']}, V {sweep[0]['vocabulary']}, {sweep[0]['dtype']}"
    against_tokens(time, sweep, "seconds, forward and backward", lambda row: row["seconds"]["both"]["median"])
    floors = [(record["tokens"], Measured(record).products(2, 1, 1)) for record in sweep if "floor_seconds" in record]
    time.plot([tokens for tokens, _ in floors], [floor for _, floor in floors], "k:", label="four bare products")
    against_tokens(memory, sweep, "GB beyond inputs and gradients", lambda row: row["peak_extra_bytes"] / 1e9)
    first = next((record for record in shapes if any("error" in row for row in measured(record))), shapes[0])
    against_time(error, first)
    for axes, title in ((time, label), (memory, label), (error, first["shape"])):
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.2)
    entries = dict(entry for axes in (error, time) for entry in zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    environment = data["environment"]
    commit = (environment["commit"] or "unknown")[:9]
    figure.suptitle(f"{environment['device']}, torch {environment['torch']}, commit {commit}", fontsize=9)
    path = results.with_suffix(".svg")
    with matplotlib.rc_context({"svg.hashsalt": "bench"}):  # makes the file reproducible
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def measured(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured rows of a shape at the task ``FULL``."""
    return [row for row in record["rows"] if row["status"] == "measured" and row["task"] == FULL.name]


def sweep_of(shapes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shapes with pairs of the model that has the most numbers of tokens: one per number, in ascending order."""
    pairs = {(r["model"], r["tokens"]): r for r in reversed(shapes) if r["responses"] == 2} or {
        (r["model"], r["tokens"]): r for r in reversed(shapes)
    }
    model = Counter(model for model, _ in pairs).most_common(1)[0][0]
    return [record for (name, _), record in sorted(pairs.items()) if name == model]


def against_tokens(axes: Axes, sweep: list[dict[str, Any]], label: str, value) -> None:
    points: dict[str, list[tuple[int, float]]] = {}
    for record in sweep:
        for row in measured(record):
            points.setdefault(row["method"], []).append((record["tokens"], value(row)))
    for method, line in points.items():
        axes.plot(*zip(*line), label=method, **STYLES[method])
    log_log(axes, "response tokens", label)
    ticks = sorted({record["tokens"] for record in sweep})
    axes.set_xticks(ticks, [f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens) for tokens in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def against_time(axes: Axes, record: dict[str, Any]) -> None:
    for row in measured(record):
        if error := row.get("error"):
            axes.plot(
                row["seconds"]["both"]["median"],
                error["logps_nats_max"],
                linestyle="",
                label=row["method"],
                **{**STYLES[row["method"]], "markersize": 8},
            )
    log_log(axes, "seconds, forward and backward", "log-prob error, nats per 1000 tokens")


def log_log(axes: Axes, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
