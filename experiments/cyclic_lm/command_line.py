"""The command: onpo-fast experiment cyclic-lm."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from onpo_fast import oracles, signals
from onpo_fast.arguments import CommandParser, at_least, positive
from onpo_fast.console import console, say
from onpo_fast.errors import UserError
from onpo_fast.oracles.classes import ClassPreference

from . import columns, comparison, page, results
from .comparison import Row
from .jobs import Job, Runner
from .recipe import (
    ARMS,
    BEST_OF_NASH_SAMPLES,
    ITERATIONS,
    LAST,
    MAIN_ARMS,
    OPTIONS_OF_ORACLE,
    ORACLE,
    SEEDS,
    TUNING_ETAS,
    TUNING_SEEDS,
)
from .results import Run

GPU_PROCESSES = 8  # that share a GPU: a run of this small model alone leaves most of it idle
ABOUT = (
    "Train a language model by self-play under a preference that is cyclic between three classes of responses, by "
    "several methods and seeds, and measure the duality gap of every policy, which is exact given its class shares. "
    "Results add up: a run that has a file of results is not done again."
)


def run(argv: list[str]) -> None:
    """Runs what has no results yet, prints the table and writes the page."""
    options = _parser().parse_args(argv)
    if options.tune and (options.seeds or options.eta or options.best_response or options.best_of_nash):
        raise UserError("--tune has its own seed and steps, and nothing else: leave out --seeds, --eta and --best_…")
    for_turns = [arm for arm in options.arms if "multi_turn_target" in ARMS[arm].options]
    if for_turns and options.oracle not in OPTIONS_OF_ORACLE:
        raise UserError(
            f"--arms {for_turns[0]} is for conversations: it needs --oracle {' or '.join(OPTIONS_OF_ORACLE)}"
        )
    folder = options.results or options.out / "results"
    failed = [] if options.page else _run_jobs(options, folder)
    runs = results.read(folder)
    if runs:
        for game, own in comparison.games(runs).items():
            console.print(drawn(comparison.table(runs, own), *game))
        say(f"{page.write(runs, options.out)}")
    if failed or (options.page and not runs):
        raise UserError("; ".join(failed) or f"there are no results in {folder}")


def _run_jobs(options: argparse.Namespace, folder: Path) -> list[str]:
    """Runs the jobs; returns what is wrong with those that failed."""
    signals.listen()
    preference = oracles.load(options.oracle)
    if not isinstance(preference, ClassPreference):
        raise UserError(
            f"--oracle {options.oracle} is not a preference between classes: make one with cyclic_preference or "
            "transitive_preference of onpo_fast.oracles (docs/evidence.md)"
        )
    runner = Runner(
        options.out,
        folder,
        preference,
        options.processes or _default_processes(options.device),
        options.device,
        options.keep_runs,
        time.monotonic() + 60 * options.minutes if options.minutes is not None else None,
    )
    try:
        found = jobs(options, results.read(folder))
        while found and not runner.failed and not runner.is_late:
            runner.run(found)
            found = jobs(options, results.read(folder)) if options.tune else []  # one beyond an end, if it is the best
    except signals.Stopped as stopped:
        console.print(f"{stopped}; the same command goes on")
        raise SystemExit(stopped.exit_status) from None
    return runner.failed


def jobs(options: argparse.Namespace, runs: list[Run]) -> list[Job]:
    """Returns the runs that the options ask for: seed by seed, so that arms stay paired if the time is up."""
    seeds = TUNING_SEEDS if options.tune else tuple(dict.fromkeys(options.seeds or SEEDS))
    game = (options.oracle, options.iterations)

    def etas(arm: str) -> tuple[float, ...]:
        if options.tune:
            return comparison.etas_to_try(runs, arm, game)
        return (options.eta or comparison.chosen_eta(runs, arm, game),)

    found = [
        Job(arm, seed, eta, options.oracle, options.iterations)
        for seed in seeds
        for arm in dict.fromkeys(options.arms)
        for eta in etas(arm)
    ]
    first = [job for job in found if job.seed == seeds[0]]
    if options.best_response:
        found += [replace(job, kind="best_response") for job in first]
    if options.best_of_nash:
        found.append(replace(first[0], kind="best_of_nash"))
    return found


def drawn(rows: list[Row], oracle: str, iterations: int) -> Table:
    """Returns the table of one game for the terminal; the page has more columns."""
    last = min(LAST, iterations)
    title = f"Duality gap, oracle {oracle}: mean of the last {last} of {iterations + 1} policies, median over seeds"
    found = Table(title=title)
    for column in columns.TERMINAL:
        found.add_column(column.heading, no_wrap=column is columns.TERMINAL[0])
    for row in rows:
        found.add_row(*(column.cell(row) for column in columns.TERMINAL))
    return found


def _default_processes(device: str) -> int:
    """One process for each core; on a GPU at most ``GPU_PROCESSES``, which share it."""
    cores = os.cpu_count() or 1
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return min(GPU_PROCESSES, cores) if on_gpu else cores


def _seed(text: str) -> int:
    value = at_least(0)(text)
    if value in TUNING_SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is one of {TUNING_SEEDS}, which choose η")
    return value


_seed.__name__ = at_least(0).__name__


def _parser() -> CommandParser:
    parser = CommandParser(prog="onpo-fast experiment cyclic-lm", description=ABOUT)
    add = parser.add_argument
    about = f"methods to run, of {', '.join(ARMS)} (default: {' '.join(MAIN_ARMS)})"
    add("--arms", nargs="+", default=list(MAIN_ARMS), choices=list(ARMS), metavar="NAME", help=about)
    about = f"seeds, each for every arm (default: {' '.join(map(str, SEEDS))})"
    add("--seeds", nargs="+", type=_seed, metavar="N", help=about)
    about = "step of mirror descent of all arms (default: for each arm what --tune has chosen, else the recipe's)"
    add("--eta", type=positive, help=about)
    about = (
        f"choose the step of each arm on seed {TUNING_SEEDS[0]}: of {', '.join(f'{eta:g}' for eta in TUNING_ETAS)}, "
        "and one beyond while the best is an end"
    )
    add("--tune", action="store_true", help=about)
    about = (
        "also train a best response against the last policy of each arm, on the first seed; a run whose directory was "
        "removed is done again for it"
    )
    add("--best_response", action="store_true", help=about)
    about = f"also find the Nash policy over {BEST_OF_NASH_SAMPLES} responses of π_1 to each held-out prompt"
    add("--best_of_nash", action="store_true", help=about)
    about = f"preference between classes: {ORACLE}, or module:name of one of your own (default: {ORACLE})"
    add("--oracle", default=ORACLE, help=about)
    about = f"policy updates of a run (default: {ITERATIONS})"
    add("--iterations", type=at_least(1), default=ITERATIONS, metavar="T", help=about)
    about = "where run directories, results and the page go (default: runs/cyclic-lm)"
    add("--out", type=Path, default=Path("runs/cyclic-lm"), help=about)
    add("--results", type=Path, help="folder of the files of results (default: OUT/results)")
    add("--processes", type=at_least(1), help="runs at the same time (default: one a core, on a GPU at most 8)")
    add("--minutes", type=positive, help="stop after this many minutes; the same command goes on (default: no limit)")
    add("--device", default="auto", help="device of the trainer (default: auto)")
    add("--keep_runs", action="store_true", help="keep run directories when their results are written")
    add("--page", action="store_true", help="run nothing: print the table and write the page from the results")
    return parser
