"""What a judge's answer says: its text -> a verdict, and the log-probs at the verdict -> a preference.

Reasoning is not read: only what follows its last end. There, explicit verdicts are looked for, ``[[A]]`` and the like,
and the last one counts; an answer without any is read as prose, cautiously: a verdict that is missed is asked for once
more and then counted, one that is inverted is seen by nobody.

No expression takes more than linear time: each repetition is bounded, or of characters that end it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

PARSER_VERSION = 3  # of this file; part of every cache key: raise it when an answer is read differently
READ_CHARACTERS = (2**11, 2**16)  # of a longer answer's beginning, where reasoning opens, and its end, with the verdict
LONGEST_CHOICE = 80  # characters that can be nothing but a verdict
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

    A letter alone, in brackets or before punctuation or "is" at the start, or the only one named:

    >>> [verdict(s) for s in ("A", " **B**.", "[[A]]", "B: shorter", "A is better.", "The answer is B.", "tie")]
    ['A', 'B', 'A', 'B', 'A', 'B', 'TIE']
    >>> [verdict(s) for s in ("", "A good answer", "Response A beats response B", "Both", "C")]
    [None, None, None, None, None]

    Reasoning is not read, and of several explicit verdicts the last counts:

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

    ``ended`` is False for one that was cut off at its token limit: that it has named only one response so far says
    nothing then.
    """
    head, tail = READ_CHARACTERS
    text, dropped = said, 0
    if len(said) > head + tail:
        text = said[:head] + "\n" + said[-tail:]
        dropped = len(said) - len(text)
    start = _end_of_reasoning(text)
    if start is None:
        return Reading(None, unfinished=True)
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
SPECIAL_TOKEN = re.compile(r"<[|｜][^<>|｜]{1,40}[|｜]>|</?s>|<(?:start|end)_of_turn>|<eos>", re.IGNORECASE)


def _end_of_reasoning(text: str) -> int | None:
    """The index after the last end of reasoning, 0 if there is none; None if a reasoning is still open at the end.

    An end needs no beginning: the template may have opened the reasoning.
    """
    start = 0
    opened: list[str] = []  # names; a reasoning may have others in it
    for found in REASONING.finditer(text):
        if found["channel"]:
            if found["channel"].lower() in FINAL_CHANNELS:
                start, opened = found.end(), []
            else:
                opened.append("channel")
        elif found["channel_end"]:
            if "channel" in opened:
                start, opened = found.end(), opened[: opened.index("channel")]
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

# A short text that is nothing but a choice: B, Response B, **Final verdict: B**, A > B.
CHOICE = re.compile(
    rf"""
    [\W_]*
    (?:(?i:the|my|final|overall|therefore|thus|so|hence|i|would|choose|prefer|pick|select|is|it|better|best|preferred|chosen|
        superior|winning|verdict|winner|decision|preference|judge?ment|conclusion|result|{_NOUN})[\W_]+|(?i:{_NOUN})){{0,8}}
    (?P<one>[ABab])
    (?:[\W_]{{0,6}}?(?P<sign>{_SIGN})[\W_]{{0,6}}?(?i:{_NOUN}[\W_]{{1,3}})?(?P<other>[ABab]))?
    [\W_]*
    """,
    re.VERBOSE,
)
TIED = re.compile(
    r"[\W_]*(?:(?:the|final|verdict|answer|winner|decision|result|it|is|it's|it’s|a|an)[\W_]+){0,6}"
    r"(?:tied?|draw|equal)[\W_]*",
    re.IGNORECASE,
)

