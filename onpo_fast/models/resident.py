"""Policies from their folders, one at a time: at most one model is in memory."""

from __future__ import annotations

from pathlib import Path

from ..config.sections import ModelConfig
from .loading import load
from .policy import Policy

Source = str | Path  # where a policy's weights are: a folder, a Hugging Face id or "smollm2"


class ResidentPolicy:
    """Loads policies and keeps the last one in memory."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.source: Source | None = None
        self.policy: Policy | None = None

    def __call__(self, source: Source) -> Policy:
        """Returns the policy from ``source``, loaded unless it is the resident one.

        Raises:
            UserError: if it cannot be loaded.
        """
        if self.policy is None or self.source != source:
            self.drop()
            self.hold(source, load(source, self.config))
        return self.policy

    def hold(self, source: Source, policy: Policy) -> None:
        """Makes this policy, whose weights are at ``source``, the resident one."""
        self.source, self.policy = source, policy

    def save(self, folder: Path, policy: Policy) -> None:
        """Saves a fitted policy to a folder and makes it the resident one, whose weights are there."""
        policy.save(folder, policy.save_dtype)
        self.hold(folder, policy)

    def drop(self) -> None:
        """Forgets the policy, to free its memory or because its weights are about to change."""
        self.source = self.policy = None
