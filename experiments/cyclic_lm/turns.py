"""Two turns: the classes and preferences of the oracle "openings", of the policy's last turn alone.

``last_turn`` is for conversations with the embedded partner, ``next_part`` for those with ``what_next``: the same
preference under two names, so that each game has its own results.
"""

from onpo_fast.conversations import Messages, message_text
from onpo_fast.multi_turn.conversation import Transcript
from onpo_fast.oracles.classes import OPENINGS, ClassPreference


def what_next(messages: Messages, seed: int) -> str:
    """An environment that wants to hear more of the story."""
    return "What happens next?"


def of_last_turn(prompt: Messages, conversation: Transcript) -> int | None:
    """Returns the class of the policy's last turn."""
    return OPENINGS.classify(prompt, message_text(conversation.messages[-1]))


last_turn = next_part = ClassPreference(OPENINGS.names, of_last_turn, OPENINGS.matrix, OPENINGS.none_loses)
