"""The embedded environments. They keep no state: all of it is in the conversation.

``partner`` speaks like a user who is not satisfied yet: it asks back, wants a shorter answer, changes a constraint.
``word_game`` plays a word chain: each word begins with the last letter of the one before it, and none comes twice.
"""

from __future__ import annotations

import random
import re

from ..conversations import Messages, message_text

ASKS_BACK = (
    "Can you say more about the second part?",
    "Why do you think so?",
    "What would you say to a child about this?",
    "Can you give one example?",
)
WANTS_LESS = (
    "Please say that in one sentence.",
    "That is too long. Can you put it in ten words?",
    "Give me the short form.",
)
CHANGES = (
    "I forgot to say: it must not cost anything.",
    "One thing has changed: there is only one hour for it.",
    "Now do the same for somebody who lives alone.",
    "Please begin again, and do not use the word 'the'.",
)

WORDS = (
    "apple ant arrow bread basket candle carpet desk dream eagle engine feather forest garden glass harbor hammer "
    "island ivory jacket jungle kettle kitten lemon ladder mirror mountain needle notebook orange ocean pencil pepper "
    "quilt quarter river rabbit silver stone table thunder umbrella uncle valley violin window winter yarn yellow "
    "zebra zipper extra"
).split()


def partner(messages: Messages, seed: int) -> str | None:
    """Asks back, then wants less, then changes a constraint; then the conversation ends. Which words, the seed says."""
    spoken = sum(message["role"] == "assistant" for message in messages)
    if spoken > 3:
        return None
    return random.Random(seed).choice((ASKS_BACK, WANTS_LESS, CHANGES)[spoken - 1])


def word_game(messages: Messages, seed: int) -> str | None:
    """Answers a chain of words with a word that follows it; None where the policy has broken it, or no word is left.

    The word of a message of the user is its last one, that of the policy's its first one, in any case.
    """
    chain = chain_of(messages)
    if not follows(chain):
        return None
    left = [word for word in WORDS if word[0] == chain[-1][-1] and word not in chain]
    return random.Random(seed).choice(left) if left else None


def chain_of(messages: Messages) -> list[str]:
    """Returns the words of a word game, in lower case; "" for a message without one."""
    chain = []
    for message in messages:
        words = re.findall(r"[^\W\d_]+", message_text(message).lower()) or [""]
        if message["role"] in ("user", "assistant"):
            chain.append(words[-1] if message["role"] == "user" else words[0])
    return chain


def follows(chain: list[str]) -> bool:
    """Returns whether the last word begins with the last letter of the one before it, and is new."""
    *before, last = chain
    return bool(last and before and before[-1]) and last[0] == before[-1][-1] and last not in before
