"""The report of a run: one HTML file that opens anywhere, without a network.

    python -m onpo_fast.report DIR

reads what the run has left in DIR so far and writes DIR/report.html. It answers, in this order: did it work, is it
healthy, where did the time go, what does it say now, how was it started. What has not been recorded is named as such,
so a run may be unfinished. The same files give the same bytes.

Here are the numbers and the plots, one function each; the words are in report.html.jinja. Text of a model reaches the
page only through that template, which escapes it.

A run may come from anybody: nothing of it is run or sent, and what is damaged is passed over and counted, or is an
error of one line. The page has a few MB at most; what is left out of it is said, and is in the run's files.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from .config import read_yaml
from .data import of_iterations
from .errors import CommandParser, UserError, command, one_line
from .files import MIB, MOST_LINES, MOST_LINES_BYTES, advising, parse_json, read_lines, read_regular
from .reports.page import COLOURS, INK, Plot, new_axes, page_style, plot, render
from .run.tracking import RECORDS_OF, whole_record

# What is on a page, so that it stays a few MB whatever the run: the rest is in the run's files
MOST_PROMPTS = 40  # shown side by side
MOST_TRAINING_PROMPTS = 10  # before there are held-out ones
MOST_MESSAGES = 20  # of a conversation
MOST_CHARACTERS = 2000  # of a text
MOST_ITERATIONS = 40  # in plots and tables
MOST_POLICIES = 20  # in the plot and the table of win rates
MOST_OPTIONS = 200  # of the configuration and the environment
MOST_POINTS = 200  # drawn for a fit: more make the file large and the line no clearer
MOST_POINTS_IN_ALL = 4000  # drawn for all fits

MOST_JSON = 64 * MIB  # bytes read of evaluation.json or environment.json
MOST_COLUMNS = 200  # names of numbers in metrics.jsonl
REMEDY = "put the run's own file there, or remove it"
LARGEST_NUMBER = 1e100  # of a measurement: what is larger is drawn as little as what is not finite
LARGEST_ITERATION, LARGEST_STEP = 10**6, 10**9
JUDGE = ("requests", "failures", "prompt_tokens", "completion_tokens", "answered", "cached", "nonsense")
FITS = ("auxiliary", "policy")
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
    responses: list[dict[str, Any]]  # to held-out prompts: the first ``MOST_PROMPTS``
    evaluated_prompts: int  # of which these are the first
    newest: int  # the iteration with the newest responses to training prompts; 0 if there are none
    training: list[dict[str, Any]]  # the first two of these, and the probability that the oracle prefers the first
    damaged: dict[str, int]  # file → lines that were passed over
    read_in_part: list[str]  # files that are longer than what is read of them

    @classmethod
    def read(cls, directory: Path) -> Run:
        config = directory / "config.yaml"
        if not config.exists():
            raise UserError(f"{directory} is not a run: it has no config.yaml")
        lines = _Lines(directory)
        evaluation = _read_json(directory / "evaluation.json", _evaluation)
        newest, training = _read_training(directory, lines)
        columns: dict[str, str] = {}
        metrics = lines.read("metrics.jsonl", lambda line: _measured(whole_record(line), columns))
        responses, count = _read_responses(lines, evaluation.get("policies", []))
        return cls(
            directory=directory,
            config=_read_config(config),
            environment=_read_json(directory / "environment.json"),
            metrics=[record for record in metrics if record is not None],
            evaluation=evaluation,
            responses=responses,
            evaluated_prompts=count,
            newest=newest,
            training=training,
            damaged={name: count for name, count in sorted(lines.damaged.items()) if count},
            read_in_part=lines.read_in_part,
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

    @cached_property
    def _last_rows(self) -> dict[str, dict[int, dict[str, Any]]]:
        rows: dict[str, dict[int, dict[str, Any]]] = {}
        for row in self.metrics:
            rows.setdefault(row["stage"], {})[row["iteration"]] = row
        return {stage: dict(sorted(by_iteration.items())) for stage, by_iteration in rows.items()}

    def iterations(self, stage: str) -> dict[int, dict[str, Any]]:
        """The row of a stage in each iteration: the last one, since a resumed run repeats some."""
        return self._last_rows.get(stage, {})

    @cached_property
    def recorded(self) -> list[int]:
        """The iterations that have records."""
        return sorted({row["iteration"] for row in self.metrics if row["iteration"] > 0})

    @cached_property
    def shown(self) -> frozenset[int]:
        """The iterations in plots and tables, of all that have records; 0 is the run's."""
        return frozenset([0, *_spaced(self.recorded, MOST_ITERATIONS)])

    @cached_property
    def shown_policies(self) -> list[int]:
        """The indices of the policies in the plot and the table of win rates."""
        return _spaced(range(len(self.evaluation.get("policies", []))), MOST_POLICIES)

    def column(self, stage: str, name: str) -> dict[int, float | None]:
        """Of the iterations that are shown."""
        return {t: row.get(name) for t, row in self.iterations(stage).items() if t in self.shown}

    def total(self, stage: str, name: str) -> float:
        return sum(row.get(name) or 0 for row in self.iterations(stage).values())

    def judge_counters(self) -> dict[str, dict[str, int]]:
        """What the judge was asked in each iteration shown, in the evaluation and in all; empty if nothing was."""
        counters: dict[str, Counter[str]] = {}
        total: Counter[str] = Counter()
        for row in self.metrics:  # all of them: one that was stopped has been paid for
            if row["stage"] in ("judge", "evaluate") and row.keys() & set(JUDGE):
                at = f"iteration {row['iteration']}" if row["stage"] == "judge" else "evaluation"
                told = {name: row.get(name) or 0 for name in JUDGE}
                total.update(told)
                if row["iteration"] in self.shown:
                    counters.setdefault(at, Counter()).update(told)
        return counters | {"in all": dict(total)} if total else {}

    def by_stage(self, name: str, reduce: Callable[[list[float]], Any]) -> dict[str, dict[int, float]]:
        """Stage, each fit being one → iteration shown → a column of the stage's rows, reduced to one value."""
        values: dict[str, dict[int, list[float]]] = {}
        for row in self.metrics:
            stage = f"{row['stage']} {row.get('fit') or ''}".strip()
            if stage in STAGES and row.get(name) is not None and row["iteration"] in self.shown:
                values.setdefault(stage, {}).setdefault(row["iteration"], []).append(row[name])
        return {stage: {at: float(reduce(some)) for at, some in points.items()} for stage, points in values.items()}

    @cached_property
    def seconds(self) -> dict[int, dict[str, float]]:
        """Iteration shown → stage → seconds; of one that has not ended, what its stages have recorded so far."""
        timed = [row for row in self.metrics if row.get("seconds") is not None and row["iteration"] in self.shown]
        last = {tuple(map(row.get, ("iteration", "stage", "fit", "step", "part", "model"))): row for row in timed}
        so_far: dict[int, Counter[str]] = {}
        for (t, stage, fit, *_), row in last.items():
            if (name := f"{stage} {fit or ''}".strip()) in STAGES:
                so_far.setdefault(t, Counter())[name] += row["seconds"]
        return dict(sorted((so_far | self.column("iteration", "stage_seconds")).items()))

    @cached_property
    def fits(self) -> list[Fit]:
        """In the order they were run. Of a step that a resumed run repeats, the last row counts."""
        steps: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
        for row in self.metrics:
            if row["stage"] == "fit":
                steps.setdefault((row["iteration"], row["fit"]), {})[row["step"]] = row
        fits: list[Fit] = []
        for (iteration, name), rows in sorted(steps.items()):  # "auxiliary" sorts, and comes, before "policy"
            start = fits[-1].start + fits[-1].rows[-1]["step"] if fits else 0
            fits.append(Fit(iteration, name, start, [rows[step] for step in sorted(rows)]))
        return fits

    @property
    def shown_fits(self) -> list[Fit]:
        return [fit for fit in self.fits if fit.iteration in self.shown]

    def evaluated(self, name: str) -> dict[int, float | None]:
        """A column of the evaluation by the policy's number, of ``MOST_ITERATIONS`` policies."""
        numbers = [int(policy.rpartition("_")[2]) for policy in self.evaluation.get("policies", [])]
        return dict(_spaced(list(zip(numbers, self.evaluation.get(name) or [])), MOST_ITERATIONS))


