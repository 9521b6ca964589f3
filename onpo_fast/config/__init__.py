"""The options of a run, from flags, YAML files and what a run began with.

Flags override the file given with ``--config``; every value used is written to ``DIR/config.yaml``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from ..errors import CommandParser, UserError
from ..models.device import device_of
from ..objectives import OBJECTIVES, Inpo, Objective
from ..pairing import PAIRINGS
from ..run.journal import Journal
from .cli_errors import TAG_ERRORS, check_file, check_flags, check_values, explain, explain_tags, switches
from .sections import (
    SECTIONS,
    AlgorithmConfig,
    DataConfig,
    FitConfig,
    JudgeConfig,
    ModelConfig,
    OracleConfig,
    RunConfig,
    SamplingConfig,
)

DESCRIPTION = "Self-play alignment by Optimistic Nash Policy Optimization (arXiv 2502.16852)."
Section = TypeVar("Section")
FILE = "config.yaml"  # in a run's directory
NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")  # of an environment variable
KEY_ENDINGS = ("_API_KEY", "_TOKEN")  # of the names of variables that a file may ask for
LARGEST_NUMBER = 2**63  # whole numbers are smaller: others are none that a run can go by
LARGEST_COUNTS = {  # of what a run makes lists, or matrices, of so many: more would fill the memory, or never end
    "iterations": 10**6,
    "epochs_auxiliary": 10**4,
    "epochs_policy": 10**4,
    "responses_per_prompt": 10**4,
    "eval_samples": 10**4,
}
TRUST = (
    "What a run directory asks for is not obeyed where it would run code, take a key from the environment, or read, "
    "write or send anything outside of the directory: give such an option again on the command line, or --trust_run "
    "if you trust whoever made the directory (docs/trust.md)."
)
TRUST_RUN = "Obey the run directory in everything: only if you trust whoever made it (docs/trust.md)."
ASKS = {  # options that only the user may set, and what a value other than the default asks for
    "oracle": "to run the Python code of {value}",
    "trust_remote_code": "to run the Python code that comes with a model",
    "judge_url": "to send conversations to {value}",
    "judge_request": "to send {value} with every request to the judge",
    "judge_key_variable": "for a key from the environment",  # its name is not repeated: it may be the key
    "judge_prompt": "to read {value} and send it to the judge",
    "judge_cache": "to write {value}",
    "report_to": "to report to Weights & Biases with your key",
}
BY_DEVICE = {"tokens_per_microbatch": (16384, 1024), "sampling_batch_size": (256, 32)}  # defaults on a GPU, on a CPU

# the arguments of apply_chat_template that are not its template's variables
TEMPLATE_ARGUMENTS = frozenset(
    "self conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs processor_kwargs strftime_now raise_exception".split()
)


@dataclass
class Config(RunConfig, FitConfig, AlgorithmConfig, JudgeConfig, OracleConfig, SamplingConfig, DataConfig, ModelConfig):
    """Every option of a run. ``section`` gives a consumer its own."""

    def section(self, kind: type[Section]) -> Section:
        """A section of the options, as ``config.section(FitConfig)``."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    def __post_init__(self) -> None:
        if self.eta is None:
            self.eta = 0.05 if self.objective == "inpo" else 20.0
        if self.tau is None:
            self.tau = self.eta / 3 if self.objective == "inpo" else 0.05
        if not NAME.fullmatch(self.judge_key_variable):
            raise UserError(
                "--judge_key_variable must be the NAME of an environment variable, as OPENAI_API_KEY (what was given "
                "is not repeated here: it may be the key)"
            )
        for name, value in vars(self).items():
            if isinstance(value, str) and "\0" in value:
                raise UserError(f"--{name} holds a NUL character, which no name of a file has")
            # "" is what a shell makes of a variable that is not set
            if value == "" or (value is None and name in ("model", "oracle", "prompt_column")):
                raise UserError(f"--{name} must not be empty")
            if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
                raise UserError(f"--{name} must be smaller than 2**63")
        _check_template_variables(self.chat_template_kwargs)
        for name, (on_gpu, on_cpu) in BY_DEVICE.items():
            if getattr(self, name) is None:
                setattr(self, name, on_gpu if device_of(self.device).type == "cuda" else on_cpu)
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, not {self.seed}")
        for name in (
            "iterations",
            "prompts_per_iteration",
            "max_new_tokens",
            "sampling_batch_size",
            "batch_pairs",
            "tokens_per_microbatch",
            "epochs_auxiliary",
            "epochs_policy",
            "eval_samples",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name, most in LARGEST_COUNTS.items():
            if getattr(self, name) > most:
                raise UserError(f"--{name} must be at most {most}, not {getattr(self, name)}")
        if self.responses_per_prompt < 2:
            raise UserError(f"--responses_per_prompt must be at least 2, not {self.responses_per_prompt}")
        for name in ("learning_rate", "temperature", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"--{name} must be positive and finite, not {getattr(self, name)}")
        if self.learning_rate > 1e30:
            raise UserError(f"--learning_rate must be at most 1e30, for AdamW's float32, not {self.learning_rate}")
        for name in ("top_p", "eval_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name} must be in (0, 1], not {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"--warmup_ratio must be in [0, 1), not {self.warmup_ratio}")
        for name in ("oracle_max_tokens", "oracle_batch_tokens", "judge_max_tokens", "judge_concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        try:
            json.dumps(self.judge_request)
        except (TypeError, ValueError, RecursionError) as error:  # of a YAML file: dates, what contains itself
            raise UserError(f"--judge_request must be a JSON object ({error})") from None
        if self.judge_retries < 0:
            raise UserError(f"--judge_retries must not be negative, not {self.judge_retries}")
        if not (math.isfinite(self.judge_timeout) and self.judge_timeout > 0):
            raise UserError(f"--judge_timeout must be positive and finite, not {self.judge_timeout}")
        if not 0 <= self.judge_max_invalid_rate <= 1:
            raise UserError(f"--judge_max_invalid_rate must be in [0, 1], not {self.judge_max_invalid_rate}")
        if self.checkpoint_steps < 1:
            raise UserError(f"--checkpoint_steps must be at least 1, not {self.checkpoint_steps}")
        for name in ("max_skipped_steps", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} must not be negative, not {getattr(self, name)}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"--weight_decay must not be negative, not {self.weight_decay}")
        for name, known in (("objective", OBJECTIVES), ("pairing", PAIRINGS)):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        objective = self.make_objective()
        if self.anchor == "live" and isinstance(objective, Inpo) and objective.initial_share < 1:
            raise UserError(f"--anchor live takes one anchor: --objective {self.objective} mixes two, use cached")

    def make_objective(self) -> Objective:
        """The objective with its parameters, which are the options of the same names."""
        kind = OBJECTIVES[self.objective]
        try:
            return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})
        except ValueError as error:
            raise UserError(f"--objective {self.objective}: {error}") from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


