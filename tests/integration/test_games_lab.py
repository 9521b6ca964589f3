"""The lab's command: what it prints, writes and refuses."""

import json
import re

import numpy as np
import pytest

from onpo_fast.errors import UserError
from onpo_fast.games import __main__ as lab
from onpo_fast.games import multiturn, run
from onpo_fast.games.neural import NeuralGame, play
from onpo_fast.games.preferences import GAMES, cyclic, hard_game, random
from onpo_fast.games.solution import nash

SMALL = {
    "matrix": ["--steps", "300", "--count", "3", "--actions", "4"],
    "neural": ["--seeds", "1", "--iterations", "2", "--fit_steps", "2", "--objectives", "onpo", "dpo"],
    "multiturn": ["--steps", "400", "--count", "2"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("lab")
    for experiment, flags in SMALL.items():
        lab.main([experiment, *flags, "--out", str(out)])
    return out


@pytest.mark.parametrize("experiment", SMALL)
def test_an_experiment_leaves_its_numbers_and_plots(results, experiment):
    numbers = json.loads((results / f"{experiment}.json").read_text())
    assert numbers["command"].startswith(f"python -m onpo_fast.games {experiment}")
    assert numbers["environment"]["numpy"] == np.__version__
    for draw in lab.figures.FIGURES[experiment]:
        svg = (results / f"{experiment}-{draw.__name__}.svg").read_text()
        assert svg.startswith("<svg"), draw
    assert "NaN" not in (results / f"{experiment}.json").read_text()


def test_the_page_shows_all_three_and_stands_alone(results):
    page = (results / "games.html").read_text()
    for section in ("matrix", "neural", "multiturn"):
        assert f'<section id="{section}">' in page
    assert page.count("<svg") == sum(map(len, lab.figures.FIGURES.values()))
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", page)


def test_the_same_options_give_the_same_numbers(results, tmp_path):
    for experiment, flags in SMALL.items():
        lab.main([experiment, *flags, "--out", str(tmp_path)])
        first, second = (json.loads((where / f"{experiment}.json").read_text()) for where in (results, tmp_path))
        for numbers in (first, second):
            for name in ("command", "seconds", "environment", "options"):
                del numbers[name]
            for one in numbers.get("objectives", {}).values():
                del one["seconds"]
        assert first == second


def test_a_page_of_one_experiment_has_no_other(results, tmp_path):
    (tmp_path / "matrix.json").write_bytes((results / "matrix.json").read_bytes())
    page = lab.write_page(tmp_path).read_text()
    assert '<section id="matrix">' in page
    assert '<section id="neural">' not in page


def test_a_game_from_a_file(tmp_path, capsys):
    P = cyclic(3, 2, np.random.default_rng(0))
    name = tmp_path / "<b>game.npy"
    np.save(name, P)
    lab.main(["matrix", "--game", str(name), "--steps", "60", "--algorithms", "onpo", "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "matrix.json").read_text())
    assert (numbers["games"], numbers["actions"]) == (2, 3)
    np.testing.assert_allclose(numbers["simplex"]["nash"], nash(P[0]))
    page = (tmp_path / "games.html").read_text()
    assert "<b>game" not in page
    assert "&lt;b&gt;game" in page


def test_a_method_that_cannot_play_is_named_and_the_others_play(tmp_path):
    lab.main(
        [
            "matrix",
            "--game",
            "one_beats_all",
            "--steps",
            "60",
            "--algorithms",
            "onpo",
            "iterative_dpo",
            "--out",
            str(tmp_path),
        ]
    )
    methods = json.loads((tmp_path / "matrix.json").read_text())["algorithms"]
    assert "no minimum" in methods["iterative_dpo"]["refused"]
    assert methods["onpo"]["average_gap"]["median"][-1] < 0.2
    assert "no minimum" in (tmp_path / "games.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["matrx"], "matrx"),
        (["matrix", "--step", "5"], "no option --step; did you mean --steps"),
        (["matrix", "--game", "chess"], "no game chess.*random"),
        (["matrix", "--game", "none.npy"], "none.npy"),
        (["matrix", "--game", "rock_paper_scissors", "--actions", "5"], "3 actions"),
        (["matrix", "--game", "hard_for_optimism=2"], "delta must be above 0"),
        (["neural", "--game", "hard_for_optimism=2"], "delta must be above 0"),
        (["matrix", "--eta", "0"], "eta"),
        (["matrix", "--eta", "nan"], "eta"),
        (["matrix", "--steps", "0"], "steps"),
        (["matrix", "--count", "0"], "one game"),
        (["matrix", "--seed", "-1"], "seed"),
        (["matrix", "--actions", "1"], "two actions"),
        (["matrix", "--actions", "100000000"], "ask for less"),
        (["multiturn", "--turns", "30"], "ask for less"),
        (["neural", "--contexts", "100"], "contexts must be at most"),
        (["matrix", "--algorithms", "ppo"], "ppo"),
        (["neural", "--objectives", "ppo"], "ppo"),
        (["neural", "--fit_steps", "0"], "fit_steps"),
        (["neural", "--eta", "-1"], "eta"),
        (["neural", "--seeds", "0"], "seeds"),
        (["neural", "--pairing", "best"], "pairing.*best_worst"),
        (["multiturn", "--turns", "0"], "turns"),
        (["multiturn", "--eta", "x"], "eta"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        lab.main([*flags, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_a_game_file_that_is_none_is_named_with_its_worst_entry(tmp_path, capsys):
    P = np.full((3, 3), 0.5)
    P[0, 2] = 0.8
    np.save(tmp_path / "off.npy", P)
    with pytest.raises(SystemExit):
        lab.main(["matrix", "--game", str(tmp_path / "off.npy"), "--out", str(tmp_path / "out")])
    assert re.search(r"off.npy: .*P\[0, 2\] = 0.8", capsys.readouterr().err)


def test_results_that_are_not_the_labs(tmp_path, capsys):
    for content in ("[]", "{}", '{"a": 1}', "{", "null"):
        (tmp_path / "multiturn.json").write_text(content)
        with pytest.raises(UserError, match=r"multiturn\.json is not what multiturn writes"):
            lab.write_page(tmp_path)


def test_where_results_cannot_go(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(SystemExit):
            lab.main(["multiturn", "--steps", "10", "--out", str(out)])
        assert "--out" in capsys.readouterr().err


def test_ties_everywhere_have_no_slope(tmp_path):
    np.save(tmp_path / "ties.npy", np.full((4, 4), 0.5))
    lab.main(
        ["multiturn", "--game", str(tmp_path / "ties.npy"), "--actions", "2", "--steps", "20", "--out", str(tmp_path)]
    )
    assert json.loads((tmp_path / "multiturn.json").read_text())["sampling_slope"] is None
    assert "nan" not in (tmp_path / "games.html").read_text().lower().replace("nand", "")


# --- The numbers are those of the games -------------------------------------------------------------------------------


def test_matrix_says_what_runs_say(results):
    numbers = json.loads((results / "matrix.json").read_text())
    P, T = random(4, 3, np.random.default_rng(0)), np.array(numbers["T"])
    for algorithm in ("onpo", "egpo"):
        trace, said = run(P, algorithm, 0.5, 300), numbers["algorithms"][algorithm]
        for gap in ("average_gap", "last_gap", "last_regularised_gap"):
            np.testing.assert_allclose(said[gap]["median"], np.median(getattr(trace, gap)[:, T - 1], axis=0), rtol=1e-9)
        late = T[T >= 50]
        slope = np.polyfit(np.log(late), np.log(trace.average_gap[:, late - 1]).mean(0), 1)[0]
        assert said["slope"] == pytest.approx(slope)
    tuned = numbers["omd_tuned"]
    for t, gap in zip(tuned["T"], tuned["average"]["median"]):
        exact = run(P, "omd", float(np.sqrt(np.log(4) / t)), t).average_gap[:, -1]
        assert gap == pytest.approx(np.median(exact))
    ends = {(one["algorithm"], one["eta"]): one["at_1000"] for one in numbers["cycling"]}
    assert ends["onpo", 0.125] == pytest.approx(0.319, abs=5e-4)
    assert ends["omd", 0.125] == pytest.approx(0.71, abs=5e-3)
    (hard,) = (game for game in numbers["hard"]["games"] if game["delta"] == 0.03)
    gap = run(hard_game(0.03), "onpo", 1 / 8, 3000).last_gap
    assert (hard["from"], hard["to"]) == (1635, 2958)
    assert gap[1633] < 0.1 < gap[1634]
    assert hard["largest"] == pytest.approx(gap[1634:2958].max())
    assert hard["average_largest"] < hard["theorem_2"] < 0.02 < hard["omd_largest"]
    best_worst = numbers["pairings"]["best_worst"]["step"]
    assert best_worst[0] > 0.06  # the first action is pushed up, the second down
    assert best_worst[1] < -0.05
    assert np.abs(numbers["pairings"]["all_pairs"]["step"]).max() < 0.01
    rows = {row[0]: row[1:] for row in lab.TABLES["matrix"](numbers)[1]}
    onpo = numbers["algorithms"]["onpo"]
    assert rows["ONPO"][:2] == [onpo["average_gap"]["median"][-1], onpo["last_gap"]["median"][-1]]


def test_multiturn_says_what_runs_say(results):
    numbers = json.loads((results / "multiturn.json").read_text())
    P = random(9, 2, np.random.default_rng(0))
    for name, algorithm, target in (
        ("onpo", "onpo", "exact"),
        ("omd", "omd", "exact"),
        ("branches", "onpo", "branches"),
    ):
        trace = multiturn.run(P, 2, algorithm, 0.5, 400, target=target)
        assert numbers["final"][name]["average_gap"] == pytest.approx(trace.average_gap[:, -1].mean())
        assert numbers["final"][name]["last_gap"] == pytest.approx(trace.last_gap[:, -1].mean())
        assert numbers["curves"][name]["last_gap"]["median"][-1] == pytest.approx(np.median(trace.last_gap[:, -1]))
    assert numbers["sampling_slope"] == pytest.approx(-0.5, abs=0.1)


def test_the_transformer_says_what_runs_say(tmp_path):
    flags = [
        "--seeds",
        "1",
        "--seed",
        "3",
        "--iterations",
        "1",
        "--fit_steps",
        "3",
        "--objectives",
        "inpo",
        "--eta",
        "2",
    ]
    lab.main(["neural", *flags, "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "neural.json").read_text())
    trace = play(NeuralGame(objective="inpo", seed=3, iterations=1, fit_steps=3, eta=0.5))
    said = numbers["objectives"]["inpo"]
    assert said["gap"]["median"] == pytest.approx(trace.gap.mean(-1))
    assert said["worst_distance"] == pytest.approx(trace.distance.max())
    assert said["distance"]["median"] == pytest.approx(trace.distance.max(-1))


def test_the_neural_page_names_a_game_from_a_file(tmp_path):
    np.save(tmp_path / "five.npy", random(5, 1, np.random.default_rng(0))[0])
    flags = ["--seeds", "1", "--iterations", "1", "--fit_steps", "1", "--objectives", "omd"]
    lab.main(["neural", "--game", str(tmp_path / "five.npy"), *flags, "--out", str(tmp_path)])
    page = (tmp_path / "games.html").read_text()
    assert "five.npy” of 5 classes" in page
    assert "over 2 contexts" in page


def test_help_names_every_game(capsys):
    with pytest.raises(SystemExit):
        lab.main(["matrix", "--help"])
    said = capsys.readouterr().out
    assert all(game in "".join(said.split()) for game in GAMES)
