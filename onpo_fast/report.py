"""The report of a run: one HTML file that opens anywhere, without a network.

    python -m onpo_fast.report DIR

reads what the run has left in DIR so far and writes DIR/report.html. It answers, in this order: did it work, is it
healthy, where did the time go, what does it say now, how was it started. What has not been recorded is named as such,
so a run may be unfinished. The same files give the same bytes.

Here are the numbers and the plots, one function each; the words are in report.html.jinja. Text of a model reaches the
page only through that template, which escapes it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from .data import of_iterations
from .errors import CommandParser, UserError, command
from .page import COLOURS, INK, STYLE, Plot, new_axes, plot, render
from .tracking import whole_records

MOST_PROMPTS = 40  # shown side by side
MOST_TRAINING_PROMPTS = 10  # before there are held-out ones
MOST_POINTS = 200  # drawn for a fit: more make the file large and the line no clearer
JUDGE = ("requests", "failures", "prompt_tokens", "completion_tokens", "answered", "cached", "nonsense")
STAGES = ("fit policy", "fit auxiliary", "sample", "judge", "score", "pair")
STAGE_COLOURS = dict(zip(STAGES, COLOURS))  # the same in every plot


class Fit(NamedTuple):
    iteration: int
    name: str  # "auxiliary" or "policy"
    start: int  # steps of the fits before it
    rows: list[dict[str, Any]]  # by step

    @property
    def skipped(self) -> list[int]:
        """The steps that left the weights as they were, their loss or gradient not being finite."""
        return [row["step"] for row in self.rows if row.get("skipped")]


@dataclass(frozen=True)
class Run:
    """What a run's directory holds; what is missing is empty."""

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    responses: list[dict[str, Any]]  # to held-out prompts
    newest: int  # the iteration with the newest responses to training prompts; 0 if there are none
    training: list[dict[str, Any]]  # the first two of these, and the probability that the oracle prefers the first

    @classmethod
    def read(cls, directory: Path) -> Run:
        config = directory / "config.yaml"
        if not config.exists():
            raise UserError(f"{directory} is not a run: it has no config.yaml")
        newest, training = _read_training(directory)
        return cls(
            directory=directory,
            config=_read_yaml(config),
            environment=_read_json(directory / "environment.json"),
            metrics=whole_records(_lines(directory / "metrics.jsonl")),
            evaluation=_read_json(directory / "evaluation.json", _is_evaluation),
            responses=[row for row in _rows(directory / "evaluation_responses.jsonl") if _is_evaluated(row)],
            newest=newest,
            training=training,
        )

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def finished(self) -> bool:
        """Whether all policies, from the start's to the last iteration's, have been evaluated."""
        return len(self.evaluation.get("policies", [])) > self.config.get("iterations", 0)

    @property
    def resume_command(self) -> str:
        return f"python -m onpo_fast.train --resume --out {shlex.quote(str(self.directory))}"

    @property
    def last(self) -> dict[str, Any] | None:
        """The last record of what was done; the prompts are read anew, and recorded last, whenever a run goes on."""
        return max(self.metrics[::-1], key=lambda row: row["stage"] != "prompts", default=None)

    def iterations(self, stage: str) -> dict[int, dict[str, Any]]:
        """The row of a stage in each iteration: the last one, since a resumed run repeats some."""
        return dict(sorted({row["iteration"]: row for row in self.metrics if row["stage"] == stage}.items()))

    def column(self, stage: str, name: str) -> dict[int, float | None]:
        return {iteration: row.get(name) for iteration, row in self.iterations(stage).items()}

    def total(self, stage: str, name: str) -> float:
        return sum(value or 0 for value in self.column(stage, name).values())

    def judge_counters(self) -> dict[str, dict[str, int]]:
        """What the judge was asked in each iteration, in the evaluation and in all; empty if nothing was counted."""
        counters: dict[str, Counter[str]] = {}
        for row in self.metrics:  # all of them: one that was stopped has been paid for
            if row["stage"] in ("judge", "evaluate") and row.keys() & set(JUDGE):
                at = f"iteration {row['iteration']}" if row["stage"] == "judge" else "evaluation"
                told = {name: row.get(name) or 0 for name in JUDGE}
                counters.setdefault(at, Counter()).update(told)
        total = {name: sum(some[name] for some in counters.values()) for name in JUDGE}
        return counters | {"in all": total} if counters else {}

    def by_stage(self, name: str, reduce: Callable[[list[float]], Any]) -> dict[str, dict[int, float]]:
        """Stage, each fit being one → iteration → a column of the stage's rows, reduced to one value."""
        values: dict[str, dict[int, list[float]]] = {}
        for row in self.metrics:
            if row.get(name) is not None:
                stage = f"{row['stage']} {row.get('fit', '')}".strip()
                values.setdefault(stage, {}).setdefault(row["iteration"], []).append(row[name])
        return {stage: {at: float(reduce(some)) for at, some in points.items()} for stage, points in values.items()}

    def seconds(self) -> dict[int, dict[str, float]]:
        """Iteration → stage → seconds; of one that has not ended, what its stages have recorded so far."""
        timed = [row for row in self.metrics if row.get("seconds") is not None]
        last = {tuple(map(row.get, ("iteration", "stage", "fit", "step", "part", "model"))): row for row in timed}
        so_far: dict[int, Counter[str]] = {}
        for (t, stage, fit, *_), row in last.items():
            if (name := f"{stage} {fit or ''}".strip()) in STAGES:
                so_far.setdefault(t, Counter())[name] += row["seconds"]
        return dict(sorted((so_far | self.column("iteration", "stage_seconds")).items()))

    def fits(self) -> list[Fit]:
        """In the order they were run. Of a step that a resumed run repeats, the last row counts."""
        steps = {(row["iteration"], row["fit"], row["step"]): row for row in self.metrics if row["stage"] == "fit"}
        fits: list[Fit] = []
        for iteration, name in sorted({key[:2] for key in steps}):  # "auxiliary" sorts, and comes, before "policy"
            rows = [steps[key] for key in sorted(steps) if key[:2] == (iteration, name)]
            fits.append(Fit(iteration, name, fits[-1].start + fits[-1].rows[-1]["step"] if fits else 0, rows))
        return fits

    def evaluated(self, name: str) -> dict[int, float | None]:
        """A column of the evaluation by the policy's number."""
        numbers = [int(policy.rpartition("_")[2]) for policy in self.evaluation.get("policies", [])]
        return dict(zip(numbers, self.evaluation.get(name) or []))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is damaged: not YAML ({error})") from None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UserError(f'{path} is damaged: expected "name: value"')
    if not isinstance(options.get("iterations", 0), int):
        raise UserError(f"{path} is damaged: iterations is a whole number")
    return options


