"""The log-probs in a reply, and which token of an answer said a letter."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_SPECIAL_TOKENS = 8  # after an answer

# For each position of an answer: the token's bytes, and the likely tokens there with their log-probs
TopLogprobs = list[tuple[bytes, list[tuple[str, float]]]]


def top_logprobs(choice: Any) -> TopLogprobs:
    """Returns the log-probs in a choice of a chat completion; [] if there are none, or they are malformed."""
    try:
        top = [
            (
                _token_bytes(position),
                [(str(t["token"]), float(t["logprob"])) for t in position.get("top_logprobs") or []],
            )
            for position in choice["logprobs"]["content"] or []
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return []
    return [] if any(math.isnan(p) for _, likely in top for _, p in likely) else top


def _token_bytes(position: dict[str, Any]) -> bytes:
    """Returns the bytes of a token. Its text is a placeholder where the token is a part of a character."""
    given = position.get("bytes")
    if isinstance(given, list) and given:
        return bytes(given)
    return str(position["token"]).encode("utf-8", "replace")


def likely_tokens_at(said: str, at: int, top: TopLogprobs) -> list[tuple[str, float]]:
    """Returns the likely tokens in place of the token that holds a character of an answer.

    The tokens, joined, must end with the answer. Before it there may be others, such as reasoning that the server
    removed; after it there may be special tokens.

    Args:
        said: the answer.
        at: index of the character.
        top: the log-probs of all tokens.

    Returns:
        Tokens with their log-probs; [] if the token cannot be identified with certainty.
    """
    wanted = said.strip().encode("utf-8", "replace")
    before = len(said[:at].lstrip().encode("utf-8", "replace"))
    for spelled in (lambda token: token, _without_markers):
        tokens = [spelled(token) for token, _ in top]
        for _ in range(len(tokens[-MAX_SPECIAL_TOKENS:])):
            joined = b"".join(tokens).rstrip()
            if joined.endswith(wanted):
                place = len(joined) - len(wanted) + before
                for token, (_, likely) in zip(tokens, top):
                    if place < len(token):
                        return likely if letters_of(token.decode("utf-8", "replace")) == said[at] else []
                    place -= len(token)
            if not re.fullmatch(rb"\s*|\s*<[^<>]{1,60}>\s*|\s*\[/?[A-Z_]{2,20}\]\s*", tokens[-1]):
                break
            tokens.pop()
    return []


def _without_markers(token: bytes) -> bytes:
    """Returns a token as text, for servers that send it as the tokenizer's vocabulary spells it."""
    for marker, text in (("▁", " "), ("Ġ", " "), ("Ċ", "\n")):
        token = token.replace(marker.encode(), text.encode())
    return token


def letters_of(token: str) -> str:
    """Returns a token without spaces, punctuation and the markers of vocabularies."""
    return re.sub(r"[\W_▁Ġ]+", "", token)