BRACKETS = re.compile(r"\[\[([^\[\]\n]{1,60})\]\]|\[([AB][^\w\[\]\n]{1,6}[AB])\]")
COMMAND = re.compile(r"\\[A-Za-z]{1,20}|[{}\\]")  # of LaTeX
BOXED = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
TAGGED = re.compile(
    r"<(?:final[_ -]?)?(?:answer|verdict|winner|choice|preference|preferred|decision|judge?ment|result|output|better|"
    r"best|response|selection|label|solution)(?:[_ -](?:response|answer))?(?:\s[^<>]{0,60})?>([^<]{1,80})</",
    re.IGNORECASE,
)
# Words that only a judge's verdict goes by. "Answer" is none: the conversation may have been about choosing an answer.
LABELLED = re.compile(
    rf"""
    \b(?i:(?:final[ ])?(?:verdict|decision|judge?ment|preference)|winner|winning[ ]{_NOUN}
      |(?:better|best|preferred|superior|stronger)[ ]{_NOUN}|(?:final|my)[ ](?:answer|choice|pick|vote))
    ["'*_`\s]{{0,6}}(?:(?i:is|was|would[ ]be|goes[ ]to)\b["'*_`\s]{{0,4}}[:=]?|[:=→⇒])["'*_`\s\[(\\]{{0,8}}
    (?:(?i:the\s)?(?i:{_NOUN})[\s_:*"'`\[(]{{1,4}})?
    (?:(?P<one>[AB])(?![\w'’])|(?P<tie>(?i:an?\s)?(?i:tie|draw)\b))
    """,
    re.VERBOSE,
)
COMPARED = re.compile(rf"\W{{0,4}}?(?P<sign>{_SIGN})\W{{0,4}}?(?i:{_NOUN}\W{{1,3}})?(?P<other>[AB])\b")
OTHER_TOO = re.compile(rf"\W{{0,4}}(?:(?i:or|and|vs)\b|[/,|])\W{{0,4}}(?i:{_NOUN}\W{{1,3}})?[AB]\b")
AFTER_ARTICLE = re.compile(
    r"\s+(?!(?:is|was|wins?|has|because|since|as|for|over|by|due|beats|with|or|and|vs|clearly|definitely)\b)[a-z]"
)
UNDECIDED = re.compile(  # between two verdicts on a line, of which then neither is the answer's
    r"\b(?:than|over|beats?|vs|versus|or|and|not|instead|rather|outperforms?|against)\b|[/|]|\w (?:≻|>|<|=) ",
    re.IGNORECASE,
)

KEY = re.compile(
    r"verdict|winner|winning|choice|chosen|choose|prefer|answer|better|best|decision|judge?ment|select|pick|result|"
    r"response|output|label|vote",
    re.IGNORECASE,
)
NO_KEY = re.compile(
    r"reason|explan|rationale|worse|worst|los(?:er|ing|t)|reject|not|confiden|second|runner", re.IGNORECASE
)


def _decided(text: str, ended: bool) -> tuple[str | None, int | None]:
    """The verdict of a text without reasoning, and the index of its letter."""
    bare = _blanked(re.compile(r"</?[A-Za-z][\w:-]{1,40}\s?/?>"), text)
    alone = re.sub(r"[\W_]+", "", bare).upper()
    if alone in ("A", "B", TIE):
        return alone, re.search("[A-Za-z]", bare).start()
    marks = sorted(_marks(text, bare), key=lambda mark: (mark.end, mark.start))
    if not marks:
        return _in_prose(bare, ended)
    last = marks[-1]
    others = [mark for mark in marks if mark.verdict != last.verdict and mark.end <= last.start]
    if others:
        between = text[others[-1].end : last.start]
        if "\n" not in between and UNDECIDED.search(between):
            return None, None
    return (None, None) if last.verdict == UNCLEAR else (last.verdict, last.at)


def _marks(text: str, bare: str) -> Iterator[_Mark]:
    """The explicit verdicts. ``bare`` is the text with spaces for tags."""
    for found in BRACKETS.finditer(text):
        group = 1 if found[1] else 2
        if found[group].strip() in ("C", "c"):  # MT-bench's tie
            yield _Mark(found.start(), found.end(), TIE, None)
        elif re.fullmatch(r"(?i)\W*a\W*(?:or|and|,|/)\W*b\W*", found[group]):
            yield _Mark(found.start(), found.end(), UNCLEAR, None)
        elif mark := _choice(found[group], found.start(group)):
            yield mark
    for found in BOXED.finditer(text):
        if mark := _choice(_blanked(COMMAND, _braced(text, found.end())), found.end()):
            yield mark
    for found in TAGGED.finditer(text):
        if mark := _choice(found[1], found.start(1)):
            yield mark
    objects = list(_objects(text))
    for start, end, pairs in objects:
        if mark := _of_object(text, start, end, pairs):
            yield mark
    for found in LABELLED.finditer(bare):
        if any(start <= found.start() < end for start, end, _ in objects):
            continue
        rest = bare[found.end() : found.end() + 60]
        if found["tie"]:
            yield _Mark(found.start(), found.end(), TIE, None)
        elif compared := COMPARED.match(rest):
            yield _compared(found.start(), found.end() + compared.end(), found["one"], found.start("one"),
                            compared["sign"], compared["other"], found.end() + compared.start("other"))  # fmt: skip
        elif OTHER_TOO.match(rest):
            yield _Mark(found.start(), found.end(), UNCLEAR, None)
        elif not _is_article(bare, found.start("one")):
            yield _Mark(found.start(), found.end(), found["one"], found.start("one"))
    lines = _lines(bare)
    said = [_bare_choice(line[0], line.start()) for line in lines[-2:]]
    if said and said[-1]:
        if said[0] and said[0].verdict != said[-1].verdict and "[[" not in lines[-1][0]:
            yield _Mark(said[0].start, said[-1].end, UNCLEAR, None)
        else:
            yield said[-1]