def _read_json(path: Path, whole: Callable[[dict], bool] = lambda document: True) -> dict[str, Any]:
    """A JSON object that is ``whole``; empty if it is not there."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error}); --resume makes it again") from None
    if not isinstance(document, dict) or not whole(document):
        raise UserError(f"{path} is damaged: it lacks what a run writes there; --resume makes it again")
    return document


def _is_evaluation(document: dict[str, Any]) -> bool:
    """Whether a document has what ``evaluate`` writes, as far as the page goes by it."""
    try:
        count = len(document["policies"])
        shapes = {"win_rate": (count, count), "interval": (count, count, 2), "duality_gap": (count,)}
        shapes |= dict.fromkeys(("confidence", "prompts", "samples_per_prompt"), ())
        shapes |= {name: (count,) for name in ("kl_to_initial", "response_tokens_mean") if document.get(name)}
        return (
            "oracle" in document
            and all(re.fullmatch(r"π_[0-9]{1,9}", name) for name in document["policies"])
            and all(_is_finite(document[name], shape) for name, shape in shapes.items())
        )
    except (KeyError, TypeError, ValueError):
        return False


def _is_finite(value: Any, shape: tuple[int, ...]) -> bool:
    array = np.array(value, dtype=float)
    return array.shape == shape and bool(np.isfinite(array).all())


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _rows(path: Path) -> list[Any]:
    """What each line says; None where that is no JSON."""

    def row(line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError:
            return None

    return [row(line) for line in _lines(path)]


def _read_training(directory: Path) -> tuple[int, list[dict[str, Any]]]:
    """The newest iteration with responses, and ``MOST_TRAINING_PROMPTS`` of these. Damaged lines are passed over."""
    newest, path = max(of_iterations(directory, "responses.jsonl").items(), default=(0, directory))
    rows = []
    for row, judged in zip_longest(_rows(path), _rows(path.with_name("preferences.jsonl"))) if newest else ():
        if isinstance(row, dict) and _are_messages(row.get("prompt")) and _are_texts(row.get("responses")):
            try:
                preference = float(judged["preferences"][0][1])
            except (KeyError, IndexError, TypeError, ValueError):  # damaged, or not judged yet
                preference = None
            rows.append({"prompt": row["prompt"], "responses": row["responses"][:2], "preference": preference})
    return newest, rows[:MOST_TRAINING_PROMPTS]


def _is_evaluated(row: Any) -> bool:
    """Whether it is one of the rows of evaluation_responses.jsonl."""
    return (
        isinstance(row, dict)
        and _are_messages(row.get("prompt"))
        and isinstance(row.get("responses"), dict)
        and all(map(_are_texts, row["responses"].values()))
        and isinstance(row.get("preference", ""), (int, float, NoneType))
    )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _short(name: str) -> str:
    """π_12 → π₁₂."""
    return name.replace("_", "").translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _grouped(number: float | None) -> str:
    """1234567 → 1,234,567."""
    return "–" if number is None else f"{number:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _date(time: float) -> str:
    try:
        return f"{datetime.fromtimestamp(time, timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):  # a damaged record
        return "at no time"


# --- Plots: each a function of the run --------------------------------------------------------------------------------


def _fit_axes(run: Run, y: str) -> tuple[Figure, Axes]:
    """Axes for all fits in a row, with a mark where an iteration starts."""
    figure, axes = new_axes("fit step, all fits in a row", y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter("{x:g}")  # a power of ten of its own would stand where the iterations' marks do
    fits = run.fits()
    if fits:
        axes.set_xlim(0.5, fits[-1].start + fits[-1].rows[-1]["step"] + 0.5)
    starts = {fit.iteration: fit.start for fit in reversed(fits)}
    for iteration, start in starts.items():
        axes.axvline(start + 0.5, color=INK, alpha=0.4, linewidth=0.7)
        if iteration % math.ceil(len(starts) / 8) == 0:
            axes.annotate(f" it. {iteration}", (start + 0.5, 1), xycoords=("data", "axes fraction"), va="bottom")
    return figure, axes


def _draw_fits(axes: Axes, run: Run, column: str, label: str = "", reduce: Any = np.mean, **style: Any) -> list[str]:
    """A column of the fits' rows by step; a long fit as means (or ``reduce``) over neighbouring steps.

    Without a label, a line has its fit's name and colour. Returns the last values of each label, in words.
    """
    said = {}
    for fit in run.fits():
        steps, values = (np.array([row.get(name) for row in fit.rows], dtype=float) for name in ("step", column))
        known, name = np.isfinite(values), label or fit.name  # null is NaN; the line goes on over it
        steps, values = steps[known], values[known]
        if len(values):
            parts = np.array_split(np.arange(len(values)), min(len(values), MOST_POINTS))
            x, y = [fit.start + steps[part].mean() for part in parts], [reduce(values[part]) for part in parts]
            marker = "o" if len(values) == 1 else ""  # one point makes no line
            look = {"color": STAGE_COLOURS[f"fit {fit.name}"], "linewidth": 1.4} | style
            axes.plot(x, y, label=name, marker=marker, markersize=4, **look)
            said[name] = f"iteration {fit.iteration}, {name}: from {values[0]:.3g} to {values[-1]:.3g}"
    return list(said.values())


def _draw_iterations(axes: Axes, series: dict[str, dict[int, float | None]]) -> list[str]:
    """Series of iteration → value from zero up, a line each. Returns their values in words."""
    said = []
    for (label, points), marker, colour in zip(series.items(), "osD^vP", COLOURS):
        if points := {at: value for at, value in points.items() if value is not None}:
            colour = STAGE_COLOURS.get(label, colour)
            axes.plot(points.keys(), points.values(), marker=marker, markersize=4, color=colour, label=label)
            said.append(f"{label}: " + ", ".join(f"{value:.3g}" for value in points.values()))
    if said:
        _whole_iterations(axes, [at for points in series.values() for at in points])
    low, high = axes.get_ylim()
    low = min(0, low)  # an estimated KL may be negative
    axes.set_ylim(low, high + 0.04 * (high - low))
    return said


def _whole_iterations(axes: Axes, numbers: Collection[int]) -> None:
    """An x-axis of iterations, also for a single one."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)


