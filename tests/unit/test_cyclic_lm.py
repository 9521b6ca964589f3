"""The experiment on a language model with an exact gap: its measures, comparisons and page, on made-up results."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.cyclic_lm import columns, comparison, control, dynamics, figures, measures, page, recipe, results
from experiments.cyclic_lm.jobs import Job, Runner
from onpo_fast.config import Config
from onpo_fast.errors import UserError
from onpo_fast.oracles.classes import OPENINGS

ROOT = Path(__file__).parents[2]
P = OPENINGS.full_matrix  # determiner ≻ function word ≻ content word ≻ determiner, with probability 0.8


def responses(shares: list[float], prompts: int = 8, samples: int = 30) -> measures.Classes:
    """Classes with exactly these shares for every prompt."""
    own = [c for c, share in enumerate(shares) for _ in range(round(share * samples))]
    assert len(own) == samples
    return [np.random.default_rng(prompt).permutation(own).tolist() for prompt in range(prompts)]


@pytest.mark.parametrize(
    ("shares", "gap"),
    [
        ([0.5, 0.3, 0.2, 0], 2 * (0.5 * 0.8 + 0.3 * 0.2 + 0.2 * 0.5) - 1),  # a content word is the best response
        ([1 / 3, 1 / 3, 1 / 3, 0], 0.0),
        ([1, 0, 0, 0], 0.6),
        ([0, 0, 0, 1], 0.6),  # any class beats none of them
    ],
)
def test_the_gap_from_class_shares(shares: list[float], gap: float) -> None:
    assert measures.gaps(P, [responses(shares)])[0] == pytest.approx(gap)


def test_the_average_policy_of_a_cycle_is_nash() -> None:
    cycle = [responses(shares) for shares in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0])]
    assert measures.average_gaps(P, cycle) == pytest.approx([0.6, 0.3, 0])
    assert measures.gaps(P, cycle) == pytest.approx([0.6] * 3)


def test_the_gap_by_prompt_sees_what_pooling_hides() -> None:
    """Each prompt has one class: pooled, policies are Nash; an opponent that sees the prompt gains all there is."""
    policy = [[prompt % 3] * 8 for prompt in range(24)]
    assert measures.gaps_by_prompt(P, [policy])[0] == pytest.approx(0.6)
    assert measures.gaps(P, [policy])[0] == pytest.approx(0)


@pytest.mark.parametrize(("samples", "lowest"), [(8, 0.16), (64, 0.28)])
def test_the_gap_by_prompt_is_a_lower_estimate(samples: int, lowest: float) -> None:
    """In expectation, and closer with more responses; the gap is 0.3."""
    policy = np.random.default_rng(0).choice(4, (4000, samples), p=[0.7, 0.2, 0.1, 0])
    assert lowest < measures.gaps_by_prompt(P, [policy.tolist()])[0] < 0.301


def test_the_noise_floor_is_what_a_nash_policy_is_measured_at(tmp_path: Path) -> None:
    (run,) = write(tmp_path, result("onpo", 0, NEAR))
    draws = np.random.default_rng(1).choice(3, (500, 8 * 30))
    measured = [measures.gaps(P, [[draw.tolist()]])[0] for draw in draws]
    assert comparison.noise_floor(run) == pytest.approx(np.mean(measured), abs=0.003)
    assert 0.02 < comparison.noise_floor(run) < 0.05


def test_the_exact_margin_is_that_of_mirror_descent() -> None:
    """In the mean over draws of prompts with different shares, each prompt has its own step."""
    rng, eta = np.random.default_rng(0), 3.0
    found, expected = [], []
    for shares in ([0.5, 0.3, 0.2, 0], [0.1, 0.8, 0.1, 0]):
        step = eta * (P @ shares)[:3]  # up to the normaliser
        policy = rng.choice(3, (4000, 8), p=shares[:3])
        found.append(measures.exact_margin(P, policy.tolist(), eta))
        expected += [
            (step[i] - step[j]) * np.sign(P[i, j] - 0.5) for one in policy for i, j in combinations(one.tolist(), 2)
        ]
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.01)


def test_responses_may_have_any_character(tmp_path: Path) -> None:
    """Also those at which Python's ``splitlines`` ends a line, as U+2028 and U+0085."""
    policies = ["π_1", "π_2"]
    evaluation = {"policies": policies, "win_rate": [[0.5, 0.4], [0.6, 0.5]], "interval": [[[0, 1]] * 2] * 2}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "responses": {name: ["The\u2028\x85end", "In"] for name in policies},
    }
    (tmp_path / "evaluation_responses.jsonl").write_text(f"{json.dumps(row, ensure_ascii=False)}\n", encoding="utf-8")
    found = measures.measure_best_response(tmp_path, OPENINGS)
    assert found["heldout"] == [[[0, 1]], [[0, 1]]]
    assert found["win_rate"] == 0.6


