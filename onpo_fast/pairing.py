"""From K responses and their preference matrix to pairs.

The loss's minimiser is a step of mirror descent if both responses of a pair are independent draws from π_t: ``iid`` and
``all_pairs`` satisfy this. ``all_pairs`` uses all K(K−1)/2 pairs, each of which is such a draw, and so has less
variance. ``best_worst`` and ``knockout``, as in the paper's experiments, choose two responses *by the oracle*: the step
then no longer vanishes at the Nash policy, in exchange for a larger margin per token.

A pairing takes the (K, K) matrix of P(i ≻ j) and a random generator, and returns index pairs in any order; ``pair``
orients and labels them. To add one, write it here and name it in ``PAIRINGS``. SPPO needs no pairing
(``win_rate_pairs``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np

from .data import Group, Pair
from .errors import UserError
from .objectives import Objective, Sppo
from .selection import Selected

Pairing = Callable[[np.ndarray, np.random.Generator], list[tuple[int, int]]]


def iid(preferences: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Returns ⌊K/2⌋ disjoint pairs, which are independent of each other."""
    return [(i, i + 1) for i in range(0, len(preferences) - 1, 2)]


def all_pairs(preferences: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Returns all K(K−1)/2 pairs. A response is scored once, whatever the number of its pairs."""
    return list(combinations(range(len(preferences)), 2))


def best_worst(preferences: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Returns the responses with the highest and the lowest mean preference; ties are broken at random."""
    score = preferences.mean(axis=1)
    order = np.lexsort((rng.random(len(score)), score))
    return [(int(order[-1]), int(order[0]))]


def knockout(preferences: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Returns the winner of a knockout tournament, and the last of a tournament between the losers of its first round.

    The draw is random; the likelier winner of a match advances, at random if it is a tie. With an odd number of players
    the last one advances without a match.
    """
    draw = rng.permutation(len(preferences)).tolist()
    first = [_match(preferences, i, j, rng) for i, j in zip(draw[::2], draw[1::2])]
    bye = draw[-1:] if len(draw) % 2 else []
    champion = _tournament(preferences, [winner for winner, _ in first] + bye, rng, keep=0)
    last = _tournament(preferences, [loser for _, loser in first], rng, keep=1)
    return [(champion, last)]


def _match(preferences: np.ndarray, i: int, j: int, rng: np.random.Generator) -> tuple[int, int]:
    """Returns (winner, loser)."""
    p = preferences[i, j]
    return (i, j) if p > 0.5 or (p == 0.5 and rng.random() < 0.5) else (j, i)


def _tournament(preferences: np.ndarray, players: list[int], rng: np.random.Generator, keep: int) -> int:
    """Returns the last player when winners (``keep`` = 0) or losers (1) of every match advance."""
    while len(players) > 1:
        matches = [_match(preferences, i, j, rng)[keep] for i, j in zip(players[::2], players[1::2])]
        players = matches + (players[-1:] if len(players) % 2 else [])
    return players[0]


PAIRINGS: dict[str, Pairing] = {"iid": iid, "all_pairs": all_pairs, "best_worst": best_worst, "knockout": knockout}


def pair(preferences: Iterable[np.ndarray], pairing: str, labels: str, seed: Sequence[int]) -> list[Pair]:
    """Returns the labelled pairs of every group.

    Args:
        preferences: a (K, K) matrix of P(i ≻ j) per group.
        pairing: a name in ``PAIRINGS``.
        labels: "soft": the winner is the likelier one, and the label is P(winner ≻ loser) ≥ ½. "sampled": the winner is
            drawn with that probability, and the label is 1.
        seed: of draws and ties, combined with the group's index.
    """
    pairs = []
    for group, matrix in enumerate(preferences):
        rng = np.random.default_rng([*seed, group])
        pairs += [_labelled(group, i, j, matrix, labels, rng) for i, j in PAIRINGS[pairing](matrix, rng)]
    return pairs


def _labelled(
    group: int, i: int, j: int, preferences: np.ndarray, labels: str, rng: np.random.Generator, *weights: float
) -> Pair:
    p = float(preferences[i, j])
    i_wins = p >= 0.5 if labels == "soft" else rng.random() < p
    winner, loser = (i, j) if i_wins else (j, i)
    return Pair(group, winner, loser, max(p, 1 - p) if labels == "soft" else 1.0, *weights)


def label(selected: Selected, preferences: Sequence[np.ndarray], labels: str, seed: Sequence[int]) -> list[Pair]:
    """Returns the labelled pairs of those that were selected, as ``pair`` labels them.

    Args:
        preferences: a matrix per group, of which the entries of the selected pairs are read.
    """
    pairs = []
    for (group, i, j), draws, importance in zip(selected.pairs, selected.counts, selected.importance):
        rng = np.random.default_rng([*seed, group, i, j])
        pairs.append(_labelled(group, i, j, preferences[group], labels, rng, float(draws), importance))
    return pairs


def against_opponent(win_rates: np.ndarray) -> np.ndarray:
    """(K,) P(y_i ≻ y″), y″ the opponent's -> (K, K) labels ½ + (P(y_i ≻ y″) − P(y_j ≻ y″)) / 2.

    Their target, at twice the step, is the difference of win rates against the opponent (arXiv 2503.08942).
    """
    return 0.5 + (win_rates[:, None] - win_rates[None, :]) / 2


def win_rate_pairs(preferences: Iterable[np.ndarray], labels: str, seed: Sequence[int]) -> list[Pair]:
    """Returns SPPO's pairs: each response without a loser, labelled with its win rate (arXiv 2405.00675, section 4).

    The label of y_i estimates P(y_i ≻ π_t) by the mean of P(y_i ≻ y_j) over the other responses j ≠ i of its group. The
    response itself, whose ½ is known, is left out, so that the estimate is unbiased.

    Args:
        preferences: a (K, K) matrix of P(i ≻ j) per group, K ≥ 2.
        labels: "soft": the probabilities. "sampled": each P(y_i ≻ y_j) with i < j is replaced by an outcome drawn from
            it, 0 or 1, and P(y_j ≻ y_i) by its complement.
        seed: of the draws, combined with the group's index.
    """
    pairs = []
    for group, matrix in enumerate(preferences):
        size = len(matrix)
        if labels != "soft":
            draws = np.random.default_rng([*seed, group]).random(matrix.shape)
            wins = np.triu(draws < matrix, 1)
            matrix = wins + np.tril(~wins.T, -1)
        others = ~np.eye(size, dtype=bool)
        rates = np.where(others, matrix, 0).sum(1) / (size - 1)
        pairs += [Pair(group, i, None, float(rate)) for i, rate in enumerate(rates)]
    return pairs


def drop_identical(pairs: Iterable[Pair], groups: Sequence[Group]) -> list[Pair]:
    """Returns the pairs whose two responses have different tokens. Pairs without a loser are kept.

    The margin of identical responses is 0 under every policy, so that their loss is constant and their gradient 0;
    without them, reported losses have no constant part. The same text in other tokens is a different response, and so
    is an empty response (only an end-of-sequence token): the policy sampled both, and without them the responses would
    not be draws from π_t.
    """

    def tokens(group: int, response: int) -> list[int]:
        return groups[group].responses[response].tokens

    return [
        pair
        for pair in pairs
        if pair.loser is None or tokens(pair.group, pair.winner) != tokens(pair.group, pair.loser)
    ]


def pairs_to_fit(
    preferences: Sequence[np.ndarray],
    groups: Sequence[Group],
    objective: Objective,
    pairing: str,
    labels: str,
    seed: Sequence[int],
    selected: Selected | None = None,
) -> tuple[list[Pair], int]:
    """The pairs to learn from, and how many pairs of identical responses were dropped.

    Args:
        preferences, pairing, labels, seed: as for ``pair``.
        objective: SPPO's takes each response by itself, and no pairing.
        selected: those to learn from, in place of what ``pairing`` chooses.

    Raises:
        UserError: if no pair is left.
    """
    if isinstance(objective, Sppo):  # each response by itself, against its win rate
        chosen = win_rate_pairs(preferences, labels, seed)
    elif selected is not None:
        chosen = label(selected, preferences, labels, seed)
    else:
        chosen = pair(preferences, pairing, labels, seed)
    pairs = drop_identical(chosen, groups)
    if not pairs:
        raise UserError(
            f"no pair to learn from: all responses that were to be compared are the same, for each of {len(groups)} "
            "prompts. A higher --temperature, more --responses_per_prompt or a smaller step keep responses apart"
        )
    return pairs, len(chosen) - len(pairs)