def win_rates(run: Run) -> Plot | None:
    rates = np.array(run.evaluation.get("win_rate", []), dtype=float)
    names = [_short(name) for name in run.evaluation.get("policies", [])]
    if len(names) < 2:
        return None
    figure, axes = new_axes("the policy that it is compared with", "policy", height=1 + 0.36 * min(len(names), 8))
    axes.pcolormesh(rates, cmap="PuOr", vmin=0, vmax=1)  # pale at ½; told apart by the colour-blind
    for (row, column), rate in np.ndenumerate(rates if len(names) <= 10 else np.empty((0, 0))):
        colour = "white" if abs(rate - 0.5) > 0.35 else "black"
        axes.text(column + 0.5, row + 0.5, f"{100 * rate:.0f} %", ha="center", va="center", color=colour)
    ticks = np.arange(len(names)) + 0.5
    axes.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names, ylim=(len(names), 0))
    axes.grid(visible=False)
    return plot(figure, [f"{names[-1]} against {name}: {_percent(rate)}" for name, rate in zip(names[:-1], rates[-1])])


def duality_gap(run: Run) -> Plot | None:
    figure, axes = new_axes("policy", "restricted duality gap")
    gaps = dict(zip(map(_short, run.evaluation.get("policies", [])), run.evaluation.get("duality_gap", [])))
    axes.bar(list(gaps), list(gaps.values()), color=COLOURS[0], width=0.6)
    return plot(figure, [f"{name}: {gap:.3g}" for name, gap in gaps.items()])


