"""Errors that a user can fix: one line on stderr and exit status 2."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it: 128 + SIGINT


class UserError(Exception):
    """Bad input. The message names the file, line, field or flag and says what to do."""


class UnusableResults(UserError):
    """Results of a stage that must not be used, so that they are discarded and made anew."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean …?" with the known name most like this one, or "" if none is like it.

    >>> nearest("itarations", ["iterations", "epochs"])
    '; did you mean iterations?'
    >>> nearest("colour", ["iterations", "epochs"])
    ''
    """
    known = list(known)
    near = [one for one in known if one.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near and name.strip("-") else ""


LONGEST_MESSAGE = 2000  # characters of an error on a terminal


def printable(text: str) -> str:
    r"""Returns text with control characters and halves of surrogate pairs written as escapes.

    >>> print(printable("a  b\x1b[31m"))
    a  b\x1b[31m
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def one_line(text: str, longest: int = LONGEST_MESSAGE) -> str:
    r"""Returns text from a file, a model or a server as one ``printable`` line for a terminal.

    A line of more than ``longest`` characters keeps its beginning and its end.

    >>> print(one_line("a\n b \x1b[31m"))
    a b \x1b[31m
    >>> one_line("x" * 5000, longest=60)
    'xxxxxxxxxx … 4980 characters … xxxxxxxxxx'
    """
    line = " ".join(text.split())
    kept = longest - 40  # the rest is for the note in the middle and for escapes
    if len(line) > longest:
        first, last = kept // 2 + kept % 2, kept // 2
        line = f"{line[:first]} … {len(line) - first - last} characters … {line[-last:]}"
    return printable(line)


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # libraries written in Rust end an error of the system with this


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Adds the name of a file to errors of the operating system that lack it.

    A library may raise such an error as a type of its own; it becomes an ``OSError``.

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
        text = str(error)
        number = int(found[1]) if (found := _OS_ERROR.search(text)) else None
        number = number or next((one for one in DISK_ERRORS if os.strerror(one) in text), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _describe(error: UserError | OSError) -> str | None:
    """Returns the text of an error for the user; None for an ``OSError`` that is not the operating system's."""
    if isinstance(error, UserError):
        return str(error)
    if error.errno is None:
        return None
    where = error.filename2 or error.filename
    if isinstance(where, bytes):
        where = os.fsdecode(where)
    if where is None and error.errno not in DISK_ERRORS:
        return f"the operating system refused an operation: {error.strerror} (--debug shows where)"
    where, again = where or "a file", "and start again (a run with --resume)"
    if error.errno == errno.ENOSPC:
        return f"no space left for {where}: free some space, {again}"
    if error.errno == errno.EDQUOT:
        return f"no space left in the disk quota for {where}: free some space, {again}"
    if error.errno == errno.EFBIG:
        return f"{where} would exceed the maximum size of a file: raise the limit (ulimit -f), {again}"
    return f"cannot read or write {where}: {error.strerror}"


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps the entry point of a command.

    Bad input, and a file that cannot be read or written, become one line on stderr and exit status 2. With ``--debug``
    the exception is raised instead.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # see onpo_fast/__init__.py
        try:
            if any("\0" in argument for argument in argv):
                raise UserError("an argument holds a NUL character, which no file or option name can have")
            main([argument for argument in argv if argument != "--debug"])
        except (UserError, OSError) as error:
            if "--debug" in argv or not (message := _describe(error)):
                raise
            print("error: " + one_line(message), file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            if "--debug" in argv:
                raise
            raise SystemExit(INTERRUPTED) from None

    return run
