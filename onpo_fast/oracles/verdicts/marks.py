r"""Verdicts with a form of their own: [[A]], \boxed{A}, <verdict>A</verdict>, {"winner": "A"}."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from .choices import CHOICE, MAX_CHOICE_CHARACTERS, NOUN, TIE, TIED, UNCLEAR, Mark, blank_out, mark_of_choice
from .sentences import favoured_letter

MAX_OBJECTS = 200  # places where a JSON object may begin that are tried

LATEX_COMMAND = re.compile(r"\\[A-Za-z]{1,20}|[{}\\]")
LATEX_SIGN = re.compile(r"\\(?:(?P<more>gg?|ggg|succ)|(?P<less>ll?|lll|prec)|(?P<same>sim|approx|equiv))(?![A-Za-z])")
BRACKETS = re.compile(r"\[\[([^\[\]\n]{1,60})\]\]|\[([AB][^\w\[\]\n]{1,6}[AB])\]|\[RESULT\]\W{0,4}([AB])\b")
BOXED = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
# Names of tags and JSON keys that mean the winner
VERDICT_NAME = (
    r"(?:(?:final|overall|my|the|your)[_ -]?)?(?:(?:answer|verdict|winner|choice|preference|decision|judge?ment|result|"
    r"output|response|selection|label|solution|pick|vote|conclusion|overall|better|best|preferred|preferable|chosen|"
    r"selected|winning|superior|stronger)"
    rf"(?:[_ -]?(?:{NOUN}|letter|label|option))?|choose|prefer|which[_ -]is[_ -]better)"
)
KEY = re.compile(VERDICT_NAME, re.IGNORECASE)
PAIR_OF_TAGS = re.compile(r"<([A-Za-z][\w -]{0,40})(?:\s[^<>]{0,60})?>([^<]{1,80})</[^<>]{1,42}>")
LAYOUT_TAGS = {"b", "strong", "i", "em", "u", "p", "div", "span", "center", "mark", "code", "pre", "final", "s"}
TAG = re.compile(r"</?[A-Za-z][\w:-]{0,40}(?:\s[^<>]{0,60})?/?>")


class Pairs(list):
    """A JSON object as a list of (key, value) pairs, because a key may occur twice."""


JsonObject = tuple[int, int, Pairs]  # start and end in the text, and the content


def plain_signs(text: str) -> str:
    """Replaces LaTeX's comparison signs by > < = and spaces, so that indices stay valid."""
    return LATEX_SIGN.sub(
        lambda found: (">" if found["more"] else "<" if found["less"] else "=").ljust(len(found[0])), text
    )


def blank_other_tags(text: str) -> str:
    """Blanks out pairs of tags that have another name than a verdict's: <worse_response>B</worse_response>."""

    def keep_or_blank(found: re.Match) -> str:
        known = re.fullmatch(VERDICT_NAME, found[1], re.IGNORECASE) or found[1].lower() in LAYOUT_TAGS
        return found[0] if known else " " * len(found[0])

    return PAIR_OF_TAGS.sub(keep_or_blank, text)


def bracketed_marks(text: str) -> Iterator[Mark]:
    """Yields the verdicts in brackets: [[A]], [[A>B]], [[C]] (MT-bench's tie), and Prometheus's [RESULT] A."""
    for found in BRACKETS.finditer(text):
        inside = found[found.lastindex]
        if inside.strip() in ("C", "c"):
            yield Mark(found.start(), found.end(), TIE, None)
        elif re.fullmatch(r"(?i)\W*a\W*(?:or|and|,|/)\W*b\W*", inside):
            yield Mark(found.start(), found.end(), UNCLEAR, None)
        elif mark := _mark_in(inside, found.start(found.lastindex)):
            yield mark


def labelled_marks(text: str, objects: list[JsonObject]) -> Iterator[Mark]:
    r"""Yields the verdicts in \boxed{}, tags and JSON objects. They may be quotations from a response."""
    for found in BOXED.finditer(text):
        if mark := _mark_in(blank_out(LATEX_COMMAND, _in_braces(text, found.end())), found.end()):
            yield mark
    for found in PAIR_OF_TAGS.finditer(text):
        if re.fullmatch(VERDICT_NAME, found[1], re.IGNORECASE) and (mark := _mark_in(found[2], found.start(2))):
            yield mark
    for start, end, pairs in objects:
        if mark := _mark_of_object(text, start, end, pairs):
            yield mark


def json_objects(text: str) -> Iterator[JsonObject]:
    """Yields the outermost JSON objects in a text."""
    at = 0
    for _ in range(MAX_OBJECTS):
        at = text.find("{", at)
        if at < 0:
            return
        try:
            pairs, end = json.JSONDecoder(object_pairs_hook=Pairs).raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
        else:
            yield at, end, pairs
            at = end


def _mark_in(stretch: str, start: int) -> Mark | None:
    """Returns the verdict of a stretch from ``start`` on: a bare choice, or a sentence that favours a response."""
    if len(stretch) > MAX_CHOICE_CHARACTERS:
        return None
    if TIED.fullmatch(stretch):
        return Mark(start, start + len(stretch), TIE, None)
    if (found := CHOICE.match(stretch)) and not re.search(r"[^\W_]", stretch[found.end() :]):
        return mark_of_choice(found, start, start + len(stretch))
    if (at := favoured_letter(stretch)) is not None:
        return Mark(start, start + len(stretch), stretch[at], start + at)
    return None


def _in_braces(text: str, start: int) -> str:
    """Returns the text from ``start`` to the closing brace; "" if there is none within ``MAX_CHOICE_CHARACTERS``."""
    depth = 1
    for index in range(start, min(len(text), start + MAX_CHOICE_CHARACTERS)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[start:index]
    return ""


def _mark_of_object(text: str, start: int, end: int, pairs: Pairs) -> Mark | None:
    """Returns the verdict at an object's outermost level that has one; an overall verdict before a criterion's."""
    level: list = [pairs]
    while level:
        marks = [
            (key, value, mark)
            for one in level
            if isinstance(one, Pairs)
            for key, value in one
            if isinstance(value, str) and KEY.fullmatch(key.strip()) and (mark := _mark_in(value, 0))
        ]
        marks = [mark for mark in marks if re.match("overall|final", mark[0], re.IGNORECASE)] or marks
        if marks:
            break
        inner = [[value for _, value in one] if isinstance(one, Pairs) else one for one in level]
        level = [value for values in inner for value in values if isinstance(value, list)]
    else:
        return None
    if len({mark.verdict for _, _, mark in marks}) != 1:
        return Mark(start, end, UNCLEAR, None)
    key, value, mark = marks[-1]
    pair = re.search(rf'"{re.escape(key)}"\s*:\s*"{re.escape(value)}"', text[start:end])  # None if it has escapes
    known = pair and mark.letter_index is not None
    return Mark(start, end, mark.verdict, start + pair.end() - 1 - len(value) + mark.letter_index if known else None)
