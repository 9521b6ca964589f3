"""The environment's messages, checked against what the policy can read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from ..models.rendering import PromptRenderer, PromptTooLong
from .conversation import Conversation
from .environment import CheckedEnvironment


def reply_to(
    environment: CheckedEnvironment,
    conversation: Conversation,
    seed: Sequence[int],
    renderer: PromptRenderer,
    room: int,
) -> dict | None:
    """Returns the environment's next message; None ends the conversation, also where it leaves the policy no room.

    Args:
        conversation: one that the policy spoke in last.
        seed: from which the environment's is made.
        renderer: of the policy.
        room: the most tokens of a turn.

    Raises:
        UserError: as the environment does, or if the chat template refuses its message.
    """
    reply = environment(conversation.state, int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
    if reply is None:
        return None
    try:
        renderer.render(conversation.with_reply(reply).state, room)
    except PromptTooLong:
        return None
    except UserError as error:
        raise UserError(f"--environment {environment.name}: after its message, {error}") from error
    return reply
