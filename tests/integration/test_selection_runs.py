"""Runs that ask the oracle about some of the pairs alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from support.judging import asked, shorter
from support.servers import serving
from support.small_runs import cut, prepare, small_run

from bench.digest import run_digest
from onpo_fast import oracles
from onpo_fast import train as module
from onpo_fast.config import Config
from onpo_fast.data import read_groups, read_pairs
from onpo_fast.errors import UserError
from onpo_fast.files import read_jsonl
from onpo_fast.reports.exports import export_pairs
from onpo_fast.reports.reading import LineReader, read_training_examples
from onpo_fast.selection import SELECTIONS, candidates

pytestmark = pytest.mark.usefixtures("without_plots")

DRAWS = 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("selection")
    prepare(folder, tiny_model)
    return folder


@pytest.fixture
def selecting(work: Path, tmp_path: Path) -> Config:
    """A run that draws ``DRAWS`` of the nine pairs of an iteration."""
    return replace(small_run(work, "unused"), out=str(tmp_path / "run"), select=DRAWS)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_run_learns_from_the_pairs_that_were_drawn(selecting: Config, selection: str) -> None:
    config = replace(selecting, selection=selection)
    module.train(config)
    for t in (1, 2):
        folder = Path(config.out, f"iteration_{t:02d}")
        groups = read_groups(folder / "responses.jsonl")
        selected = list(read_jsonl(folder / "selected.jsonl"))
        assert sum(one["draws"] for one in selected) == DRAWS
        pairs = read_pairs(folder / "pairs.jsonl", groups)
        places = [(pair.group, *sorted((pair.winner, pair.loser))) for pair in pairs]
        assert places == [tuple(one["pair"]) for one in selected]
        assert set(places) <= set(candidates(groups))
        assert [(pair.weight, pair.importance) for pair in pairs] == [
            (one["draws"], one["importance"]) for one in selected
        ]
        if selection == "uniform":
            assert all(pair.importance == pytest.approx(1) for pair in pairs)
        assert (folder / "features.jsonl").exists() == (selection != "uniform")
    export_pairs(Path(config.out), Path(config.out, "pairs"), [2])
    exported = datasets.load_from_disk(str(Path(config.out, "pairs")))
    weights = [pair.weight * pair.importance for pair in pairs]
    assert list(exported.with_format(None)["weight"] if "weight" in exported.column_names else weights) == weights
    assert "weight" in exported.column_names or selection == "uniform"  # all may count once


def test_the_report_has_no_verdict_on_pairs_that_were_not_asked_about(selecting: Config) -> None:
    module.train(replace(selecting, iterations=1, select=1))
    (one,) = read_jsonl(Path(selecting.out, "iteration_01", "selected.jsonl"))
    _, examples = read_training_examples(Path(selecting.out), LineReader(Path(selecting.out)))
    for index, example in enumerate(examples):
        assert (example["preference"] is not None) == ([index, 0, 1] == one["pair"])


@pytest.mark.parametrize("name", ["features.jsonl", "selected.jsonl"])
def test_a_damaged_file_is_made_again(selecting: Config, name: str) -> None:
    config = replace(selecting, selection="variance")
    module.train(config)
    whole = run_digest(Path(config.out))
    cut(Path(config.out, "iteration_02", name))
    module.train(config, resume=True)
    assert run_digest(Path(config.out)) == whole


def test_the_judge_is_asked_about_the_selected_pairs_alone(selecting: Config) -> None:
    """Both orders of each: counted by the server."""
    probe = set(oracles.PROBE_TEXTS)

    def requests(config: Config) -> int:
        with serving(shorter) as server:
            module.train(replace(config, judge_url=server.url))
            questions = [asked(body) for body in server.bodies]
        records = read_jsonl(Path(config.out, "metrics.jsonl"))
        assert sum(one.get("requests", 0) for one in records if one["stage"] in ("judge", "evaluate")) == len(
            [one for one in questions if set(one) != probe]
        )
        judged = [one for one in read_jsonl(Path(config.out, "metrics.jsonl")) if one["stage"] == "judge"]
        return sum(one["requests"] for one in judged)

    config = replace(selecting, oracle="judge", judge_model="m", selection="variance")
    few = requests(config)
    pairs = [len(list(read_jsonl(Path(config.out, f"iteration_{t:02d}", "selected.jsonl")))) for t in (1, 2)]
    assert few == 2 * sum(pairs)
    every = requests(replace(config, select=None, selection="uniform", out=f"{config.out}-all"))
    groups = [read_groups(Path(f"{config.out}-all", f"iteration_{t:02d}", "responses.jsonl")) for t in (1, 2)]
    assert every <= 2 * sum(len(candidates(one)) for one in groups)
    assert few < every


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"select": 0}, "--select"),
        ({"pairing": "iid"}, "--select draws from all pairs"),
        ({"objective": "sppo"}, "--select draws from all pairs"),
        ({"objective": "egpo"}, "--select draws from all pairs"),
        ({"select": None, "selection": "dopt"}, "--selection dopt is how --select draws"),
        ({"selection": "best"}, "--selection must be one of uniform, variance, dopt"),
        ({"environment": "partner", "turns": 2}, "--select is for one turn"),
    ],
)
def test_options_that_do_not_fit(selecting: Config, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        module.train(replace(selecting, **options))
    assert not Path(selecting.out).exists()
