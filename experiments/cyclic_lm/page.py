"""The page of the experiment: evidence.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onpo_fast.reports.page import page_style, render

from . import figures
from .comparison import Run, chosen_eta, games, table
from .recipe import ARMS, BASELINE, LAST, TUNING_SEEDS


def write(runs: Sequence[Run], out: Path) -> Path:
    """Writes OUT/evidence.html from all results and returns its path."""
    shown = []
    with page_style():
        for (oracle, iterations), own in games(runs).items():
            plots = {draw.__name__: draw(own) for draw in (figures.gap, figures.simplex, figures.gap_against_kl)}
            facts = {"oracle": oracle, "iterations": iterations, "environment": own[0].raw["environment"]}
            nash = next((run.best_of_nash for run in own if run.best_of_nash is not None), None)
            shown.append({**facts, "best_of_nash": nash, "rows": table(own), "plots": plots, "headline": headline(own)})
    return render(
        "evidence.html.jinja",
        out / "evidence.html",
        {},
        Path(__file__).parent,
        games=shown,
        tuning=tuning(runs),
        last=LAST,
        baseline=ARMS[BASELINE].label,
        arms=ARMS,
    )


def headline(runs: Sequence[Run]) -> str:
    """Returns the result of ONPO against OMD with two fits in one sentence; "" where it was not measured."""
    versus = next((row.paired for row in table(runs) if row.arm == "onpo"), None)
    if versus is None or versus.low is None or versus.high is None:
        return ""
    if versus.high < 0:
        verdict = "ONPO ends nearer to the Nash policy than mirror descent with as many optimizer steps"
    elif versus.low > 0:
        verdict = "ONPO ends farther from the Nash policy than mirror descent with as many optimizer steps"
    else:
        verdict = "ONPO and mirror descent with as many optimizer steps cannot be told apart"
    return (
        f"{verdict}: the gap of its last policies is {versus.mean:+.3f} in the mean over "
        f"{len(versus.difference.values)} paired seeds (95% interval {versus.low:+.3f} to {versus.high:+.3f}, sign "
        f"test p = {versus.p:.3f})."
    )


def tuning(runs: Sequence[Run]) -> list[dict]:
    """Returns what each arm's steps reached on the tuning seeds, and which was chosen."""
    tried = figures.by_arm([run for run in runs if run.seed in TUNING_SEEDS])
    return [
        {"arm": arm, "gaps": {run.eta: run.last_gap for run in own}, "chosen": chosen_eta(own, arm)}
        for arm, own in tried.items()
    ]
