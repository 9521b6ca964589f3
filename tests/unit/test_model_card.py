"""Model cards: synthetic run directories in, Markdown with a YAML header out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from test_report import evaluation, metrics, write_lines

from onpo_fast.algorithms import ALGORITHMS
from onpo_fast.config import Config
from onpo_fast.files import checksum
from onpo_fast.journal import Journal
from onpo_fast.reports.model_card import model_card, write_model_cards
from onpo_fast.reports.run_data import RunData

MARKUP = "`x`\n# Heading\n<img src=x onerror=alert(1)> [a](javascript:b) ![c](http://d) | --- \x1b[31m"
DIGEST = "0123456789abcdef" * 4


def make_run(directory: Path, **changes: object) -> Path:
    """A finished run of two iterations with empty policies."""
    directory.mkdir()
    config = Config(**{"model": "org/base", "max_new_tokens": 7, "out": str(directory), "device": "cpu", "seed": 5})
    options = yaml.safe_load(config.to_yaml()) | changes
    (directory / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    write_lines(directory / "metrics.jsonl", metrics())
    versions = {
        "onpo_fast": "0.1.0",
        "torch": "2.9.0",
        "transformers": "5.23.0",
        "commit": "abc123",
        "device": "cpu: x",
    }
    (directory / "environment.json").write_text(json.dumps(versions))
    journal = Journal(directory)
    journal.begin({"model": {"commit": "a" * 40}, "prompts": {"sha256": DIGEST}})
    for t in (1, 2):
        for name in ("auxiliary", "policy"):
            policy = directory / f"iteration_{t:02d}/{name}"
            policy.mkdir(parents=True)
            (policy / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
            journal.record(f"iteration_{t:02d}/{name}")
    (directory / "evaluation.json").write_text(json.dumps(evaluation(0.68, 0.61, 0.75)))
    journal.record("evaluation.json")
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def card(run: Path, folder: str = "iteration_02/policy") -> huggingface_hub.ModelCard:
    """The written card, as the Hub reads it."""
    write_model_cards(run)
    return huggingface_hub.ModelCard.load(run / folder / "README.md")


def test_what_a_card_says(run: Path) -> None:
    said = card(run)
    assert said.data.base_model == "org/base"
    assert said.data.library_name == "transformers"
    assert {"onpo_fast", "onpo"} <= set(said.data.tags)
    assert said.data.license is None
    text = " ".join(said.text.split())
    for expected in (
        "# π_3",
        f"revision `{'a' * 40}`",
        "policy π_3, after 2 iterations",
        "[arXiv 2502.16852](https://arxiv.org/abs/2502.16852)",
        "eta: 20.0",
        "learning_rate: 3e-05",
        "max_new_tokens: 7",
        "those bundled with `onpo_fast`: 1,200 to train on and 80 held out",
        f"`{DIGEST}`",
        "Oracle: `population`",
        "Iterations: 2 of `2`",
        "Sampled responses: 1,200; preference pairs: 600",
        "Optimizer steps: 160 in 4 fits, 0 of them skipped",
        "Seed: `5`",
        "**68.0 %** (95 % interval 61.0 % to 75.0 %, which does not contain 50 %)",
        "80 held-out prompts",
        "onpo_fast `0.1.0`, commit `abc123`",
        "torch `2.9.0`",
        "transformers `5.23.0`",
        "AutoModelForCausalLM.from_pretrained(",
    ):
        assert expected in text
    assert "beta:" not in text  # not a parameter of ONPO
    assert str(run) not in text


def test_earlier_and_auxiliary_policies(run: Path) -> None:
    first = card(run, "iteration_01/policy").text
    assert "**60.0 %** (95 % interval 50.0 % to 70.0 %, which contains 50 %)" in " ".join(first.split())
    assert "Optimizer steps: 80 in 2 fits" in first
    auxiliary = card(run, "iteration_01/auxiliary").text
    assert "# π′_2" in auxiliary
    assert "not evaluated" in auxiliary


def test_a_policy_that_is_not_evaluated(run: Path) -> None:
    Journal(run).forget_records("evaluation.json")  # of an earlier policy in this place
    assert "Not evaluated yet." in card(run).text


def test_the_same_run_gives_the_same_card(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "elsewhere")
    cards = [path.read_bytes() for path in write_model_cards(run)]
    assert len(cards) == 4
    assert [path.read_bytes() for path in write_model_cards(tmp_path / "elsewhere")] == cards


def test_a_card_is_no_part_of_a_policy(run: Path) -> None:
    policy = run / "iteration_02/policy"
    before = checksum(policy)
    write_model_cards(run)
    assert checksum(policy) == before
    (policy / "README.md.partial").write_text("as a kill leaves it")
    assert checksum(policy) == before
    assert Journal(run).note("iteration_02/policy") is not None
    (policy / "folder").mkdir()
    (policy / "folder/README.md").write_text("of something else")
    assert checksum(policy) != before


@pytest.mark.parametrize("name", ["model", "oracle", "objective", "prompts", "pairing", "seed", "judge_model"])
def test_text_of_a_config_is_no_markup(tmp_path: Path, name: str) -> None:
    changes = {name: MARKUP} | ({"oracle": "judge"} if name == "judge_model" else {})
    said = card(make_run(tmp_path / "run", **changes))
    prose = re.sub(r"```.*?```|`[^`]*`", "", said.text, flags=re.DOTALL)
    assert "\x1b" not in said.content
    for markup in ("<img", "javascript", "![", "# Heading"):
        assert markup not in prose
    assert not re.search("^# Heading", said.text, re.MULTILINE)
    assert set(said.data.to_dict()) <= {
        *("base_model", "base_model_relation", "library_name", "license", "pipeline_tag", "tags", "datasets")
    }


def test_text_of_an_environment_is_no_markup(run: Path) -> None:
    (run / "environment.json").write_text(json.dumps({"torch": MARKUP, "commit": [MARKUP], "onpo_fast": 3}))
    assert "<img" not in re.sub(r"`[^`]*`", "", card(run).text)


@pytest.mark.parametrize(
    ("changes", "inside", "outside"),
    [
        ({"prompts": "/home/me/secret/mine.jsonl"}, "`mine.jsonl`", "/home/me"),
        ({"oracle": "0.5*judge+0.5*pair-model=/home/me/judges/tall"}, "pair-model=tall", "/home/me"),
        ({"oracle": "reward-model", "oracle_model": "/home/me/reward"}, "model `reward`", "/home/me"),
        ({"oracle": "judge", "judge_model": "m", "judge_url": "http://10.0.0.1"}, "`judge`, model `m`", "10.0.0.1"),
        ({"prompts": "org/prompts:test"}, "`org/prompts:test`", "/home/me"),
    ],
)
def test_paths_and_servers_stay_private(tmp_path: Path, changes: dict, inside: str, outside: str) -> None:
    said = card(make_run(tmp_path / "run", **changes))
    assert inside in said.text
    assert outside not in said.content
    assert said.data.datasets == (["org/prompts"] if "org/prompts:test" in changes.values() else None)


def test_a_local_base_model(tmp_path: Path) -> None:
    """Its folder's name, and the license that its own card has."""
    base = tmp_path / "folder/base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\ntext")
    run = make_run(tmp_path / "run", model=str(base))
    Journal(run).begin({"model": {"model.safetensors": DIGEST}})
    said = card(run)
    assert said.data.license == "mit"
    assert said.data.base_model is None
    assert "`base`" in said.text
    assert str(tmp_path) not in said.content


