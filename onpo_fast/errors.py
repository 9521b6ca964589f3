"""What a user did that cannot work, as one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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


LONGEST_MESSAGE = 2000  # characters of a message on a terminal


def printable(text: str) -> str:
    r"""Text with its control characters, and halves of surrogate pairs, written as escapes.

    >>> print(printable("a  b\x1b[31m"))
    a  b\x1b[31m
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def one_line(text: str, longest: int = LONGEST_MESSAGE) -> str:
    r"""Text of a file, a model or a server, for a terminal: one line, ``printable``, of ``longest`` characters at most.

    A longer one keeps its beginning and its end.

    >>> print(one_line("a\n b \x1b[31m"))
    a b \x1b[31m
    >>> one_line("x" * 5000, longest=60)
    'xxxxxxxxxx … 4980 characters … xxxxxxxxxx'
    """
    line = " ".join(text.split())
    kept = longest - 40  # what is said of the rest, and escapes
    if len(line) > longest:
        first, last = kept // 2 + kept % 2, kept // 2
        line = f"{line[:first]} … {len(line) - first - last} characters … {line[-last:]}"
    return printable(line)


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust end what the system told them


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Names the file in an error of the system that lacks it, also in one that a library raises as its own kind.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        said = str(error)
        number = int(found[1]) if (found := _OS_ERROR.search(said)) else None
        number = number or next((one for one in DISK_ERRORS if os.strerror(one) in said), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _in_words(error: UserError | OSError) -> str | None:
    """None for an error of no number, which is not the system's."""
    if isinstance(error, UserError):
        return str(error)
    if error.errno is None:
        return None
    where = error.filename2 or error.filename
    if isinstance(where, bytes):
        where = os.fsdecode(where)
    if where is None and error.errno not in DISK_ERRORS:
        return f"the system refused something: {error.strerror} (--debug shows where)"
    where, again = where or "a file", "and start again (a run with --resume)"
    if error.errno == errno.ENOSPC:
        return f"no space left for {where}: free some, {again}"
    if error.errno == errno.EDQUOT:
        return f"no space left in the disk quota for {where}: free some, {again}"
    if error.errno == errno.EFBIG:
        return f"{where} would be larger than a file may be here: raise the limit (ulimit -f), {again}"
    return f"cannot read or write {where}: {error.strerror}"


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's entry point: bad input, and a file that cannot be read or written, become one line.

    ``--debug`` asks for the traceback.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        try:
            if any("\0" in argument for argument in argv):
                raise UserError("an argument holds a NUL character, which no name of a file or option has")
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
