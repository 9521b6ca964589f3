"""The options of a run that exists: from its directory, and what has changed since it began."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from ..arguments import CommandParser
from ..errors import UserError
from ..journal import Journal
from .aliases import canonical_options, fold_variants, with_underscores
from .combined import DEFAULTS_BY_DEVICE, NO_RESULT_DEPENDS_ON_THEM, Config
from .command_line import Parsed, parse, parse_with_sources, print_if_asked
from .messages import check_values
from .trust import KEY_VARIABLES, NEEDS_TRUST, check_trust
from .yaml_files import hints_with_variants, read_options

CONFIG_FILE = "config.yaml"  # in a run directory
RESOLVED = {"weights": "auto"}  # options with the value that stands for the one that the run began with
BEFORE = {"weights": "fp32"}  # what runs had before there was such an option, where that is not its default
COMPUTED_DEFAULTS = ("eta", "tau", *DEFAULTS_BY_DEVICE)  # options whose default is None and stands for a number


def parse_run(argv: list[str]) -> tuple[Config, bool]:
    """Returns the configuration of a command line for training, and whether ``--resume`` was given.

    A run that is resumed has the options that its journal says it began with. Other values, on the command line or in
    its ``config.yaml``, are refused unless ``--force`` is given. Where there is no run yet, one starts with the given
    options, so that the same command line can be repeated. The options in ``NEEDS_TRUST`` must be on the command line
    or in a file that it names, unless ``--trust_run`` is given: the run directory may come from a stranger.

    Raises:
        UserError: names what is wrong, every option that has changed, or every option that the directory must not set;
            or there is neither a run nor an option.
    """
    argv = with_underscores(argv)
    if "--resume" not in argv:
        return parse(argv), False
    parser = CommandParser(add_help=False)
    parser.add_argument("--out", "--output_dir", default="")
    for flag in ("--resume", "--force", "--trust_run"):
        parser.add_argument(flag, action="store_true")
    known, options = parser.parse_known_args(argv)
    if not known.out:
        raise UserError("--resume needs --out, the directory of the run to continue")
    directory, file = Path(known.out), Path(known.out, CONFIG_FILE)
    before = _options_in_journal(directory)
    if not file.exists():
        if not before and not options:
            raise UserError(f"{directory} has no run to continue; to start one there, give its options too")
        parsed = parse_with_sources(argv, before)
    else:
        if before is None:  # a run of a version whose journal did not have the options
            before = vars(_read(directory).config)
        else:
            _check_complete(file, before)
        parsed = parse_with_sources([f"--config={file}", *argv], before)
    _check_trust(directory, parsed, NEEDS_TRUST)
    changed = _changes(before or {}, parsed.config)
    if changed and not known.force:
        raise UserError(
            f"{directory} began with other options: {', '.join(changed)}. "
            + (
                f"Leave them out ({CONFIG_FILE} there may have them), or add --force: what is finished stays as it is, "
                "and the rest uses the new values"
                if any(directory.glob("iteration_*"))
                else "Nothing is finished there: add --force, and the run begins with the new ones"
            )
        )
    return print_if_asked(parsed), True


def read_run(directory: Path, flags: Sequence[str] = (), names: Iterable[str] = tuple(NEEDS_TRUST)) -> Config:
    """Returns the configuration of a run. An option that its file lacks has the value that the run began with.

    Args:
        flags: ``--name=value`` flags, which override what the directory says.
        names: the options of ``NEEDS_TRUST`` that will be used; the directory alone must not set them.

    Raises:
        UserError: if there is no run, or an option is wrong; names each option that must be on the command line.
    """
    if flags:  # first without the file, so that an error in them does not name it
        parse(list(flags), vars(_read(directory).config))
    parsed = _read(directory, flags)
    _check_trust(directory, parsed, names)
    return parsed.config


def _read(directory: Path, flags: Sequence[str] = ()) -> Parsed:
    file = directory / CONFIG_FILE
    if not file.exists():
        raise UserError(f"{directory} is not a run directory: it has no {CONFIG_FILE}")
    try:
        return parse_with_sources([f"--config={file}", *flags], _options_in_journal(directory))
    except UserError as error:
        raise UserError(f"{file} is not the configuration of a run: {error}") from None


def _check_trust(directory: Path, parsed: Parsed, names: Iterable[str]) -> None:
    if not parsed.trusted:
        check_trust(directory, parsed.config, parsed.sources, names)


def _check_complete(file: Path, options: Mapping[str, Any]) -> None:
    """Refuses a file that lacks options: cut between two lines it is still YAML, and must not stand for defaults."""
    try:
        there = read_options(str(file), hints_with_variants(get_type_hints(Config))).lines
    except UserError as error:
        raise UserError(f"{error}: remove it, and --resume writes it again") from None
    if missing := [name for name in options if name not in there]:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"{file} lacks {some}: remove it, and --resume writes it again")


def _options_in_journal(directory: Path) -> dict[str, Any] | None:
    """Returns the options that a run began with, by their names in this version; None if its journal has none."""
    journal = Journal(directory)
    options = journal.note("options")
    if options is None:
        return None
    options, hints = canonical_options(options), hints_with_variants(get_type_hints(Config))
    if unknown := sorted(options.keys() - hints.keys()):
        raise UserError(f"{directory} began with options that this version does not have: {', '.join(unknown)}")
    check_values(journal.file, options, hints)
    return fold_variants(options, [options])


def _changes(before: Mapping[str, Any], config: Config) -> list[str]:
    """Returns "--option old → new" for every option that has changed. A journal may lack options that are newer."""
    known = (*before, *COMPUTED_DEFAULTS)
    newer = {one.name: BEFORE.get(one.name, one.default) for one in fields(Config) if one.name not in known}
    return [
        f"--{name}" if name in KEY_VARIABLES else f"--{name} {was!r} → {now!r}"
        for name, was in {**before, **newer}.items()
        if before
        and name not in NO_RESULT_DEPENDS_ON_THEM
        and (now := getattr(config, name)) not in (was, RESOLVED.get(name))
    ]
