"""The oracle "population": formulas for groups of annotators with different tastes. Deterministic, without a model.

Its preferences can be cyclic, as in Condorcet's paradox, but rarely are on a small model's answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..conversations import Messages, message_text


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


STOP_WORDS = frozenset(
    """
    a about all an and any are as at be been but by can could did do does for from had has have how i if in into
    is it its me more my no not of on or our out please should so some than that the their them then there these
    they this to up was we were what when where which while who why will with would you your
    """.split()
)
WARM_WORDS = frozenset(
    """
    you your yours you're you'll you've we us our let's feel happy glad great good lovely wonderful enjoy love
    thank thanks please welcome hope help friend friends together care kind
    """.split()
)


def brevity(prompt: str, response: str) -> float:
    """Return −log₂(1 + number of words): half as many words score one unit more."""
    return -math.log2(1 + len(words(response)))


def warmth(prompt: str, response: str) -> float:
    """Return the share of words, "!" and "?" that address or encourage the reader, in units of 10%."""
    said = words(response)
    friendly = sum(word in WARM_WORDS for word in said) + response.count("!") + response.count("?")
    return 10 * friendly / (len(said) + 5)  # + 5, so that a lone "Thanks!" does not have the highest warmth


def relevance(prompt: str, response: str) -> float:
    """Return the share of the prompt's content words that are in the response, in units of 25%."""
    asked = set(words(prompt)) - STOP_WORDS
    return 4 * len(asked & set(words(response))) / max(len(asked), 1)


@dataclass(frozen=True)
class Annotators:
    """Annotators with the same tastes, who prefer i to j with probability σ(Σ weight·(taste_i − taste_j))."""

    name: str
    share: float  # of the population
    tastes: tuple[tuple[Callable[[str, str], float], float], ...]  # (taste, weight per unit)


# Each group ranks the three tastes differently, as in Condorcet's paradox: short beats warm for the busy and the
# studious, warm beats thorough for the busy and the lonely, thorough beats short for the lonely and the studious.
POPULATION = (
    Annotators("busy", 0.36, ((brevity, 4.0), (warmth, 1.0))),
    Annotators("lonely", 0.33, ((warmth, 3.0), (relevance, 1.0))),
    Annotators("studious", 0.31, ((relevance, 3.0), (brevity, 1.0))),
)


class Population:
    """P(i ≻ j) as the mean over groups of annotators, weighted by their shares of the population."""

    def __init__(self, annotators: Sequence[Annotators] = POPULATION) -> None:
        self.annotators = annotators

    def __call__(self, prompt: Messages, responses: list[str]) -> np.ndarray:
        question = message_text(prompt[-1])
        total = np.zeros((len(responses), len(responses)))
        for group in self.annotators:
            taste = np.array([sum(weight * f(question, r) for f, weight in group.tastes) for r in responses])
            total += group.share / (1 + np.exp(np.clip(taste[None, :] - taste[:, None], -50, 50)))
        return total / sum(group.share for group in self.annotators)
