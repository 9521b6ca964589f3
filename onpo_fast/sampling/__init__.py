"""Sampling of responses from a policy.

A sampler turns prompts into groups of K responses. Random numbers depend on the seed, the index of the prompt, the
index of the response, the position and the token, never on the batch: so the batch changes a response only where
rounding decides between two tokens, which has not been seen on a CPU in float32.
"""

from __future__ import annotations

from pathlib import Path

from ..config import SamplingConfig
from ..console import say_once
from ..distributed import World
from ..errors import UserError
from ..models.policy import Policy
from ..models.resident import ResidentPolicy, Source
from .interface import OnGroup, Sampler, TruncationWarning, all_truncated
from .local.generate import TransformersSampler
from .local.mixture import MixtureSampler
from .local.sampler import LocalSampler
from .server.sampler import open_server
from .server.unfinished import remove_unfinished
from .stage import StageSampler
from .vllm.sampler import VllmSampler

__all__ = [
    "LocalSampler",
    "MixtureSampler",
    "OnGroup",
    "Sampler",
    "StageSampler",
    "TransformersSampler",
    "TruncationWarning",
    "VllmSampler",
    "all_truncated",
    "make_sampler",
    "open_sampler",
]


def make_sampler(policy: Policy, config: SamplingConfig) -> Sampler:
    """Returns a sampler in this process that has been checked.

    Raises:
        UserError: if the policy's implementation generates from another distribution than it is scored by, or its steps
            cannot be CUDA graphs as the options say.
    """
    local = LocalSampler(policy, config)
    if (reason := local.why_not()) is None:
        return local
    if config.cuda_graphs:
        raise UserError(f"--cuda_graphs cannot be used: {reason}")
    say_once(("local", policy.family), f"responses are sampled with transformers' generate, as {reason}")
    sampler = TransformersSampler(policy, config)
    sampler.check()
    return sampler


def open_sampler(
    policies: ResidentPolicy,
    source: Source,
    config: SamplingConfig,
    directory: Path | None = None,
    world: World | None = None,
    evaluation: bool = False,
) -> Sampler:
    """Returns a sampler of the policy at ``source`` by the program of --sampler. The caller closes it.

    Args:
        directory: of the run, where a program's log goes and responses that are not in a part yet; None: nothing is
            kept.
        world: the ranks of the run, which all call this.
        evaluation: whether it samples for the evaluation of a run, which may be between two parts of an iteration.

    Raises:
        UserError: if the program is not there, or does not sample from the policy.
    """
    if config.sampler == "server":
        return open_server(policies, source, config, directory, world or World(), evaluation)
    if directory is not None:
        remove_unfinished(directory, evaluation)  # a server's, which sampled until now
    if config.sampler == "vllm":
        return VllmSampler(policies, source, config, directory)
    return make_sampler(policies(source), config)
