"""Verdicts in prose: which response a sentence states as its verdict, or favours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .choices import CHOICE, NOUN, OTHER_RESPONSE, PRAISE, TIE, TIED, VERDICT_WORD, Mark, mark_of_choice

MAX_SENTENCE_CHARACTERS = 500  # of a sentence that are read

# What may follow a choice in its sentence: a reason, the other response, or text that says nothing against it
REASON = re.compile(
    rf",?\s*(?:(?:because|since|due)\b|(?:over|to|not|and not|rather than|instead of)\s+{OTHER_RESPONSE}\W*$)"
)
CONTINUATION = re.compile(r"[,;:(]|[—–-]\s|(?:as|for|given)\b")
LABEL = re.compile(rf"\b(?:{VERDICT_WORD}|{PRAISE}|choose|prefer|pick|select|answer|go with|vote)\b", re.IGNORECASE)
AGAINST = re.compile(
    r"\b(?:not|worse|worst|inferior|weaker|loses?|lost|losing|loser|fails?|failed|neither|nor|non|no|never|wrong|"
    r"incorrect|less|least|second|hardly|poor|poorer|cannot|bad|could|should|might|if|had|would (?:be|have)|but|"
    r"however|yet|although|though|while|whereas|which|despite|unless|except|errors?|reject\w*|instead|otherwise|"
    r"doubt|nobody|may|were|false|claim that|some (?:would|people|users|may|might))\b|n['’]t\b",
    re.IGNORECASE,
)
# Words that take back what was said before
SECOND_THOUGHT = re.compile(
    r"(?:^|[.!?\n])\W{0,6}(?:(?:actually|wait|sorry|correction|hmm|no wait)\b|no[,.:!])|"
    r"\bI (?:meant|misread|was wrong|made a mistake)\b|"
    r"\b(?:scratch that|on (?:reflection|second thoughts?))\b",
    re.IGNORECASE,
)
SAYS = re.compile(r"\b(?:claims|says|said|argues|states)\b", re.IGNORECASE)
CONTRAST = re.compile(r"\b(?:but|however|yet|whereas)\b", re.IGNORECASE)
# Praise in one respect only, such as style, is not a verdict.
_OVERALL = r"(?!\s+(?:in|at|on)\s(?!every|all|both|general|most)|\s+\w+(?:ed|ten)\b)"
FAVOUR = re.compile(
    rf"\b(?:better|best|prefer\w*|choose|chose|pick|select\w*|wins?|winner|superior|stronger|go with|favou?r|vote)\b"
    rf"{_OVERALL}",
    re.IGNORECASE,
)
COMPARISON = re.compile(
    rf"""\b([AB])\b[\s"'*_`)]{{1,4}}(?:(?:is|was|seems)(?:\s(?:clearly|much|far|slightly|marginally|definitely|simply|
    significantly|considerably|somewhat|the|clear|generally|overall|still|also|therefore)){{0,3}}\s
    (?:better|best|superior|stronger|preferable|preferred|winner)|wins|beats|outperforms)\b
    (?!\s+than\s+(?!{OTHER_RESPONSE})){_OVERALL}(?!\s+(?:than|over|to)\s+{OTHER_RESPONSE}(?:\s+(?:in|at|on)\s(?!every|all|both|general|most)))""",
    re.VERBOSE,
)
ANSWER_IS = re.compile(r"[\W_]*(?:\w{2,7}\s){0,3}(?:answer|option|choice|solution)\s(?:is|was)\b", re.IGNORECASE)
LETTER = re.compile(r"\b([AB])\b")
AFTER_ARTICLE = re.compile(
    r"\s+(?!(?:is|was|wins?|has|because|since|as|for|over|by|due|beats|with|or|and|vs|clearly|definitely)\b)[a-z]"
)


@dataclass(frozen=True)
class Sentence:
    """A sentence of a text, as indices from ``start`` to ``end``."""

    start: int
    end: int
    favours: Mark | None
    """The response for which it speaks; None if it speaks for neither."""
    stated: bool = False
    """Whether it says so as a verdict, "The winner is A", and not as praise."""


def read_sentences(text: str, ended: bool) -> Iterator[Sentence]:
    """Splits a text into sentences and reads which response each favours. A question favours neither.

    Args:
        text: prose without tags, brackets and JSON.
        ended: False if the text was cut off.
    """
    for found in re.finditer(r"[^.!?\n]+([.!?]*)", text):
        said = found[0][:MAX_SENTENCE_CHARACTERS]
        if not re.search(r"[^\W\d_]", said):  # such as the number of a list item
            continue
        start, end = found.span()
        cut_off = not ended and not text[end:].strip() and not found[1]
        if "?" in found[1]:
            yield Sentence(start, end, None)
        elif TIED.fullmatch(said):
            yield Sentence(start, end, Mark(start, end, TIE, None), True)
        elif mark := _stated_verdict(said, start, end):
            yield Sentence(start, end, mark, True)
        elif (at := favoured_letter(said)) is not None and not (
            cut_off and FAVOUR.search(said.rstrip(), len(said) - 12)
        ):
            yield Sentence(start, end, Mark(start, end, said[at], start + at))
        else:
            yield Sentence(start, end, None)


def _stated_verdict(said: str, start: int, end: int) -> Mark | None:
    """Returns the verdict that a sentence, or a clause of it, states with its first words: "In all, I choose A"."""
    for clause in [0, *(found.end() for found in re.finditer(r"[,:]\s", said))]:
        found = CHOICE.match(said, clause)
        if not found or (clause and not LABEL.search(found["before"])):
            continue
        if clause and (AGAINST.search(said[:clause]) or LETTER.search(said[:clause])):
            return None
        one, rest = found["one"], said[found.end() :]
        noun = re.search(rf"(?i:{NOUN})[\W_]{{1,3}}$", found["before"])
        if one.islower() and not (noun and not re.search(r"[^\W_]", rest)):
            return None
        if not _rest_agrees(rest, found["before"], one):
            return None
        return mark_of_choice(found, start, end)
    return None


def _rest_agrees(rest: str, before: str, one: str) -> bool:
    """Returns whether the rest of a sentence says nothing against the choice with which it begins.

    Args:
        rest: the text after the choice.
        before: the text before its letter.
        one: its letter.
    """
    if not re.search(r"[^\W_]", rest):
        return True
    if CONTRAST.search(rest):
        return False
    if REASON.match(rest):
        return True
    labelled = not re.search(r"\w", before) or LABEL.search(before)  # "Response A: …" is a heading
    names_other = LETTER.search(rest) and LETTER.search(rest)[1] != one
    return bool(CONTINUATION.match(rest) and labelled and not names_other and not AGAINST.search(rest))


def favoured_letter(said: str) -> int | None:
    """Returns the index of the letter that a sentence favours; None if there is none.

    It is the response that the sentence says is better than the other, or the only one that it names, if nothing in it
    speaks against that response.
    """
    compared = list(COMPARISON.finditer(said))
    if len({found[1] for found in compared}) == 1:
        first = compared[0]
        quoted = SAYS.search(said[: first.start()]) and {first[1]} != set(LETTER.findall(said[: first.end()]))
        if not quoted and not AGAINST.search(said[: first.end()]) and not CONTRAST.search(said[first.end() :]):
            return first.start(1)
    letters = [found for found in LETTER.finditer(said) if not _is_article(said, found.start())]
    if len({found[1] for found in letters}) != 1 or re.match("['’]", said[letters[0].end() :]):
        return None
    return letters[0].start() if FAVOUR.search(said) and not AGAINST.search(said) else None


def _is_article(text: str, at: int) -> bool:
    """Returns whether the letter at an index is the article: an A at the beginning of a sentence, before a word."""
    begins = re.search(r"(?:^|[^\w\s,])\s*$", text[max(0, at - 10) : at]) is not None
    return text[at] == "A" and begins and AFTER_ARTICLE.match(text, at + 1) is not None
