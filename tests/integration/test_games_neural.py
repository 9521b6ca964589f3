"""The neural game: the training stack against closed forms, on a transformer whose responses can all be counted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from onpo_fast.algorithms import ALGORITHMS
from onpo_fast.data import Pair
from onpo_fast.games.matrix_games import Rewards
from onpo_fast.games.neural import NeuralGame, NeuralTrace, natural_step, play
from onpo_fast.games.neural_game import TransformerGame, closed_form_game
from onpo_fast.games.neural_options import resolve, response_preferences
from onpo_fast.games.preferences import GAMES, three_cycle
from onpo_fast.games.solution import duality_gap, rewards
from onpo_fast.objectives import Inpo, Ipo, Omd, Onpo

QUICK = NeuralGame(pairing="all_pairs", iterations=1, fit_steps=2, groups=4, responses=8)


@pytest.fixture(scope="module")
def quick() -> NeuralTrace:
    return play(QUICK)


def test_every_response_is_scored_as_the_model_itself_has_it() -> None:
    game = replace(QUICK, contexts=3, alphabet=3, length=4, layers=2)  # 81 responses: more than one packed row
    table = transformer(game)
    scored = table.score()
    assert scored.shape == (3, 81)
    assert table.mass_error < 1e-5
    assert np.exp(scored).sum(1) == pytest.approx(np.ones(3), abs=1e-12)
    assert len({tuple(context) for context in table.contexts}) == 3
    model = table.model.model.double()
    for context, logps in zip(table.contexts, scored):
        tokens = torch.tensor([context + response.tokens for response in table.responses])
        with torch.no_grad():
            each = model(tokens).logits.log_softmax(-1)[:, len(context) - 1 : -1]
        plain = each.gather(2, tokens[:, len(context) :, None]).sum((1, 2))
        assert np.abs(plain.numpy() - logps).max() < 1e-5


def test_the_start_is_far_from_uniform_and_the_same_for_every_objective(quick) -> None:
    assert quick.policies[0].max() > 3 / 64
    other = play(replace(QUICK, objective="omd"))
    assert np.array_equal(other.logps[0], quick.logps[0])
    assert np.array_equal(other.classes, quick.classes)
    assert np.array_equal(other.matrices, quick.matrices)
    assert not np.array_equal(play(replace(QUICK, seed=1)).logps[0], quick.logps[0])


def test_the_same_options_give_the_same_bits(quick) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = play(QUICK)
    for name in ("logps", "logps_auxiliary", "classes", "matrices"):
        assert np.array_equal(getattr(again, name), getattr(quick, name)), name
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def transformer(options: NeuralGame) -> TransformerGame:
    game, matrices, classes = resolve(options, None)
    return TransformerGame(game, response_preferences(matrices, classes))


def comparisons(pairs, context: int) -> dict[tuple[int, int], float]:
    return {(pair.winner, pair.loser): pair.weight for pair in pairs if pair.group == context}


def test_pairs_are_of_draws_from_the_policy() -> None:
    """Every comparison of two different responses comes as often as two independent draws give it."""
    options = replace(QUICK, alphabet=4, length=1, groups=2000, responses=4)
    table = transformer(options)
    policy = table.initial()
    draws = table.compare(policy).pairs
    expected = transformer(replace(options, pairing="expected")).compare(policy).pairs
    for context, p in enumerate(policy.probabilities):
        drawn, exact = comparisons(draws, context), comparisons(expected, context)
        assert sum(exact.values()) == pytest.approx(1 - (p**2).sum())
        pooled = {tuple(sorted(pair)): 0.0 for pair in exact}
        for pair, weight in drawn.items():
            pooled[tuple(sorted(pair))] += weight / (2000 * 6)
        for pair, share in exact.items():
            assert pooled[tuple(sorted(pair))] == pytest.approx(share, abs=0.02)  # 4.5 standard errors


def test_a_weight_is_so_many_comparisons() -> None:
    """In a fit: one pair of weight 3 is the same pair three times."""
    table = transformer(replace(QUICK, contexts=1, fit_steps=3))
    initial = table.initial()
    compared = table.compare(initial)
    pairs = [Pair(0, 1, 2, 0.9), Pair(0, 2, 5, 0.6), Pair(0, 7, 1, 0.8)]
    fitted = []
    for chosen in ([*pairs, pairs[0], pairs[0]], [replace(pairs[0], weight=3.0), *pairs[1:]]):
        fitted.append(table.fit(initial, replace(compared, pairs=chosen)).logps)
    assert np.abs(fitted[0] - initial.logps).max() > 1e-3
    np.testing.assert_allclose(*fitted, atol=1e-5)


def test_classes_share_out_the_responses_and_carry_their_preferences(quick) -> None:
    assert all(sorted(np.bincount(of).tolist()) == [21, 21, 22] for of in quick.classes)
    P = quick.preferences
    assert P.shape == (2, 64, 64)
    assert P[1, 5, 9] == quick.matrices[1, quick.classes[1, 5], quick.classes[1, 9]]
    masses = np.stack([np.bincount(of, p, 3) for of, p in zip(quick.classes, quick.policies[-1])])
    assert quick.gap[-1] == pytest.approx(duality_gap(quick.matrices, masses))


@pytest.mark.parametrize(
    ("name", "objective", "share"),
    [("onpo", Onpo(2.0), 0), ("omd", Omd(2.0), 0), ("inpo", Inpo(0.5, 0.1), 0.2), ("ipo", Ipo(0.5), 1)],
)
def test_the_closed_form_is_the_argmin(name, objective, share) -> None:
    """Weighted least squares over all pairs of a random game, against the formula that papers print."""
    rng = np.random.default_rng(0)
    P = GAMES["random"](6, 1, rng)[0]
    first, updated, drawn = rng.dirichlet(np.ones(6), 3)
    options = {"eta": 2.0, "tau": 0.5} | vars(objective)
    game = closed_form_game(NeuralGame(objective=name, **options), P[None])
    anchor = {0: np.log(updated), 1: np.log(first)}.get(share, game.mixture(np.log(first), np.log(updated)))
    exact = np.exp(game.fit(anchor, Rewards(rewards(P, drawn), np.log(drawn))))
    printed = first**share * updated ** (1 - share) * np.exp(2.0 * rewards(P, drawn))
    assert exact == pytest.approx(printed / printed.sum())
    i, j = np.triu_indices(6, 1)
    target = objective.target(torch.from_numpy(P[i, j])).numpy()
    base = share * np.log(first) + (1 - share) * np.log(updated)
    rows = np.eye(6)[i] - np.eye(6)[j]
    weight = np.sqrt(drawn[i] * drawn[j])
    least = np.linalg.lstsq(rows * weight[:, None], (rows @ base + target) * weight, rcond=None)[0]
    assert exact == pytest.approx(np.exp(least) / np.exp(least).sum())


@pytest.mark.parametrize(("pairing", "tolerance"), [("expected", 0.01), ("all_pairs", 0.02)])
@pytest.mark.parametrize("objective", ["onpo", "omd", "inpo", "ipo"])
def test_fits_land_on_the_closed_form(objective, pairing, tolerance) -> None:
    """Through score, pair, pack and the fused loss: a total variation, from exact expectations and from draws."""
    trace = play(NeuralGame(objective=objective, pairing=pairing, iterations=1, seed=40))
    assert trace.distance.shape == (1, 2)
    assert trace.distance.max() < tolerance
    assert (trace.distance_auxiliary is None) == (objective != "onpo")
    if objective == "onpo":
        assert trace.distance_auxiliary.max() < tolerance
        moved = np.abs(trace.policies[1] - trace.policies[0]).sum(-1) / 2
        assert moved.min() > 2 * trace.distance.max()  # it had somewhere to go


@pytest.mark.parametrize(
    "algorithm",
    [
        "onpo_direct",
        "onpo_from_policy",
        "onpo_direct_from_policy",
        "omd_two_fits",
        "online_ipo",
        "sppo",
        "nash_md",
        "egpo",
    ],
)
def test_every_other_algorithm_lands_on_its_closed_form(algorithm) -> None:
    """As above, in a smaller game; and two iterations end where two exact ones do."""
    options = NeuralGame(objective=algorithm, alphabet=5, contexts=1, width=32, iterations=2, seed=40)
    trace = play(options)
    distances = [trace.distance, trace.distance_auxiliary]
    assert (distances[1] is None) == (trace.logps_auxiliary is None) == (ALGORITHMS[algorithm].fits == 1)
    assert all(distance.max() < 0.01 for distance in distances if distance is not None)
    assert trace.gap[-1] == pytest.approx(trace.ideal_gap[-1], abs=0.02)
    assert np.abs(trace.policies[2] - trace.policies[0]).sum() / 2 > 0.02


@pytest.mark.parametrize("labels", ["soft", "sampled"])
@pytest.mark.parametrize("objective", ["egpo", "sppo"])
def test_drawn_labels_have_the_expected_means(objective, labels) -> None:
    """EGPO's against an opponent's response, whose target is half a difference of rewards; SPPO's are win rates."""
    options = NeuralGame(
        objective=objective, pairing="iid", alphabet=4, length=1, groups=20_000, responses=4, labels=labels, contexts=1
    )
    table = transformer(options)
    policy = table.initial()
    against = replace(policy, logps=np.log([[0.7, 0.1, 0.1, 0.1]])) if objective == "egpo" else None
    compared = table.compare(policy, against)
    reward = table.P[0] @ (policy if against is None else against).probabilities[0]
    sums: dict[tuple[int, int], list[float]] = {}
    for one in compared.pairs:
        assert 0 <= one.preference <= 1
        count, label = sums.setdefault((min(one.winner, one.loser), max(one.winner, one.loser)), [0.0, 0.0])
        oriented = one.preference if one.winner < one.loser else 1 - one.preference
        sums[min(one.winner, one.loser), max(one.winner, one.loser)] = [
            count + one.weight,
            label + one.weight * oriented,
        ]
    for (i, j), (count, label) in sums.items():
        expected = reward[i] if objective == "sppo" else 0.5 + (reward[i] - reward[j]) / 2
        assert label / count == pytest.approx(expected, abs=4.5 * 0.5 / count**0.5)
    assert len(sums) == (4 if objective == "sppo" else 6)


