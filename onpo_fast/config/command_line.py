"""Options from the command line and from YAML files."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from ..algorithms import ALGORITHMS
from ..arguments import CommandParser, program
from ..errors import UserError
from .aliases import (
    EARLIER_NAMES,
    TRL_NAMES,
    VARIANTS,
    canonical_flags,
    fold_variants,
    names_in_words,
    with_underscores,
)
from .combined import Config
from .messages import (
    TAG_ERRORS,
    check_flags,
    check_flags_have_values,
    check_numbers_of_flags,
    explain,
    explain_tags,
    with_written_names,
)
from .oracle_names import terms
from .oracle_sections import OPTIONS_OF_ORACLES
from .sampling_section import options_of_other_samplers
from .sections import SECTIONS
from .trust import KEY_VARIABLES, TRUST_NOTE, TRUST_RUN_HELP, check_key_variable
from .yaml_files import OptionsFile, hints_with_variants, read_options

DESCRIPTION = "Train a language model by self-play with Optimistic Nash Policy Optimization (arXiv 2502.16852)."
FILE_NOTE = (
    "A file for --config holds options as above, flat (eta: 20) or by section (algorithm: {eta: 20}), where a section "
    f"is one of {', '.join(SECTIONS)}."
)
TRL_NOTE = f"Names of TRL that mean the same are accepted too: {names_in_words(TRL_NAMES)}."
SWITCHES = {
    "debug": "Show the traceback of an error in the input.",
    "print_config": "Print every option with its value as YAML, and exit.",
    "resume": "Continue the run in --out, or start it if there is none. A finished stage is not repeated.",
    "force": "With --resume: continue although options, the model or the prompts have changed since the run began. "
    "What is finished stays as it is.",
    "trust_run": TRUST_RUN_HELP,
}
METAVARS = {int: "N", float: "X", str: "TEXT", dict: "JSON"}
WIDTH_OF_FLAGS = 28  # columns of --help


Place = tuple[str, int, str]  # a file, a line, and the name of an option there


@dataclass
class Parsed:
    """A configuration, and where its values come from."""

    config: Config
    sources: dict[str, tuple[str, int] | None]  # option → (file, line), or None if the command line sets it
    trusted: bool  # whether --trust_run was given
    print_config: bool


def parse(argv: list[str], defaults: Mapping[str, Any] | None = None) -> Config:
    """Returns the configuration of a command line.

    Args:
        defaults: values to use in place of the options' own defaults.

    Raises:
        UserError: names the option, or the file and line, that is wrong.
        SystemExit: after --help and --print_config.
    """
    parsed = parse_with_sources(argv, defaults)
    if not parsed.trusted:
        for name in KEY_VARIABLES:
            check_key_variable(name, parsed.config, parsed.sources)
    return print_if_asked(parsed)


def print_if_asked(parsed: Parsed) -> Config:
    """Returns the configuration or, with --print_config, prints it and exits."""
    if parsed.print_config:
        print(parsed.config.to_yaml(), end="")
        raise SystemExit(0)
    return parsed.config


def parse_with_sources(argv: list[str], defaults: Mapping[str, Any] | None = None) -> Parsed:
    """``parse`` without its checks of trust; also returns where each value comes from."""
    parser = _parser(defaults or {})
    hints = hints_with_variants(get_type_hints(Config))
    file_parser = CommandParser(add_help=False)
    file_parser.add_argument("--config", action="append", default=[])
    # files first, wherever they stand: flags override them
    files, flags = file_parser.parse_known_args(with_underscores(argv))
    flags, written = canonical_flags(flags)
    check_flags(flags, parser._option_string_actions)
    read = {file: read_options(file, hints) for file in files.config}
    flags = _complete_switches(flags, [name for name, hint in hints.items() if hint is bool])
    check_numbers_of_flags(flags, hints)
    check_flags_have_values(flags, {name: " ".join(about.split()) for name, about in _documented().items()})
    try:  # each file was read once: what is parsed is what was checked
        texts = [f"--config={read[file].text}\n" for file in files.config]
        values = parser.parse_args(texts + flags).as_dict()
        given = parser.parse_args(flags, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        lines = {file: {name: place[1:] for name, place in _places(file, read[file]).items()} for file in files.config}
        message = explain_tags(flags, hints) or explain(error, flags, lines, hints)
        raise UserError(with_written_names(message, written, {})) from None
    except (*TAG_ERRORS, OverflowError, RecursionError) as error:  # also for numbers of thousands of digits
        raise UserError(explain_tags(flags, hints) or f"the options cannot be read: {error}") from None
    places: dict[str, Place | None] = {}
    for file in files.config:  # a later file overrides an earlier one
        places |= _places(file, read[file])
    # a flag such as --judge_request.key adds to the value of a file: then the value is the file's too
    places |= {name: None for name, value in given.items() if name in hints and values[name] == value}
    switches = {name: values.pop(name) for name in SWITCHES}
    del values["config"]
    if "sampler" in given:  # options of the sampler that a file names are for that one
        for name, default in options_of_other_samplers(values["sampler"]).items():
            if places.get(name, ()) is not None:
                values[name] = default
                places.pop(name, None)
    _check_options_of_oracles(values, places, "oracle" in given)
    layers = [defaults or {}, *(yaml.safe_load(read[file].text) for file in files.config), given]
    try:
        config = Config(**fold_variants(values, layers))
    except UserError as error:
        raise UserError(with_written_names(str(error), written, places)) from None
    if config.out is None:
        config.out = f"runs/{datetime.now():%Y%m%d-%H%M%S}"
    sources = {name: place and place[:2] for name, place in places.items()}
    return Parsed(config, sources, switches["trust_run"], switches["print_config"])


def _check_options_of_oracles(values: Mapping[str, Any], places: Mapping[str, Place | None], chosen: bool) -> None:
    """Refuses options of another oracle than the one that judges, as where --oracle was forgotten.

    Args:
        chosen: whether --oracle is a flag: options of oracles that a file names are for the file's then.
    """
    members = {member.partition("=")[0] for _, member in terms(values["oracle"])}
    for name, wanted in OPTIONS_OF_ORACLES.items():
        place = places.get(name, ())
        if place == () or values[name] is None or (chosen and place is not None):
            continue
        if not members & set(wanted):
            where = f"{place[0]}, line {place[1]}: {place[2]}" if place else f"--{name}"
            raise UserError(
                f"{where} is for --oracle {' or '.join(wanted)}, and the oracle is {values['oracle']}: give "
                f"--oracle {wanted[0]}, or leave {name} out"
            )


def _places(file: str, options: OptionsFile) -> dict[str, Place]:
    return {name: (file, line, options.written.get(name, name)) for name, line in options.lines.items()}


def _complete_switches(argv: Sequence[str], names: Iterable[str]) -> list[str]:
    """Replaces ``--name`` without a value by ``--name=true``, for options that are true or false."""
    flags = {f"--{name}" for name in names}
    following = [*argv[1:], "--"]
    return [f"{one}=true" if one in flags and after.startswith("--") else one for one, after in zip(argv, following)]


class _HelpFormatter(DefaultHelpFormatter):
    """Shows an option's default, not its Python type; keeps paragraphs and the lines of a list."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "max_help_position": WIDTH_OF_FLAGS})

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if isinstance(action, argparse._HelpAction):
            return "Show this help and exit."
        if action.default is None or action.default is False or action.default == argparse.SUPPRESS:
            return text
        return text if "Default:" in text else f"{text} Default: {action.default}."

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = []
        for item in re.split("\n(?=- )", text):
            indent = "  " if item.startswith("- ") else ""
            lines += _wrap(item, width, subsequent_indent=indent)
        return lines

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [_wrap(one, width, initial_indent=indent, subsequent_indent=indent) for one in text.split("\n\n")]
        return "\n\n".join(map("\n".join, paragraphs))