@pytest.mark.parametrize(
    ("arm", "moved", "noise"), [("omd", 1.0, 0.0), ("omd", 0.7, 0.0), ("omd_two_fits", 0.4, 0.3), ("onpo", 0.6, 0.2)]
)
def test_how_much_of_a_step_class_shares_moved(arm: str, moved: float, noise: float) -> None:
    """Policies that move by a share of the exact step, with noise: sampling errors are in neither estimate."""
    rng, eta = np.random.default_rng(0), 2.0
    runs = []
    for seed in range(200):
        logs, rewards = np.log([0.35, 0.4, 0.25]), [np.zeros(3)]
        heldout = []
        for _ in range(7):
            shares = np.exp(logs) / np.exp(logs).sum()
            heldout.append(rng.choice(3, (20, 20), p=shares).tolist())
            rewards.append(P[:3, :3] @ shares)
            step = {"omd": rewards[-1], "omd_two_fits": 2 * rewards[-1], "onpo": 2 * rewards[-1] - rewards[-2]}[arm]
            logs = logs + eta * moved * step + noise * rng.standard_normal(3)
        runs.append(results.Run(result(arm, seed, NEAR, eta=eta) | {"heldout": heldout}))
    found = dynamics.movement(runs)
    assert found.iterations > 500
    assert found.error < 0.03
    assert found.share == pytest.approx(moved, abs=3 * found.error)
    fits = {"omd": 1, "omd_two_fits": 2, "onpo": 3}[arm]
    assert found.noise == pytest.approx(noise / fits**0.5, abs=0.02 if noise else 0.04)
    assert dynamics.movement([results.Run(result("inpo", 0, NEAR))]) is None


@pytest.mark.parametrize("arm", dynamics.STEPS)
def test_fits_without_noise_are_exact(arm: str) -> None:
    start = np.array([0.4, 0.5, 0.1, 0.0])
    exact = dynamics.exact_gaps(arm, 2.0, P, start, 8)
    assert dynamics.noisy_gaps(arm, 2.0, P, start, 8, share=1.0, noise=0.0) == pytest.approx(exact)
    assert dynamics.noisy_gaps(arm, 4.0, P, start, 8, share=0.5, noise=0.0) == pytest.approx(exact)
    noisy = dynamics.noisy_gaps(arm, 2.0, P, start, 60, share=1.0, noise=0.2)
    assert 0.1 < noisy[-5:].mean() < 0.6  # none comes to rest at a Nash policy


def test_the_share_of_the_margins_that_fits_reached() -> None:
    fits = [{"margin": 0.2, "exact": 0.4}, {"margin": 0.4, "exact": 0.4}]
    assert measures.reached(fits) == pytest.approx(0.75)
    near_nash = [{"margin": 0.2, "exact": 0.4}, {"margin": 0.02, "exact": 0.01}, {"margin": -0.1, "exact": -0.01}]
    assert measures.reached(near_nash) == pytest.approx(0.5, abs=0.01)
    assert measures.reached([{"margin": 0.2, "exact": None}]) is None
    assert measures.reached([{"margin": 0.2, "exact": 0.0}]) is None