def test_short_names_and_variants_of_the_trainer() -> None:
    """ipo is online_ipo; the second fit of onpo_direct and of onpo_from_policy is another than onpo's."""
    assert np.array_equal(
        play(replace(QUICK, objective="ipo")).logps, play(replace(QUICK, objective="online_ipo")).logps
    )
    onpo, direct, from_policy = (
        play(replace(QUICK, iterations=2, objective=name)) for name in ("onpo", "onpo_direct", "onpo_from_policy")
    )
    assert np.array_equal(direct.logps_auxiliary[1], onpo.logps_auxiliary[1])
    assert not np.array_equal(direct.logps[1], onpo.logps[1])
    assert np.array_equal(from_policy.logps_auxiliary[1], onpo.logps_auxiliary[1])  # π_1 = π′_1
    assert not np.array_equal(from_policy.logps[1], onpo.logps[1])


def test_more_steps_come_nearer() -> None:
    """What is left is neither a tie between responses that the model cannot tell apart, nor a bias of the loss."""
    trace = play(NeuralGame(objective="omd", pairing="expected", iterations=1, fit_steps=300, seed=40))
    assert trace.distance.max() < 0.001


def test_best_and_worst_land_elsewhere() -> None:
    trace = play(NeuralGame(objective="omd", pairing="best_worst", iterations=1, groups=2000, seed=40))
    assert trace.distance.min() > 0.03


