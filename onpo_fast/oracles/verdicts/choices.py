"""The shortest form of a verdict: a letter, a name with a letter, or a comparison such as A > B."""

from __future__ import annotations

import re
from dataclasses import dataclass

TIE, UNCLEAR = "TIE", "UNCLEAR"
MAX_CHOICE_CHARACTERS = 80  # of a text that may be nothing but a verdict

NOUN = r"(?:response|answer|option|assistant|model|candidate|choice|text|output|reply|one)"
SIGN = r"(?:>{1,3}|<{1,3}|={1,2}|≻|≫|≺|≪|≈|~)"
VERDICT_WORD = r"verdict|winner|winning|decision|preference|judge?ment|conclusion|result|choice|pick|selection|vote"
PRAISE = r"better|best|preferred|chosen|superior|stronger"
# The only words that may stand before the letter of a choice
BEFORE_CHOICE = (
    rf"[\W_]*(?:(?i:the|my|final|overall|in|therefore|thus|so|hence|i|d|would|choose|prefer|pick|select|go|with|is|was|"
    rf"s|say|think|clearly|definitely|it|goes|to|for|{PRAISE}|{VERDICT_WORD}|{NOUN})[\W_]+|(?i:{NOUN})){{0,8}}"
)
OTHER_RESPONSE = rf"(?i:the\s)?(?:(?i:{NOUN})[\s_*\"'`]{{1,4}})?[AB]\b"

# B, Response B, **Final verdict: B**, A > B; the text after it is judged separately
CHOICE = re.compile(
    rf"(?P<before>{BEFORE_CHOICE})(?P<one>[ABab])(?![^\W_]|['’]\w)"
    rf"(?:[\W_]{{0,6}}?(?P<sign>{SIGN})[\W_]{{0,6}}?(?i:{NOUN}[\W_]{{1,3}})?(?P<other>[ABab])(?![^\W_]))?[\s\"'*_`)\]}}$]*"
)
TIED = re.compile(
    r"[\W_]*(?:(?:the|final|verdict|answer|winner|decision|result|it|is|it's|it’s|a|an)[\W_]+){0,6}"
    r"(?:tied?|draw|equal)[\W_]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Mark:
    """A verdict at a place in a text, as indices from ``start`` to ``end``."""

    start: int
    end: int
    verdict: str
    """"A", "B", "TIE" or "UNCLEAR"."""
    letter_index: int | None
    """Index of the letter that says it; None if no single letter does."""


def mark_of_choice(found: re.Match, start: int, end: int) -> Mark:
    """Returns the mark of a match of ``CHOICE``, "A" or "A > B", in a stretch of text from ``start`` to ``end``."""
    one, sign, other = found["one"].upper(), found["sign"], found["other"]
    if sign is None:
        return Mark(start, end, one, start + found.start("one"))
    if sign[0] in "=≈~" or one == other.upper():
        return Mark(start, end, TIE if sign[0] in "=≈~" else UNCLEAR, None)
    if sign[0] in ">≻≫":
        return Mark(start, end, one, start + found.start("one"))
    return Mark(start, end, other.upper(), None)  # after "A <" the letter B is certain, so its log-probs say nothing


def blank_out(pattern: re.Pattern, text: str) -> str:
    """Replaces what a pattern finds by as many spaces, so that indices stay valid."""
    return pattern.sub(lambda found: " " * len(found[0]), text)
