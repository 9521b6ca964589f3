"""The lab's command: what it prints, writes and refuses."""

import json
import re

import numpy as np
import pytest

from onpo_fast.games import __main__ as lab
from onpo_fast.games.preferences import GAMES, cyclic
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
            for run in numbers.get("objectives", {}).values():
                del run["seconds"]
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
    lab.main(["matrix", "--game", "one_beats_all", "--steps", "60", "--algorithms", "onpo", "iterative_dpo",
              "--out", str(tmp_path)])  # fmt: skip
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
        (["matrix", "--eta", "0"], "eta"),
        (["matrix", "--eta", "nan"], "eta"),
        (["matrix", "--steps", "0"], "steps"),
        (["matrix", "--count", "0"], "at least one"),
        (["matrix", "--seed", "-1"], "seed"),
        (["matrix", "--algorithms", "ppo"], "ppo"),
        (["neural", "--objectives", "sppo"], "sppo"),
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


def test_help_names_every_game(capsys):
    with pytest.raises(SystemExit):
        lab.main(["matrix", "--help"])
    said = capsys.readouterr().out
    assert all(game in "".join(said.split()) for game in GAMES)
