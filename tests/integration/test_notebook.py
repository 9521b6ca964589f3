"""examples/demo.ipynb: every code cell runs, one after the other, and the committed file has no outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "demo.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_outputs_are_stripped() -> None:
    assert CODE
    for cell in CODE:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_the_cells_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On the model cut to two layers: the cells are plain Python and need no kernel."""
    monkeypatch.chdir(tmp_path)
    sources = ["".join(cell["source"]) for cell in CODE]
    assert 'MODEL = "smollm2"' in sources[0]
    sources[0] = sources[0].replace('"smollm2"', repr(str(tiny_model)))
    names: dict = {"__name__": "__main__"}
    for source in sources:
        exec(source, names)

    assert (tmp_path / "runs/notebook/report.html").exists()
    assert names["evaluation"]["policies"] == ["π_1", "π_2"]
    assert {row["fit"] for row in names["metrics"] if row["stage"] == "fit"} == {"auxiliary", "policy"}
    assert len(names["plots"]) >= 4
    assert "normalised loss" in capsys.readouterr().out
