"""Policies from their folders, one at a time: at most one model is in memory."""

from __future__ import annotations

from pathlib import Path

from ..config.sections import ModelConfig
from ..errors import UserError
from .adapters import Adapter
from .checkpoint import base_of
from .loading import load
from .policy import Policy

Source = str | Path  # where a policy's weights are: a folder, a Hugging Face id or "smollm2"


class ResidentPolicy:
    """Loads policies and keeps the last one in memory.

    With ``config.lora_rank`` policies are adapters over π_1, which stays in memory: another policy is the same object
    with other LoRA weights, and π_1 is that with none.

    Args:
        config: how policies are loaded.
        initial: where π_1 is; default ``config.model``.
    """

    def __init__(self, config: ModelConfig, initial: Source | None = None) -> None:
        self.config = config
        self.initial: Source = config.model if initial is None else initial
        self.source: Source | None = None  # None beside a policy: an adapter that is in no folder
        self.policy: Policy | None = None

    def __call__(self, source: Source) -> Policy:
        """Returns the policy from ``source``, loaded unless it is the resident one.

        Raises:
            UserError: if it cannot be loaded.
        """
        if self.policy is None or self.source != source:
            if self.config.lora_rank is None:
                self.drop()
                self.hold(source, self._load(source))
            else:
                self._switch_to(source)
        return self.policy

    def _switch_to(self, source: Source) -> None:
        """Loads π_1 unless it is there, and the adapter of the source, which for π_1 itself is switched off."""
        if self.policy is None:
            policy = self._load(self.initial)
            policy.adapter = Adapter(policy.model, self.initial, self.config)
            self.policy = policy
        self.source = None  # while the adapter is being replaced
        if source == self.initial:
            self.policy.adapter.switch(on=False)
        else:
            self.policy.adapter.load(Path(source))
        self.source = source

    def _load(self, source: Source) -> Policy:
        """Loads a whole model; only --model itself may be an adapter that names its base.

        Raises:
            UserError: if a folder of the run has become an adapter, whose base may be anywhere.
        """
        if source != self.config.model and base_of(str(source)) != str(source):
            raise UserError(f"{source} is an adapter, and the policies of this run are whole models")
        return load(source, self.config)

    def take(self, source: Source, seed: str) -> Policy:
        """Returns the policy from ``source`` to be trained: it is no longer resident, as its weights will change.

        Args:
            seed: of the LoRA layers, if there are any, of a policy that starts as π_1.
        """
        policy = self(source)
        if policy.adapter is None:
            self.drop()
        else:
            self.source = None
            if source == self.initial:
                policy.adapter.initialise(seed)
        return policy

    def beside(self, source: Source) -> Policy:
        """Loads a policy beside the resident one, frozen: two models are in memory."""
        return ResidentPolicy(self.config, self.initial)(source).frozen()

    def hold(self, source: Source, policy: Policy) -> None:
        """Makes this policy, whose weights are at ``source``, the resident one."""
        self.source, self.policy = source, policy

    def save(self, folder: Path, policy: Policy) -> None:
        """Saves a fitted policy to a folder and makes it the resident one, whose weights are there."""
        policy.save(folder, policy.save_dtype)
        self.hold(folder, policy)

    def keep_initial(self, folder: Path, policy: Policy) -> None:
        """Makes this policy, which has been saved to a folder, the resident one and π_1."""
        self.initial = folder
        if policy.adapter is not None:
            policy.adapter.base = folder
        self.hold(folder, policy)

    def drop(self) -> None:
        """Forgets the policy, and frees its memory."""
        self.source = self.policy = None
