"""Options of conversations with several turns of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from .values import check_at_least, check_at_most, check_positive, check_values

MOST_TURNS = 100
MOST_SECONDS = 10**6
TARGETS = ("unbiased", "branches")


@dataclass
class EnvironmentConfig:
    """The environment, which answers the policy between its turns (docs/multi-turn.md)."""

    environment: str | None = None
    """What answers the policy, so that a response is a conversation of several turns: "partner" (asks back, wants less,
    changes a constraint), "word-game" (a chain of words), or "module:function" with your Python function
    f(messages, seed) -> the next message, a text or {"role", "content"}, or None, which ends the conversation. The
    oracle compares whole conversations. Default: the policy speaks once."""
    turns: int = 2
    """With --environment: the most turns of the policy in a conversation."""
    multi_turn_target: Literal["unbiased", "branches"] = "unbiased"
    """With --environment: what a pair of actions at a later turn is fitted to. "unbiased": the difference of how often
    what follows them wins against independent conversations from the prompt. "branches": how often the one wins against
    the other, for comparison only: it is the target of another game (docs/multi-turn.md)."""
    environment_timeout: float = 60.0
    """With --environment: seconds that it may take for an answer; then the run stops."""

    def __post_init__(self) -> None:
        check_values(self, EnvironmentConfig)
        if self.multi_turn_target not in TARGETS:
            raise UserError(f"--multi_turn_target must be one of {', '.join(TARGETS)}, not {self.multi_turn_target!r}")
        check_at_least(self, 1, "turns")
        check_at_most(self, MOST_TURNS, "turns")
        check_positive(self, "environment_timeout")
        check_at_most(self, MOST_SECONDS, "environment_timeout")
        for name in ("turns", "multi_turn_target") if self.environment is None else ():
            if getattr(self, name) != EnvironmentConfig.__dataclass_fields__[name].default:
                raise UserError(f"--{name} is for conversations: give --environment, or leave it out")

    @property
    def has_turns(self) -> bool:
        """Whether the policy may speak more than once."""
        return self.environment is not None and self.turns > 1
