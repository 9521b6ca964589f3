"""Matrix games: what the theory says of them, on exact figures."""

from itertools import islice, pairwise
from math import factorial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize, root
from scipy.special import expit

from onpo_fast.algorithms import ALGORITHMS, ALIASES, refreshing
from onpo_fast.games import GAMES, best_response, bounds, duality_gap, nash, regularised_gap, run
from onpo_fast.games.lab import first_return, fitted_step
from onpo_fast.games.matrix_games import ExactGame, SampledGame, bradley_terry_scores, log_normalised
from onpo_fast.games.preferences import (
    SIZES,
    check,
    cyclic,
    hard_game,
    make,
    one_beats_all,
    random,
    read,
    symmetrised,
    three_cycle,
)
from onpo_fast.objectives import Dpo, Inpo, Ipo, Omd, Onpo, Sppo

RPS = three_cycle(1, 1, 1)
WEIGHTED = three_cycle(0.9, 0.6, 0.7)
WEIGHTED_NASH = np.array([1, 2, 4]) / 7
TILTED = np.exp([1.0, 0, -1]) / np.exp([1.0, 0, -1]).sum()


def games(actions=10, count=20, seed=0):
    return random(actions, count, np.random.default_rng(seed))


def policies(shape, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1])


# --- What a game is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GAMES)
def test_every_game_is_a_preference_matrix_and_seeded(name):
    actions = SIZES.get(name, 8)
    made = GAMES[name](actions, 5, np.random.default_rng(1))
    assert made.shape == (5, actions, actions)
    assert np.array_equal(check(made), made)
    np.testing.assert_array_equal(made, GAMES[name](actions, 5, np.random.default_rng(1)))


def test_games_are_what_they_are_called():
    def make(name, actions=9, count=30):
        return GAMES[name](actions, count, np.random.default_rng(3))

    cycle = make("cyclic")
    for distance in (1, 4):  # each action beats the four after it
        beaten = [cycle[:, i, (i + distance) % 9] for i in range(9)]
        assert np.min(beaten) >= 0.6
        assert np.ptp(beaten) > 0.2
    scores = make("bradley_terry")
    logits = np.log(scores / (1 - scores))
    np.testing.assert_allclose(logits[:, 0, 1] + logits[:, 1, 2], logits[:, 0, 2], atol=1e-9)
    assert np.std(logits[:, 0, 1]) > 1
    groups = make("annotator_groups")
    off = groups[:, ~np.eye(9, dtype=bool)]
    assert np.mean(np.abs(off - 0.5) > 0.1) > 0.7  # tastes
    assert 0.1 < np.mean((nash(groups) > 1e-9).sum(-1) > 1) < 0.9  # some go in circles, some do not


def test_float32_games_and_starts_are_taken():
    P = random(5, 2, np.random.default_rng(0))
    init = policies((5,))
    rounded = run(P.astype(np.float32), "onpo", 0.5, 50, init.astype(np.float32))
    np.testing.assert_allclose(rounded.last_gap, run(P, "onpo", 0.5, 50, init).last_gap, atol=1e-4)
    assert rounded.policy.dtype == np.float64


def test_the_nash_policy_is_beaten_by_none():
    for name in GAMES:
        P = GAMES[name](SIZES.get(name, 30), 4, np.random.default_rng(2))
        assert duality_gap(P, nash(P)).max() < 1e-9, name
    np.testing.assert_allclose(nash(RPS), 1 / 3, atol=1e-12)
    np.testing.assert_allclose(nash(WEIGHTED), WEIGHTED_NASH, atol=1e-12)
    np.testing.assert_allclose(nash(one_beats_all(5, 1, None)[0]), [1, 0, 0, 0, 0], atol=1e-12)


@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(["continuous", "decided", "classes", "ties"]))
def test_the_nash_policy_of_any_matrix(actions, seed, kind):
    """Also with sure preferences, equal actions and ties, where there are several Nash policies."""
    rng = np.random.default_rng(seed)
    P = random(actions, 1, rng)[0]
    if kind == "decided":
        P = np.where(P > P.T, 1.0, np.where(P < P.T, 0.0, 0.5))
    elif kind == "classes":
        of = rng.integers(3, size=actions)
        P = WEIGHTED[np.ix_(of, of)]
    elif kind == "ties":
        P = np.full((actions, actions), 0.5)
    policy = nash(P)
    assert policy.sum() == pytest.approx(1, abs=1e-12)
    assert (policy >= 0).all()
    assert duality_gap(P, policy) < 1e-8
    np.testing.assert_array_equal(nash(P), policy)
    if kind == "classes" and len(set(of)) == 3:  # equal actions share their class's probability somehow
        np.testing.assert_allclose(np.bincount(of, policy), WEIGHTED_NASH, atol=1e-9)