def _spaced(items: Sequence[Any], most: int) -> list[Any]:
    """All items, or ``most`` of them: the first, the last and evenly spaced ones.

    >>> _spaced(range(11), 3)
    [0, 5, 10]
    """
    if len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]


class _Lines:
    """Reads a run's files of JSON lines. What is damaged is passed over and counted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.damaged: Counter[str] = Counter()  # file → lines
        self.read_in_part: list[str] = []

    def read(self, name: str, parse: Callable[[bytes], Any]) -> Iterator[Any]:
        """What ``parse`` makes of each line; None for a line of which it makes nothing, which then is damaged."""
        path = self.directory / name
        if not path.exists():
            return
        count = 0
        with advising(REMEDY):
            for line in read_lines(path):
                count += 1
                parsed = None if line is None else parse(line)
                self.damaged[name] += parsed is None
                yield parsed
        if count == MOST_LINES or path.stat().st_size > MOST_LINES_BYTES:
            self.read_in_part.append(name)


def _document(line: bytes) -> Any:
    """What a line of JSON says; None if it is none."""
    try:
        return parse_json(line)
    except ValueError:
        return None


def _read_config(path: Path) -> dict[str, Any]:
    _, options = read_yaml(path)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UserError(f'{path} is damaged: expected "name: value"')
    iterations = options.get("iterations", 0)
    if not isinstance(iterations, int) or not 0 <= iterations <= LARGEST_ITERATION:
        raise UserError(f"{path} is damaged: iterations is a whole number, and at most {LARGEST_ITERATION}")
    return options


def _read_json(path: Path, check: Callable[[dict], dict | None] = lambda document: document) -> dict[str, Any]:
    """What ``check`` makes of a JSON object; empty if it is not there."""
    if not path.exists():
        return {}
    try:
        with advising(REMEDY):
            document = parse_json(read_regular(path, MOST_JSON))
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error}); --resume makes it again") from None
    checked = check(document) if isinstance(document, dict) else None
    if checked is None:
        raise UserError(f"{path} is damaged: it lacks what a run writes there; --resume makes it again")
    return checked


def _measured(record: dict[str, Any] | None, columns: dict[str, str]) -> dict[str, Any] | None:
    """A record with null for numbers that are not finite; None if it then lacks what its stage must have.

    ``columns`` has the names so far, each kept once; those beyond ``MOST_COLUMNS`` are left out.
    """
    if record is None or not 0 <= record["iteration"] <= LARGEST_ITERATION:
        return None
    measured: dict[str, Any] = {}
    for name, value in record.items():
        if name in columns or len(columns) < MOST_COLUMNS:
            finite = not isinstance(value, float) or abs(value) <= LARGEST_NUMBER  # false for NaN
            measured[columns.setdefault(name, name)] = value if finite else None
    stage, required = record["stage"], RECORDS_OF.get(record["stage"], {})
    if any(measured.get(name) is None for name in required):
        return None
    if stage == "fit" and not (record["fit"] in FITS and 1 <= record["step"] <= record["steps"] <= LARGEST_STEP):
        return None
    if stage == "iteration":
        stages = {name: value for name, value in record["stage_seconds"].items() if name in STAGES}
        if not all(abs(value) <= LARGEST_NUMBER for value in stages.values()):
            return None
        measured["stage_seconds"] = stages
    return measured


def _evaluation(document: dict[str, Any]) -> dict[str, Any] | None:
    """What the page goes by of what ``evaluate`` writes; None if something is missing or none of its kind."""
    try:
        policies, oracle = document["policies"], document["oracle"]
        counts = {name: document[name] for name in ("prompts", "samples_per_prompt")}
        if not (isinstance(policies, list) and policies and isinstance(oracle, str)):
            return None
        if not all(isinstance(name, str) and re.fullmatch(r"π_[0-9]{1,9}", name) for name in policies):
            return None
        if not all(type(value) is int and 0 <= value < 2**63 for value in counts.values()):
            return None
        count = len(policies)
        probabilities = {"win_rate": (count, count), "interval": (count, count, 2), "confidence": ()}
        columns = ["duality_gap", *(name for name in ("kl_to_initial", "response_tokens_mean") if document.get(name))]
        numbers = {name: _numbers(document[name], shape, 0, 1) for name, shape in probabilities.items()}
        numbers |= {name: _numbers(document[name], (count,), -LARGEST_NUMBER, LARGEST_NUMBER) for name in columns}
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return {"policies": policies, "oracle": _cut(oracle, "evaluation.json"), **counts, **numbers}


def is_evaluation(document: Any) -> bool:
    """Whether it has what ``evaluate`` writes."""
    return isinstance(document, dict) and _evaluation(document) is not None


def _numbers(value: Any, shape: tuple[int, ...], low: float, high: float) -> Any:
    """A number, or lists of them; ``ValueError`` if it has another shape, or one is not from ``low`` to ``high``."""
    array = np.array(value, dtype=float)
    if array.shape != shape or not ((low <= array) & (array <= high)).all():
        raise ValueError
    return array.tolist()


def _read_training(directory: Path, lines: _Lines) -> tuple[int, list[dict[str, Any]]]:
    """The newest iteration with responses, and the first ``MOST_TRAINING_PROMPTS`` of these."""
    newest, path = max(of_iterations(directory, "responses.jsonl").items(), default=(0, directory))
    if not newest:
        return 0, []
    name = f"{path.parent.name}/responses.jsonl"
    judged = lines.read(f"{path.parent.name}/preferences.jsonl", _first_preference)
    rows: list[dict[str, Any]] = []
    for row in lines.read(name, partial(_sampled, where=name)):
        preference = next(judged, None)
        if row is not None:
            rows.append(row | {"preference": preference})
        if len(rows) == MOST_TRAINING_PROMPTS:
            break
    return newest, rows


def _sampled(line: bytes, where: str) -> dict[str, Any] | None:
    """What the page shows of a line of an iteration's responses.jsonl."""
    row = _document(line)
    if not isinstance(row, dict) or not _are_texts(row.get("responses")):
        return None
    prompt = _conversation(row.get("prompt"), where)
    return prompt and {"prompt": prompt, "responses": [_cut(text, where) for text in row["responses"][:2]]}


