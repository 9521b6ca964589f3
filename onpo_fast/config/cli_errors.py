"""What is wrong with a command line or its YAML file, in one line: the option, or the file and line, and what fits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import yaml

from ..errors import UserError, nearest, not_known
from ..files import read_regular

LARGEST_YAML = 2**18  # bytes; a run's config.yaml has about 2000
TAG_ERRORS = (ValueError, KeyError, IndexError, AttributeError, TypeError)  # of PyYAML, for a value unlike its tag
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a JSON object"}


def check_flags(argv: Iterable[str], known: Iterable[str]) -> None:
    """Refuses a flag that is none of the known ones (``--name``); abbreviations too: a new option would change them."""
    known = list(known)
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag.partition(".")[0] not in known:  # a dictionary's keys are its own
            raise UserError(not_known(flag, known))


def switches(argv: Sequence[str], names: Iterable[str]) -> list[str]:
    """``--name`` without a value, where the option is true or false, is ``--name=true``."""
    flags = {f"--{name}" for name in names}
    after = [*argv[1:], "--"]
    return [f"{one}=true" if one in flags and next_one.startswith("--") else one for one, next_one in zip(argv, after)]


def read_yaml(path: str | Path) -> tuple[str, yaml.Node | None, object]:
    """The text of a YAML file, its tree with the lines, and its value.

    Aliases are refused: a few lines of them stand for billions of values, or for a value that contains itself.

    Raises:
        UserError: if it is no regular file, larger than ``LARGEST_YAML``, or not YAML of the safe kind; names the line.
    """
    content = read_regular(Path(path), LARGEST_YAML)
    try:
        text = content.decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # first: it ends early where the nesting is too deep
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path}, line {line}: *{event.anchor} is an alias: write the value itself")
            if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
                raise UserError(f"{path}, line {line}: {event.value!a} holds half of a surrogate pair: it is no text")
            if isinstance(event, yaml.ScalarEvent) and event.tag:
                _check_tag(f"{path}, line {line}", event)
        return text, root, yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}, line {line}: not YAML ({error.problem})") from None
    except RecursionError:
        raise UserError(f"{path}: not YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # also of a number of thousands of digits, of a date
        raise UserError(f"{path}: not YAML ({error})") from None


def _check_tag(where: str, event: yaml.ScalarEvent) -> None:
    """Raises ``UserError`` if a value does not fit its tag, as in ``seed: !!bool perhaps``."""
    try:
        yaml.SafeLoader("").construct_object(yaml.ScalarNode(event.tag, event.value))
    except TAG_ERRORS:
        kind = event.tag.rpartition(":")[2]
        raise UserError(f"{where}: not YAML (!!{kind} does not fit the value {event.value[:100]!a})") from None
    except yaml.YAMLError:  # a tag that is not known: its message comes with the whole file's
        pass


def check_file(path: str, hints: Mapping[str, object]) -> tuple[str, dict[str, int]]:
    """The text of a YAML file, and the line of every option in it; ``hints`` has the type of every option there is.

    Raises:
        UserError: if it is not YAML (of the safe kind), holds what is no option, an option twice, or null for one that
            must have a value; names the line.
    """
    text, root, _ = read_yaml(path)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f'{path} must hold options as "name: value"')
    lines: dict[str, int] = {}
    for key, value in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name not in hints:
            raise UserError(f"{path}, line {line}: there is no option {name}{nearest(name, hints) or ' (see --help)'}")
        if name in lines:
            raise UserError(f"{path}, line {line}: {name} is there twice, first in line {lines[name]}")
        if value.tag == "tag:yaml.org,2002:null" and NoneType not in get_args(hints[name]):
            raise UserError(f"{path}, line {line}: {name} must be {_kind(hints[name])}, not null")
        lines[name] = line
    return text, lines


def check_values(path: Path, values: Mapping[str, object], hints: Mapping[str, object]) -> None:
    """Refuses a value that does not fit its option's type; ``path`` is the file that holds them, as JSON.

    Raises:
        UserError: names the file and the option.
    """
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserError(f"{path}: {name} must be {_kind(hints[name])}, not {str(value)[:100]}")


def _fits(value: object, hint: object) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if kinds := get_args(hint):  # int | None
        return any(_fits(value, kind) for kind in kinds)
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int) and abs(value) >= 2**63:  # too large for what a run goes by
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def explain(
    error: Exception, argv: Sequence[str], files: Mapping[str, Mapping[str, int]], hints: Mapping[str, object]
) -> str:
    """A parser's complaint about a value, in words.

    Args:
        error: what jsonargparse raised.
        argv: the command line.
        files: the line of every option in every YAML file, from ``check_file``.
        hints: the type of every option.
    """
    text = " ".join(str(error).split())
    if unknown := re.fullmatch(r"unrecognized arguments: (\S+).*", text):
        return not_known(unknown[1], ())
    key = re.search(r'[Kk]ey "(\w+)"', text)
    if not key or (name := key[1]) not in hints:
        return f"{text} (see --help)"
    value = re.search(r".*(?:Got|Given) value: ?(.*)", text)  # the last one: a union's own
    said = {"None": "null"}.get(value[1], value[1]) if value else "that"
    where = f"--{name}"
    if f"{where}={said}" not in argv and (where, said) not in pairwise(argv):
        where = next((f"{path}, line {of[name]}: {name}" for path, of in files.items() if name in of), where)
    return f"{where} must be {_kind(hints[name])}, not {said or 'empty'}"


def explain_tags(argv: Sequence[str], hints: Mapping[str, object]) -> str:
    """What is wrong with the first value on a command line that does not fit its YAML tag; "" if all do."""
    for argument, following in pairwise([*argv, ""]):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").partition(".")[0]
        if flag.startswith("--") and name in hints:
            said = value if equals else following
            try:
                yaml.safe_load(said)
            except yaml.YAMLError:
                pass
            except TAG_ERRORS:
                return f"{flag} must be {_kind(hints[name])}, not {said[:100]}"
    return ""


def _kind(hint: object) -> str:
    options = [option for option in get_args(hint) if option is not NoneType]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, options))}"
    return " or ".join(map(_kind, options)) if options else KINDS.get(hint, str(hint))
