"""Reads replies without trusting them: the size is limited, the encoding fixed and every field checked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .failures import MalformedReply


@dataclass(frozen=True)
class Reply:
    """The first choice of a chat completion."""

    text: str
    """The message's text; "" if it has none."""
    choice: dict[str, Any]
    """The choice as the server sent it, with its finish reason and log-probs."""
    prompt_tokens: int
    """Tokens of the prompt as the server counted them; 0 if it did not."""
    completion_tokens: int
    """Tokens of the answer as the server counted them; 0 if it did not."""

    @property
    def reached_token_limit(self) -> bool:
        """Whether the answer was cut off at its limit of tokens."""
        return self.choice.get("finish_reason") == "length"

    def explain_no_text(self) -> str:
        """Says in parentheses why the message has no text; "" if the reply does not say."""
        message = self.choice["message"]
        if isinstance(message.get("refusal"), str) and message["refusal"]:
            return f"(no content, a refusal: {message['refusal']})"
        if self.choice.get("finish_reason") == "content_filter":
            return "(no content: removed by the server's content filter)"
        if any(message.get(name) for name in ("reasoning_content", "reasoning")):
            return "(no content, only reasoning)"
        return ""


def read_reply(raw: str) -> Reply:
    """Reads a chat completion.

    Raises:
        MalformedReply: if the text is not one.
    """
    try:
        reply = json.loads(raw)
        choice = reply["choices"][0]
        text = _message_text(choice["message"].get("content"))
    except Exception:  # not JSON, nested too deeply, JSON of another shape
        raise MalformedReply(f"a reply that is not a chat completion: {raw.strip() or 'it is empty'}") from None
    usage = reply.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    return Reply(text, choice, *(int(n) if isinstance(n, int) and 0 <= n < 2**31 else 0 for n in counts))


def bound_replies(most_bytes: int) -> Callable[[Any], Awaitable[None]]:
    """Returns a hook for the HTTP client, called before the body of a reply is read.

    It limits the size of a reply, and reads it as UTF-8 whatever charset it claims: JSON has no other encoding.
    """

    async def bound_reply(response: Any) -> None:
        response.encoding = "utf-8-sig"
        read_chunks = response.aiter_bytes

        async def bounded(*arguments: Any) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in read_chunks(*arguments):
                size += len(chunk)
                if size > most_bytes:
                    raise MalformedReply(f"a reply of more than {most_bytes >> 20} MiB")
                yield chunk

        response.aiter_bytes = bounded

    return bound_reply


def _message_text(content: object) -> str:
    """Returns the text of a message whose content is a string, a list of parts, or absent.

    Raises:
        TypeError: if it is something else.
    """
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else _part_text(part) for part in content if part is not None]
        return "".join(texts)
    if content is not None and not isinstance(content, str):
        raise TypeError("neither text nor parts")
    return content or ""


def _part_text(part: dict[str, Any]) -> str:
    """Returns the text of a part; "" for a part of another kind, such as an image or reasoning."""
    text = part.get("text") if part.get("type", "text") in ("text", "output_text") else None
    return text if isinstance(text, str) else ""