def test_onpo_closes_in_where_omd_circles() -> None:
    """The last iterate, fitted, of the same game from the same start."""
    game = NeuralGame(contexts=1, width=32, iterations=14, fit_steps=40, seed=40)
    onpo, omd = (play(replace(game, objective=objective)) for objective in ("onpo", "omd"))
    assert np.array_equal(onpo.logps[0], omd.logps[0])
    assert onpo.gap[-1] < omd.gap[-1] / 5
    assert onpo.gap[-1] < onpo.gap[0] / 3
    for trace in (onpo, omd):
        assert trace.gap[-1] == pytest.approx(trace.ideal_gap[-1], abs=0.05)


def test_every_iteration_draws_anew() -> None:
    table, again = transformer(QUICK), transformer(QUICK)
    policy = table.initial()
    first, second = table.compare(policy).pairs, table.compare(policy).pairs
    assert again.compare(policy).pairs == first
    assert first != second


def test_averages_are_of_all_policies_so_far(quick) -> None:
    assert quick.average_gap[0] == pytest.approx(quick.gap[0])
    assert quick.average_gap[1] == pytest.approx(duality_gap(quick.preferences, quick.policies.mean(0)))


def test_classes_are_dealt_at_random() -> None:
    """In no order of the tokens, and to every context anew."""
    classes = resolve(NeuralGame(), None)[2]
    assert not np.array_equal(classes[0], classes[1])
    assert len({tuple(row) for row in classes[0].reshape(8, 8)}) > 4


