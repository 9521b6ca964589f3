"""The page of the experiment: evidence.html."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from onpo_fast.reports.page import page_style, render

from . import figures
from .comparison import Run, chosen_eta, reported, table
from .recipe import ARMS, BASELINE, LAST, TUNING_SEEDS


def write(runs: Sequence[Run], out: Path) -> Path:
    """Writes OUT/evidence.html from all results and returns its path."""
    games = []
    with page_style():
        for oracle, group in itertools.groupby(reported(runs), key=lambda run: run.oracle):
            own = list(group)
            plots = {draw.__name__: draw(own) for draw in (figures.gap, figures.simplex, figures.gap_against_kl)}
            rows = table(own)
            games.append({"oracle": oracle, "runs": own, "rows": rows, "plots": plots, "headline": headline(own)})
    return render(
        str(Path(__file__).with_name("page.html.jinja").relative_to(Path(__file__).parents[2])),
        out / "evidence.html",
        {},
        games=games,
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
    found = []
    tried = [run for run in runs if run.seed in TUNING_SEEDS]
    for oracle, group in itertools.groupby(tried, key=lambda run: run.oracle):
        own = list(group)
        for arm, of_arm in figures.by_arm(own).items():
            etas = {run.eta: run.last_gap for run in of_arm}
            found.append({"oracle": oracle, "arm": arm, "gaps": etas, "chosen": chosen_eta(own, arm)})
    return found
