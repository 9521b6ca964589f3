"""Which responses are compared, and with what label."""

from __future__ import annotations

import numpy as np
import pytest

from onpo_fast.data import Group, Pair, Response
from onpo_fast.pairing import PAIRINGS, drop_identical, pair, win_rate_pairs


def preferences(k: int, seed: int = 0) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((k, k)), 1)
    return upper + np.tril(1 - upper.T, -1) + np.eye(k) / 2


def chain(k: int) -> np.ndarray:
    """Response 0 beats 1 beats 2 …"""
    return np.where(np.arange(k)[:, None] < np.arange(k), 0.9, 0.1) + 0.4 * np.eye(k)


@pytest.mark.parametrize("k", [2, 3, 4, 7, 8])
def test_counts(k: int) -> None:
    count = {name: len(pair([preferences(k)], name, "soft", [0])) for name in PAIRINGS}
    assert count == {"iid": k // 2, "all_pairs": k * (k - 1) // 2, "best_worst": 1, "knockout": 1}


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("labels", ["soft", "sampled"])
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_two_different_responses_of_one_group(pairing: str, labels: str, k: int) -> None:
    matrices = [preferences(k, seed) for seed in range(20)]
    for p in pair(matrices, pairing, labels, [0]):
        assert p.winner != p.loser
        assert {p.winner, p.loser} <= set(range(k))
        if labels == "soft":
            assert p.preference == pytest.approx(matrices[p.group][p.winner, p.loser])
            assert p.preference >= 0.5
        else:
            assert p.preference == 1


def test_iid_pairs_are_disjoint() -> None:
    used = [i for p in pair([preferences(8)], "iid", "sampled", [0]) for i in (p.winner, p.loser)]
    assert sorted(used) == list(range(8))


@pytest.mark.parametrize("pairing", ["best_worst", "knockout"])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_best_against_the_worst(pairing: str, k: int) -> None:
    (p,) = pair([chain(k)], pairing, "soft", [3])
    assert (p.winner, p.loser) == (0, k - 1)


def test_sampled_labels_are_drawn_from_the_preference() -> None:
    matrix = np.array([[0.5, 0.8], [0.2, 0.5]])
    wins = [p.winner == 0 for p in pair([matrix] * 4000, "iid", "sampled", [0])]
    assert np.mean(wins) == pytest.approx(0.8, abs=4 * (0.16 / 4000) ** 0.5)


def test_ties_fall_both_ways() -> None:
    tie = np.full((4, 4), 0.5)
    for pairing in ("best_worst", "knockout"):
        assert len({(p.winner, p.loser) for p in pair([tie] * 50, pairing, "soft", [0])}) > 6


def test_the_same_response_twice_is_no_pair() -> None:
    """The same tokens, that is: an empty response, or the same text said in other tokens, is compared."""
    tokens = [[5, 6, 2], [5, 6, 2], [7, 2], [2], [2]]
    texts = ["ab", "ab", "ab", "", ""]
    groups = [Group([], [1], [Response(*said, "eos", 0.0) for said in zip(texts, tokens)])]
    pairs = [Pair(0, i, j, 0.5) for i, j in ((0, 1), (0, 2), (0, 3), (3, 4))]
    assert drop_identical(pairs, groups) == pairs[1:3]


def test_win_rates_are_means_over_the_other_responses() -> None:
    matrix = np.array([[0.5, 0.9, 0.3], [0.1, 0.5, 0.6], [0.7, 0.4, 0.5]])
    pairs = win_rate_pairs([matrix, chain(2)], "soft", [0])
    assert [(p.group, p.winner, p.loser) for p in pairs] == [(0, i, None) for i in range(3)] + [
        (1, 0, None),
        (1, 1, None),
    ]
    assert [p.preference for p in pairs] == pytest.approx([0.6, 0.35, 0.55, 0.9, 0.1])
    groups = [Group([], [1], [Response("a", [5], "eos", 0.0)] * 3)] * 2
    assert drop_identical(pairs, groups) == pairs


def test_sampled_win_rates_come_from_one_outcome_a_comparison() -> None:
    matrix = np.array([[0.5, 0.9, 0.3], [0.1, 0.5, 0.6], [0.7, 0.4, 0.5]])
    pairs = win_rate_pairs([matrix] * 4000, "sampled", [0])
    rates = np.array([p.preference for p in pairs]).reshape(-1, 3)
    assert set(rates.ravel()) == {0.0, 0.5, 1.0}
    assert (rates.sum(1) == 1.5).all()  # three comparisons, each won by one of the two
    np.testing.assert_allclose(rates.mean(0), [0.6, 0.35, 0.55], atol=0.03)
    assert win_rate_pairs([matrix] * 9, "sampled", [1]) == win_rate_pairs([matrix] * 9, "sampled", [1])


def test_seeded() -> None:
    matrices = [preferences(5, seed) for seed in range(10)]
    assert pair(matrices, "knockout", "sampled", [1]) == pair(matrices, "knockout", "sampled", [1])
    assert pair(matrices, "all_pairs", "sampled", [1]) != pair(matrices, "all_pairs", "sampled", [2])


def test_the_step_fitted_at_the_nash_policy_vanishes_for_iid_draws_and_not_for_best_worst() -> None:
    """Nash policy (1, 2, 4)/7: the mirror-descent step there is 0 (up to a constant), so the fitted one should be."""
    p = np.array([[0.5, 0.9, 0.3], [0.1, 0.5, 0.6], [0.7, 0.4, 0.5]])
    draws = np.random.default_rng(0).choice(3, size=(20000, 8), p=np.array([1, 2, 4]) / 7)
    matrices = [p[np.ix_(d, d)] for d in draws]

    def fitted_step(pairing: str) -> float:
        """The largest component of argmin_θ Σ (θ_w − θ_l − (p − ½))², in units of η."""
        pairs = pair(matrices, pairing, "soft", [0])
        winner, loser = np.array([draws[q.group][[q.winner, q.loser]] for q in pairs]).T
        design = np.eye(3)[winner] - np.eye(3)[loser]
        labels = np.array([q.preference for q in pairs]) - 0.5
        return np.abs(np.linalg.lstsq(design, labels, rcond=None)[0]).max()

    assert fitted_step("all_pairs") < 0.01
    assert fitted_step("iid") < 0.01
    assert fitted_step("best_worst") > 0.05
