"""The command: onpo-fast experiment selection."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from onpo_fast.arguments import CommandParser, at_least
from onpo_fast.console import console, progress
from onpo_fast.errors import UserError
from onpo_fast.files import read_jsonl
from onpo_fast.selection import SELECTIONS

from . import neural
from .results import ALL, Result

DRAWS = {"neural": (56, 112, 224, 448), "language": (56, 112, 224)}
SEEDS = {"neural": range(10), "language": range(3)}
ABOUT = (
    "Fit steps of mirror descent to the verdicts on selected pairs, and measure their error beside the labels that "
    "they took: for uniform, variance and dopt selection, and for all pairs. Results add up in OUT/GAME.jsonl."
)

Play = Callable[[int, str, int], Result]


def run(argv: list[str]) -> None:
    """Plays what has no results yet, and prints the table as Markdown."""
    options = _parser().parse_args(argv)
    path = options.out / f"{options.game}.jsonl"
    if not options.table:
        torch.set_num_threads(1)
        _play(options, path)
    found = read(path)
    if not found:
        raise UserError(f"there are no results in {path}")
    console.print(table(found), markup=False)


def _play(options: argparse.Namespace, path: Path) -> None:
    known = {(one.seed, one.selection, one.draws) for one in read(path)}
    wanted = [
        (seed, selection, draws)
        for seed in options.seeds or SEEDS[options.game]
        for selection, draws in [(ALL, 0), *((name, n) for n in DRAWS[options.game] for name in SELECTIONS)]
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    play = _player(options.game)
    waiting = [one for one in wanted if one not in known]
    with progress("steps", len(waiting)) as done:
        for one in waiting:
            line = json.dumps(asdict(play(*one)))
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            done(1)


def _player(game: str) -> Play:
    if game == "neural":
        return neural.run
    from .language import OneStep  # here, because a language model takes seconds to import

    steps: dict[int, OneStep] = {}

    def play(seed: int, selection: str, draws: int) -> Result:
        if seed not in steps:
            steps.clear()  # one model in memory
            steps[seed] = OneStep(seed)
        return steps[seed].run(selection, draws)

    return play


def read(path: Path) -> list[Result]:
    """Reads results; an absent file has none.

    Raises:
        UserError: names the line that is no result.
    """
    found = []
    names = {field.name for field in fields(Result)}
    for number, record in enumerate(read_jsonl(path) if path.exists() else (), 1):
        if not isinstance(record, dict) or set(record) != names:
            raise UserError(f"{path}, line {number}: it is no result of this experiment: remove the line")
        found.append(Result(**record))
    return found


def table(results: Sequence[Result]) -> str:
    """Returns the mean error of each selection with its standard error over seeds, as Markdown.

    Beside it, the mean of its difference from uniform draws on the same seeds, with Student's 95% interval.
    """
    lines = ["| draws | selection | labels | error | minus uniform |", "|--:|---|--:|--:|--:|"]
    for draws in sorted({one.draws for one in results if one.selection != ALL}):
        uniform = {one.seed: one.error for one in results if (one.draws, one.selection) == (draws, "uniform")}
        for selection in SELECTIONS:
            own = [one for one in results if (one.draws, one.selection) == (draws, selection)]
            if not own:
                continue
            paired = [one.error - uniform[one.seed] for one in own if one.seed in uniform]
            against = "–" if selection == "uniform" or not paired else _interval(paired)
            lines.append(f"| {draws} | `{selection}` | {_labels(own)} | {_mean(own)} | {against} |")
    if everything := [one for one in results if one.selection == ALL]:
        lines.append(f"| – | {ALL} | {_labels(everything)} | {_mean(everything)} | – |")
    return "\n".join(lines)


def _labels(results: Iterable[Result]) -> str:
    return f"{np.mean([one.labels for one in results]):.0f}"


def _mean(results: Sequence[Result]) -> str:
    errors = [one.error for one in results]
    return f"{np.mean(errors):.3f} ± {stats.sem(errors):.3f}" if len(errors) > 1 else f"{errors[0]:.3f}"


def _interval(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):+.3f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean} ({np.mean(values) - half:+.3f} to {np.mean(values) + half:+.3f})"


def _parser() -> CommandParser:
    parser = CommandParser(prog="onpo-fast experiment selection", description=ABOUT)
    add = parser.add_argument
    about = "a transformer of a few thousand weights in a random game, or SmolLM2 in the game of cyclic-lm (needs lora)"
    add("game", choices=list(DRAWS), help=about)
    add("--seeds", nargs="+", type=at_least(0), metavar="N", help="seeds (default: 0 to 9; language: 0 to 2)")
    add("--out", type=Path, default=Path("runs/selection"), help="folder of the results (default: runs/selection)")
    add("--table", action="store_true", help="play nothing: print the table of the results")
    return parser