def test_the_gap_is_what_two_best_responses_gain():
    P, policy = games(6, 4), policies((4, 6))
    for game, pi, gap, best in zip(P, policy, duality_gap(P, policy), best_response(P, policy)):
        wins = [np.eye(6)[y] @ game @ pi for y in range(6)]
        assert gap == pytest.approx(max(wins) - min(pi @ game @ np.eye(6)[y] for y in range(6)), abs=1e-14)
        assert wins[best] == max(wins)


def test_the_regularised_gap_is_what_two_regularised_best_responses_gain():
    P, tau = games(4, 1)[0], 0.3
    policy, reference = policies((2, 4), seed=3)

    def value(mine, other):
        return mine @ P @ other - tau * mine @ np.log(mine / reference) + tau * other @ np.log(other / reference)

    def softmax(logits):
        return np.exp(logits) / np.exp(logits).sum()

    most = -minimize(lambda x: -value(softmax(x), policy), np.zeros(4)).fun
    least = minimize(lambda x: value(policy, softmax(x)), np.zeros(4)).fun
    assert regularised_gap(P, policy, reference, tau) == pytest.approx(most - least, abs=1e-7)
    assert regularised_gap(P, policy, reference, 1e-9) == pytest.approx(duality_gap(P, policy), abs=1e-7)


# --- Every algorithm is its formula -----------------------------------------------------------------------------------


def normalised(weights):
    return weights / weights.sum()


def step_of(P, policy, algorithm, eta, reward):
    """log π_new/π of one fit, by solving the optimality conditions of the algorithm's loss numerically."""
    if algorithm == "sppo":  # of Σ π (u − a)² with Σ π e^u = 1: u + λe^u = a, in which the sum falls with λ
        a = eta * (reward - 0.5)

        def u(multiplier):
            return np.array([brentq(lambda u, a=a: u + multiplier * np.exp(u) - a, -50, 50, xtol=1e-15) for a in a])

        return u(brentq(lambda multiplier: policy @ np.exp(u(multiplier)) - 1, 0, 100, xtol=1e-15))
    if algorithm == "iterative_dpo":  # β = 1/η: margins are η times the Bradley-Terry scores, of which one is 0

        def slope(free):
            z = np.append(0, free)
            return ((expit(z[:, None] - z[None, :]) - P) @ policy)[1:]

        return eta * np.append(0, root(slope, np.zeros(len(P) - 1), tol=1e-14).x)
    return eta * reward


def by_formula(P, algorithm, eta, T, init, tau):
    """π_1 … π_T with probabilities and plain products, as the papers write them."""
    policy = auxiliary = init
    policies = [policy]
    for _ in range(T - 1):
        r = P @ policy
        grow = np.exp(step_of(P, policy, algorithm, eta, r))
        mixed = normalised(init ** (eta * tau) * policy ** (1 - eta * tau))
        match algorithm:
            case "onpo" | "onpo_direct" | "onpo_from_policy" | "onpo_direct_from_policy":
                auxiliary = normalised(auxiliary * grow)
                policy = normalised(auxiliary * grow)
            case "omd" | "sppo" | "iterative_dpo":
                policy = normalised(policy * grow)
            case "omd_two_fits":
                policy = normalised(policy * grow * grow)
            case "inpo":
                inverse = 1 / eta
                policy = normalised(init ** (tau / inverse) * policy ** (1 - tau / inverse) * np.exp(r / inverse))
            case "online_ipo":
                policy = normalised(init * grow)
            case "nash_md":
                policy = normalised(mixed * np.exp(eta * P @ mixed))
            case "egpo":
                policy = normalised(mixed * np.exp(eta * P @ normalised(mixed * grow)))
            case _:
                raise AssertionError(f"{algorithm} has no formula here")
        policies.append(policy)
    return np.array(policies)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_traces_equal_the_formulas(algorithm):
    P, init = games(7, 3, seed=4), policies((3, 7), seed=5)
    T = 8 if algorithm in ("sppo", "iterative_dpo") else 60  # whose steps are solved for
    trace = run(P, algorithm, 0.4, T, init, tau=0.2, keep_policies=True)
    for b in range(3):
        expected = by_formula(P[b], algorithm, 0.4, T, init[b], 0.2)
        averages = expected.cumsum(0) / np.arange(1, T + 1)[:, None]
        np.testing.assert_allclose(trace.policies[b], expected, atol=1e-12)
        np.testing.assert_allclose(trace.last_gap[b], [duality_gap(P[b], pi) for pi in expected], atol=1e-12)
        np.testing.assert_allclose(trace.average_gap[b], [duality_gap(P[b], pi) for pi in averages], atol=1e-12)
        of_average = [regularised_gap(P[b], pi, init[b], 0.2) for pi in averages]
        np.testing.assert_allclose(trace.average_regularised_gap[b], of_average, atol=1e-12)
        np.testing.assert_allclose(trace.policy[b], expected[-1], atol=1e-12)
        np.testing.assert_allclose(trace.average_policy[b], averages[-1], atol=1e-12)