def _first_preference(line: bytes) -> float | None:
    """P(the first response ≻ the second) of a line of an iteration's preferences.jsonl."""
    try:
        preference = float(_document(line)["preferences"][0][1])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return None
    return preference if 0 <= preference <= 1 else None


def _read_responses(lines: _Lines, policies: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The first ``MOST_PROMPTS`` rows of evaluation_responses.jsonl, and how many there are.

    Of each row, a response of the first and the last policy; ``policies`` are those of the first row if it is empty.
    """
    rows: list[dict[str, Any]] = []
    count = 0
    name = "evaluation_responses.jsonl"
    for row in lines.read(name, _evaluated):
        if row is None:
            continue
        count += 1
        if len(rows) < MOST_PROMPTS:
            policies = policies or list(row["responses"])
            named = {policy: row["responses"].get(policy) for policy in {policies[0], policies[-1]}}
            texts = {policy: _cut(texts[0], name) for policy, texts in named.items() if texts}
            rows.append(
                {
                    "prompt": _conversation(row["prompt"], name),
                    "responses": texts,
                    "preference": row["preference"],
                    "policies": [policies[0], policies[-1]],
                }
            )
    return rows, count


def _evaluated(line: bytes) -> dict[str, Any] | None:
    """A row of evaluation_responses.jsonl; None if it is none."""
    row = _document(line)
    if not isinstance(row, dict) or not isinstance(row.get("responses"), dict) or not row["responses"]:
        return None
    preference = row.get("preference", "")
    if preference is not None and not (isinstance(preference, (int, float)) and 0 <= preference <= 1):
        return None
    named = all(re.fullmatch(r"π_[0-9]{1,9}", name) and _are_texts(texts) for name, texts in row["responses"].items())
    return row if named and _conversation(row.get("prompt"), "") is not None else None


def _conversation(prompt: Any, where: str) -> list[dict[str, str]] | None:
    """The messages of a prompt with what is shown of their texts; None if it is none."""
    if not isinstance(prompt, list) or not prompt:
        return None
    shown = []
    for message in prompt[:MOST_MESSAGES]:
        role, text = (message.get("role"), _message_text(message)) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or text is None:
            return None
        shown.append({"role": role[:50], "content": _cut(text, where)})
    if (more := len(prompt) - MOST_MESSAGES) > 0:
        shown.append({"role": "…", "content": f"({more:,} more messages: see {where})"})
    return shown


def _message_text(message: dict[str, Any]) -> str | None:
    """The text of a message, of its parts, or of the calls of tools in its place; None if it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in content):
        return "\n".join(part["text"] for part in content)
    return _json(message["tool_calls"]) if content is None and "tool_calls" in message else None


