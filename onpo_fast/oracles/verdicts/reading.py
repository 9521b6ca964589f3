"""From an answer and its log-probs to a preference."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .choices import MAX_CHOICE_CHARACTERS, TIE, blank_out
from .decision import decide
from .logprobs import TopLogprobs, letters_of, likely_tokens_at
from .marks import VERDICT_NAME
from .reasoning import REASONING_NAME, SPECIAL_TOKEN, end_of_reasoning

PARSER_VERSION = 4  # part of every key in the judge's cache; raise it whenever an answer is read differently
# Characters that are read at the beginning of a long answer, where reasoning opens, and at its end, with the verdict
READ_CHARACTERS = (2**11, 2**16)

VERDICT_THEN_REASONING = re.compile(
    rf"\s*<{VERDICT_NAME}>[^<]{{1,{MAX_CHOICE_CHARACTERS}}}</[^<>]{{1,42}}>(?=\s*<(?:{REASONING_NAME})\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reading:
    """What was read in an answer."""

    verdict: str | None
    """"A", "B" or "TIE"; None if the answer decides nothing."""
    letter_index: int | None = None
    """Index in the answer of the letter that decides; None for a tie, or if no single letter does."""
    unclosed_reasoning: bool = False
    """Whether the answer ends inside its reasoning."""


def verdict(said: str) -> str | None:
    r"""Returns "A", "B" or "TIE"; None if an answer decides nothing or is not clear.

    A lone letter, one in brackets or before punctuation at the start, or the response that a sentence favours:

    >>> [verdict(s) for s in ("A", " **B**.", "[[A]]", "B: shorter", "A beats B", "The answer is B.", "tie")]
    ['A', 'B', 'A', 'B', 'A', 'B', 'TIE']
    >>> [verdict(s) for s in ("", "A good answer", "Both", "C")]
    [None, None, None, None]

    Reasoning is not read, and a verdict at the end counts before others:

    >>> [verdict(s) for s in ("<think>Response B is", "B is longer.</think>A", "<|channel|>final<|message|>B")]
    [None, 'A', 'B']
    >>> [verdict(s) for s in ("[[B>>A]]", "[[C]]", r"\boxed{\text{B}}", '{"why": "B rambles", "winner": "A"}')]
    ['B', 'TIE', 'B', 'A']
    >>> [verdict(s) for s in ("A is short, B long.\n\n**Verdict: B**", "[[A]] … no: [[B]]", "[[A]] or [[B]]")]
    ['B', 'B', None]
    """
    return read_answer(said).verdict


def read_answer(said: str, ended: bool = True) -> Reading:
    """Reads an answer of any length; of one longer than ``READ_CHARACTERS``, its beginning and its end.

    Args:
        said: the answer.
        ended: False if it was cut off at its token limit. Praise at the cut then decides nothing, since it might have
            gone on "… in style only".
    """
    head, tail = READ_CHARACTERS
    text, dropped = said, 0
    if len(said) > head + tail:
        text = said[:head] + "\n" + said[-tail:]
        dropped = len(said) - len(text)
    start = end_of_reasoning(text)
    if start is None:
        return Reading(None, unclosed_reasoning=True)
    if not text[start:].strip() and (first := VERDICT_THEN_REASONING.match(text)):
        start, text = 0, first[0]
    decided, index = decide(blank_out(SPECIAL_TOKEN, text[start:]), ended)
    if decided in (None, TIE) or index is None:
        return Reading(decided)
    index += start
    return Reading(decided, index + dropped if index > head else index)


def preference_of(said: str, reading: Reading, top: TopLogprobs) -> float | None:
    """Returns P(the response shown first is better).

    It is P(A) / (P(A) + P(B)) at the token with the verdict's letter where its log-probs are known; else 1 or 0 by the
    letter. It is ½ for a tie and None without a verdict.

    Args:
        said: the answer.
        reading: what was read in it.
        top: its log-probs.
    """
    if reading.verdict in (None, TIE):
        return None if reading.verdict is None else 0.5
    likely = [] if reading.letter_index is None else likely_tokens_at(said, reading.letter_index, top)
    letter = "" if reading.letter_index is None else said[reading.letter_index]
    both = "AB" if letter.isupper() else "ab"
    first, second = (sum(math.exp(min(p, 0)) for token, p in likely if letters_of(token) == one) for one in both)
    if (first if reading.verdict == "A" else second) > 0:
        return first / (first + second)
    return float(reading.verdict == "A")