def test_variants_of_one_update_agree():
    """Two fits of mirror descent are one at twice the step, and ONPO's variants are ONPO where every fit is exact."""
    P, init = games(6, 3, seed=19), policies((3, 6), seed=20)
    once = run(P, "omd", 0.6, 40, init, keep_policies=True).policies
    np.testing.assert_allclose(run(P, "omd_two_fits", 0.3, 40, init, keep_policies=True).policies, once, atol=1e-13)
    onpo = run(P, "onpo", 0.4, 40, init, keep_policies=True).policies
    for variant in ("onpo_direct", "onpo_from_policy", "onpo_direct_from_policy"):
        np.testing.assert_allclose(run(P, variant, 0.4, 40, init, keep_policies=True).policies, onpo, atol=1e-13)


def test_short_names_play_the_same():
    P = games(4, 1)[0]
    for short, name in ALIASES.items():
        np.testing.assert_array_equal(run(P, short, 0.5, 5).policy, run(P, name, 0.5, 5).policy)


class Recorder:
    """A game that plays nothing, and notes what it is asked for. Policies are numbers."""

    def __init__(self):
        self.fits, self.compared = [], []

    def compare(self, policy, opponent=None):
        self.compared.append((policy, opponent))
        return policy, opponent

    def mixture(self, initial, policy):
        return f"{initial}~{policy}"

    def fit(self, anchor, compared, *, warm_start=None, into="policy", steps=1):
        self.fits.append((anchor, compared, warm_start, into, steps))
        return len(self.fits)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms_say_what_they_ask_of_a_game(algorithm):
    game, chosen = Recorder(), ALGORITHMS[algorithm]
    assert list(islice(chosen.play(game, 0), 4)) == [0, *(np.arange(1, 4) * chosen.fits)]
    into = [fit[3] for fit in game.fits]
    assert into == 3 * (["auxiliary"] * (chosen.fits - 1) + ["policy"])
    anchors = {"mixture" if "~" in str(fit[0]) else "initial" if fit[0] == 0 else "policy" for fit in game.fits}
    assert chosen.anchor == ("policy" if "policy" in anchors else anchors.pop())
    kinds = {
        "opponent" if two is not None else "mixture" if "~" in str(one) else "policy" for one, two in game.compared
    }
    assert chosen.compares == next(kind for kind in ("opponent", "mixture", "policy") if kind in kinds)


def test_variants_of_onpo_differ_in_their_fits():
    """(anchor, warm start, steps) of the second iteration, whose policies are the results of fits 1 and 2."""
    fits = {}
    for name in ("onpo", "onpo_direct", "onpo_from_policy", "onpo_direct_from_policy"):
        game = Recorder()
        list(islice(ALGORITHMS[name].play(game, 0), 3))
        assert {fit[1] for fit in game.fits[2:]} == {(2, None)}
        fits[name] = [(anchor, warm, steps) for anchor, _, warm, _, steps in game.fits[2:]]
    assert fits["onpo"] == [(1, None, 1), (3, None, 1)]
    assert fits["onpo_direct"] == [(1, None, 1), (1, 3, 2)]
    assert fits["onpo_from_policy"] == [(1, 2, 1), (3, 2, 1)]
    assert fits["onpo_direct_from_policy"] == [(1, 2, 1), (1, 2, 2)]


