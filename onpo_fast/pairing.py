"""From K responses and their preference matrix to pairs.

What the theory covers: the loss's minimiser is the mirror-descent step when both responses of a pair are independent
draws from π_t, which ``iid`` gives literally and ``all_pairs`` on average (each pair is such a draw, and using all
K(K−1)/2 of a prompt only lowers the variance). What the experiments do: ``best_worst`` and ``knockout`` choose two
responses *by the oracle*, which breaks the identity (the step no longer vanishes at the Nash policy) and trades bias
for a larger margin per token.

A pairing takes the (K, K) matrix of P(i ≻ j) and a random generator, and returns index pairs in any order; ``pair``
orients and labels them. To add one: write it here and name it in ``PAIRINGS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np

from .data import Group, Pair

Pairing = Callable[[np.ndarray, np.random.Generator], list[tuple[int, int]]]


def iid(preferences: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """⌊K/2⌋ disjoint pairs: independent of each other as well."""
    return [(i, i + 1) for i in range(0, len(preferences) - 1, 2)]


def all_pairs(preferences: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """All K(K−1)/2 pairs; a response is scored once, however many it is in."""
    return list(combinations(range(len(preferences)), 2))


def best_worst(preferences: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The response that beats the others most on average, and the one that does least; ties at random."""
    score = preferences.mean(axis=1)
    order = np.lexsort((rng.random(len(score)), score))
    return [(int(order[-1]), int(order[0]))]


def knockout(preferences: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The champion of a knockout tournament, and the last of the one that its first losers play on.

    A random draw; the likelier winner of a match advances, ties by coin; an odd one out has a bye.
    """
    draw = rng.permutation(len(preferences)).tolist()
    first = [_match(preferences, i, j, rng) for i, j in zip(draw[::2], draw[1::2])]
    bye = draw[-1:] if len(draw) % 2 else []
    champion = _tournament(preferences, [winner for winner, _ in first] + bye, rng, keep=0)
    last = _tournament(preferences, [loser for _, loser in first], rng, keep=1)
    return [(champion, last)]


def _match(preferences: np.ndarray, i: int, j: int, rng: np.random.Generator) -> tuple[int, int]:
    """(winner, loser)."""
    p = preferences[i, j]
    return (i, j) if p > 0.5 or (p == 0.5 and rng.random() < 0.5) else (j, i)


def _tournament(preferences: np.ndarray, players: list[int], rng: np.random.Generator, keep: int) -> int:
    while len(players) > 1:
        matches = [_match(preferences, i, j, rng)[keep] for i, j in zip(players[::2], players[1::2])]
        players = matches + (players[-1:] if len(players) % 2 else [])
    return players[0]


PAIRINGS: dict[str, Pairing] = {"iid": iid, "all_pairs": all_pairs, "best_worst": best_worst, "knockout": knockout}


def pair(preferences: Iterable[np.ndarray], pairing: str, labels: str, seed: Sequence[int]) -> list[Pair]:
    """Pairs of every group, the winner first.

    Args:
        preferences: a (K, K) matrix of P(i ≻ j) a group.
        pairing: a name in ``PAIRINGS``.
        labels: "soft": the winner is the likelier one, its label P(winner ≻ loser) ≥ ½; "bits": the winner is drawn
            with that probability, its label 1.
        seed: of draws and ties, joined with the group's index.
    """
    pairs = []
    for group, matrix in enumerate(preferences):
        rng = np.random.default_rng([*seed, group])
        for i, j in PAIRINGS[pairing](matrix, rng):
            p = float(matrix[i, j])
            i_wins = p >= 0.5 if labels == "soft" else rng.random() < p
            winner, loser = (i, j) if i_wins else (j, i)
            pairs.append(Pair(group, winner, loser, max(p, 1 - p) if labels == "soft" else 1.0))
    return pairs


def distinct(pairs: Iterable[Pair], groups: Sequence[Group]) -> list[Pair]:
    """Without the pairs of two responses of the same tokens.

    Such a pair's margin is 0 whatever the policy: its loss is a constant and its gradient 0, under every objective and
    whatever the oracle said. So the argmin stays where it is, and the losses that are shown no longer hold constants.
    The same text in other tokens is a pair, and so is an empty response (an end-of-sequence token alone) with any
    other: the policy drew it, and without it the responses would not be draws from π_t.
    """

    def tokens(group: int, response: int) -> list[int]:
        return groups[group].responses[response].tokens

    return [pair for pair in pairs if tokens(pair.group, pair.winner) != tokens(pair.group, pair.loser)]
