"""What a user did that cannot work, as one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import sys
from collections.abc import Callable, Iterable, Sequence

INTERRUPTED = 130  # the exit status of what Ctrl-C has stopped


class UserError(Exception):
    """Bad input. The message names the file, line, field or flag and says what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" with the known name that this one comes nearest to, or nothing.

    >>> nearest("itarations", ["iterations", "epochs"])
    '; did you mean iterations?'
    >>> nearest("colour", ["iterations", "epochs"])
    ''
    """
    known = list(known)
    near = [one for one in known if one.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near and name.strip("-") else ""


def not_known(argument: str, known: Iterable[str]) -> str:
    """What is wrong with an argument that is none of the known flags."""
    flag = argument.partition("=")[0]
    if not flag.startswith("-"):
        return f"one argument too many: {argument} (see --help)"
    return f"there is no option {flag}{nearest(flag, known) or ' (see --help)'}"


class CommandParser(argparse.ArgumentParser):
    """A command line, whose errors are ``UserError``s. It has ``--debug``, which ``command`` takes care of."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        known = self._option_string_actions
        for argument in argv:  # first: of several things that are wrong, a flag that is none explains the others
            if argument.startswith("--") and argument.partition("=")[0] not in ("--", *known):
                raise UserError(not_known(argument, known))
        values, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(not_known(unknown[0], known))
        return values

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


def one_line(text: str) -> str:
    r"""Text of a file, a model or a server, for a terminal: a line, in which control characters are told, not obeyed.

    >>> print(one_line("a\n b \x1b[31m"))
    a b \x1b[31m
    """
    line = " ".join(text.split())
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)


def _in_words(error: UserError | OSError) -> str | None:
    """None for an error of the system that names no file."""
    if isinstance(error, UserError):
        return str(error)
    where = error.filename2 or error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for {where or 'a file'}: free some, and start again (a run with --resume)"
    return f"cannot read or write {where}: {error.strerror}" if where else None


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's entry point: bad input, and a file that cannot be read or written, become one line.

    ``--debug`` asks for the traceback.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        try:
            main([argument for argument in argv if argument != "--debug"])
        except (UserError, OSError) as error:
            if "--debug" in argv or not (message := _in_words(error)):
                raise
            print("error: " + one_line(message), file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            if "--debug" in argv:
                raise
            raise SystemExit(INTERRUPTED) from None

    return run
