"""Models that cannot be had or trained, and fits that diverge: one line, and nothing for --resume to stumble over."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from onpo_fast import train
from onpo_fast.config import Config
from onpo_fast.device import device_of
from onpo_fast.errors import UserError
from onpo_fast.journal import Journal
from onpo_fast.models.loading import load

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """What training says on stderr, after its "error: "."""
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    del stopped
    gc.collect()  # the traceback holds the run, which holds the directory's lock
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said.removeprefix("error: ").strip()


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        (directory / "model.safetensors").unlink()  # a link
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return changed


def text(name: str, content: str) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).write_text(content)

    return changed


def configured(name: str, **values) -> Callable[[Path], None]:
    return lambda directory: text(name, json.dumps({**json.loads((directory / name).read_text()), **values}))(directory)


def shard_missing(directory: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(directory / "model.safetensors"), "gone.safetensors"),
    }
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def nan_in_a_row(tensors: dict) -> None:
    tensors["model.embed_tokens.weight"][-1, 0] = float("nan")  # no probe meets it but as a logit


def huge(tensors: dict) -> None:
    tensors["model.norm.weight"].fill_(1e38)


@pytest.mark.parametrize(
    ("change", "message", "unsaid"),
    [
        (weights(nan_in_a_row), "the weights of broken are not finite (model.embed_tokens.weight)", "shapes"),
        (weights(huge), "the weights of broken are finite, but not its log-probs", ""),
        (
            lambda directory: (directory / "model.safetensors").rename(directory / "other.safetensors"),
            "cannot load the model broken: Error no file named model.safetensors",
            "pickle",
        ),
        (shard_missing, "broken/model.safetensors.index.json lists 'gone.safetensors', which does not exist", "pickle"),
        (
            configured("config.json", model_type="t5"),
            "broken (t5) is an encoder with a decoder: a policy is a causal language model",
            "ApertusConfig",
        ),
        (
            configured("generation_config.json", eos_token_id="x"),
            "the generation_config.json of broken has the eos_token_id 'x', which is not a token",
            "",
        ),
    ],
    ids=["nan", "overflow", "misnamed", "shard", "t5", "eos"],
)
def test_models(here: Path, tiny_model: Path, change: Callable, message: str, unsaid: str) -> None:
    shutil.copytree(tiny_model, "broken", copy_function=lambda source, target: Path(target).symlink_to(source))
    change(here / "broken")
    with pytest.raises(UserError) as error:
        load("broken", Config())
    assert str(error.value).startswith(message)
    assert not unsaid or unsaid not in str(error.value)


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ messages[0].content + 1 }}", "{% for"])
def test_templates(here: Path, tiny_model: Path, template: str, capsys) -> None:
    shutil.copytree(tiny_model, "broken")
    text("chat_template.jinja", template)(here / "broken")
    (here / "p.jsonl").write_text('{"prompt": "x"}\n')
    said = one_line(["--model", "broken", "--prompts", "p.jsonl", "--out", "out"], capsys)
    assert said.startswith("p.jsonl, line 1: the model's chat template refuses the prompt that ends 'x': ")
    assert not (here / "out").exists()


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_devices(name: str) -> None:
    with pytest.raises(UserError, match=rf"^--device {name}: torch cannot compute there \([^.]{{,120}}.*cpu or cuda$"):
        device_of(name)


def test_a_loss_backend_that_cannot_run_is_known_at_the_start(here: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("onpo_fast.loss._has_triton", lambda device: False)
    said = one_line(["--loss_backend", "triton", "--device", "cpu", "--out", "out"], capsys)
    assert said.startswith("--loss_backend triton: backend='triton' needs triton and an NVIDIA GPU")
    assert not (here / "out").exists()


@pytest.mark.parametrize("eta", ["1e-300", "1e300"])
def test_targets_beyond_numbers(here: Path, eta: str, capsys) -> None:
    said = one_line(["--eta", eta, "--out", "out"], capsys)
    assert said.startswith(f"--objective onpo: Onpo(eta={float(eta)}) has a target whose square is ")


# ---------------------------------------------------------------------------------------------------------------------
# Fits that diverge
# ---------------------------------------------------------------------------------------------------------------------


def test_a_diverged_run_can_go_on_slower(here: Path, tiny_model: Path, capsys) -> None:
    """To the bits of a run that had it from the start."""
    options = [
        "--model",
        str(tiny_model),
        "--prompts_per_iteration",
        "2",
        "--iterations",
        "1",
        "--batch_pairs",
        "1",
        "--eval_samples",
        "1",
        "--max_new_tokens",
        "6",
        "--responses_per_prompt",
        "3",
        "--checkpoint_steps",
        "1",
        "--report_to",
        "none",
    ]
    wild = [*options, "--learning_rate", "1e10", "--out", "out"]
    said = one_line(wild, capsys)
    assert said.startswith("iteration 1, fit auxiliary, the fit diverged: the weights of the fitted policy are ")
    assert sorted(path.name for path in (here / "out/iteration_01").iterdir()) == [
        "logps_initial.jsonl",
        "pairs.jsonl",
        "preferences.jsonl",
        "responses.jsonl",
    ]
    assert one_line(["--resume", *wild], capsys) == said
    train.main(["--resume", "--force", "--out", "out", "--learning_rate", "1e-5"])
    train.main([*options, "--learning_rate", "1e-5", "--out", "calm"])
    ours, theirs = Journal(here / "out").entries, Journal(here / "calm").entries
    for name in ("iteration_01/auxiliary", "iteration_01/policy", "evaluation_responses.jsonl"):
        assert ours[name]["checksum"] == theirs[name]["checksum"]