def loss(run: Run) -> Plot | None:
    figure, axes = _fit_axes(run, "normalised loss")
    said = _draw_fits(axes, run, "loss_normalised")
    untrained = run.column("pair", "untrained_loss")
    for fit in run.fits() if said else ():
        if (value := untrained.get(fit.iteration)) is not None:
            steps = (fit.start + 0.5, fit.start + fit.rows[-1]["step"] + 0.5)
            axes.plot(steps, (value, value), color=INK, linestyle="--", linewidth=0.9, label="untrained")
    said += [f"iteration {t}, untrained: {value:.3g}" for t, value in untrained.items() if value is not None]
    for fit in run.fits():
        if fit.skipped:
            steps = fit.start + np.array(fit.skipped)[:: math.ceil(len(fit.skipped) / MOST_POINTS)]
            axes.plot(steps, 0 * steps, "x", color=INK, markersize=5, clip_on=False, label="skipped steps")
            said.append(f"iteration {fit.iteration}, {fit.name}: {len(fit.skipped)} steps skipped")
    axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
    return plot(figure, said)


def margin(run: Run) -> Plot | None:
    figure, axes = _fit_axes(run, "nats")
    said = _draw_fits(axes, run, "margin")
    return plot(figure, said + _draw_fits(axes, run, "target", "target", color=INK, linestyle="--", linewidth=0.9))


def pair_accuracy(run: Run) -> Plot | None:
    figure, axes = _fit_axes(run, "share of pairs")
    axes.axhline(0.5, color=INK, linestyle="--", linewidth=0.9)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    return plot(figure, _draw_fits(axes, run, "pair_accuracy"))


