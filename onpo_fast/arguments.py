"""Command lines: a parser whose errors are one line, and checks of numbers."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .errors import UserError, nearest


def not_known(argument: str, known: Iterable[str]) -> str:
    """Returns the error text for an unknown flag, or for a positional argument too many."""
    flag = argument.partition("=")[0]
    if not flag.startswith("-"):
        return f"one argument too many: {argument} (see --help)"
    return f"there is no option {flag}{nearest(flag, known) or ' (see --help)'}"


def program(name: str) -> str:
    """Returns how a command of the package was started, for its usage: onpo-fast NAME, or python -m onpo_fast.NAME."""
    started = Path(sys.argv[0])
    if started.stem == "onpo-fast":
        return f"onpo-fast {name}"
    return f"python -m onpo_fast{' ' if started.parts[-2:] == ('onpo_fast', '__main__.py') else '.'}{name}"


class CommandParser(argparse.ArgumentParser):
    """A parser that raises ``UserError`` for a wrong command line. Its ``--debug`` is handled by ``command``."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="Show the traceback of an error in the input.")

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        known = self._option_string_actions
        for argument in argv:  # first, since an unknown flag often explains the other errors
            if argument.startswith("--") and argument.partition("=")[0] not in ("--", *known):
                raise UserError(not_known(argument, known))
        values, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(not_known(unknown[0], known))
        return values

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


def at_least(smallest: int) -> Callable[[str], int]:
    """Returns a type of options for ``argparse``: whole numbers from ``smallest`` on."""

    def parse(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise ValueError
        return value

    parse.__name__ = f"whole number from {smallest} on"  # argparse's messages name a type by its function
    return parse


def positive(text: str) -> float:
    """A type of options for ``argparse``: positive, finite numbers."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


positive.__name__ = "positive, finite number"
