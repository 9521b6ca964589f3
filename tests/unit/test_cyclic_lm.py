"""The experiment on a language model with an exact gap: its measures, comparisons and page, on made-up results."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.cyclic_lm import columns, comparison, measures, page, recipe, results
from experiments.cyclic_lm.jobs import Job
from onpo_fast.config import Config
from onpo_fast.errors import UserError
from onpo_fast.oracles import cyclic_preference
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


@pytest.mark.parametrize(("arm", "moved", "noise"), [("omd", 0.7, 0.0), ("omd_two_fits", 0.4, 0.3), ("onpo", 0.6, 0.2)])
def test_how_much_of_a_step_class_shares_moved(arm: str, moved: float, noise: float) -> None:
    """Policies that move by a share of the exact step, with noise; in the mean over many runs."""
    rng, eta = np.random.default_rng(0), 1.0
    runs = []
    for seed in range(150):
        logs, rewards = np.log([0.35, 0.4, 0.25]), [np.zeros(3)]
        heldout = []
        for _ in range(6):
            shares = np.exp(logs) / np.exp(logs).sum()
            heldout.append(rng.choice(3, (20, 20), p=shares).tolist())
            rewards.append(P[:3, :3] @ shares)
            step = {"omd": rewards[-1], "omd_two_fits": 2 * rewards[-1], "onpo": 2 * rewards[-1] - rewards[-2]}[arm]
            logs = logs + eta * moved * step + noise * rng.standard_normal(3)
        runs.append(results.Run(result(arm, seed, NEAR, eta=eta) | {"heldout": heldout}))
    found = comparison.movement(runs)
    assert found.iterations > 500
    assert found.share == pytest.approx(moved, abs=0.1)
    fits = {"omd": 1, "omd_two_fits": 2, "onpo": 3}[arm]
    assert found.noise == pytest.approx(noise / fits**0.5, abs=0.04 if noise else 0.1)
    assert comparison.movement([results.Run(result("inpo", 0, NEAR))]) is None


def test_the_share_of_the_margins_that_fits_reached() -> None:
    fits = [{"margin": 0.2, "exact": 0.4}, {"margin": 0.4, "exact": 0.4}]
    assert measures.reached(fits) == pytest.approx(0.75)
    assert measures.reached([{"margin": 0.2, "exact": None}]) is None
    assert measures.reached([{"margin": 0.2, "exact": 0.0}]) is None


@pytest.mark.parametrize("n", range(1, 15))
def test_the_interval_of_a_median_covers(n: int) -> None:
    """Its coverage is what it says, from draws of a skewed distribution; it is the narrowest with 95%."""
    summary = comparison.summarise(list(range(n)))
    k = int(summary.low) + 1
    assert summary.high == n - k
    assert summary.coverage == pytest.approx(max(0, 1 - 2 * stats.binom.cdf(k - 1, n, 0.5)))
    assert summary.coverage >= 0.95 or k == 1
    assert 1 - 2 * stats.binom.cdf(k, n, 0.5) < 0.95
    draws = np.sort(np.random.default_rng(n).exponential(size=(20000, n)), axis=1)
    covered = ((draws[:, k - 1] <= np.log(2)) & (draws[:, n - k] >= np.log(2))).mean()
    assert covered == pytest.approx(summary.coverage, abs=0.015)


def result(arm: str, seed: int, last: list[float], eta: float = recipe.ETA, oracle: str = "openings") -> dict:
    """Raw results of a run that begins at shares (.35, .5, .15) and then stays at ``last``."""
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
        "recipe": {"options": {}},
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
    onpo, two_fits = comparison.table(runs, recipe.ETA)
    versus = onpo.paired
    assert len(versus.difference.values) == 5
    assert versus.wins == 4
    assert versus.p == pytest.approx(stats.binomtest(4, 5).pvalue)
    assert versus.difference.median == pytest.approx(0.06 - 0.3)
    differences = [0.24, -0.24, -0.24, -0.24, -0.24]
    low, high = stats.t.interval(0.95, 4, np.mean(differences), stats.sem(differences))
    assert (versus.low, versus.high) == (pytest.approx(low), pytest.approx(high))
    assert two_fits.paired is None
    assert comparison.table(runs, 1.5)[0].paired is None  # the baseline has no runs with this step


@pytest.mark.parametrize(
    ("onpo", "words"),
    [([NEAR] * 3, "nearer"), ([NEAR, FAR, FARTHER], "cannot be told apart"), ([FARTHER] * 3, "farther")],
)
def test_the_headline_says_what_came_out(tmp_path: Path, onpo: list[list[float]], words: str) -> None:
    runs = write(
        tmp_path,
        *(result("onpo", seed, shares) for seed, shares in enumerate(onpo)),
        *(result("omd_two_fits", seed, shares) for seed, shares in enumerate([FAR, FAR, [0.6, 0.2, 0.2, 0]])),
    )
    assert words in page.headline(comparison.table(runs, recipe.ETA))


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
    assert [(row.arm, row.eta, row.seeds) for row in comparison.table(own, recipe.ETA)] == [
        ("onpo", recipe.ETA, 1),
        ("onpo", best, 1),
        ("omd", recipe.ETA, 1),
    ]
    html = page.write(runs, tmp_path).read_text(encoding="utf-8")
    assert f"chosen: {best:g}" in html
    assert "cpu: &lt;b&gt;" in html


def test_games_are_kept_apart(tmp_path: Path) -> None:
    runs = write(tmp_path, result("onpo", 0, NEAR), result("onpo", 0, FAR, oracle="mine:cycle"))
    assert set(comparison.games(runs)) == {("openings", 6), ("mine:cycle", 6)}


@pytest.mark.parametrize("name", ["recipe", "matrix", "classes"])
def test_runs_of_different_recipes_are_not_compared(tmp_path: Path, name: str) -> None:
    """A result of an earlier recipe, or of an oracle that has changed under the same name."""
    other = {"recipe": {"options": {"learning_rate": 0.1}}, "matrix": P.T.tolist(), "classes": ["a", "b", "c"]}
    with pytest.raises(UserError, match=rf"1\.json and .*0\.json differ in their {name}"):
        write(tmp_path, result("onpo", 0, NEAR), result("onpo", 1, NEAR) | {name: other[name]})


def test_pi_1_is_never_among_the_last_policies(tmp_path: Path) -> None:
    short = result("onpo", 0, NEAR) | {"iterations": 1, "heldout": [responses(FAR), responses(NEAR)]}
    (run,) = write(tmp_path, short)
    assert run.last(run.gap) == pytest.approx(0.06)


def test_a_class_that_pi_1_lacks_is_still_a_best_response(tmp_path: Path) -> None:
    """Exact fits cannot bring it back, and an opponent plays it."""
    start = responses([0.6, 0.4, 0, 0])
    (run,) = write(tmp_path, result("omd", 0, NEAR) | {"heldout": [start] + [responses(NEAR)] * 6})
    assert run.exact_gap[0] == pytest.approx(run.gap[0])
    assert run.exact_gap[-1] > 0.5


def test_exact_fits_are_those_of_the_matrix_game(tmp_path: Path) -> None:
    """π_2 of ONPO and of OMD with two fits: two steps from π_1."""
    onpo, two_fits = write(tmp_path, result("onpo", 0, NEAR), result("omd_two_fits", 0, NEAR))
    start = np.array([0.3, 0.5, 0.2])
    second = start * np.exp(2 * recipe.ETA * P[:3, :3] @ start)
    expected = 2 * (P[:3, :3] @ second / second.sum()).max() - 1
    assert onpo.exact_gap[1] == pytest.approx(expected)
    assert two_fits.exact_gap[1] == pytest.approx(expected)
    assert onpo.exact_gap[0] == pytest.approx(onpo.gap[0])


@pytest.mark.parametrize("text", ["", "[]", '{"arm": "onpo"}', '{"arm": "another"}'])
def test_a_file_that_is_no_result(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        results.read(tmp_path)


def test_a_best_response_belongs_to_its_run(tmp_path: Path) -> None:
    answer = {**result("onpo", 0, NEAR), "kind": "best_response", "win_rate": 0.61, "interval": [0.5, 0.7]}
    runs = write(tmp_path, result("onpo", 0, NEAR), result("onpo", 1, NEAR), answer)
    assert [run.best_response for run in runs] == [0.61, None]
    assert comparison.table(runs, recipe.ETA)[0].best_response == 0.61


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
    games, tuning = comparison.games(runs), page.tuning(runs)
    assert games
    assert tuning
    for game, own in games.items():
        rows = comparison.table(own, comparison.chosen_eta(runs, recipe.BASELINE, game))
        assert columns.markdown(rows) in text, game
    for one in tuning:
        gaps = [f"**{gap:.3f}**" if eta == one["chosen"] else f"{gap:.3f}" for eta, gap in one["gaps"].items()]
        assert f"| {recipe.ARMS[one['arm']].label} | {' | '.join(gaps)} |" in text


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
    config = Config(**Job(arm, 0, 3.0).options())
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
    assert recipe.ordered.names == OPENINGS.names
    assert cyclic_preference(OPENINGS.names, OPENINGS.classify).matrix[2, 0] == pytest.approx(0.8)
    assert recipe.ordered.matrix[0, 1] > 0.5
    assert recipe.ordered.matrix[0, 2] > 0.5
    assert recipe.ordered.matrix[1, 2] > 0.5