def test_refreshing_starts_again_from_its_own_policy():
    """COMAL: with the reference refreshed INPO converges to the Nash policy of the game without a pull."""
    P, T, every = WEIGHTED[None], 5000, 200
    init = TILTED[None]
    game = ExactGame(P, Inpo(2.0, 0.05), 0.5, 0.05)
    play = ALGORITHMS["inpo"].play
    plain = [np.exp(policy) for policy in islice(play(game, np.log(init)), T)]
    refreshed = [np.exp(policy) for policy in islice(refreshing(play, every)(game, np.log(init)), T)]
    np.testing.assert_array_equal(refreshed[: every + 1], plain[: every + 1])
    again = next(islice(play(game, np.log(refreshed[every])), 7, None))
    np.testing.assert_allclose(refreshed[every + 7], np.exp(again), atol=1e-14)
    assert duality_gap(P, plain[-1]) > 1e-2
    assert duality_gap(P, refreshed[-1]) < 1e-6
    np.testing.assert_allclose(refreshed[-1][0], WEIGHTED_NASH, atol=1e-6)


def test_optimism_counts_the_last_reward_twice_and_the_one_before_back():
    """π_{t+1} ∝ π_t·exp(η(2r_t − r_{t−1})): the one-line form of the two steps."""
    P = games(6, 1, seed=6)[0]
    policy = run(P, "onpo", 0.5, 40, keep_policies=True).policies
    before = np.zeros(6)
    for now, following in pairwise(policy):
        r = P @ now
        np.testing.assert_allclose(following, normalised(now * np.exp(0.5 * (2 * r - before))), atol=1e-14)
        before = r


def test_sppo_minimises_its_loss_over_policies():
    P, init = games(5, 1, seed=7)[0], policies((5,), seed=8)
    for eta in (0.5, 5.0, 30.0):
        target = eta * (P @ init - 0.5)

        def loss(logits, target=target):
            logits = logits - np.log(np.exp(logits).sum())
            return init @ (logits - np.log(init) - target) ** 2

        ours = run(P, "sppo", eta, 2, init).policy
        best = min(minimize(loss, start, tol=1e-14).fun for start in (np.log(init), np.log(ours)))
        assert loss(np.log(ours)) <= best * (1 + 1e-9)
    nearly = run(P, "sppo", 1e-3, 2, init).policy  # to first order it is mirror descent
    np.testing.assert_allclose(nearly, run(P, "omd", 1e-3, 2, init).policy, atol=1e-7)


def test_iterative_dpo_fits_bradley_terry_scores():
    rng = np.random.default_rng(9)
    truth = rng.standard_normal((2, 6))
    P, policy = expit(truth[:, :, None] - truth[:, None, :]), policies((2, 6))
    centred = truth - (policy * truth).sum(-1, keepdims=True)
    np.testing.assert_allclose(bradley_terry_scores(P, policy), centred, atol=1e-9)
    general = games(6, 2, seed=10)
    scores = bradley_terry_scores(general, policy)
    residual = ((expit(scores[:, :, None] - scores[:, None, :]) - general) * policy[:, None, :]).sum(-1)
    assert np.abs(residual).max() < 1e-10
    step = np.log(run(general, "iterative_dpo", 0.7, 2, policy).policy / policy)
    np.testing.assert_allclose(step - (policy * step).sum(-1, keepdims=True), 0.7 * scores, atol=1e-9)


def test_iterative_dpo_needs_a_minimum():
    with pytest.raises(ValueError, match="no minimum"):
        run(one_beats_all(4, 1, None)[0], "iterative_dpo", 0.5, 3)
    assert np.isfinite(run(RPS, "iterative_dpo", 0.5, 3).last_gap).all()  # sure, but in a circle


def test_inpo_without_a_pull_is_omd():
    P = games(5, 2)
    np.testing.assert_array_equal(run(P, "inpo", 0.5, 50, tau=0).policy, run(P, "omd", 0.5, 50).policy)
    np.testing.assert_array_equal(run(P, "inpo", 0.5, 50, tau=2).policy, run(P, "online_ipo", 0.5, 50).policy)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_batch_is_its_games(algorithm):
    P, init = games(5, 3), policies((3, 5))
    batch = run(P, algorithm, 0.5, 30, init)
    for b in range(3):
        alone = run(P[b], algorithm, 0.5, 30, init[b])
        assert (alone.last_gap.shape, alone.policy.shape) == ((30,), (5,))
        for field in ("average_gap", "last_gap", "last_regularised_gap", "policy", "average_policy"):
            np.testing.assert_allclose(getattr(alone, field), getattr(batch, field)[b], atol=1e-12)


