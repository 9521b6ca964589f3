"""What a judge's answer says: its text -> a verdict, and the log-probs at the verdict -> a preference.

Reasoning is not read: only what follows its last end. There, the verdict is the last in double brackets, or the one
with which the answer ends, or what all explicit verdicts and all sentences agree on. What contradicts itself is none:
a verdict that is missed is asked for once more and then counted, one that is inverted is seen by nobody.

No expression takes more than linear time: each repetition is bounded, or of characters that end it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

PARSER_VERSION = 4  # of this file; part of every cache key: raise it when an answer is read differently
READ_CHARACTERS = (2**11, 2**16)  # of a longer answer's beginning, where reasoning opens, and its end, with the verdict
LONGEST_CHOICE = 80  # characters that can be nothing but a verdict
LONGEST_SENTENCE = 500  # characters of a sentence that are read
MOST_OBJECTS = 200  # places where JSON may begin that are tried
MOST_SPECIAL_TOKENS = 8  # after an answer

TIE, UNCLEAR = "TIE", "UNCLEAR"

# What was said at each position, as bytes, and the likely tokens there with their log-probs.
TopLogprobs = list[tuple[bytes, list[tuple[str, float]]]]


@dataclass(frozen=True)
class Reading:
    """What was read in an answer."""

    verdict: str | None  # A, B or TIE; None if the answer decides nothing
    at: int | None = None  # index in the answer of the letter that decides; None for a tie, or where it is not known
    unfinished: bool = False  # a reasoning was opened and never closed


@dataclass(frozen=True)
class _Mark:
    """An explicit verdict in a text."""

    start: int
    end: int
    verdict: str  # A, B, TIE or UNCLEAR
    at: int | None  # of the letter


def verdict(said: str) -> str | None:
    r"""A, B or TIE; None if an answer decides nothing, or what it decides is not clear.

    A letter alone, in brackets or before punctuation at the start, or the one that a sentence speaks for:

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
    """Reads an answer of any length; of one that is longer than ``READ_CHARACTERS``, its beginning and its end.

    ``ended`` is False for one that was cut off at its token limit: praise with which it breaks off says nothing, for it
    may go on "… in style only".
    """
    head, tail = READ_CHARACTERS
    text, dropped = said, 0
    if len(said) > head + tail:
        text = said[:head] + "\n" + said[-tail:]
        dropped = len(said) - len(text)
    start = _end_of_reasoning(text)
    if start is None:
        return Reading(None, unfinished=True)
    if not text[start:].strip() and (first := VERDICT_THEN_REASONING.match(text)):
        start, text = 0, first[0]
    decided, at = _decided(_blanked(SPECIAL_TOKEN, text[start:]), ended)
    if decided in (None, TIE) or at is None:
        return Reading(decided)
    at += start
    return Reading(decided, at + dropped if at > head else at)


def preference_of(said: str, reading: Reading, top: TopLogprobs) -> float | None:
    """P(the response shown first is better): from the log-probs of the token that said the verdict, else 1, 0, or ½ for
    a tie. None without a verdict."""
    if reading.verdict in (None, TIE):
        return None if reading.verdict is None else 0.5
    likely = [] if reading.at is None else _likely_at(said, reading.at, top)
    letter = "" if reading.at is None else said[reading.at]
    both = "AB" if letter.isupper() else "ab"
    first, second = (sum(math.exp(min(p, 0)) for token, p in likely if _letter(token) == one) for one in both)
    if (first if reading.verdict == "A" else second) > 0:
        return first / (first + second)
    return float(reading.verdict == "A")


# ---------------------------------------------------------------------------------------------------------------------
# Reasoning
# ---------------------------------------------------------------------------------------------------------------------

