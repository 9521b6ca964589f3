"""A conversation from its prompt to its end, and its transcript, which is what oracles compare."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from ..conversations import Messages, Prompt, message_text, tools_of
from ..data import Response


class Transcript(str):
    """What follows a prompt in a conversation, as text: the first turn of the policy, then each message with its role.

    A conversation of one turn is the text of its response.

    Attributes:
        messages: the same as a list of messages; the first is the policy's.
    """

    messages: Messages

    def __new__(cls, messages: Messages) -> Transcript:
        first, *rest = (message_text(message) for message in messages)
        roles = [message["role"].capitalize() for message in messages[1:]]
        transcript = super().__new__(cls, "\n\n".join([first, *(f"{role}: {text}" for role, text in zip(roles, rest))]))
        transcript.messages = messages
        return transcript

    def __getnewargs__(self) -> tuple[Messages]:
        return (self.messages,)  # for copies


PROBES = tuple(  # two conversations that differ, also in length
    Transcript([{"role": "assistant", "content": "Yes."}, *more])
    for more in ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "I think so."}], [])
)


@dataclass(frozen=True)
class Conversation:
    """A conversation so far.

    Attributes:
        prompt: what it begins with.
        responses: the policy's turns.
        replies: the environment's; None: it ended the conversation. One fewer than responses while the environment is
            to speak, and after the last turn.
    """

    prompt: Messages
    responses: tuple[Response, ...] = ()
    replies: tuple[dict | None, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the environment has ended it."""
        return bool(self.replies) and self.replies[-1] is None

    @property
    def messages(self) -> Messages:
        """What follows the prompt."""
        found: Messages = []
        for turn, response in enumerate(self.responses):
            found.append({"role": "assistant", "content": response.text})
            if turn < len(self.replies) and self.replies[turn] is not None:
                found.append(copy.deepcopy(self.replies[turn]))  # oracles may change what they are given
        return found

    @property
    def state(self) -> Prompt:
        """All of it, as the prompt of the policy's next turn."""
        return Prompt([*self.prompt, *self.messages], getattr(self.prompt, "where", ""), tools_of(self.prompt))

    @property
    def transcript(self) -> Transcript:
        return Transcript(self.messages)

    def with_response(self, response: Response) -> Conversation:
        """Returns it with another turn of the policy."""
        return replace(self, responses=(*self.responses, response))

    def with_reply(self, reply: dict | None) -> Conversation:
        """Returns it with the environment's next message; None ends it."""
        return replace(self, replies=(*self.replies, reply))
