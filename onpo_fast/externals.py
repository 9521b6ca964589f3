"""What a run asks and does not make: its oracle and its environment, loaded and tried."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from . import oracles
from .config import Config, JudgeConfig, ModelConfig, OracleConfig
from .console import say
from .data import Messages, read_prompts
from .files import checksum
from .journal import Journal
from .multi_turn import environment as environments
from .multi_turn.conversation import PROBES
from .multi_turn.environment import CheckedEnvironment
from .run.fingerprint import changes
from .run.outputs import HELD_OUT


def load_oracle(config: Config, directory: Path) -> oracles.Oracle:
    """The oracle that the options of a run name."""
    sections = (config.section(OracleConfig), config.section(JudgeConfig), config.section(ModelConfig))
    return oracles.load(config.oracle, *sections, directory)


def load_environment(config: Config) -> CheckedEnvironment | None:
    """The environment that the options of a run name; None where the policy has one turn."""
    if config.environment is None:
        return None
    environment = environments.load(config.environment, config.environment_timeout)  # also where it has nothing to say
    return environment if config.has_turns else None


def try_oracle(config: Config, oracle: oracles.Oracle, prompts: Sequence[Messages], in_directory: bool) -> None:
    """Does what ``oracles.probe`` does, with conversations where a response is one."""
    texts = PROBES if config.has_turns else oracles.PROBE_TEXTS
    oracles.probe(oracle, config.oracle, prompts, in_directory, texts)


def check_oracle(directory: Path, config: Config) -> tuple[oracles.Oracle, dict[str, str]]:
    """Tries the oracle before anything is sampled; returns it and its fingerprint.

    Says so if it is not the oracle that the run was judged by. That is no error: all win rates are those of the
    oracle as it is now.
    """
    oracle = load_oracle(config, directory)
    now = oracles.fingerprint(oracle, config.oracle, functools.cache(checksum))
    began = (Journal(directory).note("options") or {}).get("oracle", config.oracle)
    if began != config.oracle:
        say(f"{directory} was judged by --oracle {began}. The evaluation is under --oracle {config.oracle}")
    elif changed := changes(Journal(directory).note("oracle") or now, now):
        say(
            f"{oracles.title(config.section(OracleConfig))} is not what {directory} began with: {', '.join(changed)} "
            "changed. The evaluation is under the oracle as it is now"
        )
    kinds = list(oracles.shortest_by_kind(read_prompts(directory / HELD_OUT)).values())
    try_oracle(config, oracle, kinds, in_directory=False)
    try_oracle(config, oracle, [min(kinds, key=oracles.length)], in_directory=True)
    return oracle, now


def check_environment(directory: Path, config: Config) -> CheckedEnvironment | None:
    """Tries the environment before anything is sampled; returns it, or None where the policy has one turn.

    Says so if it is not the environment that the run began with. That is no error: all conversations of the evaluation
    are with the environment as it is now.
    """
    environment = load_environment(config)
    if environment is None:
        return None
    journal = Journal(directory)
    began = (journal.note("options") or {}).get("environment")
    before = journal.note("environment") if began == environment.name else None
    if began != environment.name:
        before_it = f"with --environment {began}" if began else "without an environment"
        say(f"{directory} began {before_it}. The evaluation is with --environment {environment.name}")
    elif changed := changes(environment.files if before is None else before, environment.files):
        say(
            f"--environment {environment.name} is not what {directory} began with: {', '.join(changed)} changed. The "
            "evaluation is with the environment as it is now"
        )
    environment.probe(min(read_prompts(directory / HELD_OUT), key=oracles.length))
    return environment