# The names of tags whose content is reasoning, with what may be around them: begin_of_thought, seed:think.
_NAME = (
    r"[\w:.-]{0,30}?(?:think|thought|reason|reflect|analys|analyz|scratch|deliberat|monologue|ponder|contemplat)"
    r"[\w:.-]{0,30}|cot|details"
)
REASONING = re.compile(
    rf"""
      <\s{{0,3}}[|｜]?\s{{0,3}}(?P<slash>/?)\s{{0,3}}(?P<tag>{_NAME})(?:\s[^<>]{{0,200}})?[|｜]?\s{{0,3}}>
    | [◁⟨〈《«‹【＜]\s{{0,3}}(?P<slash2>/?)\s{{0,3}}(?P<tag2>{_NAME})\s{{0,3}}[▷⟩〉》»›】＞]
    | \[(?P<slash3>/)(?P<tag3>{_NAME})\]
    | \[(?P<open>THINK(?:ING)?)\]
    | <\|channel\|?>\s{{0,3}}(?P<channel>[a-z]\w{{0,30}})(?:[^<]{{0,60}}(?:<\|constrain\|>[^<]{{0,60}})?<\|message\|>)?
    | (?P<channel_end><channel\|>|<\|(?:end|return|call)\|>)
    | (?P<leaked_end>(?-i:assistantfinal))
    | (?P<leaked>\A\s*(?-i:analysis(?=[A-Z])))
    | (?P<begin><unused94>|<\|inner_prefix\|>|here(?:['’]s|[ ]is)[ ]my[ ]thought[ ]process:|\A\s*thinking\.\.\.\n)
    | (?P<end><unused95>|<\|inner_suffix\|>|here(?:['’]s|[ ]is)[ ]my[ ]response:|\.\.\.done[ ]thinking\.)
    """,
    re.IGNORECASE | re.VERBOSE,
)
FINAL_CHANNELS = {"final", "answer", "response", "output", "content"}
SPECIAL_TOKEN = re.compile(
    r"(?:<\|(?:begin|start)\|>assistant\b)?<[|｜][^<>|｜]{1,40}[|｜]>|<\|[a-z_]{1,20}>|<[a-z_]{1,20}\|>|</?s>|"
    r"<(?:start|end)_of_turn>|<eos>",
    re.IGNORECASE,
)
# Around a tag that is spoken of: "opens with `<think>`", "leaks its </think> marker".
SPOKEN_OF = re.compile(
    r"[`\"'“‘«]\s?\Z|\b(?:its|an?|the|stray|literal|(?:un)?closed|(?:un)?closing|missing)\s\Z", re.IGNORECASE
)
AFTER_SPOKEN_OF = re.compile(r"\s?[`\"'”’»]|\s[a-z]{2}")


def _end_of_reasoning(text: str) -> int | None:
    """The index after the last end of reasoning, 0 if there is none; None if a reasoning is still open at the end.

    An end needs no beginning: the template may have opened the reasoning.
    """
    start = 0
    opened: list[str] = []  # names; a reasoning may have others in it
    for found in REASONING.finditer(text):
        before = text[max(0, found.start() - 12) : found.start()]
        if SPOKEN_OF.search(before) and AFTER_SPOKEN_OF.match(text, found.end()):
            continue
        if found["channel"]:
            if found["channel"].lower() in FINAL_CHANNELS:
                start, opened = found.end(), []
            else:
                opened.append("channel")
        elif found["channel_end"]:
            if opened:
                start, opened = found.end(), opened[: opened.index("channel")] if "channel" in opened else []
        elif found["leaked_end"]:
            start, opened = found.end(), []
        elif found["leaked"]:
            opened.append("leaked")
        elif found["begin"] or found["end"]:
            if found["begin"]:
                opened.append("words")
            else:
                start, opened = found.end(), opened[: opened.index("words")] if "words" in opened else opened
        else:
            name = (found["tag"] or found["tag2"] or found["tag3"] or found["open"]).lower()
            closes = found["slash"] or found["slash2"] or found["slash3"] or re.search(r"(?:\b|_)end(?:\b|_)", name)
            name = re.sub(r"(?:begin|start|end|of)(?=[\W_]|$)|[\W_]", "", name)
            if closes:
                start, opened = found.end(), opened[: opened.index(name)] if name in opened else opened
            else:
                opened.append(name)
    return None if opened else start


def _blanked(pattern: re.Pattern, text: str) -> str:
    """Puts spaces in place of what the pattern finds, so that indices stay."""
    return pattern.sub(lambda found: " " * len(found[0]), text)


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

