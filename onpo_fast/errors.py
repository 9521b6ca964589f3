"""What a user did that cannot work, as one line on stderr and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message names the file, line, field or flag and says what to do."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's entry point: a ``UserError`` becomes one line, unless ``--debug`` asks for the traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        try:
            main([argument for argument in argv if argument != "--debug"])
        except UserError as error:
            if "--debug" in argv:
                raise
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            raise SystemExit(2) from None

    return run
