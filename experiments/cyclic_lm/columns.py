"""The columns of the table of arms: for the terminal, as Markdown and on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .comparison import EXACT_ITERATIONS, Difference, Row, Summary, Tuning
from .recipe import ARMS, BASELINE

ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """A heading, and the text of a row's cell."""

    heading: str
    cell: Callable[[Row], str]


def known(value: float | None, form: str) -> str:
    """Returns a number in Python's format, or a dash where it was not measured."""
    return ABSENT if value is None else format(value, form)


def interval(summary: Summary) -> str:
    """Returns the median over seeds, with its interval."""
    return f"{summary.median:.3f} ({summary.low:.3f} to {summary.high:.3f})"


def difference(one: Difference | None) -> str:
    """Returns the mean difference, with its interval if there is one."""
    if one is None:
        return ABSENT
    return f"{one.mean:+.3f}" + ("" if one.low is None else f" ({one.low:+.3f} to {one.high:+.3f})")


def versus_control(row: Row) -> str:
    """Returns the difference from the control, or that it is the control."""
    return "the control" if row.is_control else difference(row.versus_control)


def below(one: Difference | None) -> str:
    """Returns on how many seeds a difference is negative."""
    return ABSENT if one is None else f"{one.below} of {one.seeds}"


def moved(row: Row) -> str:
    """Returns the share of the exact step that class shares moved by, with its standard error if there is one."""
    one = row.movement
    if one is None:
        return ABSENT
    return f"{one.share:.0%}" + ("" if one.error is None else f" ± {one.error:.0%}")


ALL = (
    Column("arm", lambda row: row.label),
    Column("η", lambda row: f"{row.eta:g}"),
    Column("seeds", lambda row: str(row.seeds)),
    Column("gap", lambda row: interval(row.gap)),
    Column("with exact fits", lambda row: known(row.exact_gap, ".3f")),
    Column(f"mean minus {ARMS[BASELINE].label}", versus_control),
    Column("seeds below it", lambda row: below(row.versus_control)),
    Column("sign test p", lambda row: known(row.versus_control and row.versus_control.p, ".3f")),
    Column("mean minus π₁", lambda row: difference(row.versus_initial)),
    Column("KL to π₁, nats", lambda row: f"{row.kl:.2f}"),
    Column("gap by prompt, lower estimate", lambda row: interval(row.prompt_gap)),
    Column("gap of the mean policy", lambda row: interval(row.average_gap)),
    Column("wins against π₁", lambda row: f"{row.win_rate:.1%}"),
    Column("cyclic triples", lambda row: f"{row.cyclic_triples:.1%}"),
    Column("margins reached", lambda row: known(row.reached, ".0%")),
    Column("moved", moved),
    Column("noise of a fit, nats", lambda row: known(row.movement and row.movement.noise, ".2f")),
    Column("trained best response wins", lambda row: known(row.best_response, ".1%")),
    Column("optimizer steps", lambda row: f"{row.steps:g}"),
)
MARKDOWN = ALL[:10]  # the page has all
MEDIAN = Column("gap", lambda row: f"{row.gap.median:.3f}")  # without its interval, for the width of a terminal
TERMINAL = (*ALL[:3], MEDIAN, *ALL[4:8])


def markdown(rows: Sequence[Row]) -> str:
    """Returns the main columns of a game's table as Markdown."""
    return _markdown(
        [column.heading for column in MARKDOWN], ([column.cell(row) for column in MARKDOWN] for row in rows)
    )


def tuning_markdown(tuning: Sequence[Tuning]) -> str:
    """Returns what the steps that were tried reached, as Markdown; the chosen ones are bold."""
    etas = sorted({eta for one in tuning for eta in one.gaps})
    rows = []
    for one in tuning:
        cells = [known(one.gaps.get(eta), ".3f") for eta in etas]
        rows.append([one.label, *(f"**{cell}**" if eta == one.chosen else cell for eta, cell in zip(etas, cells))])
    return _markdown(["arm", *(f"η = {eta:g}" for eta in etas)], rows)


def by_length_markdown(gaps: dict[str, list[tuple[float, float]]], title: str) -> str:
    """Returns ``comparison.exact_gaps_by_length`` or ``comparison.noisy_gaps_by_length`` as Markdown."""
    head = [title, *(f"{iterations} iterations" for iterations in EXACT_ITERATIONS)]
    return _markdown(
        head, ([label, *(f"{gap:.3f} (η = {eta:.2f})" for gap, eta in own)] for label, own in gaps.items())
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
