"""Where a model's reasoning ends and its answer begins."""

from __future__ import annotations

import re

# Names of tags that enclose reasoning, with what may surround them, as in begin_of_thought and seed:think
REASONING_NAME = (
    r"[\w:.-]{0,30}?(?:think|thought|reason|reflect|analys|analyz|scratch|deliberat|monologue|ponder|contemplat)"
    r"[\w:.-]{0,30}|cot|details"
)
REASONING = re.compile(
    rf"""
      <\s{{0,3}}[|｜]?\s{{0,3}}(?P<slash>/?)\s{{0,3}}(?P<tag>{REASONING_NAME})(?:\s[^<>]{{0,200}})?[|｜]?\s{{0,3}}>
    | [◁⟨〈《«‹【＜]\s{{0,3}}(?P<slash2>/?)\s{{0,3}}(?P<tag2>{REASONING_NAME})\s{{0,3}}[▷⟩〉》»›】＞]
    | \[(?P<slash3>/)(?P<tag3>{REASONING_NAME})\]
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
# What surrounds a tag that is only mentioned: "opens with `<think>`", "leaks its </think> marker"
BEFORE_MENTION = re.compile(
    r"[`\"'“‘«]\s?\Z|\b(?:its|an?|the|stray|literal|(?:un)?closed|(?:un)?closing|missing)\s\Z", re.IGNORECASE
)
AFTER_MENTION = re.compile(r"\s?[`\"'”’»]|\s[a-z]{2}")


def end_of_reasoning(text: str) -> int | None:
    """Finds the index after the last end of reasoning.

    An end counts without a beginning, because the chat template may have opened the reasoning.

    Returns:
        The index; 0 if there is no reasoning, None if the last one is not closed.
    """
    start = 0
    opened: list[str] = []  # names of open tags; reasoning may be nested
    for found in REASONING.finditer(text):
        before = text[max(0, found.start() - 12) : found.start()]
        if BEFORE_MENTION.search(before) and AFTER_MENTION.match(text, found.end()):
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
        elif found["begin"]:
            opened.append("words")
        elif found["end"]:
            start, opened = found.end(), _closed(opened, "words")
        else:
            name, closes = _tag(found)
            if closes:
                start, opened = found.end(), _closed(opened, name)
            else:
                opened.append(name)
    return None if opened else start


def _tag(found: re.Match) -> tuple[str, bool]:
    """Returns the bare name of a tag, and whether it is a closing one."""
    name = (found["tag"] or found["tag2"] or found["tag3"] or found["open"]).lower()
    closes = found["slash"] or found["slash2"] or found["slash3"] or re.search(r"(?:\b|_)end(?:\b|_)", name)
    return re.sub(r"(?:begin|start|end|of)(?=[\W_]|$)|[\W_]", "", name), bool(closes)


def _closed(opened: list[str], name: str) -> list[str]:
    """Returns the open tags that are left when the first of this name, and all within it, are closed."""
    return opened[: opened.index(name)] if name in opened else opened