def test_an_action_without_probability_never_gets_any():
    init = np.array([0.5, 0.5, 0, 0])
    for algorithm in ALGORITHMS:
        trace = run(games(4, 1)[0], algorithm, 0.5, 20, init)
        assert (trace.policy[2:] == 0).all(), algorithm
        assert np.isfinite(trace.last_gap).all(), algorithm
        assert np.isfinite(trace.last_regularised_gap).all(), algorithm


# --- Theorems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["random", "cyclic", "bradley_terry", "annotator_groups", "one_beats_all", "hard_for_optimism"]
)
def test_theorem_2_with_its_constant_corrected(name):
    T = np.arange(1, 1001)
    for actions in (4,) if name in SIZES else (2, 10, 40):
        P = GAMES[name](actions, 10, np.random.default_rng(11))
        init = policies((10, actions), seed=12)
        for start, eta in ((None, 0.5), (None, 0.1), (init, 0.5)):
            D = bounds.divergence(np.full(actions, 1 / actions) if start is None else start)
            bound = bounds.theorem_2(np.reshape(D, (-1, 1)), T, eta)
            assert (run(P, "onpo", eta, 1000, start).average_gap <= bound + 1e-12).all()


def test_theorem_2_as_printed_has_a_counterexample():
    gap = run(one_beats_all(10, 1, None)[0], "onpo", 0.5, 50).average_gap[-1]
    assert gap == pytest.approx(0.1757, abs=5e-5)
    assert 4 * np.sqrt(np.log(10)) / 50 == pytest.approx(0.1214, abs=5e-5)
    assert bounds.theorem_2(np.log(10), 50) == pytest.approx(0.2042, abs=5e-5)


@pytest.mark.parametrize("T", [3, 30, 300, 1000])
def test_theorem_1(T):
    D = np.log(10)
    for name in ("random", "cyclic", "one_beats_all"):
        P = GAMES[name](10, 20, np.random.default_rng(13))
        assert (run(P, "omd", bounds.tuned_eta(D, T), T).average_gap[:, -1] <= bounds.theorem_1(D, T)).all()


def test_the_rates_are_one_over_t_and_one_over_its_root():
    P, T = games(), np.unique(np.geomspace(50, 5000, 7).astype(int))
    fast = run(P, "onpo", 0.5, 5000).average_gap[:, T - 1]
    slow = [run(P, "omd", bounds.tuned_eta(np.log(10), t), int(t)).average_gap[:, -1] for t in T]
    slopes = [np.polyfit(np.log(T), np.log(gap).mean(0), 1)[0] for gap in (fast, np.transpose(slow))]
    assert slopes[0] <= -0.95
    assert -0.60 <= slopes[1] <= -0.40


@pytest.mark.parametrize(
    ("algorithm", "eta", "expected"),
    [("onpo", 1 / 8, 0.319), ("onpo", 1 / 2, 1.2e-5), ("omd", 1 / 8, 0.71), ("omd", 1 / 2, 0.995), ("omd", 1, 1.0)],
)
def test_the_last_iterate_on_rock_paper_scissors(algorithm, eta, expected):
    assert run(RPS, algorithm, eta, 1000, TILTED).last_gap[-1] == pytest.approx(expected, rel=0.05, abs=1e-3 * expected)


def test_the_last_iterate_of_onpo_converges_linearly():
    gap = run(RPS, "onpo", 0.5, 1500, TILTED).last_gap
    slopes = [np.polyfit(np.arange(200), np.log(gap[at : at + 200]), 1)[0] for at in (400, 800, 1200)]
    np.testing.assert_allclose(slopes, np.mean(slopes), rtol=0.02)
    assert slopes[0] < -0.01
    assert run(RPS, "onpo", 1, 1000, TILTED).last_gap[-1] < 1e-12


@pytest.mark.parametrize("delta", [0.3, 0.02])
def test_the_hard_game_has_the_nash_strategies_of_its_two_players(delta):
    marginals = nash(hard_game(delta)).reshape(2, 2)
    np.testing.assert_allclose(marginals.sum(1), np.array([1, delta]) / (1 + delta), atol=1e-9)
    np.testing.assert_allclose(marginals.sum(0), np.array([0.5, 0.5 + delta]) / (1 + delta), atol=1e-9)


