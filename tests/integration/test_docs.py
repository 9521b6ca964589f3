"""Code samples and commands of the documentation: they run as they stand, and name options that exist.

The page on DDP, FSDP2 and LoRA is in ``test_distributed.py``, the README's sample in ``test_project.py``.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from onpo_fast import oracles
from onpo_fast.algorithms import ALGORITHMS, ALIASES
from onpo_fast.config import Config, parse
from onpo_fast.data import Group, Response
from onpo_fast.multi_turn.conversation import Transcript

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-trainer.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)}


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if snippets(text) and title[0] != "#"])
def test_your_trainer(title: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if title == "TRL":
        pytest.importorskip("trl", reason="TRL 1.16 wants Python 3.11")
    monkeypatch.chdir(tmp_path)  # where the trainers write
    torch.manual_seed(0)
    (preamble,) = snippets(PAGE.partition("\n## ")[0])
    preamble, replaced = re.subn(r'^MODEL = ".*"$', f"MODEL = {str(tiny_model)!r}", preamble, flags=re.MULTILINE)
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
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "docs/your-trainer.md" in readme


def _group(*texts: str) -> Group:
    return Group([{"role": "user", "content": "Hi"}], [1], [Response(text, [1], "eos", -1.0) for text in texts])


def test_your_own_oracles() -> None:
    """Those in docs/oracles.md, asked."""
    names: dict = {}
    for snippet in snippets((ROOT / "docs" / "oracles.md").read_text(encoding="utf-8")):
        exec(snippet, names)
    group = _group("a", "bcd", "e")
    for oracle in (names["prefer"], names["shorter"]):
        (matrix,) = oracles.judge(oracle, [group], "mine")
        assert matrix.tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    (cycle,) = oracles.judge(names["preference"], [_group("Why?", "Stop!", "It rains.", " ")], "my_cycle:preference")
    np.testing.assert_allclose(cycle[0], [0.5, 0.8, 0.2, 0.8])
    assert oracles.cyclic_triples([cycle]) == (1, 4)


def test_the_games() -> None:
    """docs/games.md: its samples run, with the results that it states."""
    text = (ROOT / "docs" / "games.md").read_text(encoding="utf-8")
    names: dict = {}
    matrix, slow, transformer, turns = snippets(text)
    exec(matrix, names)
    assert names["trace"].average_gap.shape == (20, 1000)
    exec(slow, names)
    assert names["hard"][[0, 999, 7999]] == pytest.approx([0.25, 0.009, 0.42], abs=5e-3)
    assert names["cycle"][[0, 999, 2999]] == pytest.approx([0.33, 0.013, 0.70], abs=5e-3)
    exec(turns, names)
    assert names["trace"].average_gap[:, -1].max() < 0.01
    assert names["biased"].average_gap[:, -1].mean() > 0.1
    exec(transformer.replace("iterations=4", "iterations=1"), names)
    assert names["trace"].distance.max() < 0.05


def test_a_preference_for_the_experiment() -> None:
    """docs/evidence.md: a cycle of the reader's own."""
    names: dict = {}
    (snippet,) = snippets((ROOT / "docs" / "evidence.md").read_text(encoding="utf-8"))
    exec(snippet, names)
    (cycle,) = oracles.judge(names["preference"], [_group("Well, no", "No.", "It's", "So")], "my_cycle:preference")
    np.testing.assert_allclose(cycle[0], [0.5, 0.8, 0.2, 0.8])


def test_a_word_game() -> None:
    """docs/multi-turn.md: an oracle for the embedded word game."""
    names: dict = {}
    *_, snippet = snippets((ROOT / "docs" / "multi-turn.md").read_text(encoding="utf-8"))
    exec(snippet, names)
    prompt = [{"role": "user", "content": "My word is garden"}]
    said = [["Needle", "engine", "eagle"], ["Nest", "table", "egg"], ["Bread"]]
    roles = ("assistant", "user", "assistant")
    lines = [Transcript([{"role": role, "content": text} for role, text in zip(roles, texts)]) for texts in said]
    assert [names["unbroken"](prompt, line) for line in lines] == [2, 2, 0]
    assert names["longer"](prompt, lines)[0] == [0.5, 0.5, 1.0]


def test_configuration(tmp_path: Path) -> None:
    """docs/configuration.md: a flat file and one by section are the same configuration."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (snippet,) = snippets(text)
    exec(snippet, {})
    flat, by_section = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    parsed = []
    for name, content in (("flat", flat), ("by_section", by_section)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(content)
        parsed.append(parse(["--config", str(path), "--out", "runs/x"]))
    assert parsed[0] == parsed[1]
    assert parsed[0].eta == 20


def test_the_algorithms_are_all_listed() -> None:
    """docs/algorithm.md names every algorithm and every short name."""
    text = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    table = text.partition("## Algorithms of `--objective`")[2]
    for name in (*ALGORITHMS, *ALIASES):
        assert f"`{name}`" in table


SWITCHES = "config resume force trust_run help push_to_hub".split()
EARLIER = "algorithm second_fit fit_start judge_max_nonsense".split()  # hidden aliases
TRL = (
    "model_name_or_path dataset_name output_dir max_completion_length num_generations num_generations_eval "
    "attn_implementation lora_r per_device_train_batch_size"
).split()
OTHER_COMMANDS = {
    "pip and docker": "no-deps no-build-isolation",
    "dashes for underscores": "learning-rate",
    "export, AlpacaEval": "alpaca merge model_outputs",
    "evaluate": "best_of_nash",
    "report": "picture",
    "memory": "gpus memory prompt_tokens",
    "games": "game actions steps algorithms objectives seeds turns fit_steps",
    "experiment": "arms seeds tune minutes page results best_response table",
    "bench": "kills errors only budget benchmark-only samplers tokens timed_steps times trl_batches",
    "gpu-check": "part dry-run",
    "torchrun": "nproc-per-node nnodes rdzv-backend rdzv-id rdzv-endpoint shutdown-timeout",
    "vLLM": "enable-lora host max-lora-rank no-enable-chunked-prefill served-model-name",
    "SGLang": "enable-deterministic-inference",
    "sbatch": "nodes ntasks-per-node gpus-per-node time signal",
}


def test_options_exist() -> None:
    """Every --option that README and docs name is one of a command."""
    known = {field.name for field in fields(Config)} | {*SWITCHES, *EARLIER, *TRL}
    known |= {option for options in OTHER_COMMANDS.values() for option in options.split()}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text(encoding="utf-8")))
        assert named <= known, (page.name, named - known)


def test_commands_exist() -> None:
    commands = "train evaluate report export memory games experiment bench env COMMAND".split()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"onpo-fast (\w+)", page.read_text(encoding="utf-8")))
        assert named <= set(commands), (page.name, named)