_NOUN = r"(?:response|answer|option|assistant|model|candidate|choice|text|output|reply|one)"
_SIGN = r"(?:>{1,3}|<{1,3}|={1,2}|≻|≫|≺|≪|≈|~)"
_VERDICT = r"verdict|winner|winning|decision|preference|judge?ment|conclusion|result|choice|pick|selection|vote"
_PRAISE = r"better|best|preferred|chosen|superior|stronger"
# The only words that may stand before the letter of a choice.
_BEFORE = (
    rf"[\W_]*(?:(?i:the|my|final|overall|in|therefore|thus|so|hence|i|d|would|choose|prefer|pick|select|go|with|is|was|"
    rf"s|say|think|clearly|definitely|it|goes|to|for|{_PRAISE}|{_VERDICT}|{_NOUN})[\W_]+|(?i:{_NOUN})){{0,8}}"
)
_OTHER = rf"(?i:the\s)?(?:(?i:{_NOUN})[\s_*\"'`]{{1,4}})?[AB]\b"

# B, Response B, **Final verdict: B**, A > B; what follows is looked at apart.
CHOICE = re.compile(
    rf"(?P<before>{_BEFORE})(?P<one>[ABab])(?![^\W_]|['’]\w)"
    rf"(?:[\W_]{{0,6}}?(?P<sign>{_SIGN})[\W_]{{0,6}}?(?i:{_NOUN}[\W_]{{1,3}})?(?P<other>[ABab])(?![^\W_]))?[\s\"'*_`)\]}}$]*"
)
TIED = re.compile(
    r"[\W_]*(?:(?:the|final|verdict|answer|winner|decision|result|it|is|it's|it’s|a|an)[\W_]+){0,6}"
    r"(?:tied?|draw|equal)[\W_]*",
    re.IGNORECASE,
)
# What may follow a choice in its sentence: a reason, the other response, or more that says nothing against it.
REASON = re.compile(rf",?\s*(?:(?:because|since|due)\b|(?:over|to|not|and not|rather than|instead of)\s+{_OTHER}\W*$)")
MORE = re.compile(r"[,;:(]|[—–-]\s|(?:as|for|given)\b")
LABEL = re.compile(rf"\b(?:{_VERDICT}|{_PRAISE}|choose|prefer|pick|select|answer|go with|vote)\b", re.IGNORECASE)

COMMAND = re.compile(r"\\[A-Za-z]{1,20}|[{}\\]")  # of LaTeX
LATEX_SIGN = re.compile(r"\\(?:(?P<more>gg?|ggg|succ)|(?P<less>ll?|lll|prec)|(?P<same>sim|approx|equiv))(?![A-Za-z])")
BRACKETS = re.compile(r"\[\[([^\[\]\n]{1,60})\]\]|\[([AB][^\w\[\]\n]{1,6}[AB])\]|\[RESULT\]\W{0,4}([AB])\b")
BOXED = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
_NAMES = (  # of tags and JSON keys that mean the winner
    r"(?:(?:final|overall|my|the|your)[_ -]?)?(?:(?:answer|verdict|winner|choice|preference|decision|judge?ment|result|"
    r"output|response|selection|label|solution|pick|vote|conclusion|overall|better|best|preferred|preferable|chosen|"
    r"selected|winning|superior|stronger)"
    rf"(?:[_ -]?(?:{_NOUN}|letter|label|option))?|choose|prefer|which[_ -]is[_ -]better)"
)
KEY = re.compile(_NAMES, re.IGNORECASE)
VERDICT_THEN_REASONING = re.compile(
    rf"\s*<{_NAMES}>[^<]{{1,{LONGEST_CHOICE}}}</[^<>]{{1,42}}>(?=\s*<(?:{_NAME})\b)", re.IGNORECASE
)
PAIR_OF_TAGS = re.compile(r"<([A-Za-z][\w -]{0,40})(?:\s[^<>]{0,60})?>([^<]{1,80})</[^<>]{1,42}>")
OF_LAYOUT = {"b", "strong", "i", "em", "u", "p", "div", "span", "center", "mark", "code", "pre", "final", "s"}
TAG = re.compile(r"</?[A-Za-z][\w:-]{0,40}(?:\s[^<>]{0,60})?/?>")

