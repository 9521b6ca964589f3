"""Conversations of a policy with held-out prompts, in parts, so that an evaluation that is killed goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..data import Group, Messages
from ..run.cache import StageCache
from . import files
from .conversation import Conversation
from .tree import play

# given states, the number of responses to each, the numbers that the seed ends with and the end of the output's name
Sample = Callable[[Sequence[Messages], int, Sequence[int], str], list[Group]]

# given a conversation that the policy spoke in last and a seed, returns the environment's message; None ends it
Reply = Callable[[Conversation, Sequence[int]], "dict | None"]


def converse(
    prompts: Sequence[Messages],
    count: int,
    answer: Reply,
    turns: int,
    sample: Sample,
    cache: StageCache,
    output: str,
    seed: Sequence[int],
    config_key: object,
) -> tuple[list[Group], list[Group], Counter[str]]:
    """Plays ``count`` conversations from each prompt.

    Args:
        answer: gives the next message of a conversation.
        turns: the most turns of the policy.
        sample: samples responses of the policy.
        cache: makes the replies resumable.
        output: begins the names of the outputs.
        seed: of the environment.
        config_key: what replies depend on beside conversations and the run's own key.

    Returns:
        The conversations as responses to each prompt, for the oracle; the policy's turns, each with what came before it
        as its prompt; and the seconds that the environment took.
    """
    spoken: list[Group] = []
    cost: Counter[str] = Counter()

    def act(states: Sequence[Messages], responses: int, turn: int, learning: bool) -> list[Group]:
        last, ending = ((), "") if turn == 1 else ((turn,), f"_turn_{turn}")
        groups = sample(states, responses, last, ending)
        spoken.extend(groups)
        return groups

    def answers(conversations: Sequence[Conversation], turn: int) -> list[dict | None]:
        def compute(part: Sequence[Conversation], first: int) -> list[dict | None]:
            return [answer(conversation, [*seed, turn, index]) for index, conversation in enumerate(part, first)]

        replies, spent = cache.in_parts(
            f"{output}_replies_{turn}",
            conversations,
            files.REPLIES_AT_A_TIME,
            compute=compute,
            read=lambda file, part: files.read_replies(file, len(part)),
            write=files.write_replies,
            on_known=lambda known: None,
            stage="evaluate",
            config_key=config_key,
            shared=False,
        )
        cost.update(spent)
        return replies

    conversations = play(prompts, turns, count, act, answers)
    return [files.as_group(own) for own in conversations], spoken, cost
