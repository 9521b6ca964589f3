"""What a run directory may set: it may come from a stranger, and some options run code, take a key or send data."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from ..errors import UserError
from ..journal import Journal
from .combined import Config
from .oracle_names import NAMES, terms

NEEDS_TRUST = {  # options that only the user may set, and what a value other than the default asks for
    "oracle": "to run the Python code of {value}",
    "environment": "to run the Python code of {value}",
    "trust_remote_code": "to run the Python code that comes with a model",
    "judge_url": "to send conversations to {value}",
    "judge_request": "to send {value} with every request to the judge",
    "judge_key_variable": "for a key from the environment",  # its name is not repeated: it may be the key
    "judge_prompt": "to read {value} and send it to the judge",
    "judge_cache": "to write {value}",
    "sampler_url": "to send prompts to {value}",
    "sampler_key_variable": "for a key from the environment",
    "sampler_reload": "to run the command {value}",
    "vllm_python": "to run {value}",
    "vllm_options": "to start vLLM with {value}",
    "push_to_hub": "to upload the policy to {value} with your Hugging Face token",
    "report_to": "to report to Weights & Biases with your key",
}
TRUST_NOTE = (
    "A run directory may come from a stranger. Options in it that would run code, use a key from the environment, or "
    "read, write or send anything outside the directory are refused: repeat them on the command line, or give "
    "--trust_run if you trust whoever made the directory (docs/trust.md)."
)
TRUST_RUN_HELP = (
    "Accept every option that the run directory sets, also those that run code or send data. Only if you trust whoever "
    "made the directory (docs/trust.md)."
)
KEY_VARIABLES = ("judge_key_variable", "sampler_key_variable")
MOST_SHOWN = 500  # characters of a value, which is shown whole or not at all: its end may be what does harm
KEY_ENDINGS = ("_API_KEY", "_TOKEN")  # of the names of environment variables that a file may ask for

Sources = Mapping[str, tuple[str, int] | None]  # option → (file, line), or None if the command line sets it


def options_needing_trust(config: Config) -> list[str]:
    """Returns the options that ask for what only the user may allow."""
    defaults = {field.name: field.default for field in fields(Config) if field.name in NEEDS_TRUST}
    names = [name for name, default in defaults.items() if getattr(config, name) != default]
    names = [name for name in names if name != "report_to" or config.report_to == "wandb"]
    names = [name for name in names if name != "environment" or ":" in config.environment]
    return [name for name in names if name != "oracle" or _runs_code(config.oracle)]


def _runs_code(oracle: str) -> bool:
    """Whether an oracle, or a member of a mixture, is not a known name, so that it would be imported."""
    return any(name.partition("=")[0] not in NAMES for _, name in terms(oracle))


def check_trust(directory: Path, config: Config, sources: Sources, names: Iterable[str]) -> None:
    """Refuses options of a run directory that the user has not given too.

    Args:
        names: the options of ``NEEDS_TRUST`` that will be used.

    Raises:
        UserError: names the file and line of each, and what to add to the command line.
    """
    problems, remedies = [], []
    for name in options_needing_trust(config):
        source = sources.get(name, (str(Journal(directory).file), 0))
        if name not in names or source is None or not _is_inside(Path(source[0]), directory):
            continue
        value = getattr(config, name)
        text = value if isinstance(value, str) else json.dumps(value)
        where = f"{source[0]}, line {source[1]}" if source[1] else source[0]
        shown = text if len(text) <= MOST_SHOWN else f"(its {len(text)} characters are not shown)"
        asks = NEEDS_TRUST[name].format(value=shown)
        if (name, value) == ("sampler_reload", "vllm"):  # no command
            asks = "to have the server load the policies of the run"
        problems.append(f"{where}: {name} asks {asks}")
        given = "NAME" if name in KEY_VARIABLES else shlex.quote(text) if shown == text else "VALUE"
        remedies.append(f"--{name}" if value is True else f"--{name} {given}")
    if problems:
        raise UserError(
            f"{'; '.join(problems)}. If you want that, give {' '.join(remedies)} on the command line, or --trust_run "
            f"if you trust whoever made {directory}"
        )
    for name in KEY_VARIABLES:
        if name in names:
            check_key_variable(name, config, sources)


def check_key_variable(name: str, config: Config, sources: Sources) -> None:
    """Refuses a file that names an environment variable which is not made for the key of a service."""
    source = sources.get(name)
    if source is not None and not getattr(config, name).upper().endswith(KEY_ENDINGS):
        raise UserError(
            f"{source[0]}, line {source[1]}: {name} must end in {' or '.join(KEY_ENDINGS)}. Give another NAME on the "
            f"command line itself, as --{name} NAME, or --trust_run if you trust the file (the value is not repeated "
            "here: it may be the key)"
        )


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether a file is in a directory, by its name or by where its links lead."""
    by_name = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(directory))
    return by_name or path.resolve().is_relative_to(directory.resolve())
