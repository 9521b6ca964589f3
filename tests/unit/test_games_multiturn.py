"""Several turns: values against enumeration, updates against plain loops, and where each target leads."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from onpo_fast.games import matrix, preferences
from onpo_fast.games.matrix_games import LABELS
from onpo_fast.games.multiturn import (
    TARGETS,
    action_values,
    behaviour,
    branch_values,
    distribution,
    fit,
    outcomes,
    run,
    sampled_steps,
    sampling_error,
    uniform,
)
from onpo_fast.games.solution import duality_gap, nash
from onpo_fast.objectives import Omd, Onpo

SIZES = [(1, 4), (2, 2), (2, 3), (3, 2), (3, 3)]  # turns, actions


def random_games(turns: int, actions: int, count: int, seed: int = 0) -> np.ndarray:
    return preferences.random(actions**turns, count, np.random.default_rng(seed))


def random_policy(turns: int, actions: int, *batch: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    return [rng.dirichlet(np.ones(actions), (*batch, actions**h)) for h in range(turns)]


# ---------------------------------------------------------------------------------------------------------------------
# Plain references: trajectories one at a time
# ---------------------------------------------------------------------------------------------------------------------


def index(history: tuple[int, ...], actions: int) -> int:
    return sum(y * actions ** (len(history) - 1 - k) for k, y in enumerate(history))


def chance(policy: list[np.ndarray], f: tuple[int, ...], start: int = 0) -> float:
    """P(f | its first ``start`` actions)."""
    p = 1.0
    for k in range(start, len(f)):
        p *= policy[k][index(f[:k], policy[0].shape[-1]), f[k]]
    return p


def enumerated(P: np.ndarray, policy: list[np.ndarray], branches: bool) -> list[np.ndarray]:
    """E[P(f ≻ o)] given a state and an action, o from the first state, or from the same one for ``branches``."""
    turns, actions = len(policy), policy[0].shape[-1]
    finals = list(product(range(actions), repeat=turns))
    values = [np.zeros_like(turn) for turn in policy]
    for h in range(turns):
        for f in finals:
            for o in finals:
                if not branches:
                    p = chance(policy, o)
                elif o[:h] == f[:h]:
                    p = chance(policy, o, h)
                else:
                    continue
                won = P[index(f, actions), index(o, actions)]
                values[h][index(f[:h], actions), f[h]] += chance(policy, f, h + 1) * p * won
    return values


def self_play(P: np.ndarray, turns: int, algorithm: str, eta: float, T: int, policy: list[np.ndarray]):
    """(average gaps, last gaps, π_T, mean of d_t) of one game, by the formulas."""
    auxiliary = policy
    finals, average_gap, last_gap = [], [], []
    for t in range(T):
        if t:
            step = [np.exp(eta * Q) for Q in enumerated(P, policy, branches=False)]
            auxiliary = [normalised(a * s) for a, s in zip(auxiliary, step)]
            policy = [normalised(a * s) for a, s in zip(auxiliary, step)] if algorithm == "onpo" else auxiliary
        actions = policy[0].shape[-1]
        finals.append(np.array([chance(policy, f) for f in product(range(actions), repeat=turns)]))
        last_gap.append(2 * (P @ finals[-1]).max() - 1)
        average_gap.append(2 * (P @ np.mean(finals, axis=0)).max() - 1)
    return average_gap, last_gap, policy, np.mean(finals, axis=0)


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# The game
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "actions"), SIZES)
def test_values_are_those_of_all_trajectories(turns: int, actions: int) -> None:
    (P,) = random_games(turns, actions, 1)
    policy = random_policy(turns, actions)
    for got, expected in (
        (action_values(P @ distribution(policy), policy), enumerated(P, policy, branches=False)),
        (branch_values(P, policy), enumerated(P, policy, branches=True)),
    ):
        for h in range(turns):
            np.testing.assert_allclose(got[h], expected[h], rtol=0, atol=1e-14)


def test_outcomes() -> None:
    policy = random_policy(3, 2)
    below = outcomes(policy)
    assert [b.shape for b in below] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert below[0][0] == pytest.approx([chance(policy, f) for f in product(range(2), repeat=3)])
    assert below[1][1] == pytest.approx([chance(policy, (1, *f), 1) for f in product(range(2), repeat=2)])


def test_the_game_s_regret_is_the_states_own() -> None:
    """⟨d_μ − d_π, r⟩ = Σ_h E_{s∼d_μ}⟨μ − π, Q⟩, as the module says."""
    (P,) = random_games(3, 3, 1)
    policy, other = random_policy(3, 3), random_policy(3, 3, seed=1)
    reward = P @ distribution(policy)
    total = 0.0
    for h, Q in enumerate(action_values(reward, policy)):
        reached = distribution(other).reshape(3**h, -1).sum(-1)
        total += reached @ ((other[h] - policy[h]) * Q).sum(-1)
    assert total == pytest.approx((distribution(other) - distribution(policy)) @ reward, abs=1e-14)


def test_no_policy_gains_more_than_the_gap_says() -> None:
    """Among all deterministic policies, of which there is a best response, the best gains what the gap is made of."""
    (P,) = random_games(2, 2, 1)
    final = distribution(random_policy(2, 2))
    gains = []
    for a, b, c in product(np.eye(2), repeat=3):
        gains.append(distribution([a[None], np.stack([b, c])]) @ P @ final)
    assert 2 * max(gains) - 1 == pytest.approx(duality_gap(P, final), abs=1e-14)


@pytest.mark.parametrize(("turns", "actions"), SIZES)
def test_a_policy_is_its_distribution(turns: int, actions: int) -> None:
    policy = random_policy(turns, actions, 5)
    for got, expected in zip(behaviour(distribution(policy), turns), policy):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_where_a_policy_never_goes_it_is_uniform() -> None:
    first, second = behaviour(np.array([0.25, 0.75, 0, 0]), 2)
    assert first.tolist() == [[1, 0]]
    assert second.tolist() == [[0.25, 0.75], [0.5, 0.5]]


# ---------------------------------------------------------------------------------------------------------------------
# Self-play with exact values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["onpo", "omd"])
@pytest.mark.parametrize(("turns", "actions"), [(1, 3), (2, 3), (3, 2)])
def test_updates_are_the_formulas(algorithm: str, turns: int, actions: int) -> None:
    (P,) = random_games(turns, actions, 1)
    init = random_policy(turns, actions)
    average_gap, last_gap, policy, final = self_play(P, turns, algorithm, 0.7, 25, init)
    trace = run(P, turns, algorithm, 0.7, 25, init)
    np.testing.assert_allclose(trace.average_gap, average_gap, atol=1e-13)
    np.testing.assert_allclose(trace.last_gap, last_gap, atol=1e-13)
    np.testing.assert_allclose(distribution(trace.average_policy), final, atol=1e-14)
    for got, expected in zip(trace.policy, policy):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("algorithm", ["onpo", "omd"])
@pytest.mark.parametrize("target", ["exact", "branches"])
def test_one_turn_is_the_matrix_game(algorithm: str, target: str) -> None:
    P = random_games(1, 5, 4)
    init = random_policy(1, 5, 4)
    single = matrix.run(P, algorithm, 0.5, 300, init[0][:, 0])
    trace = run(P, 1, algorithm, 0.5, 300, init, target=target)
    np.testing.assert_allclose(trace.average_gap, single.average_gap, atol=1e-12)
    np.testing.assert_allclose(trace.last_gap, single.last_gap, atol=1e-12)
    np.testing.assert_allclose(trace.policy[0][:, 0], single.policy, atol=1e-12)
    np.testing.assert_allclose(trace.average_policy[0][:, 0], single.average_policy, atol=1e-12)


@pytest.mark.parametrize(("turns", "updates"), [(2, 20_000), (3, 10_000)])
def test_onpo_converges_and_omd_cycles(turns: int, updates: int) -> None:
    """20 random games of three actions a turn, at η = ½."""
    P = random_games(turns, 3, 20)
    onpo, omd = (run(P, turns, algorithm, 0.5, updates + 1) for algorithm in ("onpo", "omd"))
    assert onpo.average_gap[:, -1].max() < 1e-3
    for typical in (np.mean, np.median):
        assert typical(onpo.last_gap[:, -1]) < typical(omd.last_gap[:, -1]) / 10
    # as 1/T: ten times the updates, a tenth of the gap
    assert np.median(onpo.average_gap[:, updates] / onpo.average_gap[:, updates // 10]) == pytest.approx(0.1, rel=0.25)


def test_the_gaps_are_of_the_policies_in_the_trace() -> None:
    P = random_games(2, 3, 4)
    trace = run(P, 2, "onpo", 0.5, 40)
    np.testing.assert_allclose(duality_gap(P, distribution(trace.policy)), trace.last_gap[:, -1], atol=1e-14)
    np.testing.assert_allclose(duality_gap(P, distribution(trace.average_policy)), trace.average_gap[:, -1], atol=1e-14)
    np.testing.assert_allclose(duality_gap(P, np.full((4, 9), 1 / 9)), trace.last_gap[:, 0], atol=1e-14)
    assert (trace.average_gap[:, 0] == trace.last_gap[:, 0]).all()


def test_averaging_state_by_state_is_another_policy() -> None:
    """Two plans, each of an action and its sequel: the mixture never pairs one's action with the other's sequel."""
    plans = [[np.eye(2)[[a]], np.eye(2)[[b, b]]] for a, b in ((0, 0), (1, 1))]
    mixture = np.mean([distribution(plan) for plan in plans], axis=0)
    state_by_state = distribution([np.mean(turn, axis=0) for turn in zip(*plans)])
    assert mixture.tolist() == [0.5, 0, 0, 0.5]
    assert distribution(behaviour(mixture, 2)).tolist() == mixture.tolist()
    assert state_by_state.tolist() == [0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("target", ["exact", "branches"])
def test_a_batch_is_its_games(target: str) -> None:
    P = random_games(2, 3, 3)
    init = random_policy(2, 3, 3)
    batch = run(P, 2, "onpo", 0.5, 60, init, target=target)
    for b, game in enumerate(P):
        alone = run(game, 2, "onpo", 0.5, 60, [turn[b] for turn in init], target=target)
        np.testing.assert_allclose(alone.last_gap, batch.last_gap[b], atol=1e-13)
        np.testing.assert_allclose(alone.average_gap, batch.average_gap[b], atol=1e-13)
        assert [turn.shape for turn in alone.policy] == [(1, 3), (3, 3)]
        assert [turn.shape for turn in alone.average_policy] == [(1, 3), (3, 3)]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_never_played_stays_so(target: str) -> None:
    init = uniform(2, 3)
    init[1][1] = [0, 0.5, 0.5]
    trace = run(random_games(2, 3, 2), 2, "onpo", 0.5, 20, init, target=target)
    assert (trace.policy[1][:, 1, 0] == 0).all()
    assert np.isfinite(trace.average_gap).all()


# ---------------------------------------------------------------------------------------------------------------------
# Sampled targets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "actions"), SIZES)
@pytest.mark.parametrize("objective", [Onpo(eta=0.7), Omd(eta=0.7)])
def test_the_three_sample_target_is_unbiased(turns: int, actions: int, objective) -> None:
    """Every triple as often as it comes: the fit is ηQ up to a constant a state, to rounding."""
    (P,) = random_games(turns, actions, 1)
    policy = random_policy(turns, actions)
    finals = list(product(range(actions), repeat=turns))
    opponent = [chance(policy, o) for o in finals]
    for h, Q in enumerate(enumerated(P, policy, branches=False)):
        for s, state in enumerate(product(range(actions), repeat=h)):
            pairs, preference = np.zeros((2, actions, actions))
            for f in (f for f in finals if f[:h] == state):
                for g in (g for g in finals if g[:h] == state):
                    p = chance(policy, f, h) * chance(policy, g, h)
                    target = 0.5 + (P[index(f, actions)] - P[index(g, actions)]) @ opponent
                    pairs[f[h], g[h]] += p
                    preference[f[h], g[h]] += p * target
            np.testing.assert_allclose(
                fit(pairs, preference / pairs, objective), 0.7 * (Q[s] - Q[s].mean()), rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("samples", [1, 3, 50])
def test_the_fit_is_the_shortest_least_squares(samples: int) -> None:
    """Against numpy's, one row a sample; with few samples some actions are never compared."""
    rng = np.random.default_rng(samples)
    first, second = rng.integers(0, 5, (2, samples))
    labels = rng.uniform(-0.5, 1.5, samples)
    rows = np.eye(5)[first] - np.eye(5)[second]
    expected = np.linalg.lstsq(rows, 2.0 * (labels - 0.5), rcond=None)[0]

    pairs, total = np.zeros((2, 5, 5))
    np.add.at(pairs, (first, second), 1)
    np.add.at(total, (first, second), labels)
    step = fit(pairs, total / np.maximum(pairs, 1), Onpo(eta=2.0))
    np.testing.assert_allclose(step, expected, atol=1e-12)
    never = sorted(set(range(5)) - set(first[first != second]) - set(second[first != second]))
    assert step[never] == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("turns", "actions"), [(1, 4), (2, 3), (3, 3)])
