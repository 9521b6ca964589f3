"""Error messages for options: which option, or which file and line, is wrong, and what fits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import yaml

from ..arguments import not_known
from ..errors import UserError

TAG_ERRORS = (ValueError, KeyError, IndexError, AttributeError, TypeError)  # PyYAML, for a value unlike its tag
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a JSON object"}


def check_flags(argv: Iterable[str], known: Iterable[str]) -> None:
    """Refuses unknown flags. Abbreviations are unknown too: a new option would change what they mean."""
    known = list(known)
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag.partition(".")[0] not in known:  # --judge_request.key has a key of its own
            raise UserError(not_known(flag, known))


def check_values(path: Path, values: Mapping[str, object], hints: Mapping[str, object]) -> None:
    """Refuses a value that does not fit the type of its option.

    Args:
        path: the JSON file that holds the values, for the message.
        hints: the type of every option.

    Raises:
        UserError: names the file and the option.
    """
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserError(f"{path}: {name} must be {type_in_words(hints[name])}, not {str(value)[:100]}")


def _fits(value: object, hint: object) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if kinds := get_args(hint):  # int | None
        return any(_fits(value, kind) for kind in kinds)
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int) and abs(value) >= 2**63:
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def check_flags_have_values(argv: Sequence[str], about: Mapping[str, str]) -> None:
    """Refuses the name of an option at the end of a command line or before another flag, where its value is missing.

    Args:
        about: what each option that takes a value is for.

    Raises:
        UserError: names the option and says what it takes.
    """
    for argument, following in pairwise([*argv, "--"]):
        name = argument.removeprefix("--")
        if argument.startswith("--") and name in about and following.startswith("--"):
            raise UserError(f"{argument} needs a value: {about[name]}")


# what YAML 1.1 reads otherwise than people: 010 as 8, 1_0 as 10, 1:30 as 90
_ODD_NUMBER = re.compile(r"[-+]?(0[0-9xXoObB_].*|[0-9][0-9_]*[_:][0-9_:.]*)")


def check_number(where: str, value: str, hint: object) -> None:
    """Raises ``UserError`` if the value of an option that is a number is not written as people read it.

    Args:
        where: the option, with its file and line or as a flag.
        hint: its type.
    """
    if {int, float} & {hint, *get_args(hint)} and _ODD_NUMBER.fullmatch(value):
        raise UserError(f"{where} must be {type_in_words(hint)} in plain decimal digits, not {value}")


def check_numbers_of_flags(argv: Sequence[str], hints: Mapping[str, object]) -> None:
    """Does what ``check_number`` does for all flags.

    Args:
        hints: the type of every option.
    """
    for argument, following in pairwise([*argv, "--"]):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            check_number(flag, value if equals else following, hints.get(flag[2:]))


def with_written_names(
    message: str, written: Mapping[str, str], sources: Mapping[str, tuple[str, int, str] | None]
) -> str:
    """Adds to an error about an option the name that it was given by or, if a file sets it, the file and line.

    Args:
        message: the first option that it names is the one that is wrong.
        written: option → its name in the command line, where that is another.
        sources: option → (file, line, its name there), or None if the command line sets it.
    """
    for name in re.findall(r"--(\w+)", message)[:1]:
        if source := sources.get(name):
            file, line, there = source
            return f"{message} ({file}, line {line}: {there})"
        if name in written:
            return message.replace(f"--{name}", f"--{written[name]} (--{name})", 1)
    return message


def explain(
    error: Exception,
    argv: Sequence[str],
    files: Mapping[str, Mapping[str, tuple[int, str]]],
    hints: Mapping[str, object],
) -> str:
    """Returns an error of jsonargparse about a value in plain words.

    Args:
        argv: the command line.
        files: for every YAML file, the line of each option in it and its name there.
        hints: the type of every option.
    """
    text = " ".join(str(error).split())
    if unknown := re.fullmatch(r"unrecognized arguments: (\S+).*", text):
        return not_known(unknown[1], ())
    key = re.search(r'[Kk]ey "(\w+)"', text)
    if not key or (name := key[1]) not in hints:
        return f"{text} (see --help)"
    value = re.search(r".*(?:Got|Given) value: ?(.*)", text)  # the last match: before it, those of a union's members
    given = {"None": "null"}.get(value[1], value[1]) if value else "that"
    where = f"--{name}"
    if f"{where}={given}" not in argv and (where, given) not in pairwise(argv):
        places = ((path, *of[name]) for path, of in files.items() if name in of)
        where = next((f"{path}, line {line}: {there}" for path, line, there in places), where)
    return f"{where} must be {type_in_words(hints[name])}, not {given or 'empty'}"


def explain_tags(argv: Sequence[str], hints: Mapping[str, object]) -> str:
    """Returns the error about the first value in a command line that does not fit its YAML tag; "" if all fit."""
    for argument, following in pairwise([*argv, ""]):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").partition(".")[0]
        if flag.startswith("--") and name in hints:
            given = value if equals else following
            try:
                yaml.safe_load(given)
            except yaml.YAMLError:
                pass
            except TAG_ERRORS:
                return f"{flag} must be {type_in_words(hints[name])}, not {given[:100]}"
    return ""


def type_in_words(hint: object) -> str:
    """Returns what values of a type are, for a message.

    >>> type_in_words(int | None), type_in_words(Literal["soft", "sampled"])
    ('a whole number', 'one of soft, sampled')
    """
    options = [option for option in get_args(hint) if option is not NoneType]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, options))}"
    return " or ".join(map(type_in_words, options)) if options else TYPES.get(hint, str(hint))
