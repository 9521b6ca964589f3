"""Oracles whose preference depends on a response only through its class.

With at least three classes that beat each other round a cycle, no score per response can express such a preference. The
shares of the classes among a policy's responses say how often any policy wins against it: P π̂ has the probability that
a response of each class beats one of the policy's, so no policy wins more than its maximum.

``OPENINGS`` is the oracle "openings". ``cyclic_preference`` and ``transitive_preference`` make one from any function
that classifies responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit

from ..data import Group, Messages
from ..errors import UserError
from . import openings
from .interface import average_orders, call_oracle, copy_question

Classify = Callable[[Messages, str], int | None]

NONE = "none of them"  # name of the class of responses that have none


@dataclass(frozen=True, eq=False)
class ClassPreference:
    """A preference between classes of responses, callable as an oracle: ``(prompt, responses)`` → (K, K) float64.

    A response of no class loses to those of every class with probability ``none_loses``, and ties with its own kind.

    Attributes:
        names: names of the C ≥ 2 classes.
        classify: maps a prompt and a response to the index of its class, or None if it has none.
        matrix: (C, C) float64 P(class i ≻ class j), with P + Pᵀ = 1 and therefore ½ on the diagonal.
        none_loses: P(any class ≻ none of them), in [0, 1].

    Raises:
        ValueError: if a field cannot be used; the message names it.
    """

    names: Sequence[str]  # kept as a tuple
    classify: Classify
    matrix: np.ndarray
    none_loses: float = 0.8

    def __post_init__(self) -> None:
        names = tuple(self.names)
        if isinstance(self.names, str) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"names: expected the names of the classes, not {self.names!r}")
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"names: expected at least two different classes, not {', '.join(names) or 'none'}")
        if not callable(self.classify):
            raise ValueError(f"classify: expected a function of a prompt and a response, not {self.classify!r}")
        matrix, none_loses = _probabilities("matrix", self.matrix), _probabilities("none_loses", self.none_loses)
        if matrix.shape != (len(names), len(names)):
            raise ValueError(f"matrix: expected shape {(len(names), len(names))}, got {matrix.shape}")
        if none_loses.shape != ():
            raise ValueError(f"none_loses: expected a number, got shape {none_loses.shape}")
        if not np.allclose(matrix + matrix.T, 1, rtol=0, atol=1e-9):
            i, j = np.unravel_index(np.abs(matrix + matrix.T - 1).argmax(), matrix.shape)
            total = matrix[i, j] + matrix[j, i]
            raise ValueError(f"matrix: P({names[i]} ≻ {names[j]}) + P({names[j]} ≻ {names[i]}) is {total:.6g}, not 1")
        matrix = average_orders(matrix)
        matrix.flags.writeable = False
        for field, value in (("names", names), ("matrix", matrix), ("none_loses", float(none_loses))):
            object.__setattr__(self, field, value)  # the dataclass is frozen

    @property
    def full_matrix(self) -> np.ndarray:
        """(C + 1, C + 1) P(class i ≻ class j), where the last class is that of responses without one."""
        count = len(self.names)
        full = np.full((count + 1, count + 1), 0.5)
        full[:count, :count] = self.matrix
        full[:count, count] = self.none_loses
        full[count, :count] = 1 - self.none_loses
        return full

    def indices(self, prompt: Messages, responses: Sequence[str]) -> np.ndarray:
        """Returns the class of each response, (K,) int64; C is none of them.

        Raises:
            UserError: if ``classify`` returns something other than an index of a class or None.
        """
        return np.array([self._index(prompt, response) for response in responses], dtype=np.int64)

    def _index(self, prompt: Messages, response: str) -> int:
        index = self.classify(prompt, response)
        if index is None:
            return len(self.names)
        is_index = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
        if not (is_index and 0 <= index < len(self.names)):
            shown = response if len(response) <= 40 else response[:40] + "…"
            raise UserError(
                f"classes {', '.join(self.names)}: classify returned {index!r} for the response {shown!r}; expected an "
                f"index from 0 to {len(self.names) - 1}, or None"
            )
        return int(index)

    def __call__(self, prompt: Messages, responses: Sequence[str]) -> np.ndarray:
        indices = self.indices(prompt, responses)
        return self.full_matrix[np.ix_(indices, indices)]


def _probabilities(field: str, value: Any) -> np.ndarray:
    """Returns a number or nested numbers as a new float64 array; ``ValueError`` unless all are in [0, 1]."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: expected probabilities ({error})") from None
    bad = array[~((array >= 0) & (array <= 1))]  # also NaN
    if len(bad):
        raise ValueError(f"{field}: {bad[0]} is not a probability")
    return array


