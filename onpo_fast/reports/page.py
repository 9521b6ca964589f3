"""What every page shares: one HTML file that opens anywhere, without a network, in the reader's colours.

A page is a template that extends page.html.jinja, and plots as inline SVG. Text of a model, a dataset or a file
reaches a page only through its template, which escapes it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import atomic_write_text

INK = "#0a0b0c"  # stands for the page's text colour, which the SVG takes over as currentColor
COLOURS = ["#3d85c8", "#cf6d1f", "#2f9464", "#b35ca8", "#857a2b", "#d0524a", "#7f7f7f"]  # ≥ 3:1 on white and on black
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.12,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's colour
}


@contextmanager
def page_style() -> Iterator[None]:
    """Draws as every page does: from matplotlib's own defaults, whatever a file ``matplotlibrc`` says.

    matplotlib takes one from the current folder, which may be anybody's. Its ``text.usetex`` would run LaTeX.
    """
    with matplotlib.style.context(["default", STYLE]):
        yield


class Plot(NamedTuple):
    svg: Markup
    said: str  # its values in words, to be read out


def new_axes(x: str, y: str, height: float = 2.6) -> tuple[Figure, Axes]:
    """An empty plot, 4.2 inches wide so that its text stays legible on a phone."""
    figure = Figure(figsize=(4.2, height), layout="constrained")
    return figure, figure.add_subplot(xlabel=x, ylabel=y)


def plot(figure: Figure, said: list[str]) -> Plot | None:
    """Finish a figure as inline SVG in the page's text colour; None if there was no value to draw."""
    if not said:
        return None
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(legend := dict(zip(labels, handles))) > 1:
        columns = 3 if max(map(len, legend)) < 15 else 2  # of what a phone shows
        figure.legend(legend.values(), legend.keys(), loc="outside upper left", ncols=columns)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": " ".join(said)}):  # ids that never change, and differ between plots
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same in every plot, and nothing refers to them
    return Plot(Markup(svg), "; ".join(said))


def render(template: str, path: Path, filters: dict[str, Callable], **values: object) -> Path:
    """Writes the page that a template of this package makes of the values, whole or not at all; returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, Path(__file__).parents[1]]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"csp_hash": _csp_hash} | filters
    html = environment.get_template(template).render(values)
    # A model may emit half of a surrogate pair, which JSON can hold and UTF-8 cannot.
    atomic_write_text(path, html.encode("utf-8", "replace").decode("utf-8"), shared=True)
    return path


def _csp_hash(script: str) -> str:
    """What a Content-Security-Policy calls an inline script that it allows: the SHA-256 of its text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
