"""The terminal: messages of one line, and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from . import signals
from .errors import one_line

Progress = Callable[[int], None]  # called with the number of items (responses, groups, …) that are newly done

Item = TypeVar("Item")

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(message: str) -> None:
    """Print a message as one line. Control characters, as from a file or a server, are escaped."""
    console.print(one_line(message))


announced: set[object] = set()  # topics of ``say_once``


def say_once(topic: object, message: str) -> None:
    """``say`` a message unless this process has already said one about the topic (any hashable object)."""
    if topic not in announced:
        announced.add(topic)
        say(message)


_bars: list[Bars] = []  # the one that is shown, if any: several bars are in one


@contextmanager
def progress(description: str, total: int, stoppable: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with the time left; yields a function that advances it by a number of steps.

    Within another one, it is shown below that. The function may be called in another thread.

    Args:
        description: text before the bar.
        total: number of steps.
        stoppable: whether advancing raises ``Stopped`` after Ctrl-C or SIGTERM; False where stopping would lose work.
    """
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with nullcontext(_bars[0]) if _bars else _shown(Bars(*columns, console=console)) as bars:
        task = bars.add_task(description, total=total)

        def advance(done: int) -> None:
            bars.advance(task, done)
            if stoppable:
                signals.stop_if_asked()

        yield advance


@contextmanager
def _shown(bars: Bars) -> Iterator[Bars]:
    with bars:
        _bars.append(bars)
        try:
            yield bars
        finally:
            _bars.clear()


def counted(items: Iterable[Item], done: Callable[[int], None]) -> Iterator[Item]:
    """Yield the items and report their number to ``done``, a hundred at a time."""
    number = 0
    for number, item in enumerate(items, 1):
        yield item
        if number % 100 == 0:
            done(100)
    done(number % 100)
