"""Options in YAML files, flat or by section, with the line of each for error messages.

A file may come from a stranger: it is read with a size limit, without aliases, and only tags of the safe kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import NamedTuple, get_args

import yaml

from ..errors import UserError, nearest
from ..files import read_regular
from .aliases import OTHER_VALUES, VARIANTS, canonical_name, instead_of
from .messages import TAG_ERRORS, check_number, type_in_words
from .sections import SECTIONS

LARGEST_YAML = 2**18  # bytes; the config.yaml of a run has about 2000


class OptionsFile(NamedTuple):
    """The options of a YAML file."""

    text: str  # flat YAML with the canonical names
    lines: dict[str, int]  # option → its line in the file
    written: dict[str, str]  # option → its name in the file, where that is another


def read_yaml(path: str | Path) -> tuple[yaml.Node | None, object]:
    """Reads a YAML file: its tree, whose nodes know their lines, and its value.

    Aliases are refused: a few lines of them can stand for billions of values, or for a value that contains itself.

    Raises:
        UserError: if it is not a regular file, is larger than ``LARGEST_YAML``, or is not YAML of the safe kind; names
            the line.
    """
    content = read_regular(Path(path), LARGEST_YAML)
    try:
        text = content.decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # first: it stops early where the nesting is too deep
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path}, line {line}: *{event.anchor} is an alias: write the value itself")
            if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
                raise UserError(f"{path}, line {line}: {event.value!a} holds half of a surrogate pair: it is not text")
            if isinstance(event, yaml.ScalarEvent) and event.tag:
                _check_tag(f"{path}, line {line}", event)
        return root, yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}, line {line}: not YAML ({error.problem})") from None
    except RecursionError:
        raise UserError(f"{path}: not YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a number of thousands of digits, a bad date
        raise UserError(f"{path}: not YAML ({error})") from None


def _check_tag(where: str, event: yaml.ScalarEvent) -> None:
    """Raises ``UserError`` if a value does not fit its tag, as in ``seed: !!bool perhaps``."""
    try:
        yaml.SafeLoader("").construct_object(yaml.ScalarNode(event.tag, event.value))
    except TAG_ERRORS:
        kind = event.tag.rpartition(":")[2]
        raise UserError(f"{where}: not YAML (!!{kind} does not fit the value {event.value[:100]!a})") from None
    except yaml.YAMLError:  # an unknown tag: ``yaml.safe_load`` says so with the line
        pass


def read_options(path: str, hints: Mapping[str, object]) -> OptionsFile:
    """Reads a YAML file of options, which may be flat (``eta: 20``) or by section (``algorithm: {eta: 20}``).

    Args:
        hints: the type of every option.

    Raises:
        UserError: if it is not YAML of the safe kind, or has an unknown option, an option in another section, an option
            twice, or null for an option that needs a value; names the line.
    """
    root, _ = read_yaml(path)
    written: dict[str, str] = {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f'{path} must hold options as "name: value"')
    entries: list[tuple[yaml.Node, yaml.Node]] = []
    lines: dict[str, int] = {}
    for key, value, section in _entries(root):
        line = key.start_mark.line + 1
        name = _known_name(f"{path}, line {line}", str(key.value), section, hints)
        if name in lines:
            also = f"{key.value} is " if key.value == name else f"{key.value} is another name of {name}, which is "
            raise UserError(f"{path}, line {line}: {also}there twice, first in line {lines[name]}")
        if value.tag == "tag:yaml.org,2002:null" and NoneType not in get_args(hints[name]):
            raise UserError(f"{path}, line {line}: {key.value} must be {type_in_words(hints[name])}, not null")
        if isinstance(value, yaml.ScalarNode):
            check_number(f"{path}, line {line}: {key.value}", value.value, hints[name])
            value.value = OTHER_VALUES.get(name, {}).get(value.value, value.value)
        if key.value != name:
            written[name] = str(key.value)
        key.value, lines[name] = name, line
        entries.append((key, value))
    try:
        flat = yaml.MappingNode(root.tag, entries, flow_style=False)
        return OptionsFile(yaml.serialize(flat, Dumper=yaml.SafeDumper, allow_unicode=True), lines, written)
    except RecursionError:
        raise UserError(f"{path}: not YAML (nested too deeply)") from None


def _entries(root: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node, str | None]]:
    """Yields the key and value of every option, and the section that it is in."""
    for key, value in root.value:
        if str(key.value) in SECTIONS and isinstance(value, yaml.MappingNode):
            yield from ((*entry, key.value) for entry in value.value)
        else:
            yield key, value, None


def _known_name(where: str, written: str, section: str | None, hints: Mapping[str, object]) -> str:
    """Returns the option of this name; ``UserError`` if there is none, or it belongs to another section."""
    name = canonical_name(written)
    if name not in hints:
        if hint := instead_of(written):
            raise UserError(f"{where}: there is no option {written}: {hint}")
        if written in SECTIONS:
            raise UserError(
                f"{where}: {written} is a section: its options come below it, as in {written}: {{name: value}}"
            )
        known = hints if section else [*hints, *SECTIONS]
        raise UserError(f"{where}: there is no option {written}{nearest(written, known) or ' (see --help)'}")
    own = next((own for own, kind in SECTIONS.items() if name in kind.__dataclass_fields__), "algorithm")
    if section not in (None, own):
        raise UserError(f"{where}: {written} belongs to the section {own}, not to {section}")
    return name


def hints_with_variants(hints: Mapping[str, object]) -> dict[str, object]:
    """Returns the types of options together with those of ``VARIANTS``."""
    return {**hints, **VARIANTS}
