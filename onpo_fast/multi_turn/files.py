"""Files of conversations in a run directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..conversations import columns_of
from ..data import Group, Misfit, Response, read_items
from ..files import write_jsonl
from .conversation import Conversation

REPLIES_AT_A_TIME = 64  # in a part of a stage: what a run that is killed asks for again at most


def write_replies(path: Path, replies: Iterable[dict | None]) -> None:
    write_jsonl(path, ({"reply": reply} for reply in replies))


def read_replies(path: Path, count: int) -> list[dict | None]:
    """Reads what ``write_replies`` wrote: ``count`` messages of the environment, or None.

    Raises:
        UserError: names the file, and the line that does not fit.
    """

    def make(record: dict, _: int | None) -> dict | None:
        reply = record["reply"]
        fits = reply is None or (isinstance(reply, dict) and isinstance(reply.get("content"), str) and "role" in reply)
        if not fits:
            raise Misfit("it is no message of an environment")
        return reply

    return read_items(path, make, range(count), "conversations that were answered")


def write_conversations(path: Path, groups: Iterable[Group]) -> None:
    """Writes conversations that ``as_group`` made: "prompt", "responses" as text and "conversations" as messages."""
    write_jsonl(
        path,
        (
            {
                **columns_of(group.prompt),
                "responses": [response.text for response in group.responses],
                "conversations": [response.text.messages for response in group.responses],
            }
            for group in groups
        ),
    )


def as_group(conversations: Sequence[Conversation]) -> Group:
    """Returns conversations from one prompt as its responses, for the oracle: each is its transcript.

    The tokens of a response are those of all turns of the policy.
    """
    responses = [
        Response(
            conversation.transcript,
            [token for response in conversation.responses for token in response.tokens],
            conversation.responses[-1].stop_reason,
            sum(response.logp for response in conversation.responses),
        )
        for conversation in conversations
    ]
    return Group(conversations[0].prompt, [], responses)
