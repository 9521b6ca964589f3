"""What the pages of docs/ tell people to paste runs as it stands, on the shallow model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from onpo_fast import oracles
from onpo_fast.data import Group, Response

PAGE = (Path(__file__).parents[2] / "docs" / "your-trainer.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)}


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if snippets(text) and title[0] != "#"])
def test_your_trainer(title: str, shallow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if title == "TRL":
        pytest.importorskip("trl", reason="TRL 1.16 wants Python 3.11")
    monkeypatch.chdir(tmp_path)  # where the trainers write
    torch.manual_seed(0)
    (preamble,) = snippets(PAGE.partition("\n## ")[0])
    preamble, replaced = re.subn(r'^MODEL = ".*"$', f"MODEL = {str(shallow_model)!r}", preamble, flags=re.MULTILINE)
    assert replaced == 1
    (snippet,) = snippets(SECTIONS[title])
    names: dict = {"__name__": "__main__"}
    exec(preamble + snippet, names)

    if "trainer" in names:
        losses = [entry["train_loss"] for entry in names["trainer"].state.log_history if "train_loss" in entry]
        labels = [1.0, 1.0] if "preference" not in snippet and "TRL" not in title else [0.9, 0.7]
        assert losses == [pytest.approx(sum(100 * (p - 0.5) ** 2 for p in labels) / 2, rel=1e-3)]
    elif "out" in names:
        assert names["out"].loss < 100 * (0.4**2 + 0.2**2) / 2  # which it starts at
    else:
        assert names["loss"].item() == pytest.approx(25.0)  # η²/4: the policy is its reference
        assert names["model"].lm_head.weight.grad.isfinite().all()


def test_every_section_is_linked_and_run() -> None:
    assert len(snippets(PAGE)) == 1 + 4
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "docs/your-trainer.md" in readme


def test_oracles_of_ones_own() -> None:
    """The two in docs/oracles.md, asked."""
    names: dict = {}
    for snippet in snippets((Path(__file__).parents[2] / "docs" / "oracles.md").read_text(encoding="utf-8")):
        exec(snippet, names)
    group = Group([{"role": "user", "content": "Hi"}], [1], [Response(t, [1], "eos", -1.0) for t in ("a", "bcd", "e")])
    for oracle in (names["prefer"], names["shorter"]):
        (matrix,) = oracles.judge(oracle, [group], "mine")
        assert matrix.tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]


def test_the_games() -> None:
    """docs/games.md: what it shows of the lab, and what it says that comes out."""
    text = (Path(__file__).parents[2] / "docs" / "games.md").read_text(encoding="utf-8")
    names: dict = {}
    matrix, transformer, turns = snippets(text)
    exec(matrix, names)
    assert names["trace"].average_gap.shape == (20, 1000)
    exec(turns, names)
    assert names["trace"].average_gap[:, -1].max() < 0.01
    assert names["biased"].average_gap[:, -1].mean() > 0.1
    exec(transformer.replace("iterations=4", "iterations=1"), names)
    assert names["trace"].distance.max() < 0.05
