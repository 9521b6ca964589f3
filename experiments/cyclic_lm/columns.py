"""The columns of the table of arms: for the terminal, as Markdown and on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .comparison import Paired, Row, Summary
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


def difference(versus: Paired | None) -> str:
    """Returns the mean difference from the control, with its interval if there is one."""
    if versus is None:
        return ABSENT
    mean = f"{versus.mean:+.3f}"
    return mean if versus.low is None else f"{mean} ({versus.low:+.3f} to {versus.high:+.3f})"


def below(versus: Paired | None) -> str:
    """Returns on how many seeds an arm is nearer to Nash than the control."""
    return ABSENT if versus is None else f"{versus.wins} of {len(versus.difference.values)}"


ALL = (
    Column("arm", lambda row: row.label),
    Column("η", lambda row: f"{row.eta:g}"),
    Column("seeds", lambda row: str(row.seeds)),
    Column("gap", lambda row: interval(row.gap)),
    Column("with exact fits", lambda row: known(row.exact_gap, ".3f")),
    Column(f"minus {ARMS[BASELINE].label}", lambda row: difference(row.paired)),
    Column("seeds below it", lambda row: below(row.paired)),
    Column("sign test p", lambda row: known(row.paired and row.paired.p, ".3f")),
    Column("KL to π₁, nats", lambda row: f"{row.kl:.2f}"),
    Column("trained best response wins", lambda row: known(row.best_response, ".1%")),
    Column("gap by prompt, at least", lambda row: interval(row.prompt_gap)),
    Column("gap of the mean policy", lambda row: interval(row.average_gap)),
    Column("wins against π₁", lambda row: f"{row.win_rate:.1%}"),
    Column("cyclic triples", lambda row: f"{row.cyclic_triples:.1%}"),
    Column("margins reached", lambda row: known(row.reached, ".0%")),
    Column("moved", lambda row: known(row.movement and row.movement.share, ".0%")),
    Column("noise of a fit, nats", lambda row: known(row.movement and row.movement.noise, ".2f")),
    Column("optimizer steps", lambda row: str(row.steps)),
)
MARKDOWN = ALL[:10]  # the page has all
MEDIAN = Column("gap", lambda row: f"{row.gap.median:.3f}")  # without its interval, for the width of a terminal
TERMINAL = (*ALL[:3], MEDIAN, *ALL[4:8])


def markdown(rows: Sequence[Row]) -> str:
    """Returns the main columns of a game's table as Markdown."""
    head = [column.heading for column in MARKDOWN]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *([column.cell(row) for column in MARKDOWN] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