@pytest.mark.parametrize("n", range(1, 15))
def test_the_interval_of_a_median_covers(n: int) -> None:
    """Its coverage is what it says, from draws of a skewed distribution; it is the narrowest with 95%."""
    summary = comparison.summarise(list(range(n)))
    k = int(summary.low) + 1
    assert summary.high == n - k
    draws = np.sort(np.random.default_rng(n).exponential(size=(20000, n)), axis=1)
    covered = ((draws[:, k - 1] <= np.log(2)) & (draws[:, n - k] >= np.log(2))).mean()
    assert covered > 0.945 or k == 1
    assert 1 - 2 * stats.binom.cdf(k, n, 0.5) < 0.95


def result(arm: str, seed: int, last: list[float], eta: float = recipe.ETA, oracle: str = "openings") -> dict:
    """Raw results of a run that begins at shares (.3, .5, .2) and then stays at ``last``."""
    first = responses([0.3, 0.5, 0.2, 0])
    return {
        "kind": "train",
        "arm": arm,
        "eta": eta,
        "seed": seed,
        "oracle": oracle,
        "iterations": 6,
        "classes": list(OPENINGS.names),
        "matrix": P.tolist(),
        "heldout": [first] + [responses(last)] * 6,
        "training": [],
        "recipe": {"options": {"learning_rate": 0.0007}, "prompts": {"prompts": "1"}},
        "win_rate": [[0.5] * 7] * 7,
        "kl_to_initial": [0.0] + [0.5] * 6,
        "cyclic_triples": [0.2] * 6,
        "fits": [{"iteration": 1, "fit": "policy", "steps": 24, "margin": 0.3, "exact": 0.4}],
        "seconds": 1.0,
        "environment": {"device": "cpu: <b>", "torch": "2", "transformers": "5", "commit": None},
    }


def write(folder: Path, *raw: dict) -> list[results.Run]:
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(raw):
        (folder / f"{number}.json").write_text(json.dumps(one))
    return results.read(folder)


NEAR, FAR, FARTHER = [0.4, 0.3, 0.3, 0], [0.7, 0.2, 0.1, 0], [0.9, 0.1, 0, 0]  # gaps of 0.06, 0.3 and 0.48


def test_paired_differences_and_the_sign_test(tmp_path: Path) -> None:
    runs = write(
        tmp_path,
        *(result("onpo", seed, NEAR if seed else FAR) for seed in range(6)),
        *(result("omd_two_fits", seed, FAR if seed else NEAR) for seed in range(5)),  # one seed fewer
    )
    onpo, two_fits = comparison.table(runs, runs)
    versus = onpo.versus_control
    assert versus.seeds == 5
    assert versus.below == 4
    assert versus.p == pytest.approx(stats.binomtest(4, 5).pvalue)
    differences = [0.24, -0.24, -0.24, -0.24, -0.24]
    assert versus.mean == pytest.approx(np.mean(differences))
    low, high = stats.t.interval(0.95, 4, np.mean(differences), stats.sem(differences))
    assert (versus.low, versus.high) == (pytest.approx(low), pytest.approx(high))
    assert two_fits.versus_control is None
    assert two_fits.is_control
    start = 2 * (0.5 * 0.8 + 0.2 * 0.2 + 0.3 * 0.5) - 1  # of shares (.3, .5, .2), on every seed
    assert comparison.initial_gap(runs) == pytest.approx(start)
    assert onpo.versus_initial.mean == pytest.approx(np.mean([0.3] + [0.06] * 5) - start)


@pytest.mark.parametrize(
    ("onpo", "words"),
    [
        ([NEAR] * 5, "nearer"),
        ([NEAR, FAR, FARTHER, NEAR, FARTHER], "cannot be told apart"),
        ([FARTHER] * 5, "farther"),
        ([NEAR] * 4, ""),  # too few
    ],
)
def test_the_headline_says_what_came_out(tmp_path: Path, onpo: list[list[float]], words: str) -> None:
    """For the chosen step, whatever else has run."""
    runs = write(
        tmp_path,
        *(result("onpo", seed, shares) for seed, shares in enumerate(onpo)),
        *(result("onpo", seed, FARTHER, eta=0.5) for seed in range(5)),
        *(result("omd_two_fits", seed, shares) for seed, shares in enumerate([FAR, FAR, [0.6, 0.2, 0.2, 0], FAR, FAR])),
    )
    said = page.headline(comparison.table(runs, runs), recipe.ETA)
    assert words in said
    assert bool(words) == bool(said)