def _cut(text: str, where: str) -> str:
    """The beginning of a text that is long, and where the rest is."""
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]}… ({more:,} more characters: see {where})"


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _options(values: dict[str, Any], where: str, depth: int = 3) -> dict[str, Any]:
    """A mapping as a table shows it: texts, and mappings inside down to a depth; the rest is in the file."""
    shown: dict[str, Any] = {}
    for name, value in list(values.items())[:MOST_OPTIONS]:
        if isinstance(value, dict) and depth > 1:
            shown[_cut(str(name), where)] = _options(value, where, depth - 1)
        else:
            shown[_cut(str(name), where)] = _cut(value if isinstance(value, str) else _json(value), where)
    if len(values) > MOST_OPTIONS:
        shown["…"] = f"({len(values) - MOST_OPTIONS:,} more: see {where})"
    return shown


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # a date as a name, a number of thousands of digits
        return "(a value that cannot be shown)"


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
    except (OverflowError, OSError, TypeError, ValueError):  # a damaged record
        return "at no time"


# --- Plots: each a function of the run --------------------------------------------------------------------------------


def _fit_axes(run: Run, y: str) -> tuple[Figure, Axes]:
    """Axes for all fits in a row, with a mark where an iteration starts."""
    figure, axes = new_axes("fit step, all fits in a row", y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter("{x:g}")  # a power of ten of its own would stand where the iterations' marks do
    fits = run.shown_fits
    if fits:
        axes.set_xlim(0.5, fits[-1].start + fits[-1].rows[-1]["step"] + 0.5)
    starts = {fit.iteration: fit.start for fit in reversed(fits)}
    for number, (iteration, start) in enumerate(sorted(starts.items()), 1):
        axes.axvline(start + 0.5, color=INK, alpha=0.4, linewidth=0.7)
        if number % math.ceil(len(starts) / 8) == 0:
            axes.annotate(f" it. {iteration}", (start + 0.5, 1), xycoords=("data", "axes fraction"), va="bottom")
    return figure, axes


def _draw_fits(axes: Axes, run: Run, column: str, label: str = "", reduce: Any = np.mean, **style: Any) -> list[str]:
    """A column of the fits' rows by step; a long fit as means (or ``reduce``) over neighbouring steps.

    Without a label, a line has its fit's name and colour. Returns the last values of each label, in words.
    """
    said = {}
    most = max(2, min(MOST_POINTS, MOST_POINTS_IN_ALL // max(1, len(run.shown_fits))))
    for fit in run.shown_fits:
        steps, values = (np.array([row.get(name) for row in fit.rows], dtype=float) for name in ("step", column))
        known, name = np.isfinite(values), label or fit.name  # null is NaN; the line goes on over it
        steps, values = steps[known], values[known]
        if len(values):
            parts = np.array_split(np.arange(len(values)), min(len(values), most))
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
    shown = run.shown_policies
    if len(shown) < 2:
        return None
    rates = np.array(run.evaluation["win_rate"])[np.ix_(shown, shown)]
    names = [_short(run.evaluation["policies"][index]) for index in shown]
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
    evaluation = run.evaluation
    gaps = {_short(evaluation["policies"][index]): evaluation["duality_gap"][index] for index in run.shown_policies}
    axes.bar(list(gaps), list(gaps.values()), color=COLOURS[0], width=0.6)
    return plot(figure, [f"{name}: {gap:.3g}" for name, gap in gaps.items()])


def loss(run: Run) -> Plot | None:
    figure, axes = _fit_axes(run, "normalised loss")
    said = _draw_fits(axes, run, "loss_normalised")
    untrained = run.column("pair", "untrained_loss")
    for fit in run.shown_fits if said else ():
        if (value := untrained.get(fit.iteration)) is not None:
            steps = (fit.start + 0.5, fit.start + fit.rows[-1]["step"] + 0.5)
            axes.plot(steps, (value, value), color=INK, linestyle="--", linewidth=0.9, label="untrained")
    said += [f"iteration {t}, untrained: {value:.3g}" for t, value in untrained.items() if value is not None]
    for fit in run.shown_fits:
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
    rows = run.seconds
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
    filters["options"] = _options
    with page_style():
        plots = {draw.__name__: draw(run) for draw in PLOTS}
    path = Path(directory) / "report.html"
    return render("report.html.jinja", path, filters, run=run, plots=plots)


@command
def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m onpo_fast.report", description="(Re)build a run's report.html.")
    parser.add_argument("directory", type=Path, help="the run's output directory")
    print(one_line(str(write_report(parser.parse_args(argv).directory))))


if __name__ == "__main__":
    main()
