"""The games lab from the command line.

    python -m onpo_fast.games                    # all three, two minutes on two cores
    python -m onpo_fast.games matrix --help      # matrix, neural or multiturn

An experiment prints a table, and writes its numbers to ``OUT/<experiment>.json`` and its plots beside it.
``OUT/games.html`` shows all experiments whose numbers are in OUT. Earlier files are overwritten: the same options give
the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from docstring_parser import parse_from_object
from rich.table import Table

from ..algorithms import ALGORITHMS, ALIASES
from ..arguments import CommandParser, program
from ..console import console, progress, say
from ..errors import UserError, command, nearest
from ..files import atomic_write_text
from ..reports.page import Plot, page_style, render
from ..run.tracking import environment
from . import figures, lab
from .arguments import whole_number
from .neural import GIVEN, NeuralGame
from .preferences import GAMES, make

GAME = (
    f"preference game: {', '.join(GAMES)} (hard_for_optimism=0.03 sets its delta); or a file (.npy, .json, .csv) with "
    "a preference matrix or several"
)
NAMES = [*ALGORITHMS, *ALIASES]


def matrix(options: argparse.Namespace) -> dict:
    """Play matrix games and return their numbers."""
    with progress("matrix games", lab.matrix_parts(options.algorithms)) as done:
        return lab.matrix(
            options.game,
            options.algorithms,
            options.actions,
            options.count,
            options.steps,
            options.eta,
            options.tau,
            options.seed,
            done,
        )


def neural(options: argparse.Namespace) -> dict:
    """Play neural games and return their numbers."""
    names = {field.name for field in fields(NeuralGame)} - {"objective", "eta"}
    chosen = {name: getattr(options, name) for name in names}
    given = make(options.game) if options.game not in GAMES else None
    if given is not None:
        chosen |= {"game": GIVEN, "actions": given.shape[-1]}
        if len(given) > 1:
            chosen["contexts"] = len(given)
        else:
            given = given[0]  # the same for every context
    game = NeuralGame(**chosen)
    seeds = range(options.seed, options.seed + whole_number("seeds", options.seeds))
    with progress("a transformer", len(options.objectives) * len(seeds)) as done:
        return lab.transformer(game, options.objectives, seeds, options.eta, done, given)


def multiturn(options: argparse.Namespace) -> dict:
    """Play games of several turns and return their numbers."""
    with progress("several turns", lab.TURNS_PARTS) as done:
        return lab.several_turns(
            options.game, options.turns, options.actions, options.count, options.steps, options.eta, options.seed, done
        )


EXPERIMENTS = {"matrix": matrix, "neural": neural, "multiturn": multiturn}


def table(experiment: str, results: dict) -> Table:
    """Return the most important numbers as a table."""
    columns, rows = TABLES[experiment](results)
    drawn = Table(*columns)
    for name, *values in rows:
        drawn.add_row(name, *("–" if value is None else f"{value:.3g}" for value in values))
    return drawn


def _matrix_table(results: dict) -> tuple[list[str], list[list]]:
    rows = [
        [
            figures.label(name),
            *(run[gap]["median"][-1] if gap in run else None for gap in ("average_gap", "last_gap")),
            run.get("slope"),
            run["last_regularised_gap"]["median"][-1] if "slope" in run else None,
        ]
        for name, run in results["algorithms"].items()
    ]
    tuned = results["omd_tuned"]
    rows.append(["OMD, η tuned to T", tuned["average"]["median"][-1], None, tuned["slope"], None])
    return [f"after {results['T'][-1]} policies", "gap of the average", "of the last", "slope", "regularised"], rows


def _neural_table(results: dict) -> tuple[list[str], list[list]]:
    rows = [
        [
            figures.label(name),
            run["gap"]["median"][0],
            run["gap"]["median"][-1],
            run["worst_distance"],
            np.mean(run["seconds"]),
        ]
        for name, run in results["objectives"].items()
    ]
    after = f"after {results['iterations']} iterations"
    return [after, "gap at the start", "gap of the last", "worst distance", "seconds a run"], rows


def _multiturn_table(results: dict) -> tuple[list[str], list[list]]:
    rows = [
        [figures.label(name), run["average_gap"], run["worst_average_gap"], run["last_gap"]]
        for name, run in results["final"].items()
    ]
    return [f"after {results['T'][-1]} policies", "gap of the average", "the worst", "of the last"], rows


TABLES = {"matrix": _matrix_table, "neural": _neural_table, "multiturn": _multiturn_table}


def work(experiment: str, options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run an experiment and write its numbers."""
    start = time.perf_counter()
    _check_out(options.out)
    try:
        results = EXPERIMENTS[experiment](options)
    except ValueError as error:  # the arguments come from the command line
        raise UserError(str(error)) from error
    results = {
        "command": shlex.join(["python", "-m", "onpo_fast.games", *argv]),
        "seconds": time.perf_counter() - start,
        "environment": environment(torch.device("cpu")),
        "options": {name: value for name, value in vars(options).items() if name != "debug"},
    } | results
    results = json.loads(json.dumps(results, default=_plain))
    console.print(table(experiment, results))
    options.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.out / f"{experiment}.json", json.dumps(results, indent=1, allow_nan=False) + "\n")