def cyclic_preference(
    names: Sequence[str], classify: Classify, wins: float = 0.8, none_loses: float = 0.8
) -> ClassPreference:
    """Makes a preference in which the classes beat each other round a cycle.

    Each of C classes beats the ⌊(C−1)/2⌋ that follow it (the first follows the last), and loses to as many before it.
    If C is even, opposite classes tie. With three classes, each beats the next.

    Args:
        names: names of C ≥ 3 classes, in the order of the cycle.
        classify: as in ``ClassPreference``.
        wins: probability that a class beats one that it beats.
        none_loses: as in ``ClassPreference``.

    Raises:
        ValueError: if an argument cannot be used; the message names it.
    """
    count = len(names)
    if count < 3:
        raise ValueError(f"names: a cycle takes at least three classes, not {count}")
    wins = float(_probabilities("wins", wins))
    after = (np.arange(count)[None, :] - np.arange(count)[:, None]) % count  # how far j follows i
    beaten = (count - 1) // 2
    matrix = np.select([after == 0, after <= beaten, after >= count - beaten], [0.5, wins, 1 - wins], 0.5)
    return ClassPreference(names, classify, matrix, none_loses)


def transitive_preference(
    names: Sequence[str], classify: Classify, wins: float = 0.8, none_loses: float = 0.8
) -> ClassPreference:
    """Makes a preference in which earlier classes beat later ones: the control without a cycle.

    It is a Bradley-Terry model whose scores are equally spaced: P(class i ≻ class j) = σ((j − i)·log(wins/(1 − wins))).

    Args:
        names: names of C ≥ 2 classes, the best first.
        classify: as in ``ClassPreference``.
        wins: probability that a class beats the next, in (0, 1).
        none_loses: as in ``ClassPreference``.

    Raises:
        ValueError: if an argument cannot be used; the message names it.
    """
    wins = float(_probabilities("wins", wins))
    if wins in (0, 1):
        raise ValueError(f"wins: {wins:g} has no finite scores; expected a probability between 0 and 1")
    after = np.arange(len(names))[None, :] - np.arange(len(names))[:, None]
    return ClassPreference(names, classify, expit(after * logit(wins)), none_loses)


def class_shares(oracle: object, samples: Mapping[str, Sequence[Group]]) -> dict[str, list] | None:
    """Counts the classes of each policy's responses; None if the oracle has no classes.

    Args:
        oracle: any oracle.
        samples: for each policy its responses to the same prompts.

    Returns:
        "classes": the C + 1 names of the classes, none of them last; "shares": for each policy, the share of each class
        among its responses; "best_response": for each policy the most that any policy wins against it, max_c (P π̂)_c
        for its shares π̂, which is ½ at a Nash policy.
    """
    if not isinstance(oracle, ClassPreference):
        return None
    count = len(oracle.names) + 1
    shares = []
    for groups in samples.values():
        questions = [copy_question(group.prompt, [response.text for response in group.responses]) for group in groups]
        indices = np.concatenate([call_oracle("class shares", oracle.indices, *question) for question in questions])
        shares.append((np.bincount(indices, minlength=count) / len(indices)).tolist())
    most = (np.array(shares) @ oracle.full_matrix.T).max(1)
    return {"classes": [*oracle.names, NONE], "shares": shares, "best_response": most.tolist()}


OPENINGS = cyclic_preference(openings.NAMES, openings.classify)