class Parsed(NamedTuple):
    """A configuration, and where its values are from."""

    config: Config
    sources: dict[str, tuple[str, int] | None]  # option → (file, line), or None where the command line has its value
    trusted: bool  # whether --trust_run was given


def _check_template_variables(variables: dict | None) -> None:
    """What is given to ``apply_chat_template`` beside the prompt must not change how it is called."""
    if taken := [str(name) for name in variables or {} if not isinstance(name, str) or name in TEMPLATE_ARGUMENTS]:
        raise UserError(
            f"--chat_template_kwargs must leave {', '.join(taken)} alone: it is for a template's own variables"
        )


def parse(argv: list[str], defaults: Mapping[str, Any] | None = None) -> Config:
    """The configuration from a command line; ``defaults`` in place of those above.

    Raises:
        UserError: if it does not fit.
    """
    parsed = _parse(argv, defaults)
    _check_key_variable(parsed)
    return parsed.config


def _parse(argv: list[str], defaults: Mapping[str, Any] | None = None) -> Parsed:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m onpo_fast.train", description=DESCRIPTION, epilog=TRUST, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of the options below.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error in the input.")
    parser.add_argument("--resume", action="store_true", help="Go on with the run in --out, if there is one.")
    parser.add_argument("--force", action="store_true", help="Go on with it though options or the model changed.")
    parser.add_argument("--trust_run", action="store_true", help=TRUST_RUN)
    for section in SECTIONS:
        parser.add_class_arguments(section)
    parser.set_defaults(defaults or {})
    hints = get_type_hints(Config)
    first = CommandParser(add_help=False)
    first.add_argument("--config", action="append", default=[])
    files, flags = first.parse_known_args(argv)  # files first, wherever they stand: flags override them
    check_flags(flags, parser._option_string_actions)
    read_files = [(file, *check_file(file, hints)) for file in files.config]
    flags = switches(flags, [name for name, hint in hints.items() if hint is bool])
    try:  # each file was read once: what is parsed is what was checked
        values = parser.parse_args([f"--config={text}\n" for _, text, _ in read_files] + flags).as_dict()
        given = parser.parse_args(flags, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        known_lines = {file: lines for file, _, lines in read_files}
        raise UserError(explain_tags(flags, hints) or explain(error, flags, known_lines, hints)) from None
    except (*TAG_ERRORS, OverflowError, RecursionError) as error:  # also of numbers of thousands of digits
        raise UserError(explain_tags(flags, hints) or f"the options cannot be read: {error}") from None
    trusted = values["trust_run"]
    for name in ("config", "debug", "resume", "force", "trust_run"):
        del values[name]
    config = Config(**values)
    if config.out is None:
        config.out = f"runs/{datetime.now():%Y%m%d-%H%M%S}"
    sources: dict[str, tuple[str, int] | None] = {}
    for file, _, lines in read_files:  # a later file overrides an earlier one
        sources |= {name: (file, line) for name, line in lines.items()}
    # not where a flag as --judge_request.key adds to what a file says: then the value is the file's too
    sources |= {name: None for name, value in given.items() if name in hints and values[name] == value}
    return Parsed(config, sources, trusted)


def parse_run(argv: list[str]) -> tuple[Config, bool]:
    """The configuration from a command line, and whether a run is to go on.

    One that goes on has the options that it began with, as its journal has them; others, on the command line or in its
    ``config.yaml``, are refused unless ``--force`` is given. Where there is no run yet, one starts with the options
    that are given, so that one command line can be started again and again. The run directory may be a stranger's: what
    ``ASKS`` lists must be on the command line or in a file that it names, unless ``--trust_run`` is given.

    Raises:
        UserError: if it does not fit; names every option that has changed, or that the directory must not set. Or if
            there is no run, and no options.
    """
    if "--resume" not in argv:
        return parse(argv), False
    resuming = CommandParser(add_help=False)
    resuming.add_argument("--out", default="")
    for flag in ("--resume", "--force", "--trust_run"):
        resuming.add_argument(flag, action="store_true")
    known, options = resuming.parse_known_args(argv)
    if not known.out:
        raise UserError("--resume needs --out, the directory of the run to go on with")
    file, before = Path(known.out, FILE), _began_with(Path(known.out))
    if not file.exists():
        if not before and not options:
            raise UserError(f"{known.out} has no run to go on with; to start one there, give its options too")
        parsed = _parse(argv, before)
    else:
        if before is None:  # a run from before its journal had them
            before = vars(_read(Path(known.out)).config)
        else:
            _check_whole(file, before)
        parsed = _parse([f"--config={file}", *argv], before)
    _check_trust(Path(known.out), parsed, ASKS)
    config = parsed.config
    changed = [
        f"--{name}" if name == "judge_key_variable" else f"--{name} {was!r} → {now!r}"
        for name, was in (before or {}).items()
        if name != "out" and (now := getattr(config, name)) != was
    ]
    if changed and not known.force:
        raise UserError(
            f"{known.out} began with other options: {', '.join(changed)}. Leave them out ({FILE} there may have them), "
            "or add --force: what is done stays as it is, the rest goes by the new ones"
        )
    return config, True


def read(directory: Path, flags: Sequence[str] = (), asks: Iterable[str] = tuple(ASKS)) -> Config:
    """The configuration of a run; what its file lacks is as it was when the run began.

    Args:
        flags: of the command line, as ``--name=value``; they override what the directory says.
        asks: the options of ``ASKS`` that are to be obeyed; the directory must not have set them.

    Raises:
        UserError: if there is none, or it does not fit; names each option that must be given on the command line.
    """
    if flags:
        parse(list(flags))  # so that what is wrong with them is not said of the file
    parsed = _read(directory, flags)
    _check_trust(directory, parsed, asks)
    return parsed.config


def _read(directory: Path, flags: Sequence[str] = ()) -> Parsed:
    file = directory / FILE
    if not file.exists():
        raise UserError(f"{directory} is not a run directory: it has no {FILE}")
    try:
        return _parse([f"--config={file}", *flags], _began_with(directory))
    except UserError as error:
        raise UserError(f"{file} is not the configuration of a run: {error}") from None


def _check_whole(file: Path, options: Mapping[str, Any]) -> None:
    """What is cut between two lines is YAML still, and must not stand for the defaults."""
    try:
        _, there = check_file(str(file), get_type_hints(Config))
    except UserError as error:
        raise UserError(f"{error}: remove it, and --resume writes it again") from None
    if cut := [name for name in options if name not in there]:
        raise UserError(f"{file} lacks {', '.join(cut)}: remove it, and --resume writes it again")


def _began_with(directory: Path) -> dict[str, Any] | None:
    """The options that a run's journal has."""
    journal, hints = Journal(directory), get_type_hints(Config)
    options = journal.note("options")
    if unknown := sorted((options or {}).keys() - hints.keys()):
        raise UserError(f"{directory} began with options that this version does not have: {', '.join(unknown)}")
    check_values(journal.file, options or {}, hints)
    return options


# ---------------------------------------------------------------------------------------------------------------------
# What a run directory may ask for: it may come from a stranger
# ---------------------------------------------------------------------------------------------------------------------


def asked(config: Config) -> list[str]:
    """The options that ask for what only the user may allow."""
    values = {field.name: field.default for field in fields(Config) if field.name in ASKS}
    names = [name for name, default in values.items() if getattr(config, name) != default]
    names = [name for name in names if name != "report_to" or config.report_to == "wandb"]
    return [name for name in names if name != "oracle" or _runs_code(config.oracle)]


def _runs_code(oracle: str) -> bool:
    """Whether an oracle, or a member of a panel, is none of the known ones, and so would be imported."""
    from ..oracles import NAMES  # which needs this module
    from ..oracles.panel import terms

    return any(name.partition("=")[0] not in NAMES for _, name in terms(oracle))


def _check_trust(directory: Path, parsed: Parsed, names: Iterable[str]) -> None:
    """Refuses what the run directory asks for, and the user has neither given nor allowed."""
    if parsed.trusted:
        return
    complaints, remedies = [], []
    for name in asked(parsed.config):
        source = parsed.sources.get(name, (str(Journal(directory).file), 0))
        if name not in names or source is None or not _is_inside(Path(source[0]), directory):
            continue
        value = getattr(parsed.config, name)
        text = value if isinstance(value, str) else json.dumps(value)
        said = text if len(text) <= 100 else f"{text[:100]}…"
        where = f"{source[0]}, line {source[1]}" if source[1] else source[0]
        complaints.append(f"{where}: {name} asks {ASKS[name].format(value=said)}")
        shown = "NAME" if name == "judge_key_variable" else shlex.quote(said)
        remedies.append(f"--{name}" if value is True else f"--{name} {shown}")
    if complaints:
        raise UserError(
            f"{'; '.join(complaints)}. If that is meant, give {' '.join(remedies)} on the command line, or --trust_run "
            f"if you trust whoever made {directory}"
        )
    if "judge_key_variable" in names:
        _check_key_variable(parsed)


def _check_key_variable(parsed: Parsed) -> None:
    """A file may name variables that are made for keys of services, and no others."""
    name = parsed.config.judge_key_variable
    source = parsed.sources.get("judge_key_variable")
    if source is not None and not parsed.trusted and not name.upper().endswith(KEY_ENDINGS):
        raise UserError(
            f"{source[0]}, line {source[1]}: judge_key_variable must end in {' or '.join(KEY_ENDINGS)}. Give another "
            "NAME on the command line itself, as --judge_key_variable NAME, or --trust_run if you trust the file (what "
            "was given is not repeated here: it may be the key)"
        )


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether a file is in a directory, by its name or by where its links lead."""
    by_name = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(directory))
    return by_name or path.resolve().is_relative_to(directory.resolve())


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds options of ``Config``, with its help, and ``--trust_run`` to another command."""
    documented = {
        one.arg_name: one.description
        for section in SECTIONS
        for one in docstring_parser.parse_from_object(section).params
    }
    for name in names:
        value = {"action": "store_const", "const": "true"} if get_type_hints(Config)[name] is bool else {}
        about = documented[name].replace("%", "%%").replace("\n", " ")
        parser.add_argument(f"--{name}", help=f"default: the run's. {about}", **value)
    parser.add_argument("--trust_run", action="store_true", help=TRUST_RUN)


def given_flags(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """What was given of the options that ``add_options`` has added, as ``read`` takes it."""
    given = [f"--{name}={value}" for name in names if (value := getattr(options, name)) is not None]
    return [*given, "--trust_run"] if options.trust_run else given
