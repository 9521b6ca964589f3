"""Every algorithm on a tiny language model: which files it makes, from which labels it learns, and that it resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.small_runs import flip, prepare, small_run

from bench.digest import run_digest
from onpo_fast import train as module
from onpo_fast.algorithms import ALGORITHMS
from onpo_fast.config import Config
from onpo_fast.data import read_groups, read_pairs, read_preferences

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def work(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("algorithms")
    prepare(folder, tiny_model)
    return folder


def a_run(work: Path, name: str, **options) -> Config:
    return replace(small_run(work, name.replace(" ", "_")), report_to="none", objective=name.split()[0], **options)


def files(directory: Path) -> set[str]:
    return {path.name for path in (directory / "iteration_02").iterdir()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_of_every_algorithm_and_again_after_damage(name: str, work: Path) -> None:
    config = a_run(work, name, tau=1.0 if name == "online_ipo" else None, eta=0.5 if name == "inpo" else 1.0)
    module.train(config)
    directory = Path(config.out)
    fitted = files(directory) & {"auxiliary", "policy"}
    assert fitted == ({"auxiliary", "policy"} if ALGORITHMS[name].fits == 2 else {"policy"})
    before = run_digest(directory)
    flip(directory / "iteration_02" / "policy" / "model.safetensors")
    flip(directory / "iteration_01" / "pairs.jsonl")
    module.train(config, resume=True)
    assert run_digest(directory) == before


def test_sppo_learns_each_responses_win_rate(work: Path) -> None:
    config = a_run(work, "sppo win rates", iterations=1)
    module.train(config)
    folder = Path(config.out) / "iteration_01"
    preferences = read_preferences(folder / "preferences.jsonl")
    pairs = read_pairs(folder / "pairs.jsonl")
    assert [pair.loser for pair in pairs] == [None] * sum(map(len, preferences))
    for pair in pairs:
        row = np.delete(preferences[pair.group][pair.winner], pair.winner)
        assert pair.preference == pytest.approx(row.mean())


def test_egpo_compares_with_its_half_step(work: Path) -> None:
    """The second fit's labels are differences of win rates against responses of the policy of the first."""
    config = a_run(work, "egpo labels", iterations=1, batch_pairs=10**6)  # one step a fit
    module.train(config)
    folder = Path(config.out) / "iteration_01"
    opponents = read_groups(folder / "opponents_2.jsonl")
    assert [len(group.responses) for group in opponents] == [1] * len(opponents)
    groups = read_groups(folder / "responses.jsonl")
    matches = iter(read_preferences(folder / "preferences_2.jsonl"))  # one a response, with the opponent's
    against = [[next(matches)[0, 1] for _ in group.responses] for group in groups]
    pairs = read_pairs(folder / "pairs_2.jsonl")
    assert pairs
    for pair in pairs:
        difference = against[pair.group][pair.winner] - against[pair.group][pair.loser]
        assert pair.preference == pytest.approx(0.5 + difference / 2)
    assert not (folder / "responses_2.jsonl").exists()  # the policy's responses are those of the first comparison
    assert not (folder / "logps_initial_2.jsonl").exists()  # nor are they scored again
    (target,) = [
        record["target"]
        for record in map(json.loads, (Path(config.out) / "metrics.jsonl").read_text().splitlines())
        if record["stage"] == "fit" and record["fit"] == "policy"
    ]
    assert target == pytest.approx(2 * config.eta * np.mean([pair.preference - 0.5 for pair in pairs]))
    card = (folder / "policy" / "README.md").read_text()
    responses = sum(len(group.responses) for group in [*groups, *opponents])
    assert f"Sampled responses: {responses}; preference pairs: {2 * len(pairs)}" in card


def test_nash_md_samples_from_the_mixture(work: Path) -> None:
    """In iteration 2 the responses are draws from a mixture of π_1 and π_2: from π_2 alone they would be others."""
    config = a_run(work, "nash_md mixture", learning_rate=0.03)
    module.train(config)
    other = a_run(work, "nash_md alone", learning_rate=0.03, tau=1e-9)
    module.train(other)
    texts = [
        [r.text for group in read_groups(Path(one.out) / "iteration_02" / "responses.jsonl") for r in group.responses]
        for one in (config, other)
    ]
    assert texts[0] != texts[1]


def test_a_refreshed_reference(work: Path) -> None:
    """With --refresh_reference 1 every fit is measured from the policy before it, as if it were π_1."""
    config = a_run(work, "online_ipo refreshed", refresh_reference=1, tau=0.5)
    module.train(config)
    plain = a_run(work, "online_ipo plain", tau=0.5)
    module.train(plain)
    assert run_digest(Path(config.out)) != run_digest(Path(plain.out))
    scored = files(Path(config.out))
    assert "logps_iteration_01_policy.jsonl" in scored
    assert "logps_iteration_01_policy.jsonl" not in files(Path(plain.out))