def test_the_working_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal says whether org/base was a folder or a model of the Hub."""
    from_hub = make_run(tmp_path / "from_hub", prompts="org/prompts")
    from_folder = make_run(tmp_path / "from_folder")
    Journal(from_folder).begin({"model": {"model.safetensors": DIGEST}})
    before = [card(run).content for run in (from_hub, from_folder)]
    for folder in ("org/base", "org/prompts"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [card(run).content for run in (from_hub, from_folder)] == before
    assert card(from_hub).data.base_model == "org/base"
    assert card(from_folder).data.base_model is None
    assert "org/base" not in card(from_folder).content


def test_bundled_model_and_multimodal_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model="smollm2")
    (run / "iteration_02/policy/config.json").write_text('{"architectures": ["Gemma3ForConditionalGeneration"]}')
    (run / "iteration_02/policy/modeling.py").write_text("")
    said = card(run)
    assert said.data.license == "apache-2.0"
    assert said.data.base_model.endswith("/SmolLM2-135M-Instruct")
    assert said.data.pipeline_tag == "image-text-to-text"
    assert 'AutoModelForImageTextToText.from_pretrained("path/of/this/directory", trust_remote_code=True)' in said.text


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_is_named(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", objective=name)
    text = model_card(RunData.read(run), Journal(run), "iteration_01/policy", "org/name")
    assert f"Algorithm `{name}`: " in text
    assert 'from_pretrained("org/name")' in text


def test_a_run_that_has_only_started(run: Path) -> None:
    for name in ("metrics.jsonl", "environment.json", "evaluation.json"):
        (run / name).unlink()
    assert "Optimizer steps: 0 in 0 fits" in card(run).text
