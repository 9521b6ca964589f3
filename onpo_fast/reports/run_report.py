"""Write a run's report.html, and a picture of its main plots."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import UserError, naming
from .formatting import date, duration, grouped, percent, policy_symbol, table_rows
from .page import page_style, render
from .plots import Draw, divergence, draw_all, loss, stage_seconds, win_rates
from .run_data import RunData

FILTERS = {
    "date": date,
    "duration": duration,
    "grouped": grouped,
    "percent": percent,
    "policy_symbol": policy_symbol,
    "table_rows": table_rows,
}
PICTURE = {
    "Win rates on held-out prompts": win_rates,
    "Normalised loss": loss,
    "KL from the first policy": divergence,
    "Seconds by stage": stage_seconds,
}
PICTURE_TYPES = (".png", ".svg")


def write_report(directory: Path) -> Path:
    """Write ``directory``/report.html and return its path.

    Raises:
        UserError: if there is no config.yaml, or a file of the run is damaged as a whole.
    """
    run = RunData.read(Path(directory))
    with page_style():
        plots = draw_all(run)
    return render("report.html.jinja", Path(directory) / "report.html", FILTERS, run=run, plots=plots)


def write_picture(directory: Path, path: Path) -> Path:
    """Draw a run's win rates, losses, KL and seconds on one white sheet and return its path.

    Args:
        directory: of the run.
        path: a ``.png`` or ``.svg`` file, replaced if it exists. The same run gives the same bytes.

    Raises:
        UserError: if the name has another ending, or the run cannot be read.
    """
    if path.suffix not in PICTURE_TYPES:
        raise UserError(f"--picture {path}: the name must end in {' or '.join(PICTURE_TYPES)}")
    run = RunData.read(Path(directory), examples=False)
    content = io.BytesIO()
    with page_style(), matplotlib.rc_context({"svg.hashsalt": "onpo_fast"}):
        figure = Figure(figsize=(9.6, 6.4), layout="constrained", facecolor="white")
        for axes, (title, draw) in zip(figure.subplots(2, 2).flat, PICTURE.items()):
            _draw_titled(run, axes, title, draw)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(content, format=path.suffix[1:], dpi=160, facecolor="white", metadata=metadata)
    with naming(path):
        path.write_bytes(content.getvalue())
    return path


def _draw_titled(run: RunData, axes: Axes, title: str, draw: Draw) -> None:
    """Draw a plot with a title and a legend, or only a title that says that the run has no values for it."""
    axes.set_title(title, pad=16, loc="left", fontweight="bold")
    if not draw(run, axes):
        axes.clear()
        axes.set_axis_off()
        axes.set_title(f"{title}: not recorded yet", loc="left")
        return
    handles, labels = axes.get_legend_handles_labels()
    if len(unique := dict(zip(labels, handles))) > 1:
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if draw is stage_seconds else {}  # bars fill the axes
        axes.legend(unique.values(), unique.keys(), fontsize="small", **beside)
