"""How a response begins: the classes of the oracle "openings".

The class is that of the first word: a determiner, another word of the closed classes (pronouns, prepositions,
conjunctions, auxiliaries, question words), or any other word. Every word is in at most one list, since a first word
says nothing of its part in the sentence: "this" and "that" are determiners, question words and "no" are not.
"""

from __future__ import annotations

import re
import unicodedata

from ..conversations import Messages

NAMES = ("determiner", "function word", "content word")

DETERMINERS = frozenset(
    """
    the a an this that these those each every either neither some any all both another such many much most more few
    fewer several enough my your his her its our their
    """.split()
)
FUNCTION_WORDS = frozenset(
    """
    i you he she it we they one me him us them mine yours hers ours theirs myself yourself himself herself itself
    ourselves yourselves themselves oneself someone somebody something anyone anybody anything everyone everybody
    everything nobody nothing none here there

    about above across after against along amid among around at before behind below beneath beside besides between
    beyond by despite down during except for from in inside into like near of off on onto out outside over past per
    since than through throughout till to toward towards under underneath unlike until up upon via with within without

    and or but so yet nor if while as because although though unless whereas whether once

    be am is are was were been being do does did have has had having can cannot could will would shall should may might
    must ought let

    how why where when what which who whom whose whatever whichever whoever whenever wherever however

    yes no not then thus hence therefore also too just only even still now
    """.split()
)

APOSTROPHES = str.maketrans("’‘ʼ", "'''")
MARKDOWN = "#*_>~+"  # marks of headings, emphasis, quotations and lists
# A letter with a full stop or a bracket is a label or an abbreviation ("A) Paris", "A.I."). Otherwise a word is letters
# and digits, also joined by an apostrophe, a hyphen or an underscore ("I'm", "self-made", "my_list").
WORD = re.compile(r"[^\W\d_][.)]|[^\W\d_][^\W_]*(?:['_-][^\W_]+)*")


def first_word(response: str) -> str:
    """Returns the word that a response begins with, in lower case with straight apostrophes; "" if there is none.

    Blanks, punctuation, quotation marks and Markdown's marks before the word are skipped. Digits, other symbols, emoji
    and code (a backtick) are not: such a response begins with no word.

    >>> first_word('**“You’re** right'), first_word("1. The"), first_word("- A self-made man")
    ("you're", '', 'a')
    """
    text = unicodedata.normalize("NFKC", response).translate(
        APOSTROPHES
    )  # NFKC turns ornamental letters into plain ones
    start = next((place for place, character in enumerate(text) if not _is_skipped(character)), len(text))
    word = WORD.match(text, start)
    return word.group().lower() if word else ""


def _is_skipped(character: str) -> bool:
    """Whether a character may stand before the first word."""
    kind = unicodedata.category(character)
    return character.isspace() or character in MARKDOWN or kind[0] == "P" or kind == "Cf"  # Cf: a byte-order mark


def classify(prompt: Messages, response: str) -> int | None:
    """Returns the index in ``NAMES`` of the class of a response's first word; None if it begins with no word.

    A contraction of a word in the lists is a function word, for the pronoun or the verb in it: "that's", "don't".
    "Today's" and compounds such as "in-depth" are content words. The prompt is not read.
    """
    word = first_word(response)
    if not word:
        return None
    if word in DETERMINERS:
        return 0
    stem, apostrophe, _ = word.partition("'")
    contracted = bool(apostrophe) and (stem in DETERMINERS or word.endswith("n't"))
    return 1 if contracted or stem in FUNCTION_WORDS else 2