def test_its_error_falls_as_the_root_of_the_samples(labels: str, turns: int, actions: int) -> None:
    P = random_games(turns, actions, 10)
    samples = [100, 1_000, 10_000, 100_000]
    error = sampling_error(P, turns, samples, labels=labels)
    assert error.shape == (10, 4)
    slope, _ = np.polyfit(np.log(samples), np.log(np.sqrt(np.square(error).mean(0))), 1)
    assert slope == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize("labels", LABELS)
def test_it_falls_to_zero_whatever_the_policy(labels: str) -> None:
    (P,) = random_games(2, 3, 1)
    assert sampling_error(P, 2, [10**10], random_policy(2, 3), labels=labels) < 1e-4


def test_as_many_draws_as_were_asked_for() -> None:
    """A step fitted to one sample moves two actions of a state, by half the target each, or none."""
    (P,) = random_games(2, 3, 1)
    policy = uniform(2, 3)
    differences = np.unique(np.abs(P[:, None] - P[None]))
    for seed in range(20):
        for step in sampled_steps(P, policy, Onpo(eta=1.0), 1, "soft", np.random.default_rng(seed)):
            for g in step:
                low, middle, high = np.sort(g)
                assert middle == pytest.approx(0, abs=1e-12)
                assert low == pytest.approx(-high, abs=1e-12)
                assert np.abs(differences - 2 * high).min() < 1e-12