def log_ratios(run: Run) -> Plot | None:
    figure, axes = _fit_axes(run, "nats")
    said = _draw_fits(axes, run, "log_ratio_winner", "preferred", color=COLOURS[2])
    return plot(figure, said + _draw_fits(axes, run, "log_ratio_loser", "other", color=COLOURS[3]))


def gradient_norm(run: Run) -> Plot | None:
    figure, axes = _fit_axes(run, "gradient norm")
    return plot(figure, _draw_fits(axes, run, "gradient_norm", reduce=np.max))  # a mean would hide a spike


def divergence(run: Run) -> Plot | None:
    figure, axes = new_axes("t of the policy π_t", "nats a response")
    initial, anchor = run.column("iteration", "kl_to_initial"), run.column("iteration", "kl_to_anchor")
    series = {"to π₁": initial, "to the anchor": anchor, "to π₁, held out": run.evaluated("kl_to_initial")}
    return plot(figure, _draw_iterations(axes, series))


def response_length(run: Run) -> Plot | None:
    figure, axes = new_axes("t of the policy π_t", "tokens a response")
    training, held_out = run.column("sample", "response_tokens_mean"), run.evaluated("response_tokens_mean")
    return plot(figure, _draw_iterations(axes, {"training": training, "held out": held_out}))


def shares(run: Run) -> Plot | None:
    figure, axes = new_axes("iteration", "share")
    cyclic, cut = run.column("judge", "cyclic_triples"), run.column("sample", "stopped_by_length")
    said = _draw_iterations(axes, {"cyclic triples": cyclic, "responses cut off": cut})
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    return plot(figure, said)


def stage_seconds(run: Run) -> Plot | None:
    figure, axes = new_axes("iteration", "seconds", height=3)
    rows = run.seconds()
    stages = dict.fromkeys(stage for row in rows.values() for stage in row)
    heights = {stage: np.array([row.get(stage, 0.0) for row in rows.values()]) for stage in stages}
    bottom = 0.0
    for stage, height in heights.items():
        axes.bar(list(rows), height, bottom=bottom, width=0.6, color=STAGE_COLOURS.get(stage), label=stage)
        bottom = bottom + height
    if rows:
        _whole_iterations(axes, rows)
    return plot(figure, [f"{stage}: {_duration(height.sum())}" for stage, height in heights.items()])


def peak_memory(run: Run) -> Plot | None:
    figure, axes = new_axes("iteration", "GiB", height=3)
    return plot(figure, _draw_iterations(axes, run.by_stage("peak_memory_bytes", lambda some: max(some) / 2**30)))


def throughput(run: Run) -> Plot | None:
    figure, axes = new_axes("iteration", "tokens a second", height=3)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return plot(figure, _draw_iterations(axes, run.by_stage("tokens_per_second", np.median)))


PLOTS = [
    *(win_rates, duality_gap),
    *(loss, margin, pair_accuracy, log_ratios, gradient_norm, divergence, response_length, shares),
    *(stage_seconds, peak_memory, throughput),
]


# --- The page ---------------------------------------------------------------------------------------------------------


def write_report(directory: Path) -> Path:
    """(Re)build ``directory``/report.html and return its path; ``UserError`` if there is no config.yaml."""
    run = Run.read(Path(directory))
    filters = {"short": _short, "percent": _percent, "duration": _duration, "date": _date, "grouped": _grouped}
    filters["json"] = partial(json.dumps, ensure_ascii=False, default=str)
    with matplotlib.rc_context(STYLE):
        plots = {draw.__name__: draw(run) for draw in PLOTS}
    path = Path(directory) / "report.html"
    return render("report.html.jinja", path, filters, run=run, plots=plots, most_prompts=MOST_PROMPTS)


@command
def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m onpo_fast.report", description="(Re)build a run's report.html.")
    parser.add_argument("directory", type=Path, help="the run's output directory")
    print(write_report(parser.parse_args(argv).directory))


if __name__ == "__main__":
    main()
