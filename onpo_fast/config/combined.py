"""All options of a run in one flat object."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TypeVar

import yaml

from .. import algorithms
from ..device import device_of
from ..errors import UserError
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

Section = TypeVar("Section")
DEFAULTS_BY_DEVICE = {  # on a GPU, on a CPU
    "tokens_per_microbatch": (None, 1024),  # None: a run takes the most that fits the memory
    "sampling_batch_size": (256, 32),
}

# options that may change while a run goes on: where things are, how long is waited, how much is asked at a time.
# What a server or vLLM may do otherwise with other values, the check of responses finds
NO_RESULT_DEPENDS_ON_THEM = (
    "out",
    "push_to_hub",
    "rank_timeout",
    "environment_timeout",
    "cuda_graphs",
    "vllm_python",
    "vllm_options",
    "sampler_url",
    "sampler_model",
    "sampler_reload",
    "sampler_key_variable",
    "sampler_concurrency",
    "sampler_timeout",
    "sampler_retries",
)


@dataclass
class Config(
    RunConfig,
    FitConfig,
    AlgorithmConfig,
    JudgeConfig,
    OracleConfig,
    EnvironmentConfig,
    SamplingConfig,
    DataConfig,
    ModelConfig,
):
    """Every option of a run. ``config.section(FitConfig)`` returns the options of one consumer.

    Raises:
        UserError: if a value is not allowed; names the option.
    """

    def __post_init__(self) -> None:
        for section in SECTIONS.values():
            section.__post_init__(self)
        if algorithms.named(self.objective).compares == "mixture" and self.initial_weight < 1:
            if self.sampler != "local":
                raise UserError(
                    f"--sampler {self.sampler} samples from one policy, and --objective {self.objective} from a "
                    "mixture of two: use --sampler local"
                )
            if self.cuda_graphs:
                raise UserError(f"--cuda_graphs is for one policy, and --objective {self.objective} mixes two")
        if self.has_turns and not algorithms.named(self.objective).takes_turns:
            raise UserError(
                f"--environment: --objective {self.objective} is for one turn; with several there are "
                f"{', '.join(name for name, one in algorithms.ALGORITHMS.items() if one.takes_turns)}"
            )
        if self.has_turns and self.oracle == "openings":
            raise UserError(
                "--oracle openings reads the first words of a conversation, which later turns do not change, so that "
                "nothing would be learned at them: give --environment another oracle (docs/multi-turn.md)"
            )
        if self.has_turns and self.select is not None:
            raise UserError("--select is for one turn: leave it or --environment out")
        for name, (on_gpu, on_cpu) in DEFAULTS_BY_DEVICE.items():
            if getattr(self, name) is None:
                setattr(self, name, on_gpu if device_of(self.device).type == "cuda" else on_cpu)
                if name == "tokens_per_microbatch" and self.tokens_per_microbatch is not None:
                    self.tokens_per_microbatch = max(self.tokens_per_microbatch, self.max_new_tokens)

    def section(self, kind: type[Section]) -> Section:
        """Returns the options of one section, a class in ``SECTIONS``."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    def to_yaml(self) -> str:
        """Returns all options as flat YAML, which a run writes to its config.yaml."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
