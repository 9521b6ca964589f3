"""Responses, put together to groups as they come."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..console import Progress
from ..data import Group, Messages, Response
from .interface import OnGroup


class Gathering:
    """The K responses of every prompt, which come in any order.

    Args:
        prompts: conversations that end with the user.
        rendered: their tokens.
        responses_per_prompt: K.
        progress: called with 1 for each response.
        first: the index of the first prompt among all prompts of the seed.
        on_group: called with the index among all prompts, and the group, as soon as it has its responses.
    """

    def __init__(
        self,
        prompts: Sequence[Messages],
        rendered: Sequence[list[int]],
        responses_per_prompt: int,
        progress: Progress,
        first: int = 0,
        on_group: OnGroup = lambda index, group: None,
    ) -> None:
        self.prompts, self.rendered, self.count = prompts, rendered, responses_per_prompt
        self.progress, self.first, self.on_group = progress, first, on_group
        self.responses: dict[tuple[int, int], Response] = {}  # by the indices of prompt and response
        self.missing = [responses_per_prompt] * len(prompts)

    def places(self) -> list[tuple[int, int]]:
        """Returns the indices of prompt and response of all responses, those of a prompt next to each other."""
        return [(p, k) for p in range(len(self.prompts)) for k in range(self.count)]

    def add(self, place: tuple[int, int], response: Response) -> None:
        """Takes a response at its indices of prompt and response."""
        self.responses[place] = response
        self.progress(1)
        prompt = place[0]
        self.missing[prompt] -= 1
        if self.missing[prompt] == 0:
            self.on_group(self.first + prompt, self._group(prompt))

    def groups(self) -> list[Group]:
        """Returns the groups in the order of the prompts, when all responses are there."""
        return [self._group(p) for p in range(len(self.prompts))]

    def _group(self, p: int) -> Group:
        return Group(self.prompts[p], self.rendered[p], [self.responses[p, k] for k in range(self.count)])


def make_response(
    tokens: list[int], logp: float, tokenizer: PreTrainedTokenizerBase, eos_tokens: Sequence[int]
) -> Response:
    """Returns a response of these tokens, the end-of-sequence token included.

    Args:
        logp: summed log-prob, nats.
    """
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Response(text, tokens, "eos" if tokens[-1] in eos_tokens else "length", logp)
