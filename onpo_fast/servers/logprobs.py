"""Servers that refuse a request because it asks for log-probs: how to recognise them, and what to send instead."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

from .failures import named_fields

LOGPROBS = re.compile(r"log[\s_-]?prob", re.IGNORECASE)
REFUSAL_WORDS = re.compile(
    r"\b(?:not|no|cannot|never|un(?:supported|available|implemented|known|expected|recognized|able)|disabled|disallowed|"
    r"forbidden|invalid|lacks?|without|bad request|notimplemented\w*|(?-i:[A-Z]\w*Error))\b|n['’]t\b",
    re.IGNORECASE,
)


class LogprobsRefusal(Enum):
    """Whether a failed reply refuses log-probs."""

    CERTAIN = "certain"
    POSSIBLE = "possible"
    NO = "no"


def without_logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the same request without the fields that ask for log-probs."""
    return {name: value for name, value in body.items() if "logprobs" not in name}


def logprobs_refusal(status: int, text: str, body: dict[str, Any]) -> LogprobsRefusal:
    """Judges by its status and text whether a failed reply refuses the request because it asks for log-probs."""
    if status < 400 or status in (401, 408, 409, 429):
        return LogprobsRefusal.NO
    mentions = [text[max(0, found.start() - 80) : found.end() + 80] for found in LOGPROBS.finditer(text)]
    if mentions and status < 500:
        return LogprobsRefusal.CERTAIN
    if any(REFUSAL_WORDS.search(words) for words in mentions):  # a server that fails may also just repeat the request
        return LogprobsRefusal.POSSIBLE
    names_nothing = status in (400, 422, 501) and not (mentions or named_fields(text, body))
    if names_nothing and (status == 501 or REFUSAL_WORDS.search(text) or not text.strip()):
        return LogprobsRefusal.POSSIBLE
    return LogprobsRefusal.NO