def test_the_control_of_a_comparison(tmp_path: Path) -> None:
    """The one with the chosen step; another, if it is the only one."""
    others = [result("omd_two_fits", seed, FAR, eta=2.0) for seed in range(3)]
    runs = write(tmp_path / "one", *(result("onpo", seed, NEAR, eta=2.0) for seed in range(3)), *others)
    onpo, _ = comparison.table(runs, runs)
    assert onpo.versus_control.below == 3
    chosen = recipe.ARMS["omd_two_fits"].eta
    both = [*others, *(result("omd_two_fits", seed, FARTHER, eta=chosen) for seed in range(3))]
    runs = write(tmp_path / "two", result("onpo", 0, NEAR), *both)
    onpo, *controls = comparison.table(runs, runs)
    assert onpo.versus_control.mean == pytest.approx(0.06 - 0.48)
    assert [(row.eta, row.is_control) for row in controls] == [(chosen, True), (2.0, False)]
    assert controls[1].versus_control.mean == pytest.approx(0.3 - 0.48)
    more = [result("omd_two_fits", 0, FAR, eta=eta) for eta in (1.0, 2.0)]
    runs = write(tmp_path / "several", result("onpo", 0, NEAR), *more)
    assert comparison.table(runs, runs)[0].versus_control is None
    half = [result("omd_two_fits", 0, FARTHER, eta=recipe.ARMS["omd_two_fits"].eta), *others]  # one seed of the chosen
    runs = write(tmp_path / "half", *(result("onpo", seed, NEAR) for seed in range(3)), *half)
    assert comparison.table(runs, runs)[0].versus_control.seeds == 3


def test_tuning_goes_on_while_the_best_step_is_an_end(tmp_path: Path) -> None:
    tuning, game = recipe.TUNING_SEEDS[0], ("openings", 6)

    def to_try(name: str, gaps: dict[float, list[float]]) -> tuple[float, ...]:
        runs = write(tmp_path / name, *(result("omd", tuning, shares, eta=eta) for eta, shares in gaps.items()))
        return comparison.etas_to_try(runs, "omd", game)

    low, middle, high = recipe.TUNING_ETAS
    assert to_try("none", {}) == (low, middle, high)
    assert to_try("one", {low: FAR}) == (middle, high)
    assert to_try("middle", {low: FAR, middle: NEAR, high: FAR}) == ()
    assert to_try("low", {low: NEAR, middle: FAR, high: FAR}) == (low / 2,)
    assert to_try("high", {low: FAR, middle: FAR, high: NEAR}) == (high * 2,)
    assert to_try("lower", {low / 2: NEAR, low: FAR, middle: FAR, high: FAR}) == (low / 4,)
    assert to_try("enough", {low / 2: FAR, low: NEAR, middle: FAR, high: FAR}) == ()
    many = {low / 2**i: NEAR if i == 3 else FAR for i in range(4)}
    assert to_try("end", many | {middle: FAR, high: FAR}) == ()


def test_the_step_is_chosen_on_seeds_that_are_not_reported(tmp_path: Path) -> None:
    tuning, game = recipe.TUNING_SEEDS[0], ("openings", 6)
    best = max(recipe.TUNING_ETAS)
    sweep = [result("onpo", tuning, NEAR if eta == best else FAR, eta=eta) for eta in recipe.TUNING_ETAS]
    reported = [result("onpo", 0, NEAR, eta=best), result("onpo", 0, FAR), result("omd", 0, FAR)]
    runs = write(tmp_path, *sweep, *reported)
    assert comparison.chosen_eta(runs, "onpo", game) == best
    assert comparison.chosen_eta(runs, "onpo", ("mine:cycle", 6)) == best  # that of the bundled preference
    assert comparison.chosen_eta(runs, "omd", game) == recipe.ETA
    unfinished = [run for run in runs if (run.seed, run.eta) != (tuning, min(recipe.TUNING_ETAS))]
    assert comparison.chosen_eta(unfinished, "onpo", game) == recipe.ETA
    (own,) = comparison.games(runs).values()
    assert [(row.arm, row.eta, row.seeds) for row in comparison.table(runs, own)] == [
        ("onpo", recipe.ETA, 1),
        ("onpo", best, 1),
        ("omd", recipe.ETA, 1),
    ]
    html = page.write(runs, tmp_path).read_text(encoding="utf-8")
    assert f"openings, 6 iterations: η = {min(recipe.TUNING_ETAS):g}: 0.300" in html
    assert f"chosen: {best:g}" in html
    assert "cpu: &lt;b&gt;" in html


