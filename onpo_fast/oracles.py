"""Who prefers what.

An oracle maps a prompt (a list of messages) and K responses to the K×K matrix of P(response i ≻ response j). It need
not come from a score: preferences may be cyclic. ``judge`` asks it for many groups and checks what it says.

To add an oracle: write a callable here and name it in ``load``.
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .data import Group, Messages
from .errors import UserError

Oracle = Callable[[Messages, list[str]], np.ndarray]

TOLERANCE = 1e-3  # of P + Pᵀ = 1: what half-precision sigmoids keep


# ---------------------------------------------------------------------------------------------------------------------
# The embedded population
# ---------------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
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
    """Half the words is one unit better: −log₂(1 + words)."""
    return -math.log2(1 + len(words(response)))


def warmth(prompt: str, response: str) -> float:
    """Share of words that address or encourage the reader, an exclamation or question counting as one; 1 unit = 10%."""
    said = words(response)
    friendly = sum(word in WARM_WORDS for word in said) + response.count("!") + response.count("?")
    return 10 * friendly / (len(said) + 5)  # five neutral words, so that one "Thanks!" is not all warmth


def relevance(prompt: str, response: str) -> float:
    """Share of the prompt's content words that the response takes up; 1 unit = 25%."""
    asked = set(words(prompt)) - STOP_WORDS
    return 4 * len(asked & set(words(response))) / max(len(asked), 1)


@dataclass(frozen=True)
class Annotators:
    """A part of the population with one taste: prefers i to j with probability σ(Σ weight·(taste_i − taste_j))."""

    name: str
    share: float  # of the population
    tastes: tuple[tuple[Callable[[str, str], float], float], ...]  # (taste, weight per unit)


# Each group ranks the three tastes in another order, as in Condorcet's paradox: short beats warm for the busy and the
# studious, warm beats thorough for the busy and the lonely, thorough beats short for the lonely and the studious.
POPULATION = (
    Annotators("busy", 0.36, ((brevity, 4.0), (warmth, 1.0))),
    Annotators("lonely", 0.33, ((warmth, 3.0), (relevance, 1.0))),
    Annotators("studious", 0.31, ((relevance, 3.0), (brevity, 1.0))),
)


class Population:
    """P(i ≻ j): the mean over annotator groups of a logistic of their taste difference. Deterministic, no model."""

    def __init__(self, annotators: Sequence[Annotators] = POPULATION) -> None:
        self.annotators = annotators

    def __call__(self, prompt: Messages, responses: list[str]) -> np.ndarray:
        question = prompt[-1]["content"]
        total = np.zeros((len(responses), len(responses)))
        for group in self.annotators:
            taste = np.array([sum(weight * f(question, r) for f, weight in group.tastes) for r in responses])
            total += group.share / (1 + np.exp(np.clip(taste[None, :] - taste[:, None], -50, 50)))
        return total / sum(group.share for group in self.annotators)


# ---------------------------------------------------------------------------------------------------------------------
# Loading and asking
# ---------------------------------------------------------------------------------------------------------------------


def load(name: str) -> Oracle:
    """The oracle of this name: "population", or "module:function" for the user's own.

    Raises:
        UserError: if it cannot be imported or called.
    """
    if name == "population":
        return Population()
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f'--oracle {name}: expected "population" or "module:function"')
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside where the user stands
    try:
        oracle = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the module is the user's: anything may go wrong while it is imported
        raise UserError(f"--oracle {name}: cannot import it ({type(error).__name__}: {error})") from error
    if not callable(oracle):
        raise UserError(f"--oracle {name}: {function_name} is not a function")
    return oracle


def judge(
    oracle: Oracle, groups: Sequence[Group], name: str, progress: Callable[[int], None] = lambda n: None
) -> list[np.ndarray]:
    """The preference matrix of every group: (K, K) float64 with P + Pᵀ = 1 and ½ on the diagonal.

    Raises:
        UserError: if the oracle fails or says what no preference can be; the message names the oracle and the group.
    """
    matrices = []
    for index, group in enumerate(groups):
        where = f"--oracle {name}, prompt {index} ({group.prompt[-1]['content'][:40]!r})"
        texts = [response.text for response in group.responses]
        try:
            answer = oracle([dict(message) for message in group.prompt], texts)
        except Exception as error:  # the function is the user's
            raise UserError(f"{where}: it raised {type(error).__name__}: {error}") from error
        matrices.append(checked(answer, len(texts), where))
        progress(1)
    return matrices


def checked(answer: object, responses: int, where: str) -> np.ndarray:
    """The answer as a preference matrix. Its diagonal is not read: a response ties with itself."""
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().double().cpu().numpy()
    try:
        matrix = np.array(answer, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: not a matrix of numbers ({error})") from None
    if matrix.shape != (responses, responses):
        raise UserError(f"{where}: expected a {responses}×{responses} matrix, got shape {matrix.shape}")
    np.fill_diagonal(matrix, 0.5)
    bad = ~((matrix >= 0) & (matrix <= 1))  # NaN is bad too
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise UserError(f"{where}: P({i} ≻ {j}) is {matrix[i, j]}, not a probability")
    excess = np.abs(matrix + matrix.T - 1)
    if excess.max(initial=0) > TOLERANCE:
        i, j = np.unravel_index(excess.argmax(), excess.shape)
        raise UserError(f"{where}: P({i} ≻ {j}) + P({j} ≻ {i}) is {matrix[i, j] + matrix[j, i]:.6g}, not 1")
    return (matrix + 1 - matrix.T) / 2


def cyclic_triples(matrices: Sequence[np.ndarray]) -> tuple[int, int]:
    """(cyclic, all) triples of responses in which each beats one of the others: i ≻ j ≻ k ≻ i."""
    cyclic = total = 0
    for matrix in matrices:
        for i, j, k in itertools.combinations(range(len(matrix)), 3):
            total += 1
            beats = (matrix[i, j] > 0.5, matrix[j, k] > 0.5, matrix[k, i] > 0.5)
            loses = (matrix[i, j] < 0.5, matrix[j, k] < 0.5, matrix[k, i] < 0.5)
            cyclic += all(beats) or all(loses)
    return cyclic, total