def test_a_symmetrised_game_is_played_as_its_two_players_would():
    """ONPO from a product policy is both players' optimistic mirror descent in A, with half the step."""
    A, eta = np.random.default_rng(21).random((3, 2)), 0.8
    x, y = policies((3,), seed=22), policies((2,), seed=23)
    rows, columns = (x, x), (y, y)  # (auxiliary, policy) of each player
    trace = run(symmetrised(A), "onpo", eta, 40, np.outer(x, y).ravel(), keep_policies=True)
    for t in range(40):
        np.testing.assert_allclose(trace.policies[t], np.outer(rows[1], columns[1]).ravel(), atol=1e-12)
        loss, gain = A @ columns[1], rows[1] @ A
        assert trace.last_gap[t] == pytest.approx(gain.max() - loss.min(), abs=1e-12)
        grow_row, grow_column = np.exp(-eta / 2 * loss), np.exp(eta / 2 * gain)
        rows = (row := normalised(rows[0] * grow_row)), normalised(row * grow_row)
        columns = (column := normalised(columns[0] * grow_column)), normalised(column * grow_column)


@pytest.mark.parametrize(
    ("make_game", "rounds"), [(hard_game, 12), (lambda delta: three_cycle(0.5 + delta, 1, 1), 4.2)]
)
def test_the_last_policy_of_onpo_comes_back_after_rounds_of_the_order_of_one_over_delta(make_game, rounds):
    deltas = np.array([0.04, 0.02, 0.01])
    P = np.stack([make_game(delta) for delta in deltas])
    trace = run(P, "onpo", 0.5, 2500)
    returns = [first_return(gap) for gap in trace.last_gap]
    for delta, gap, (first, last) in zip(deltas, trace.last_gap, returns):
        assert gap[: first - 1].min() < 2 * delta  # it had been good
        assert gap[first - 2] <= 0.1 < gap[first - 1]
        assert (gap[first - 1 : last] > 0.1).all()
        assert gap[first - 1 : last].max() > 0.4
        assert last - first > 3 / delta
    np.testing.assert_allclose(deltas * np.array(returns)[:, 0], rounds, rtol=0.1)
    bound = bounds.theorem_2(np.log(P.shape[-1]), np.arange(1, 2501))
    assert (trace.average_gap <= bound).all()


def test_the_hard_game_by_name():
    np.testing.assert_array_equal(make("hard_for_optimism=0.03", count=2), np.stack(2 * [hard_game(0.03)]))
    np.testing.assert_array_equal(make("hard_for_optimism"), hard_game(0.01)[None])
    for source, message in (("=0", "delta"), ("=0.6", "delta"), ("=nan", "delta"), ("=x", "x is not a number")):
        with pytest.raises(ValueError, match=message):
            make(f"hard_for_optimism{source}")
    with pytest.raises(ValueError, match="hard_for_optimism has 4 actions, not 3"):
        make("hard_for_optimism=0.1", actions=3)
    with pytest.raises(ValueError, match=r"P\[|probability"):
        symmetrised(np.array([[2.0, 0.0]]))


def test_pulled_methods_solve_the_regularised_game_and_not_the_other():
    P = cyclic(5, 4, np.random.default_rng(14))
    for algorithm in ("inpo", "egpo"):
        trace = run(P, algorithm, 0.5, 1500, policies((4, 5)), tau=0.1)
        assert trace.last_regularised_gap[:, -1].max() < 1e-10, algorithm
        assert trace.last_gap[:, -1].min() > 1e-3, algorithm


# --- Samples ----------------------------------------------------------------------------------------------------------


def exact_step(P, policy):
    return P @ policy - 0.5


@pytest.mark.parametrize("pairing", ["iid", "all_pairs"])
@pytest.mark.parametrize("labels", ["soft", "sampled"])
def test_sampled_minimisers_converge_to_the_closed_form(pairing, labels):
    P, policy = games(5, 1, seed=15)[0], np.array([0.3, 0.25, 0.2, 0.15, 0.1])
    errors = []
    for groups in (60, 3000):
        steps = [fitted_step(P, policy, pairing, groups, seed, labels, 4) - exact_step(P, policy) for seed in range(10)]
        errors.append(np.sqrt(np.mean(np.square(steps))))
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(50**0.5, rel=0.5)