def test_games_are_kept_apart(tmp_path: Path) -> None:
    runs = write(tmp_path, result("onpo", 0, NEAR), result("onpo", 0, FAR, oracle="mine:cycle"))
    assert set(comparison.games(runs)) == {("openings", 6), ("mine:cycle", 6)}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"recipe": {"options": {"learning_rate": 0.1}}}, "learning_rate is 0.1 and 0.0007"),
        ({"recipe": {"options": {}, "prompts": {"prompts": "2"}}}, "the files of prompts"),
        ({"matrix": P.T.tolist()}, "matrix"),
        ({"classes": ["a", "b", "c"]}, "classes"),
        ({"heldout": [[[0, 1]] * 3] * 7}, "the number of held-out responses"),
    ],
)
def test_runs_of_different_recipes_are_not_compared(tmp_path: Path, other: dict, words: str) -> None:
    """A result of an earlier recipe, or of an oracle that has changed under the same name."""
    with pytest.raises(UserError, match=rf"1\.json and .*0\.json are not runs of the same game: {words}"):
        write(tmp_path, result("onpo", 0, NEAR), result("onpo", 1, NEAR) | other)


def test_two_files_of_the_same_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1\.json and .*0\.json are results of the same run"):
        write(tmp_path, result("onpo", 0, NEAR), result("onpo", 0, NEAR))


def test_pi_1_is_never_among_the_last_policies(tmp_path: Path) -> None:
    short = result("onpo", 0, NEAR) | {"iterations": 1, "heldout": [responses(FAR), responses(NEAR)]}
    short |= {"kl_to_initial": [0.0, 0.1], "win_rate": [[0.5] * 2] * 2, "cyclic_triples": [0.2]}
    (run,) = write(tmp_path, short)
    assert run.last(run.gap) == pytest.approx(0.06)


def test_a_class_that_pi_1_lacks_is_still_a_best_response() -> None:
    """Exact fits cannot bring it back, and an opponent plays it."""
    found = dynamics.exact_gaps("omd", recipe.ETA, P, np.array([0.6, 0.4, 0, 0]), 7)
    assert found[0] == pytest.approx(2 * (0.6 * 0.5 + 0.4 * 0.8) - 1)
    assert found[-1] > 0.5


def test_exact_fits_are_those_of_the_matrix_game(tmp_path: Path) -> None:
    """π_2 of ONPO and of OMD with two fits: two steps from π_1, whose shares are the mean of all runs'."""
    start = np.array([0.3, 0.5, 0.2])
    second = start * np.exp(2 * recipe.ETA * P[:3, :3] @ start)
    expected = 2 * (P[:3, :3] @ second / second.sum()).max() - 1
    for arm in ("onpo", "omd_two_fits"):
        assert dynamics.exact_gaps(arm, recipe.ETA, P, np.append(start, 0), 7)[1] == pytest.approx(expected)
    assert dynamics.exact_gaps("onpo_best_worst", recipe.ETA, P, np.append(start, 0), 7) is None
    runs = write(tmp_path, result("onpo", 0, NEAR), result("onpo", 1, NEAR, eta=1.0))
    assert dynamics.initial_shares(runs) == pytest.approx([0.3, 0.5, 0.2, 0])
    other = result("omd", 2, NEAR) | {"heldout": [responses([0.5, 0.5, 0, 0])] + [responses(NEAR)] * 6}
    runs = write(tmp_path / "more", *(result(arm, 1, NEAR) for arm in ("onpo", "omd", "inpo")), other)
    assert dynamics.initial_shares(runs) == pytest.approx([0.4, 0.5, 0.1, 0])  # a seed counts once