def _wrap(text: str, width: int, **indents: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, **indents)


def _parser(defaults: Mapping[str, Any]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program("train"),
        usage=f"{program('train')} [--config FILE] [--out DIR] [--resume] [OPTIONS]",
        description=DESCRIPTION,
        epilog=f"{FILE_NOTE}\n\n{TRL_NOTE}\n\n{TRUST_NOTE}",
        exit_on_error=False,
        print_config=None,
        formatter_class=_HelpFormatter,
    )
    about = "YAML file with options. Flags override it, and a later file overrides an earlier one."
    parser.add_argument("--config", action="config", metavar="FILE", help=about)
    for name, about in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=about)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section)
        group = parser._action_groups[-1]
        group.title, group.description = name, section.__doc__
    hints = get_type_hints(Config)
    for name, hint in hints.items():
        action = parser._option_string_actions[f"--{name}"]
        action.metavar = next((METAVARS[kind] for kind in METAVARS if hint in (kind, kind | None)), action.metavar)
    about = "".join(f"\n- {name}: {algorithm.about}" for name, algorithm in ALGORITHMS.items())
    parser._option_string_actions["--objective"].help += about
    for name, kind in VARIANTS.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.set_defaults(dict(defaults))
    return parser


def _documented() -> dict[str, str]:
    """Returns the description of every option."""
    return {
        option.arg_name: option.description
        for section in SECTIONS.values()
        for option in docstring_parser.parse_from_object(section).params
    }


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds options of ``Config``, with its help, and ``--trust_run`` to another command, whose run has their values."""
    documented = _documented()
    for name in names:
        value = {"action": "store_const", "const": "true"} if get_type_hints(Config)[name] is bool else {}
        about = re.sub(r"\s*Default: .*", "", documented[name], flags=re.DOTALL).replace("%", "%%").replace("\n", " ")
        parser.add_argument(f"--{name}", help=f"{about} Default: the run's value.", **value)
    for other, name in EARLIER_NAMES.items():
        if name in names:
            parser.add_argument(f"--{other}", dest=name, help=argparse.SUPPRESS)
    parser.add_argument("--trust_run", action="store_true", help=TRUST_RUN_HELP)


def given_options(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Returns the options of ``add_options`` that were given, as ``--name=value`` flags for ``read_run``."""
    given = [f"--{name}={value}" for name in names if (value := getattr(options, name)) is not None]
    return [*given, "--trust_run"] if options.trust_run else given
