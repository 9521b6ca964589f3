"""The page of the experiment, evidence.html, and its main table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onpo_fast.files import atomic_write_text
from onpo_fast.reports.page import page_style, render

from . import columns, figures
from .comparison import Row, chosen_eta, games, noise_floor, table
from .recipe import ARMS, BASELINE, LAST, TUNING_SEEDS
from .results import Run


def write(runs: Sequence[Run], out: Path) -> Path:
    """Writes OUT/evidence.html and OUT/evidence.md from all results and returns the path of the page."""
    with page_style():
        shown = [_game(runs, own) for own in games(runs).values()]
    tables = (f"{one['oracle']}, {one['iterations']} iterations\n\n{columns.markdown(one['rows'])}" for one in shown)
    atomic_write_text(out / "evidence.md", "\n\n".join(tables) + "\n")
    return render(
        "evidence.html.jinja",
        out / "evidence.html",
        {},
        Path(__file__).parent,
        games=shown,
        tuning=tuning(runs),
        columns=columns.ALL,
        arms=ARMS,
    )


def _game(runs: Sequence[Run], own: Sequence[Run]) -> dict:
    """Returns what the page shows of a game; ``runs`` are all, among which are those that chose the steps."""
    oracle, iterations = own[0].game
    rows = table(own, chosen_eta(runs, BASELINE, own[0].game))
    draw = (figures.gap, figures.average_gap, figures.simplex, figures.gap_against_kl)
    return {
        "oracle": oracle,
        "iterations": iterations,
        "last": min(LAST, iterations),
        "rows": rows,
        "headline": headline(rows),
        "plots": {one.__name__: one(own) for one in draw},
        "best_of_nash": next((run.best_of_nash for run in own if run.best_of_nash is not None), None),
        "classes": own[0].raw["classes"],
        "matrix": own[0].raw["matrix"],
        "floor": noise_floor(own[0]),
        "responses": sum(map(len, own[0].raw["heldout"][0])),
        "prompts": len(own[0].raw["heldout"][0]),
        "environments": sorted({_environment(run) for run in own}),
    }


def _environment(run: Run) -> str:
    facts = run.raw["environment"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers"))
    return f"{facts['device']}, {versions}, commit {facts['commit'] or 'unknown'}"


def headline(rows: Sequence[Row]) -> str:
    """Returns the result of ONPO against OMD with two fits in one sentence; "" where it was not measured."""
    versus = next((row.paired for row in rows if row.arm == "onpo" and row.paired is not None), None)
    if versus is None or versus.low is None or versus.high is None:
        return ""
    if versus.high < 0:
        verdict = "ONPO ends nearer to the Nash policy than mirror descent with as many optimizer steps"
    elif versus.low > 0:
        verdict = "ONPO ends farther from the Nash policy than mirror descent with as many optimizer steps"
    else:
        verdict = "ONPO and mirror descent with as many optimizer steps cannot be told apart"
    return (
        f"{verdict}: the gap of its last policies differs by {versus.mean:+.3f} in the mean over "
        f"{len(versus.difference.values)} paired seeds (95% interval {versus.low:+.3f} to {versus.high:+.3f}, sign "
        f"test p = {versus.p:.3f})."
    )


def tuning(runs: Sequence[Run]) -> list[dict]:
    """Returns what each arm's steps reached on the tuning seeds, and which was chosen."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.seed in TUNING_SEEDS:
            groups.setdefault((run.game, run.arm), []).append(run)
    return [
        {
            "oracle": game[0],
            "arm": arm,
            "gaps": {run.eta: run.last(run.gap) for run in own},
            "chosen": chosen_eta(runs, arm, game),
        }
        for (game, arm), own in groups.items()
    ]
