"""The experiment on selection: its table, and a step in the neural game."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.selection import command_line, neural
from experiments.selection.results import ALL, Result
from onpo_fast.errors import UserError
from onpo_fast.selection import SELECTIONS

ROOT = Path(__file__).parents[2]


def test_the_table_compares_with_uniform_draws_on_the_same_seeds() -> None:
    results = [Result(seed, "uniform", 100, 90, 0.2 + 0.1 * seed) for seed in range(3)]
    results += [Result(seed, "dopt", 100, 80, 0.15 + 0.1 * seed) for seed in range(3)]
    results += [Result(0, ALL, 0, 896, 0.1)]
    assert command_line.table(results).splitlines()[2:] == [
        "| 100 | `uniform` | 90 | 0.300 ± 0.058 | – |",
        "| 100 | `dopt` | 80 | 0.250 ± 0.058 | -0.050 (-0.050 to -0.050) |",
        "| – | all pairs | 896 | 0.100 | – |",
    ]


@pytest.mark.parametrize("game", command_line.DRAWS)
def test_the_documentation_has_the_table_of_the_committed_results(game: str) -> None:
    """docs/selection.md, from experiments/results."""
    found = command_line.read(ROOT / "experiments" / "results" / "selection" / f"{game}.jsonl")
    assert {one.seed for one in found} == set(command_line.SEEDS[game])
    assert command_line.table(found) in (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")


def test_results_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    played = []

    def play(seed: int, selection: str, draws: int) -> Result:
        played.append((seed, selection, draws))
        return Result(seed, selection, draws, draws, 0.5)

    monkeypatch.setattr(neural, "run", play)
    for seeds in (["0"], ["0", "1"]):
        command_line.run(["neural", "--seeds", *seeds, "--out", str(tmp_path)])
    assert len(played) == len(set(played)) == 2 * (1 + 4 * len(SELECTIONS))
    assert "0.500 ± 0.000" in capsys.readouterr().out
    with open(tmp_path / "neural.jsonl", "a") as file:
        file.write(json.dumps(asdict(Result(0, ALL, 0, 1, 0.1)) | {"more": 1}) + "\n")
    with pytest.raises(UserError, match=r"neural\.jsonl, line 27: it is no result"):
        command_line.run(["neural", "--table", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="no results"):
        command_line.run(["language", "--table", "--out", str(tmp_path)])


def test_a_step_of_the_neural_game(monkeypatch: pytest.MonkeyPatch) -> None:
    """More labels, a smaller error; the same seed, the same bits."""
    monkeypatch.setattr(neural, "ITERATIONS", 2)
    few, every = neural.run(0, "variance", 28), neural.run(0, ALL, 0)
    assert few == neural.run(0, "variance", 28)
    assert few.labels <= 2 * 28 < every.labels <= 2 * 896
    assert 0 < every.error < few.error < 1
