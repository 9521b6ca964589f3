"""Render a page: one HTML file that opens anywhere, without a network, in the reader's light or dark colours.

A page is a template that extends page.html.jinja, with plots as inline SVG. Text of a model, a dataset or a file
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

INK = "#0a0b0c"  # replaced by currentColor, the page's text colour, in inline SVG
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
    """Draw with matplotlib's defaults and ``STYLE``, ignoring any ``matplotlibrc``.

    matplotlib reads that file from the current folder, which may be a stranger's, and its ``text.usetex`` runs LaTeX.
    """
    with matplotlib.style.context(["default", STYLE]):
        yield


class Plot(NamedTuple):
    svg: Markup
    description: str  # the values in words, for screen readers


def new_axes(x: str, y: str, height: float = 2.6) -> tuple[Figure, Axes]:
    """Return an empty plot, 4.2 inches wide so that its text stays legible on a phone."""
    figure = Figure(figsize=(4.2, height), layout="constrained")
    return figure, figure.add_subplot(xlabel=x, ylabel=y)


def plot(figure: Figure, values: list[str]) -> Plot | None:
    """Turn a figure into inline SVG in the page's text colour.

    Args:
        figure: with one axes; its legend is added here.
        values: what was drawn, in words. None is returned if it is empty.
    """
    if not values:
        return None
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(legend := dict(zip(labels, handles))) > 1:
        columns = 3 if max(map(len, legend)) < 15 else 2  # as many as fit on a phone
        figure.legend(legend.values(), legend.keys(), loc="outside upper left", ncols=columns)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": " ".join(values)}):  # ids are deterministic, and differ between plots
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # a style would apply to the whole page
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # repeated in every plot, never referred to
    return Plot(Markup(svg), "; ".join(values))


def render(
    template: str, path: Path, filters: dict[str, Callable], folder: Path | None = None, **values: object
) -> Path:
    """Render a template with the values, write the page to ``path`` atomically and return ``path``.

    Templates are looked up in this folder, in the package and in ``folder``.
    """
    folders = [Path(__file__).parent, Path(__file__).parents[1], *([folder] if folder else [])]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"csp_hash": _csp_hash} | filters
    html = environment.get_template(template).render(values)
    # A model may emit half of a surrogate pair, which JSON can hold and UTF-8 cannot
    atomic_write_text(path, html.encode("utf-8", "replace").decode("utf-8"), shared=True)
    return path


def _csp_hash(script: str) -> str:
    """The source expression that allows an inline script in a Content-Security-Policy: the SHA-256 of its text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