def _choice(stretch: str, start: int) -> _Mark | None:
    """The verdict of a short stretch, which begins at ``start``: a bare choice, or a sentence for one of the two."""
    if mark := _bare_choice(stretch, start, lower=True):
        return mark
    if (letter := _claimed(stretch)) and len(stretch) <= LONGEST_CHOICE:
        return _Mark(start, start + len(stretch), letter, start + _index_of(letter, stretch))
    return None


def _bare_choice(stretch: str, start: int, lower: bool = False) -> _Mark | None:
    """The verdict of a short stretch, which begins at ``start``, if it says nothing else."""
    end = start + len(stretch)
    if len(stretch) > LONGEST_CHOICE:
        return None
    if TIED.fullmatch(stretch):
        return _Mark(start, end, TIE, None)
    if (found := CHOICE.fullmatch(stretch)) and (lower or found["one"].isupper()):
        return _compared(start, end, found["one"], start + found.start("one"), found["sign"], found["other"],
                         start + found.start("other"))  # fmt: skip
    return None


def _lines(text: str) -> list[re.Match]:
    """The lines that are not blank."""
    return [line for line in re.finditer(r"[^\n]+", text) if not line[0].isspace()]


def _compared(start: int, end: int, one: str, at: int, sign: str | None, other: str | None, other_at: int) -> _Mark:
    """The mark of ``A``, or of ``A > B``."""
    if sign is None:
        return _Mark(start, end, one.upper(), at)
    if sign[0] in "=≈~" or one.upper() == other.upper():
        return _Mark(start, end, TIE if sign[0] in "=≈~" else UNCLEAR, None)
    return _Mark(start, end, one.upper(), at) if sign[0] in ">≻≫" else _Mark(start, end, other.upper(), other_at)