def test_best_worst_moves_away_from_the_nash_policy_and_iid_does_not():
    """Pairs that the oracle chose are not draws from π: at the Nash policy, where the step should be 0, it is not."""
    fair = fitted_step(WEIGHTED, WEIGHTED_NASH, "iid", 10000)
    assert np.abs(fair).max() < 0.01
    biased = fitted_step(WEIGHTED, WEIGHTED_NASH, "best_worst", 10000)
    assert np.ptp(biased) > 0.1
    np.testing.assert_allclose(biased, expected_best_worst_step(WEIGHTED, WEIGHTED_NASH, 8), atol=0.01)


def expected_best_worst_step(P, policy, responses):
    """The same from all the ways in which K responses can fall on three actions."""
    normal, moment = np.zeros((3, 3)), np.zeros(3)
    for a in range(responses + 1):
        for b in range(responses + 1 - a):
            counts = np.array([a, b, responses - a - b])
            ways = factorial(responses) / np.prod([factorial(n) for n in counts])
            score = np.where(counts > 0, P @ counts, np.nan)
            difference = np.eye(3)[np.nanargmax(score)] - np.eye(3)[np.nanargmin(score)]
            weight = ways * np.prod(policy**counts)
            normal += weight * np.outer(difference, difference)
            moment += weight * difference * (P[np.nanargmax(score), np.nanargmin(score)] - 0.5)
    step = np.linalg.pinv(normal) @ moment
    return step - policy @ step


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "sppo"])
def test_sampled_runs_follow_the_exact_ones(algorithm):
    P = games(4, 2, seed=17)
    exact = run(P, algorithm, 0.5, 4)
    sampled, again = (run(P, algorithm, 0.5, 4, mode="sampled", groups=400, responses=4) for _ in range(2))
    assert np.abs(sampled.policy - exact.policy).max() < 0.03
    np.testing.assert_array_equal(sampled.policy, again.policy)


def test_bits_is_an_old_name_of_sampled_labels():
    P, options = games(4, 2, seed=17), {"mode": "sampled", "groups": 10}
    old, new = (run(P, "omd", 0.5, 3, labels=labels, **options).policy for labels in ("bits", "sampled"))
    np.testing.assert_array_equal(old, new)
    assert not np.array_equal(new, run(P, "omd", 0.5, 3, **options).policy)


@pytest.mark.parametrize("labels", ["soft", "sampled"])
def test_an_opponents_draws_give_its_rewards(labels):
    """EGPO's second fit: pairs of π against draws of another policy, not against each other."""
    P, policy, other = games(4, 1, seed=18), np.full((1, 4), 0.25), np.array([[0.7, 0.1, 0.1, 0.1]])
    game = SampledGame(P, Omd(1.0), 1.0, 0.0, 4000, 4, "all_pairs", labels, 0)
    compared = game.compare(np.log(policy), opponent=np.log(other))
    step = (game.fit(np.log(policy), compared) - np.log(policy))[0]
    exact = P[0] @ other[0]
    np.testing.assert_allclose(step - step.mean(), exact - exact.mean(), atol=0.03)
    against_itself = P[0] @ policy[0]
    assert np.abs((step - step.mean()) - (against_itself - against_itself.mean())).max() > 0.06
    assert set(np.round(compared.preference.numpy(), 6)) <= {0.5, 1.5} or labels == "soft"


def test_what_was_not_drawn_stays():
    """One pair of two of five actions: the others keep their odds against each other."""
    policy = np.array([0.498, 0.499, 0.001, 0.001, 0.001])
    game = SampledGame(games(5, 1)[:1], Onpo(2.0), 2.0, 0.0, 1, 2, "iid", "soft", 0)
    anchor = np.log(policy)[None]
    compared = next(drawn for _ in range(50) if int((drawn := game.compare(anchor)).winner) != int(drawn.loser))
    fitted = np.exp(game.fit(anchor, compared))[0]
    np.testing.assert_allclose(fitted[2:] / fitted[2], 1)
    margin = np.log(fitted / policy)
    expected = 2 * (float(compared.preference) - 0.5)
    assert margin[int(compared.winner)] - margin[int(compared.loser)] == pytest.approx(expected)


def test_exact_and_sampled_are_one_interface():
    P = games(3, 1)
    anchor = log_normalised(np.zeros((1, 3)))
    for game in (ExactGame(P, Omd(0.5), 0.5, 0.0), SampledGame(P, Omd(0.5), 0.5, 0.0, 4, 4, "iid", "soft", 0)):
        assert np.exp(game.fit(anchor, game.compare(anchor))).sum() == pytest.approx(1)


