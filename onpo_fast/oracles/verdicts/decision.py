"""What an answer without its reasoning decides, given all the verdicts in it."""

from __future__ import annotations

import re
from collections import Counter

from .choices import BEFORE_CHOICE, TIE, UNCLEAR, Mark, blank_out
from .marks import LATEX_COMMAND, TAG, blank_other_tags, bracketed_marks, json_objects, labelled_marks, plain_signs
from .sentences import ANSWER_IS, LETTER, MAX_SENTENCE_CHARACTERS, SECOND_THOUGHT, Sentence, read_sentences

# Words between two verdicts in brackets on one line, which then are not the answer's
UNDECIDED = re.compile(
    r"\b(?:than|over|beats?|vs|versus|or|and|not|instead|rather|outperforms?|against)\b|[/|]|\w (?:≻|>|<|=) ",
    re.IGNORECASE,
)

Decision = tuple[str | None, int | None]  # "A", "B", "TIE" or None, and the index of its letter if one says it
NO_DECISION: Decision = (None, None)


def decide(text: str, ended: bool) -> Decision:
    """Decides a text without reasoning.

    The decision is the last verdict in double brackets, unless text after it takes it back or favours the other
    response; else the verdict with which the text ends, unless the sentence before it favours the other; else what all
    verdicts and sentences agree on.

    Args:
        text: the answer after its reasoning, with special tokens blanked out.
        ended: False if it was cut off at its token limit.
    """
    text = blank_other_tags(plain_signs(text))
    objects = list(json_objects(text))
    bare = blank_out(TAG, text)
    alone = re.sub(r"[\W_]+", "", bare).upper()
    if alone in ("A", "B", TIE):
        return alone, re.search("[A-Za-z]", bare).start()
    prose = bare
    for start, end, _ in objects:
        prose = prose[:start] + " " * (end - start) + prose[end:]
    sentences = list(read_sentences(prose, ended))
    letters = Counter(LETTER.findall(prose))
    favoured = [
        one.favours
        for one in sentences
        if one.favours and not _may_answer_the_prompt(prose[one.start : one.end], one.favours, letters)
    ]
    marks = sorted(labelled_marks(text, objects), key=lambda mark: mark.end)

    if brackets := list(bracketed_marks(prose)):
        return _decide_by_brackets(prose, brackets, favoured)
    final, start = _final_mark(bare, marks, sentences)
    if final:
        before = [sentence.favours for sentence in sentences if sentence.end <= start][-1:]
        before += [mark for mark in marks if mark.end <= start and not re.search(r"\w", bare[mark.end : start])]
        return _agreement([final, *(mark for mark in before if mark)])
    everything = [*favoured, *marks]
    quoted = any({mark.verdict} != {mark.verdict, *LETTER.findall(_sentence_before(mark, bare))} for mark in marks)
    unsure = quoted or (everything and SECOND_THOUGHT.search(prose, min(mark.end for mark in everything) - 1))
    return NO_DECISION if unsure else _agreement(everything)


def _decide_by_brackets(prose: str, brackets: list[Mark], favoured: list[Mark]) -> Decision:
    last = brackets[-1]
    others = [mark for mark in brackets if mark.verdict != last.verdict]
    between = prose[others[-1].end : last.start] if others else "\n"
    after = {mark.verdict for mark in favoured if mark.start >= last.end}
    unsure = ("\n" not in between and UNDECIDED.search(between)) or SECOND_THOUGHT.search(prose, last.end)
    return NO_DECISION if unsure or after - {last.verdict} else _agreement([last])


def _agreement(marks: list[Mark]) -> Decision:
    """Returns the verdict on which all marks agree, and the letter of the first; no decision if they do not."""
    decided = {mark.verdict for mark in marks}
    if len(decided) != 1 or UNCLEAR in decided:
        return NO_DECISION
    return marks[0].verdict, marks[0].letter_index


def _final_mark(text: str, marks: list[Mark], sentences: list[Sentence]) -> tuple[Mark | None, int]:
    """Returns the verdict with which a text ends, and where its sentence begins.

    ``text`` has spaces in place of tags.
    """
    for mark in marks[-1:]:
        before = LATEX_COMMAND.sub(" ", _sentence_before(mark, text))
        if not re.search(r"\w", text[mark.end :]) and re.fullmatch(BEFORE_CHOICE, before):
            return mark, mark.start - len(before)
    for sentence in sentences[-1:]:
        if sentence.stated and not re.search(r"\w", text[sentence.end :]):
            return sentence.favours, sentence.start
    return None, 0


def _may_answer_the_prompt(said: str, mark: Mark, letters: Counter[str]) -> bool:
    """Returns whether a sentence may give the right option of a multiple-choice prompt instead of a verdict.

    An example is "The best option is B. Response A says so."

    Args:
        said: the sentence.
        mark: the response that it seems to favour.
        letters: how often A and B occur in the whole text.
    """
    other = "B" if mark.verdict == "A" else "A"
    return ANSWER_IS.match(said) is not None and letters[other] > LETTER.findall(said).count(other)


def _sentence_before(mark: Mark, text: str) -> str:
    """Returns the part of a mark's sentence that stands before it."""
    return re.split(r"[.!?\n]", text[max(0, mark.start - MAX_SENTENCE_CHARACTERS) : mark.start])[-1]