def _braced(text: str, start: int) -> str:
    """What stands before the brace that closes the one before ``start``; "" if that is far, or nowhere."""
    depth = 1
    for index in range(start, min(len(text), start + LONGEST_CHOICE)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[start:index]
    return ""


def _objects(text: str) -> Iterator[tuple[int, int, list[tuple[str, object]]]]:
    """(start, end, pairs) of each JSON object; the pairs are also those of objects in it."""
    at = 0
    for _ in range(MOST_OBJECTS):
        at = text.find("{", at)
        if at < 0:
            return
        pairs: list[tuple[str, object]] = []
        try:
            _, end = json.JSONDecoder(object_pairs_hook=pairs.extend).raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
        else:
            yield at, end, pairs
            at = end


def _of_object(text: str, start: int, end: int, pairs: list[tuple[str, object]]) -> _Mark | None:
    marks = [
        (key, value, mark)
        for key, value in pairs
        if isinstance(value, str) and KEY.search(key) and not NO_KEY.search(key) and (mark := _choice(value, 0))
    ]
    if len({mark.verdict for _, _, mark in marks}) != 1:
        return _Mark(start, end, UNCLEAR, None) if marks else None
    key, value, mark = marks[-1]
    pair = re.search(rf'"{re.escape(key)}"\s*:\s*"{re.escape(value)}"', text[start:end])  # unless it is escaped
    at = start + pair.end() - 1 - len(value) + mark.at if pair and mark.at is not None else None
    return _Mark(start, end, mark.verdict, at)


# Prose ---------------------------------------------------------------------------------------------------------------

FIRST = re.compile(r"[^\w{]*([AB])(?:\W*(?:[.:,;)\n]|$)|\s[—–-]\s| because\b| (is)\b)")
NAMED = re.compile(
    r"\b(?:(?i:response|option|assistant)(?: is|:)?\W{1,4}(?P<named>[AB])\b"
    r"|(?i:answer|verdict|choice)(?: is|:)?\W{1,4}(?P<guarded>[AB])\b)|\[(?P<bracketed>[AB])\]"
)
AGAINST = re.compile(
    r"\b(?:not|worse|worst|inferior|weaker|loses|lost|losing|fails?|failed|neither|nor|no|never|wrong|incorrect|less|"
    r"poor|poorer|cannot|bad|could|should|might|if|but|however|though|although|unless)\b|n['’]t\b",
    re.IGNORECASE,
)
FAVOUR = re.compile(
    r"\b(?:better|best|prefer\w*|choose|chose|pick|select\w*|wins?|winner|superior|stronger|go with|favou?r|vote)\b",
    re.IGNORECASE,
)
LETTER = re.compile(r"\b([AB])\b(?!['’])")


def _clearly_better(letter: str, text: str) -> bool:
    adverbs = r"(?: (?:clearly|much|far|slightly|marginally|definitely|significantly|the|clear|generally)){0,3}"
    praise = "(?:better|best|superior|preferable|preferred|winner)"
    return re.search(rf"\b{letter}\b(?: (?:is|was|seems){adverbs} {praise}| wins)\b", text) is not None


def _claimed(text: str) -> str | None:
    """The one letter that a sentence names, if it speaks for it and in no way against it."""
    letters = {found[1] for found in LETTER.finditer(text) if not _is_article(text, found.start())}
    return letters.pop() if len(letters) == 1 and FAVOUR.search(text) and not AGAINST.search(text) else None


def _is_article(text: str, at: int) -> bool:
    """Whether the letter there is the article: an A at the beginning of a sentence, before a word."""
    begins = re.search(r"(?:^|[^\w\s,])\s*$", text[max(0, at - 10) : at]) is not None
    return text[at] == "A" and begins and AFTER_ARTICLE.match(text, at + 1) is not None


def _index_of(letter: str, text: str) -> int:
    return re.search(rf"\b{letter}\b", text).start()


def _said_first(text: str) -> int | None:
    """The index of the letter with which a text begins, if it is the verdict, and not one of two headings."""
    first = FIRST.match(text)
    if not first:
        return None
    letter, at = first[1], first.start(1)
    other = "B" if letter == "A" else "A"
    rest = text[at + 1 :]
    if re.match(rf"[\W_]*(?:or\b|and\b)?[\W_]*{other}[\W_]*(?:$|\n|or\b|and\b)", rest):
        return None
    if re.search(rf"\b{other}\s?[:=)]|\n[^\w\n]*{other}\.", rest):
        return None
    sentence = re.split(r"[.!?\n]", text[at:], maxsplit=1)[0]
    doubtful = AGAINST.search(sentence) or other in LETTER.findall(sentence)
    return None if first[2] and doubtful and not _clearly_better(letter, sentence) else at


def _in_prose(text: str, ended: bool) -> tuple[str | None, int | None]:
    """The verdict of a text without an explicit one."""
    candidates: list[tuple[str, int | None]] = []
    if (first := _said_first(text)) is not None:
        candidates.append((text[first], first))
    lines = _lines(text)
    if lines and (mark := _bare_choice(lines[0][0], lines[0].start())):
        candidates.append((mark.verdict, mark.at))
    for line in lines[:1] + lines[1:][-1:]:
        if letter := _claimed(line[0]):
            candidates.append((letter, line.start() + _index_of(letter, line[0])))
    if candidates:
        return candidates[0] if len({decided for decided, _ in candidates}) == 1 else (None, None)
    ended = ended and not text.lstrip(" \n`json").startswith("{")  # JSON that can be none was cut off
    named: dict[str, int] = {}
    guarded = False  # whether one was named as the answer, verdict or choice
    for found in NAMED.finditer(text):
        letter = found["named"] or found["guarded"] or found["bracketed"]
        at = found.start(found.lastgroup)
        if not (found["guarded"] == "A" and AFTER_ARTICLE.match(text, at + 1)):
            named.setdefault(letter, at)
            guarded = guarded or found["guarded"] is not None
    if len(named) != 1 or not (ended or guarded):
        return None, None
    ((letter, at),) = named.items()
    sentences = [sentence for sentence in re.split(r"[.!?\n]+", text) if re.search(rf"\b{letter}\b", sentence)]
    if any(AGAINST.search(sentence) and not _clearly_better(letter, sentence) for sentence in sentences):
        return None, None
    return letter, at


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