UNDECIDED = re.compile(  # between two bracketed verdicts on a line, of which then neither is the answer's
    r"\b(?:than|over|beats?|vs|versus|or|and|not|instead|rather|outperforms?|against)\b|[/|]|\w (?:≻|>|<|=) ",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Sentence:
    start: int
    end: int
    voice: _Mark | None  # the response it speaks for
    stated: bool = False  # as a verdict: "The winner is A", and not as praise


def _decided(text: str, ended: bool) -> tuple[str | None, int | None]:
    """The verdict of a text without reasoning, and the index of its letter.

    That is the last verdict in double brackets, if nothing after it takes it back or speaks for the other response; or
    else the verdict with which the text ends, if the sentence before it does not speak for the other; or else what all
    that is said agrees on.
    """
    text = LATEX_SIGN.sub(
        lambda found: (">" if found["more"] else "<" if found["less"] else "=").ljust(len(found[0])), text
    )
    text = PAIR_OF_TAGS.sub(_without_other_tags, text)
    objects = list(_objects(text))
    bare = _blanked(TAG, text)
    alone = re.sub(r"[\W_]+", "", bare).upper()
    if alone in ("A", "B", TIE):
        return alone, re.search("[A-Za-z]", bare).start()
    prose = bare
    for start, end, _ in objects:
        prose = prose[:start] + " " * (end - start) + prose[end:]
    sentences = list(_sentences(prose, ended))
    letters = Counter(LETTER.findall(prose))
    voices = [s.voice for s in sentences if s.voice and not _is_of_the_task(prose[s.start : s.end], s.voice, letters)]
    marks = sorted(_marks(text, objects), key=lambda mark: mark.end)

    if brackets := list(_bracketed(prose)):
        last = brackets[-1]
        others = [mark for mark in brackets if mark.verdict != last.verdict]
        between = prose[others[-1].end : last.start] if others else "\n"
        after = {voice.verdict for voice in voices if voice.start >= last.end}
        unsure = ("\n" not in between and UNDECIDED.search(between)) or SECOND_THOUGHT.search(prose, last.end)
        return (None, None) if unsure or after - {last.verdict} else _of([last])

    final, start = _final(bare, marks, sentences)
    if final:
        before = [sentence.voice for sentence in sentences if sentence.end <= start][-1:]
        before += [mark for mark in marks if mark.end <= start and not re.search(r"\w", bare[mark.end : start])]
        return _of([final, *(voice for voice in before if voice)])
    spoken = [*voices, *marks]
    quoted = any({mark.verdict} != {mark.verdict, *LETTER.findall(_before(mark, bare))} for mark in marks)
    unsure = quoted or (spoken and SECOND_THOUGHT.search(prose, min(mark.end for mark in spoken) - 1))
    return (None, None) if unsure else _of(spoken)


def _of(marks: list[_Mark]) -> tuple[str | None, int | None]:
    """What marks agree on, and where the first says it; None if they do not."""
    decided = {mark.verdict for mark in marks}
    return (None, None) if len(decided) != 1 or UNCLEAR in decided else (marks[0].verdict, marks[0].at)


def _final(text: str, marks: list[_Mark], sentences: list[_Sentence]) -> tuple[_Mark | None, int]:
    """The verdict with which a text ends, and where its sentence begins. ``text`` has spaces for tags."""
    for mark in marks[-1:]:
        before = COMMAND.sub(" ", _before(mark, text))
        if not re.search(r"\w", text[mark.end :]) and re.fullmatch(_BEFORE, before):
            return mark, mark.start - len(before)
    for sentence in sentences[-1:]:
        if sentence.stated and not re.search(r"\w", text[sentence.end :]):
            return sentence.voice, sentence.start
    return None, 0


def _is_of_the_task(said: str, voice: _Mark, letters: Counter[str]) -> bool:
    """Whether a sentence may say what the right answer is to a question of several choices, about which the responses
    are: "The best option is B. Response A says so." ``letters`` are those of the whole text."""
    other = "B" if voice.verdict == "A" else "A"
    return ANSWER_IS.match(said) is not None and letters[other] > LETTER.findall(said).count(other)


def _before(mark: _Mark, text: str) -> str:
    """What stands before a mark in its sentence."""
    return re.split(r"[.!?\n]", text[max(0, mark.start - LONGEST_SENTENCE) : mark.start])[-1]


# Explicit marks ------------------------------------------------------------------------------------------------------


def _bracketed(text: str) -> Iterator[_Mark]:
    """[[A]], [[A>B]], [[C]] (MT-bench's tie), and Prometheus's [RESULT] A."""
    for found in BRACKETS.finditer(text):
        inside = found[found.lastindex]
        if inside.strip() in ("C", "c"):
            yield _Mark(found.start(), found.end(), TIE, None)
        elif re.fullmatch(r"(?i)\W*a\W*(?:or|and|,|/)\W*b\W*", inside):
            yield _Mark(found.start(), found.end(), UNCLEAR, None)
        elif mark := _choice(inside, found.start(found.lastindex)):
            yield mark


def _marks(text: str, objects: list[tuple[int, int, list]]) -> Iterator[_Mark]:
    r"""The verdicts in \boxed{}, tags and JSON. They may be quoted from a response."""
    for found in BOXED.finditer(text):
        if mark := _choice(_blanked(COMMAND, _braced(text, found.end())), found.end()):
            yield mark
    for found in PAIR_OF_TAGS.finditer(text):
        if re.fullmatch(_NAMES, found[1], re.IGNORECASE) and (mark := _choice(found[2], found.start(2))):
            yield mark
    for start, end, pairs in objects:
        if mark := _of_object(text, start, end, pairs):
            yield mark


def _without_other_tags(found: re.Match) -> str:
    """Spaces for a pair of tags that has another name than a verdict's: <worse_response>B</worse_response>."""
    known = re.fullmatch(_NAMES, found[1], re.IGNORECASE) or found[1].lower() in OF_LAYOUT
    return found[0] if known else " " * len(found[0])


def _choice(stretch: str, start: int) -> _Mark | None:
    """The verdict of a short stretch, which begins at ``start``: a bare choice, or a sentence for one of the two."""
    if len(stretch) > LONGEST_CHOICE:
        return None
    if TIED.fullmatch(stretch):
        return _Mark(start, start + len(stretch), TIE, None)
    if (found := CHOICE.match(stretch)) and not re.search(r"[^\W_]", stretch[found.end() :]):
        return _compared(found, start, start + len(stretch))
    if (at := _praised(stretch)) is not None:
        return _Mark(start, start + len(stretch), stretch[at], start + at)
    return None


def _compared(found: re.Match, start: int, end: int) -> _Mark:
    """The mark of ``A``, or of ``A > B``; ``found`` is CHOICE's, in a stretch from ``start`` to ``end``."""
    one, sign, other = found["one"].upper(), found["sign"], found["other"]
    if sign is None:
        return _Mark(start, end, one, start + found.start("one"))
    if sign[0] in "=≈~" or one == other.upper():
        return _Mark(start, end, TIE if sign[0] in "=≈~" else UNCLEAR, None)
    if sign[0] in ">≻≫":
        return _Mark(start, end, one, start + found.start("one"))
    return _Mark(start, end, other.upper(), None)  # once "A <" is said, the letter is certain: no log-probs there


def _braced(text: str, start: int) -> str:
    """What stands before the brace that closes the one before ``start``; "" if that is far, or nowhere."""
    depth = 1
    for index in range(start, min(len(text), start + LONGEST_CHOICE)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[start:index]
    return ""


class _Pairs(list):
    """A JSON object as (key, value) pairs: a key may come twice."""


def _objects(text: str) -> Iterator[tuple[int, int, _Pairs]]:
    """(start, end, pairs) of each JSON object that is in no other."""
    at = 0
    for _ in range(MOST_OBJECTS):
        at = text.find("{", at)
        if at < 0:
            return
        try:
            pairs, end = json.JSONDecoder(object_pairs_hook=_Pairs).raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
        else:
            yield at, end, pairs
            at = end


def _of_object(text: str, start: int, end: int, pairs: _Pairs) -> _Mark | None:
    """The verdict of the outermost level of an object that has any, of the whole before that of a criterion."""
    level: list = [pairs]
    while level:
        marks = [
            (key, value, mark)
            for one in level
            if isinstance(one, _Pairs)
            for key, value in one
            if isinstance(value, str) and KEY.fullmatch(key.strip()) and (mark := _choice(value, 0))
        ]
        marks = [mark for mark in marks if re.match("overall|final", mark[0], re.IGNORECASE)] or marks
        if marks:
            break
        inner = [[value for _, value in one] if isinstance(one, _Pairs) else one for one in level]
        level = [value for values in inner for value in values if isinstance(value, list)]
    else:
        return None
    if len({mark.verdict for _, _, mark in marks}) != 1:
        return _Mark(start, end, UNCLEAR, None)
    key, value, mark = marks[-1]
    pair = re.search(rf'"{re.escape(key)}"\s*:\s*"{re.escape(value)}"', text[start:end])  # unless it is escaped
    at = start + pair.end() - 1 - len(value) + mark.at if pair and mark.at is not None else None
    return _Mark(start, end, mark.verdict, at)


# Sentences -----------------------------------------------------------------------------------------------------------

AGAINST = re.compile(
    r"\b(?:not|worse|worst|inferior|weaker|loses?|lost|losing|loser|fails?|failed|neither|nor|non|no|never|wrong|"
    r"incorrect|less|least|second|hardly|poor|poorer|cannot|bad|could|should|might|if|had|would (?:be|have)|but|"
    r"however|yet|although|though|while|whereas|which|despite|unless|except|errors?|reject\w*|instead|otherwise|"
    r"doubt|nobody|may|were|false|claim that|some (?:would|people|users|may|might))\b|n['’]t\b",
    re.IGNORECASE,
)
# That what was said before is taken back.
SECOND_THOUGHT = re.compile(
    r"(?:^|[.!?\n])\W{0,6}(?:(?:actually|wait|sorry|correction|hmm|no wait)\b|no[,.:!])|"
    r"\bI (?:meant|misread|was wrong|made a mistake)\b|"
    r"\b(?:scratch that|on (?:reflection|second thoughts?))\b",
    re.IGNORECASE,
)
SAYS = re.compile(r"\b(?:claims|says|said|argues|states)\b", re.IGNORECASE)
CONTRAST = re.compile(r"\b(?:but|however|yet|whereas)\b", re.IGNORECASE)
# In style only is no verdict.
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
    (?!\s+than\s+(?!{_OTHER})){_OVERALL}(?!\s+(?:than|over|to)\s+{_OTHER}(?:\s+(?:in|at|on)\s(?!every|all|both|general|most)))""",
    re.VERBOSE,
)
ANSWER_IS = re.compile(r"[\W_]*(?:\w{2,7}\s){0,3}(?:answer|option|choice|solution)\s(?:is|was)\b", re.IGNORECASE)
LETTER = re.compile(r"\b([AB])\b")
AFTER_ARTICLE = re.compile(
    r"\s+(?!(?:is|was|wins?|has|because|since|as|for|over|by|due|beats|with|or|and|vs|clearly|definitely)\b)[a-z]"
)


def _sentences(text: str, ended: bool) -> Iterator[_Sentence]:
    """The sentences of a text, and for whom they speak. A question speaks for nobody."""
    for found in re.finditer(r"[^.!?\n]+([.!?]*)", text):
        said = found[0][:LONGEST_SENTENCE]
        if not re.search(r"[^\W\d_]", said):  # the number of an item is none
            continue
        start, end = found.span()
        open_ended = not ended and not text[end:].strip() and not found[1]
        if "?" in found[1]:
            yield _Sentence(start, end, None)
        elif TIED.fullmatch(said):
            yield _Sentence(start, end, _Mark(start, end, TIE, None), True)
        elif mark := _stated(said, start, end):
            yield _Sentence(start, end, mark, True)
        elif (at := _praised(said)) is not None and not (open_ended and FAVOUR.search(said.rstrip(), len(said) - 12)):
            yield _Sentence(start, end, _Mark(start, end, said[at], start + at))
        else:
            yield _Sentence(start, end, None)


def _stated(said: str, start: int, end: int) -> _Mark | None:
    """The verdict that a sentence, or a clause of it, states with its first words: "In all, I choose A"."""
    for clause in [0, *(found.end() for found in re.finditer(r"[,:]\s", said))]:
        found = CHOICE.match(said, clause)
        if not found or (clause and not LABEL.search(found["before"])):
            continue
        if clause and (AGAINST.search(said[:clause]) or LETTER.search(said[:clause])):
            return None
        one, rest = found["one"], said[found.end() :]
        noun = re.search(rf"(?i:{_NOUN})[\W_]{{1,3}}$", found["before"])
        if one.islower() and not (noun and not re.search(r"[^\W_]", rest)):
            return None
        if not _goes_with(rest, found["before"], one):
            return None
        return _compared(found, start, end)
    return None


def _goes_with(rest: str, before: str, one: str) -> bool:
    """Whether the rest of a sentence lets stand the choice with which it begins."""
    if not re.search(r"[^\W_]", rest):
        return True
    if CONTRAST.search(rest):
        return False
    if REASON.match(rest):
        return True
    labelled = not re.search(r"\w", before) or LABEL.search(before)  # "Response A: …" is a heading
    others = LETTER.search(rest) and LETTER.search(rest)[1] != one
    return bool(MORE.match(rest) and labelled and not others and not AGAINST.search(rest))


def _praised(said: str) -> int | None:
    """The index of the letter for which a sentence speaks: the one that it compares with the other, or the only one
    that it names, and in no way against it."""
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
    """Whether the letter there is the article: an A at the beginning of a sentence, before a word."""
    begins = re.search(r"(?:^|[^\w\s,])\s*$", text[max(0, at - 10) : at]) is not None
    return text[at] == "A" and begins and AFTER_ARTICLE.match(text, at + 1) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs
# ---------------------------------------------------------------------------------------------------------------------


def top_logprobs(choice: object) -> TopLogprobs:
    """What a server gives of log-probs, in a choice of its reply; nothing if that is nothing, or nonsense."""
    try:
        top = [
            (_bytes(position), [(str(t["token"]), float(t["logprob"])) for t in position.get("top_logprobs") or []])
            for position in choice["logprobs"]["content"] or []
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return []
    return [] if any(math.isnan(p) for _, likely in top for _, p in likely) else top


def _bytes(position: dict) -> bytes:
    """What a token said. Its text is no more than a picture of it where it is part of a character."""
    given = position.get("bytes")
    if isinstance(given, list) and given:
        return bytes(given)
    return str(position["token"]).encode("utf-8", "replace")


def _likely_at(said: str, at: int, top: TopLogprobs) -> list[tuple[str, float]]:
    """The likely tokens where the token was said that holds character ``at`` of an answer; none if that is not certain.

    The tokens, put together, must end with the answer. Before it there may be others: reasoning that the server took
    out. After it there may be special tokens.
    """
    wanted = said.strip().encode("utf-8", "replace")
    before = len(said[:at].lstrip().encode("utf-8", "replace"))
    for spelled in (lambda token: token, _without_markers):
        tokens = [spelled(token) for token, _ in top]
        for _ in range(len(tokens[-MOST_SPECIAL_TOKENS:])):
            joined = b"".join(tokens).rstrip()
            if joined.endswith(wanted):
                place = len(joined) - len(wanted) + before
                for token, (_, likely) in zip(tokens, top):
                    if place < len(token):
                        return likely if _letter(token.decode("utf-8", "replace")) == said[at] else []
                    place -= len(token)
            if not re.fullmatch(rb"\s*|\s*<[^<>]{1,60}>\s*|\s*\[/?[A-Z_]{2,20}\]\s*", tokens[-1]):
                break
            tokens.pop()
    return []


def _without_markers(token: bytes) -> bytes:
    """A token as its tokeniser's file spells it, as text."""
    for marker, text in (("▁", " "), ("Ġ", " "), ("Ċ", "\n")):
        token = token.replace(marker.encode(), text.encode())
    return token


def _letter(token: str) -> str:
    return re.sub(r"[\W_▁Ġ]+", "", token)
