"""What every sampler offers, and a warning that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..console import Progress, say
from ..data import Group, Messages
from ..models.policy import Policy

OnGroup = Callable[[int, Group], None]  # called with the index of a prompt and the group of its K responses


class Sampler(Protocol):
    """Samples K responses to every prompt, of one policy."""

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress,
        first: int = 0,
        on_group: OnGroup = lambda index, group: None,
    ) -> list[Group]:
        """Samples responses and returns the groups in the order of the prompts.

        Args:
            prompts: conversations that end with the user.
            responses_per_prompt: K.
            seed: non-negative integers; equal seeds give equal responses.
            progress: called with the number of responses that were finished.
            first: the index of the first prompt among all prompts of the seed, so that a part of them gets the same
                responses.
            on_group: called in this thread with each group as soon as its K responses are there, in any order, and its
                index among all prompts of the seed.

        Raises:
            UserError: if a prompt and a response exceed the model's context.
        """
        ...

    def close(self) -> None:
        """Ends what the sampler has started, and frees its memory. It may be called twice."""
        ...


class TruncationWarning:
    """Warns once if all responses that were sampled together were cut off, and says what may help."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, what: str, policy: Policy, groups: Sequence[Group], max_new_tokens: int) -> None:
        if not self.said and all_truncated(groups):
            self.said = True
            say(
                f"warning: every response of {what} was cut off at {max_new_tokens} tokens: "
                f"{policy.renderer.truncation_remedy(max_new_tokens)}"
            )


def all_truncated(groups: Sequence[Group]) -> bool:
    """Returns whether every response reached the maximum length."""
    return all(response.stop_reason == "length" for group in groups for response in group.responses)
