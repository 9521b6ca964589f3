"""The sampler of one stage of a run: opened when it is first needed, closed at the end, its responses checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import SamplingConfig
from ..console import Progress
from ..data import Group, Messages
from ..models.resident import ResidentPolicy, Source
from . import handover
from .interface import OnGroup, Sampler
from .server.unfinished import remove_unfinished


class StageSampler:
    """Samples the parts of a stage from one policy. Leaving the ``with`` block closes the sampler, also on errors.

    Args:
        policies: loads the policy.
        source: where the policy is.
        config: the options of sampling.
        open_sampler: opens the sampler.
        directory, evaluation: whose files of unfinished responses are removed once all parts are recorded; see
            ``open_sampler``.

    Attributes:
        was_opened: whether anything had to be sampled.
    """

    def __init__(
        self,
        policies: ResidentPolicy,
        source: Source,
        config: SamplingConfig,
        open_sampler: Callable[[], Sampler],
        directory: Path,
        evaluation: bool = False,
    ) -> None:
        self.policies, self.source, self.config = policies, source, config
        self.was_opened = False
        self.directory, self.evaluation = directory, evaluation
        self._open_sampler = open_sampler
        self._sampler: Sampler | None = None

    def __enter__(self) -> StageSampler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self) -> Sampler:
        """Opens the sampler, unless it is open.

        Raises:
            UserError: as ``open_sampler``.
        """
        if self._sampler is None:
            self._sampler = self._open_sampler()
            self.was_opened = True
        return self._sampler

    def close(self) -> None:
        """Closes the sampler, if it is open."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress,
        first: int = 0,
        on_group: OnGroup = lambda index, group: None,
    ) -> list[Group]:
        """Samples a part of the stage; see ``Sampler``."""
        return self.open()(prompts, responses_per_prompt, seed, progress, first, on_group)

    def check(self, groups: Sequence[Group]) -> dict[str, float]:
        """Closes the sampler, loads the policy and compares the stage's responses with it; see ``handover.check``.

        It is called once all parts are recorded, on rank 0.

        Raises:
            UnusableResults: if they are not draws from the policy.
        """
        self.close()
        remove_unfinished(self.directory, self.evaluation)
        return handover.check(self.policies(self.source), groups, self.config)
