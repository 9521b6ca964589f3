"""The page of the experiment, evidence.html, and its main table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onpo_fast.files import atomic_write_text
from onpo_fast.reports.page import page_style, render

from . import columns, figures
from .comparison import (
    EXACT_ETAS,
    EXACT_ITERATIONS,
    Row,
    chosen_eta,
    exact_gaps_by_length,
    games,
    initial_gap,
    noise_floor,
    noisy_gaps_by_length,
    table,
    tuning,
)
from .recipe import LAST
from .results import Run

LEAST_PAIRS = 5  # fewer do not decide anything: with five the smallest p of a sign test is 1/16


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
        exact_iterations=EXACT_ITERATIONS,
        exact_etas=(EXACT_ETAS[0], EXACT_ETAS[-1]),
    )


def _game(runs: Sequence[Run], own: Sequence[Run]) -> dict:
    """Returns what the page shows of a game; ``runs`` are all, among which are those that chose the steps."""
    oracle, iterations = own[0].game
    rows = table(runs, own)
    draw = (figures.gap, figures.average_gap, figures.simplex, figures.gap_against_kl)
    return {
        "oracle": oracle,
        "iterations": iterations,
        "last": min(LAST, iterations),
        "rows": rows,
        "headline": headline(rows, chosen_eta(runs, "onpo", own[0].game)),
        "initial_gap": initial_gap(own),
        "plots": {one.__name__: one(own) for one in draw},
        "best_of_nash": next((run.best_of_nash for run in own if run.best_of_nash is not None), None),
        "exact": exact_gaps_by_length(own),
        "noisy": noisy_gaps_by_length(own),
        "classes": own[0].raw["classes"],
        "matrix": own[0].raw["matrix"],
        "floor": noise_floor(own[0]),
        "responses": own[0].responses,
        "prompts": len(own[0].raw["heldout"][0]),
        "environments": sorted({_environment(run) for run in own}),
    }


def _environment(run: Run) -> str:
    facts = run.raw["environment"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers"))
    return f"{facts['device']}, {versions}, commit {facts['commit'] or 'unknown'}"


def headline(rows: Sequence[Row], eta: float) -> str:
    """Returns the result of ONPO, with this step, against the control in one sentence.

    "" where it was not measured or on fewer than ``LEAST_PAIRS`` seeds.
    """
    row = next((row for row in rows if row.arm == "onpo" and row.eta == eta), None)
    control = next((row for row in rows if row.is_control), None)
    versus = row and row.versus_control
    if versus is None or versus.seeds < LEAST_PAIRS:
        return ""
    names = f"ONPO (η = {eta:g})", f"mirror descent with as many optimizer steps (η = {control.eta:g})"
    if versus.high < 0:
        verdict = f"{names[0]} ends nearer to the Nash policy than {names[1]}"
    elif versus.low > 0:
        verdict = f"{names[0]} ends farther from the Nash policy than {names[1]}"
    else:
        verdict = f"{names[0]} and {names[1]} cannot be told apart"
    return (
        f"{verdict}: the gap of its last policies differs by {versus.mean:+.3f} in the mean over {versus.seeds} paired "
        f"seeds (95% interval {versus.low:+.3f} to {versus.high:+.3f}, sign test p = {versus.p:.3f})."
    )
