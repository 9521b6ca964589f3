"""Two turns: the classes and preferences of the oracle "openings", of the policy's last turn alone."""

from onpo_fast.conversations import Messages, message_text
from onpo_fast.multi_turn.conversation import Transcript
from onpo_fast.oracles.classes import OPENINGS, ClassPreference


def of_last_turn(prompt: Messages, conversation: Transcript) -> int | None:
    """Returns the class of the policy's last turn."""
    return OPENINGS.classify(prompt, message_text(conversation.messages[-1]))


last_turn = ClassPreference(OPENINGS.names, of_last_turn, OPENINGS.matrix, OPENINGS.none_loses)
