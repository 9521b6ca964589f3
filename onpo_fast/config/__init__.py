"""The options of a run: sections for their consumers, and how they are read.

Flags override the file given with ``--config``. A run writes every value that it uses to ``config.yaml``.
"""

from .combined import Config
from .command_line import add_options, given_options, parse
from .resume import CONFIG_FILE, parse_run, read_run
from .sections import (
    SECTIONS,
    AlgorithmConfig,
    DataConfig,
    EnvironmentConfig,
    FitConfig,
    JudgeConfig,
    ModelConfig,
    OracleConfig,
    RunConfig,
    SamplingConfig,
)
from .trust import NEEDS_TRUST, TRUST_NOTE, options_needing_trust
from .yaml_files import read_yaml

__all__ = [
    "CONFIG_FILE",
    "NEEDS_TRUST",
    "SECTIONS",
    "TRUST_NOTE",
    "AlgorithmConfig",
    "Config",
    "DataConfig",
    "EnvironmentConfig",
    "FitConfig",
    "JudgeConfig",
    "ModelConfig",
    "OracleConfig",
    "RunConfig",
    "SamplingConfig",
    "add_options",
    "given_options",
    "options_needing_trust",
    "parse",
    "parse_run",
    "read_run",
    "read_yaml",
]