@pytest.mark.parametrize("arm", ["inpo", "egpo", "nash_md"])
def test_regularised_arms_have_the_solution_of_their_trainer(arm: str) -> None:
    """Exact fits end at the policy that the options of the arm regularise towards, π ∝ π_1·exp(3η r)."""
    start, eta = np.array([0.3, 0.5, 0.2]), 1.0
    end = dynamics.exact_gaps(arm, eta, P, np.append(start, 0), 400)[-1]
    policy = start.copy()
    for _ in range(20000):  # a damped fixed point
        step = start * np.exp(3 * eta * P[:3, :3] @ policy)
        policy = policy**0.99 * (step / step.sum()) ** 0.01
        policy /= policy.sum()
    assert end == pytest.approx(2 * (P[:3, :3] @ policy).max() - 1, abs=0.01)


@pytest.mark.parametrize("text", ["", "[]", '{"arm": "onpo"}', '{"kind": "another"}', '{"kind": ["train"]}', "\\xff"])
def test_a_file_that_is_no_result(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.json"):
        results.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arm", "sgd"),
        ("eta", "3"),
        ("eta", float("nan")),
        ("seed", "zero"),
        ("seed", None),
        ("iterations", 6.0),
        ("environment", {}),
        ("environment", []),
        ("classes", []),
        ("eta", 1e-320),
        ("matrix", [[0.5]]),
        ("matrix", [[0.9] * 4] * 4),
        ("matrix", [[5.0] * 4] * 4),
        ("classes", "abc"),
        ("classes", ["a", "a", "b"]),
        ("win_rate", [[9.0] * 7] * 7),
        ("kl_to_initial", [0.0]),
        ("kl_to_initial", ["0.1"] * 7),
        ("win_rate", [[0.5]]),
        ("cyclic_triples", []),
        ("cyclic_triples", [None] * 6),
        ("fits", []),
        ("fits", [{"iteration": 1, "steps": 3, "margin": None, "exact": 1.0}]),
        ("heldout", [[[0, 1]]] * 6),
        ("heldout", [[[0, 1]]] * 6 + [[[0, 1], [0, 1]]]),
        ("heldout", [[[0, 4]]] * 7),
        ("heldout", []),
        ("recipe", {}),
    ],
)
def test_a_damaged_field_is_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"0\.json is not a file of results \({field} does not fit\)"):
        write(tmp_path, result("onpo", 0, NEAR) | {field: value})


def test_a_best_response_belongs_to_its_run(tmp_path: Path) -> None:
    answer = {**result("onpo", 0, NEAR), "kind": "best_response", "win_rate": 0.61}
    answer["heldout"] = answer["heldout"][:2]
    runs = write(tmp_path, result("onpo", 0, NEAR), result("onpo", 1, NEAR), answer)
    assert [run.best_response for run in runs] == [0.61, None]
    assert comparison.table(runs, runs)[0].best_response == 0.61


def test_best_of_nash_has_a_gap_of_its_own(tmp_path: Path) -> None:
    """Pooled over two prompts it plays each class as often; against an opponent that sees the prompt it does not."""
    weights = [[0.5, 0.5, 0, 0], [1 / 6, 1 / 6, 2 / 3, 0]]
    chosen = {**result("onpo", 0, NEAR), "kind": "best_of_nash", "samples": 64, "heldout_shares": weights}
    (run,) = write(tmp_path, result("onpo", 0, NEAR), chosen)
    assert run.best_of_nash.gap == pytest.approx(0)
    assert run.best_of_nash.prompt_gap == pytest.approx((0.3 + 0.3) / 2)
    assert "2016 times" in page.write([run], tmp_path).read_text(encoding="utf-8")