@pytest.mark.parametrize("labels", LABELS)
def test_self_play_on_samples_approaches_nash(labels: str) -> None:
    P = random_games(2, 3, 10)
    exact = run(P, 2, "onpo", 0.5, 300).average_gap[:, -1]
    sampled = run(P, 2, "onpo", 0.5, 300, target="sampled", samples=500, labels=labels).average_gap[:, -1]
    assert np.abs(sampled - exact).max() < 0.02
    assert sampled.max() < 0.05


def test_samples_are_seeded() -> None:
    (P,) = random_games(2, 3, 1)
    gaps = [run(P, 2, "onpo", 0.5, 5, target="sampled", samples=20, seed=seed).last_gap for seed in (1, 1, 2)]
    assert (gaps[0] == gaps[1]).all()
    assert (gaps[0] != gaps[2]).any()


# ---------------------------------------------------------------------------------------------------------------------
# Comparing the two branches
# ---------------------------------------------------------------------------------------------------------------------


def local_equilibrium(P: np.ndarray) -> list[np.ndarray]:
    """Two turns: the Nash policy of every state's own final states, then that of the first turn given what follows."""
    actions = round(len(P) ** 0.5)
    blocks = P.reshape(actions, actions, actions, actions)
    second = np.stack([nash(blocks[s, :, s]) for s in range(actions)])
    return [nash(np.einsum("sf,sfog,og->so", second, blocks, second))[None], second]