def write_page(out: Path) -> Path:
    """Write the page and the plots of all experiments whose numbers are in ``out``; return the path of the page."""
    found = {name: out / f"{name}.json" for name in EXPERIMENTS if (out / f"{name}.json").is_file()}
    results: dict[str, Any] = dict.fromkeys(EXPERIMENTS)
    plots: dict[str, dict[str, Plot | None]] = {}
    for name, path in found.items():
        try:
            results[name] = json.loads(path.read_text(encoding="utf-8"))
            with page_style():
                plots[name] = {draw.__name__: draw(results[name]) for draw in figures.FIGURES[name]}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"{path} is not what {name} writes: remove it, or run {name} again") from None
    for name, drawn in plots.items():
        for title, plot in drawn.items():
            if plot:
                atomic_write_text(out / f"{name}-{title}.svg", str(plot.svg))
    return render("games/results.html.jinja", out / "games.html", {"label": figures.label}, plots=plots, **results)


def _check_out(out: Path) -> None:
    """Raise ``UserError`` if results cannot be written to ``out``, before time is spent on them."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} is not a directory with write permission")


def _plain(value: object) -> object:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return str(value)  # a path


def _parser(experiment: str) -> CommandParser:
    parser = CommandParser(prog=f"{program('games')} {experiment}", description=ABOUT[experiment])
    ARGUMENTS[experiment](parser)
    _add_out(parser)
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/games"), help="where results go (default: runs/games)")


def _add(parser: argparse.ArgumentParser, name: str, default: object, about: str, **options: Any) -> None:
    if not isinstance(default, (list, type(None))):
        options.setdefault("type", type(default))
        about += f" (default: {default})"
    elif default:
        about += f" (default: {' '.join(default)})"
    parser.add_argument(f"--{name}", default=default, help=about.replace("%", "%%"), **options)


def _add_names(parser: argparse.ArgumentParser, name: str, default: Sequence[str]) -> None:
    about = f"algorithms to play, of {', '.join(ALGORITHMS)}"
    _add(parser, name, list(default), about, nargs="+", choices=NAMES, metavar="NAME")


def _matrix_arguments(parser: argparse.ArgumentParser) -> None:
    _add(parser, "game", "random", GAME)
    _add(
        parser,
        "actions",
        None,
        "number of actions in a named game (default: 10, or that of a game with a fixed number)",
        type=int,
    )
    _add(parser, "count", 20, "number of games of a random kind")
    _add(parser, "steps", 5000, "number of policies, T")
    _add(parser, "eta", 0.5, "step size of mirror descent; Theorem 2 holds up to 0.5")
    _add(parser, "tau", 0.1, "pull towards the initial policy, in inpo, nash_md, egpo and the regularised gap")
    _add_names(parser, "algorithms", lab.COMPARED)
    _add(parser, "seed", 0, "seed of random games")


def _neural_arguments(parser: argparse.ArgumentParser) -> None:
    about = {one.arg_name: " ".join(one.description.split()) for one in parse_from_object(NeuralGame).params}
    _add_names(parser, "objectives", ("onpo", "omd", "inpo"))
    _add(
        parser, "seeds", 2, "number of seeds, from --seed on; a seed determines the game, the initial policy and draws"
    )
    _add(
        parser,
        "eta",
        None,
        "step size of mirror descent, for all (default: that with which ONPO converges fastest)",
        type=float,
    )
    for field in fields(NeuralGame):
        if field.name == "game":
            _add(parser, "game", field.default, GAME)
        elif field.name not in ("objective", "eta"):
            of = {"type": float} if field.default is None else {}
            _add(parser, field.name, field.default, about[field.name].replace("``", ""), **of)
    parser.add_argument("--spread", dest="logit_std", type=float, help=argparse.SUPPRESS)  # an old name


def _multiturn_arguments(parser: argparse.ArgumentParser) -> None:
    _add(parser, "game", "random", GAME + ", between final states")
    _add(parser, "turns", 2, "number of turns, H")
    _add(parser, "actions", 3, "number of actions in a turn, A; there are A^H final states")
    _add(parser, "count", 20, "number of games of a random kind")
    _add(parser, "steps", 20000, "number of policies, T")
    _add(parser, "eta", 0.5, "step size of mirror descent")
    _add(parser, "seed", 0, "seed of random games and samples")


ARGUMENTS = {"matrix": _matrix_arguments, "neural": _neural_arguments, "multiturn": _multiturn_arguments}


ABOUT = {
    "matrix": "Play every algorithm in small games with exact updates, and measure the bias of pairings.",
    "neural": "Train a tiny transformer by self-play through the training stack, in games whose gap is exact.",
    "multiturn": "Play games of several turns with exact updates, sampled targets and biased targets.",
}


@command
def main(argv: list[str]) -> None:
    """Run one experiment, or all three, and write the page."""
    if argv and argv[0] in EXPERIMENTS:
        options = _parser(argv[0]).parse_args(argv[1:])
        work(argv[0], options, argv)
    else:
        options = _all(argv)
        for experiment in EXPERIMENTS:
            arguments = ["--out", str(options.out)]
            work(experiment, _parser(experiment).parse_args(arguments), [experiment, *arguments])
    say(f"{write_page(options.out)}")


def _all(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog=f"{program('games')} [matrix|neural|multiturn]",
        description="Run the games lab: all three experiments with their defaults, or one with its own options.",
        epilog=" ".join(f"{name}: {about}" for name, about in ABOUT.items()) + " Each of them has its own --help.",
    )
    if argv and not argv[0].startswith("-"):
        raise UserError(
            f"there is no experiment {argv[0]}{nearest(argv[0], EXPERIMENTS)}; there are {', '.join(EXPERIMENTS)}"
        )
    _add_out(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