def test_the_documentation_has_the_tables_of_the_committed_results() -> None:
    """docs/evidence.md, from experiments/results."""
    runs = results.read(ROOT / "experiments" / "results" / "cyclic_lm")
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    games, tuning = comparison.games(runs), comparison.tuning(runs)
    assert games
    assert tuning
    for game, own in games.items():
        assert columns.markdown(comparison.table(runs, own)) in text, game
    assert columns.tuning_markdown(tuning) in text
    own = games[recipe.ORACLE, recipe.ITERATIONS]
    assert columns.by_length_markdown(comparison.exact_gaps_by_length(own), "exact fits") in text
    assert columns.by_length_markdown(comparison.noisy_gaps_by_length(own), "noisy fits") in text


def test_the_documentation_has_the_table_of_two_turns() -> None:
    """docs/multi-turn.md, from experiments/results: two games."""
    runs = results.read(ROOT / "experiments" / "results" / "two_turns")
    text = (ROOT / "docs" / "multi-turn.md").read_text(encoding="utf-8")
    games = comparison.games(runs)
    assert set(games) == {(recipe.NEXT_PART, recipe.ITERATIONS), (recipe.LAST_TURN, recipe.ITERATIONS)}
    for game, own in games.items():
        assert columns.markdown(comparison.table(runs, own)) in text, game
        assert f"{comparison.initial_gap(own):.2f}" in text, game


def test_every_step_of_an_arm_looks_its_own_way(tmp_path: Path) -> None:
    runs = write(tmp_path, *(result(arm, 0, NEAR, eta=eta) for arm in recipe.ARMS for eta in (1.0, 2.0, 4.0)))
    groups = figures.groups(runs)
    for arm in recipe.ARMS:
        own = [group for group in groups if group.runs[0].arm == arm]
        assert len({group.dash for group in own}) == len({group.mark for group in own}) == 3


def test_topics_are_held_out() -> None:
    training, heldout = (
        [json.loads(line)["prompt"][-1]["content"] for line in Path(file).read_text().splitlines()]
        for file in recipe.PROMPTS.values()
    )
    nouns = [{text.rstrip(".").split()[-1] for text in texts} for texts in (training, heldout)]
    assert not nouns[0] & nouns[1]
    assert len(nouns[1]) == (len(nouns[0]) + len(nouns[1])) / 3
    assert len(set(training)) >= max(100, recipe.OPTIONS["prompts_per_iteration"] * recipe.ITERATIONS)


@pytest.mark.parametrize("arm", recipe.ARMS)
def test_the_options_of_every_arm_are_the_trainers(arm: str) -> None:
    """And the target of a pair with label 0.8 is that of the step η, where the loss is squared."""
    oracle = recipe.LAST_TURN if "multi_turn_target" in recipe.ARMS[arm].options else recipe.ORACLE
    config = Config(**Job(arm, 0, 3.0, oracle).options())
    objective = config.make_objective()
    if recipe.ARMS[arm].objective != "iterative_dpo":
        import torch

        assert objective.target(torch.tensor([0.8])).item() == pytest.approx(3.0 * 0.3)


def test_names_tell_jobs_apart() -> None:
    job = Job("onpo", 0, 3.0)
    others = [
        replace(job, seed=1),
        replace(job, eta=1.5),
        replace(job, oracle="mine:cycle"),
        replace(job, iterations=3),
        replace(job, kind="best_response"),
        replace(job, kind="best_of_nash"),
    ]
    assert len({one.name for one in [job, *others]}) == 7


def test_the_control_has_no_cycle() -> None:
    assert control.ordered.names == OPENINGS.names
    assert (control.ordered.matrix[np.triu_indices(3, 1)] > 0.5).all()
    assert f"{control.__name__}:ordered" == recipe.CONTROL


def test_results_of_the_control_outlive_changes_of_the_page(tmp_path: Path) -> None:
    """The files of the experiment are its oracle's package, and each of them would make another game of it."""
    runner = Runner(tmp_path, tmp_path, control.ordered, 1)
    assert runner._recipe(recipe.CONTROL)["oracle"] == {}
    assert runner._recipe("experiments.cyclic_lm.control:of_mine")["oracle"]
