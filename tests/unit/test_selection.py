"""Which pairs the oracle is asked about, and how they are weighted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onpo_fast import oracles, stage_metrics
from onpo_fast.batches import Batch, divided_alike, plan_steps, total_weight
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.objectives import Onpo
from onpo_fast.pairing import label
from onpo_fast.selection import SELECTIONS, UNIFORM_SHARE, Predictor, candidates, select

PROMPT = [{"role": "user", "content": "Hi"}]


def groups(sizes: list[int]) -> list[Group]:
    return [Group(PROMPT, [1], [Response(str(i), [i], "eos", 0.0) for i in range(size)]) for size in sizes]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_mean_over_draws_is_that_over_all_pairs(selection: str) -> None:
    """In expectation, of any value that pairs have; the spread over draws says how closely this must hold."""
    rng = np.random.default_rng(0)
    pairs = candidates(groups([4, 5, 3]))
    x = rng.standard_normal((len(pairs), 3)) * np.exp(rng.standard_normal((len(pairs), 1)))
    q = SELECTIONS[selection](x, rng.random(len(pairs)))
    assert q.sum() == pytest.approx(1)
    assert q.min() >= UNIFORM_SHARE / len(pairs) - 1e-12
    values = dict(zip(pairs, rng.standard_normal(len(pairs))))
    means = []
    for seed in range(4000):
        found = select(q, pairs, 6, np.random.default_rng(seed))
        assert sum(found.counts) == 6
        terms = zip(found.pairs, found.counts, found.importance)
        means.append(sum(count * importance * values[pair] for pair, count, importance in terms) / 6)
    error = np.std(means) / len(means) ** 0.5
    assert abs(np.mean(means) - np.mean(list(values.values()))) < 4 * error
    assert error < 0.05


@pytest.mark.parametrize(("draws", "batch_pairs"), [(6, 1), (20, 1), (20, 4), (100, 4)])
def test_the_mean_over_the_steps_of_an_epoch_is_that_over_all_pairs(draws: int, batch_pairs: int) -> None:
    """In expectation, with fewer draws than pairs and with more, though one step has more draws than another."""
    rng = np.random.default_rng(0)
    own = groups([6, 3, 2])
    pairs = candidates(own)
    q = rng.dirichlet(np.ones(len(pairs))) * 0.9 + 0.1 / len(pairs)
    values = dict(zip(pairs, rng.standard_normal(len(pairs))))
    P = [np.full((6, 6), 0.7)] * 3

    def loss(step: Batch) -> float:
        drawn = [pair for pairs in step.values() for pair in pairs]
        values_of = (values[(pair.group, *sorted((pair.winner, pair.loser)))] for pair in drawn)
        summed = sum(pair.weight * pair.importance * value for pair, value in zip(drawn, values_of))
        return summed / total_weight(step)  # as a step's loss is divided

    means = []
    for seed in range(3000):
        drawn = label(select(q, pairs, draws, np.random.default_rng(seed)), P, "soft", [1])
        means.append(np.mean([loss(step) for step in divided_alike(plan_steps(drawn, 2, batch_pairs, [seed]))]))
    error = np.std(means) / len(means) ** 0.5
    assert abs(np.mean(means) - np.mean(list(values.values()))) < 4 * error
    assert error < 0.05


def test_variance_prefers_uncertain_labels_and_different_responses() -> None:
    x = np.array([[1.0, 0], [3, 0], [1, 0], [0, 0]])
    q = SELECTIONS["variance"](x, np.array([0.5, 0.5, 0.9, 0.5]))
    assert q[1] > q[0] > q[2] > q[3]
    assert (q[1] - q[3]) / (q[0] - q[3]) == pytest.approx(3)
    assert (q[2] - q[3]) / (q[0] - q[3]) == pytest.approx(0.3 / 0.5)


def test_a_d_optimal_design() -> None:
    """Of one direction with three pairs and another with one, each gets half: the known optimum for d = 2."""
    x = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    q = (SELECTIONS["dopt"](x, np.full(4, 0.5)) - UNIFORM_SHARE / 4) / (1 - UNIFORM_SHARE)
    assert q == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2], abs=1e-4)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_features_that_are_all_zero(selection: str) -> None:
    q = SELECTIONS[selection](np.zeros((5, 3)), np.full(5, 0.5))
    assert q == pytest.approx([0.2] * 5)


def test_responses_with_the_same_tokens_are_no_candidates() -> None:
    one = Group(
        [], [1], [Response("a", [1], "eos", 0.0), Response("a", [1], "eos", 0.0), Response("b", [2], "eos", 0.0)]
    )
    assert candidates([one]) == [(0, 0, 2), (0, 1, 2)]


def test_the_predictor_learns_from_labels() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3000, 4)), np.array([1.0, -2, 0, 0.5])
    predictor = Predictor(4)
    assert predictor(x) == pytest.approx(np.full(3000, 0.5))
    predictor.fit(x, 1 / (1 + np.exp(-x @ w)))
    assert predictor.weights == pytest.approx(w, abs=0.02)


@pytest.mark.parametrize("labels", ["soft", "sampled"])
def test_labels_of_selected_pairs(labels: str) -> None:
    P = np.array([[0.5, 0.2, 0.7], [0.8, 0.5, np.nan], [0.3, np.nan, 0.5]])
    found = select(np.array([0.5, 0.5]), [(0, 0, 1), (0, 0, 2)], 50, np.random.default_rng(0))
    pairs = label(found, [P], labels, [1])
    assert sum(pair.weight for pair in pairs) == 50
    assert all(pair.importance == 1 for pair in pairs)
    if labels == "soft":
        assert [(pair.winner, pair.loser, pair.preference) for pair in pairs] == [(1, 0, 0.8), (0, 2, 0.7)]
    else:
        assert all(pair.preference == 1 for pair in pairs)


class OfPairs(oracles.BatchOracle):
    """Says nothing of pairs that it was not asked about."""

    def compare(self, groups, pairs, progress=lambda n: None):
        matrices = []
        for (_, responses), own in zip(groups, pairs):
            matrix = np.full((len(responses), len(responses)), np.nan)
            for i, j in own:
                matrix[i, j] = 0.9
            matrices.append(matrix)
        return matrices


def test_an_oracle_without_a_compare_of_its_own_compares_all() -> None:
    class OfGroups(oracles.BatchOracle):
        def many(self, groups, progress=lambda n: None):
            return [np.full((len(responses), len(responses)), 0.5) for _, responses in groups]

    assert oracles.compares_pairs(OfPairs())
    assert not oracles.compares_pairs(OfGroups())
    assert not oracles.compares_pairs(oracles.Population())


def test_the_loss_before_a_fit_has_the_pairs_weights() -> None:
    sure, tie = Pair(0, 0, 1, 1.0), Pair(0, 0, 2, 0.5)
    weighted = [replace(sure, weight=3.0, importance=2.0), replace(tie, importance=2.0)]
    found, expected = (
        stage_metrics.pairing(pairs, 0, groups([3]), Onpo(2.0)) for pairs in (weighted, [sure] * 3 + [tie])
    )
    assert found["untrained_loss"] == pytest.approx(expected["untrained_loss"])


def test_an_oracle_answers_for_the_pairs_alone() -> None:
    (found,) = oracles.judge(OfPairs(), groups([3]), "mine", pairs=[[(0, 2)]])
    np.testing.assert_allclose(found, [[0.5, 0.5, 0.9], [0.5, 0.5, 0.5], [0.1, 0.5, 0.5]])
    asked = [[(0, 1)], [(1, 2)]]
    bad = OfPairs()
    bad.compare = lambda groups, pairs, progress: [np.full((3, 3), 0.5), np.full((3, 3), np.nan)]
    with pytest.raises(UserError, match=r"prompt 1 .*P\(1 ≻ 2\) is nan"):
        oracles.judge(bad, groups([3, 3]), "mine", pairs=asked)