def test_a_given_game_is_played_by_responses_or_by_classes(quick) -> None:
    P = GAMES["random"](64, 2, np.random.default_rng(0))
    whole = play(replace(QUICK, objective="omd"), P)
    assert np.array_equal(whole.preferences, P)
    assert (whole.game.game, whole.game.actions) == ("given", 64)
    assert np.array_equal(play(QUICK, three_cycle(1, 1, 1)).logps, quick.logps)


def test_a_trace_is_json(quick) -> None:
    record = json.loads(json.dumps(quick.as_dict(), allow_nan=False))
    assert record["game"]["eta"] == pytest.approx(3**0.5)
    assert record["gap"] == quick.gap.tolist()
    dpo = play(replace(QUICK, objective="dpo")).as_dict()
    assert (dpo["distance"], dpo["ideal_gap"]) == (None, None)


def test_progress_counts_fits() -> None:
    for objective, fits in (("onpo", 4), ("omd", 2), ("egpo", 4)):
        told: list[tuple[int, int]] = []
        play(replace(QUICK, iterations=2, objective=objective), on_progress=lambda *at, told=told: told.append(at))
        assert told == [(i, fits) for i in range(1, fits + 1)]


def test_the_natural_step() -> None:
    assert natural_step(three_cycle(1, 1, 1)) == pytest.approx(3**0.5)
    assert natural_step(GAMES["bradley_terry"](4, 2, np.random.default_rng(0))) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eta": 0.0}, "eta must be a positive"),
        ({"eta": -1.0}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"iterations": 0}, "iterations must be"),
        ({"fit_steps": 0}, "fit_steps must be"),
        ({"game": "chess"}, "game must be one of"),
        ({"objective": "ppo"}, "objective must be one of"),
        ({"pairing": "some"}, "pairing must be one of"),
        ({"labels": "hard"}, "labels"),
        ({"alphabet": 8, "length": 4}, "more than 512 responses"),
        ({"actions": 65}, "65 actions"),
        ({"width": 6}, "width must be"),
        ({"responses": 1}, "responses must be"),
        ({"seed": -1}, "seed must be"),
        ({"logit_std": -1.0}, "logit_std must be"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be"),
        ({"loss_backend": "numpy"}, "loss_backend must be one of"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says) -> None:
    with pytest.raises(ValueError, match=says):
        NeuralGame(**options)


@pytest.mark.parametrize(
    ("options", "preferences", "says"),
    [
        ({}, np.full((3, 65, 65), 0.5), "3 preference matrices for 2 contexts"),
        ({}, np.full((65, 65), 0.5), "65 actions"),
        ({}, np.full((3, 3), 0.4), "must be 1"),
        ({"game": "given"}, None, "needs preferences"),
        ({"actions": 4}, None, "3 actions"),
        ({"objective": "inpo", "eta": 0.1, "tau": 0.2}, None, "tau must be at most eta"),
        ({"objective": "egpo", "eta": 2.0, "tau": 0.6}, None, "eta·tau"),
    ],
)
def test_games_that_do_not_fit_are_refused(options, preferences, says) -> None:
    with pytest.raises(ValueError, match=says):
        play(NeuralGame(**options), preferences)