@pytest.mark.parametrize("objective", [Onpo(0.7), Omd(0.7), Inpo(2.0, 0.5), Ipo(2.0), Dpo(0.5), Sppo(0.7)])
def test_steps_multiply_the_target(objective):
    preference = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    more = objective.with_steps(3)
    torch.testing.assert_close(more.target(preference), 3 * objective.target(preference))
    if isinstance(objective, Inpo):
        assert more.initial_share == pytest.approx(objective.initial_share)
    elif not isinstance(objective, Sppo):
        P, anchor = games(4, 1), np.log(policies((1, 4)))
        game, other = (SampledGame(P, one, 1.0, 0.0, 30, 4, "iid", "soft", 0) for one in (objective, more))
        compared = game.compare(anchor)
        np.testing.assert_allclose(game.fit(anchor, compared, steps=3), other.fit(anchor, compared), atol=1e-9)


# --- Bad input --------------------------------------------------------------------------------------------------------


def off(at, value, batch=False):
    P = games(4, 1)[0].copy()
    P[at] = value
    return P[None] if batch else P


@pytest.mark.parametrize(
    ("P", "message"),
    [
        (np.full((2, 3), 0.5), r"square.*\(2, 3\)"),
        (np.full(4, 0.5), r"square.*\(4,\)"),
        (np.empty((0, 0)), "square"),
        (off((1, 2), 1.2), r"P\[1, 2\] = 1.2 .*\[0, 1\]"),
        (off((1, 2), np.nan), r"P\[1, 2\] = nan"),
        (off((0, 3), -3, batch=True), r"P\[0, 0, 3\] = -3"),
        (off((2, 2), 0.75), r"P\[2, 2\] = 0.75 .*itself"),
        (np.array([[0.5, 0.9], [0.3, 0.5]]), r"P\[0, 1\] = 0.9 and P\[1, 0\] = 0.3"),
        (np.array([["a", "b"], ["c", "d"]]), "numbers"),
    ],
)
def test_what_is_no_game_is_refused(P, message):
    with pytest.raises(ValueError, match=message):
        run(P, "onpo", 0.5, 10)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eta": 0}, "eta"),
        ({"eta": -1.0}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": float("inf")}, "eta"),
        ({"T": 0}, "T must be"),
        ({"T": 2.5}, "T must be"),
        ({"tau": -0.1}, "tau"),
        ({"algorithm": "inpo", "eta": 5, "tau": 0.5}, r"eta·tau.*2\.5"),
        ({"algorithm": "ppo"}, "no algorithm 'ppo'.*onpo"),
        ({"init": [0.5, 0.5]}, r"3 actions.*\(2,\)"),
        ({"init": [0.5, 0.6, 0.5]}, "sum to 1.6"),
        ({"init": [1.5, -0.5, 0]}, "-0.5"),
        ({"init": [np.nan, 0.5, 0.5]}, "nan"),
        ({"mode": "both"}, "mode"),
        ({"mode": "sampled", "algorithm": "sppo"}, "sppo"),
        ({"mode": "sampled", "pairing": "best"}, "pairing.*best_worst"),
        ({"mode": "sampled", "labels": "hard"}, "labels"),
        ({"mode": "sampled", "groups": 0}, "groups"),
        ({"mode": "sampled", "responses": 1}, "responses"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {"algorithm": "onpo", "eta": 0.5, "T": 10} | changed
    with pytest.raises(ValueError, match=message):
        run(WEIGHTED, **arguments)


def test_games_from_files(tmp_path):
    P = games(4, 2)
    np.save(tmp_path / "two.npy", P)
    (tmp_path / "one.json").write_text(str(P[0].tolist()))
    np.savetxt(tmp_path / "one.csv", P[0], delimiter=",")
    np.testing.assert_array_equal(read(tmp_path / "two.npy"), P)
    np.testing.assert_array_equal(read(tmp_path / "one.json"), P[0])
    np.testing.assert_allclose(read(tmp_path / "one.csv"), P[0], atol=1e-15)
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object))
    (tmp_path / "ragged.json").write_text("[[0.5, 0.2], [0.8]]")
    (tmp_path / "broken.json").write_text("[[0.5,")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "words.csv").write_text("a,b\nc,d\n")
    (tmp_path / "off.csv").write_text("0.5,0.9\n0.3,0.5\n")
    (tmp_path / "game.txt").write_text("")
    for name in (
        "pickle.npy",
        "ragged.json",
        "broken.json",
        "bytes.json",
        "words.csv",
        "off.csv",
        "game.txt",
        "no.npy",
    ):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