def test_branches_lead_elsewhere() -> None:
    """As 1/T to the equilibrium of the local games, whose gap in the real one is far from 0."""
    P = random_games(2, 3, 20)
    limit = np.stack([distribution(local_equilibrium(game)) for game in P])
    short, long = (run(P, 2, "onpo", 0.5, T, target="branches") for T in (2_000, 8_000))
    distance = [np.abs(distribution(trace.average_policy) - limit).max(1).mean() for trace in (short, long)]
    assert distance[1] < 0.35 * distance[0]
    assert distance[1] < 0.015
    assert np.median(duality_gap(P, limit)) > 0.2
    assert np.median(long.average_gap[:, -1]) > 0.2
    assert run(P, 2, "onpo", 0.5, 8_000).average_gap[:, -1].max() < 2e-3


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": 0}, "turns must be a whole number, at least 1, not 0"),
        ({"turns": 2.0}, "turns must be a whole number"),
        ({"turns": 3}, "9 is not such a number"),
        ({"P": np.full((8, 8), 0.5)}, "2 turns of A actions have A.2 final states, and 8 is not such a number"),
        ({"P": np.full((9, 9), 0.6)}, "must be 1"),
        ({"P": np.full((9, 8), 0.5)}, "square"),
        ({"algorithm": "inpo"}, "no algorithm 'inpo' for several turns; there are onpo, omd"),
        ({"eta": 0.0}, "eta must be a positive, finite number"),
        ({"eta": float("nan")}, "eta must be a positive, finite number"),
        ({"eta": float("inf")}, "eta must be a positive, finite number"),
        ({"eta": "half"}, "eta must be a positive, finite number"),
        ({"T": 0}, "T must be a whole number, at least 1, not 0"),
        ({"target": "local"}, "no target 'local'; there are exact, sampled, branches"),
        ({"target": "sampled", "samples": 0}, "samples must be a whole number"),
        ({"target": "sampled", "labels": "hard"}, "labels"),
        ({"init": np.full(9, 1 / 9)}, "a list of 2 arrays"),
        ({"init": uniform(1, 3)}, "a list of 2 arrays"),
        ({"init": uniform(2, 4)}, r"turn 0 of the policy must be of shape \(1, 3\)"),
        ({"init": [np.ones((1, 3)) / 3, np.ones((3, 3))]}, "turn 1 of the policy must hold distributions"),
        ({"init": [np.array([[1.5, -0.5, 0]]), np.ones((3, 3)) / 3]}, "turn 0 of the policy must hold distributions"),
        ({"init": [np.full((1, 3), np.nan), np.ones((3, 3)) / 3]}, "turn 0 of the policy must hold distributions"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    options = {"P": np.full((9, 9), 0.5), "turns": 2, "algorithm": "onpo", "eta": 0.5, "T": 3} | change
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    trace = run(np.full((9, 9), 0.5), np.int64(2), "onpo", np.float32(0.5), np.int32(3))
    assert trace.last_gap.tolist() == [0, 0, 0]
