"""Model families as tiny checkpoints (bench/zoo.py): what a run makes of them is what plain transformers makes of them.

``python -m bench families`` checks all of them. Here: one of every kind, and that the check itself notices mistakes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bench import families
from bench.families import FamilyResult, check, check_all, main
from bench.tiny_checkpoints import Family
from bench.zoo import FAMILIES
from onpo_fast.data import Group
from onpo_fast.errors import UserError
from onpo_fast.models.policy import Policy

# Their sampled and scored log-probs, gradients and saved files are plain transformers'.
EXACT = {
    "llama-tied": "a tied head",
    "gptj": "a head with a bias, and dropout modules",
    "cohere": "a logit scale",
    "gemma2": "softcaps and sliding windows in some layers",
    "mistral": "a sliding window in every layer",
    "starcoder2": "residual and embedding dropout that are no modules",
    "opt": "dropout that is no module, and dropped layers",
    "mixtral": "experts with router jitter",
    "phimoe": "experts with input jitter",
    "qwen3_next": "linear attention and experts",
    "bloom": "ALiBi",
    "falcon-alibi": "ALiBi, made from a padding mask",
    "mamba": "a state space",
    "llama4_text": "a base model that is the model itself",
    "llama-fp8": "weights in float8",
    "gpt_oss-mxfp4": "experts in MXFP4",
    "rwkv": "samples wrong in a batch",
    "recurrent_gemma": "samples wrong in a padded batch",
    "phi3-longrope": "rotates a batch by its longest row",
    "qwen3_5": "a part that sees, outside of transformers' causal class",
    "mistral3": "a part that sees",
}
# Plain transformers has no one log-prob for these.
EXACT_OR_REFUSED = ("nemotron_h", "phi3-longrope-crossed", "deepseek_v32", "bart-decoder")
NOT_CAUSAL = [name for name, family in FAMILIES.items() if not family.causal]


def checked(name: str, tmp_path: Path) -> FamilyResult:
    """The row of a family that this version of transformers has."""
    row = check(name, FAMILIES[name], tmp_path)
    if row.verdict == "absent":
        pytest.skip(f"this transformers has no {name}")
    return row


@pytest.mark.parametrize("name", EXACT, ids=[f"{name}: {kind}" for name, kind in EXACT.items()])
def test_is_exact(name: str, tmp_path: Path) -> None:
    row = checked(name, tmp_path)
    assert row.verdict == "exact"
    assert max(row.logps, row.sampled, row.saved) <= families.MAX_LOGP_ERROR
    assert row.gradient <= families.MAX_GRADIENT_ERROR


@pytest.mark.parametrize("name", EXACT_OR_REFUSED)
def test_is_never_wrong_without_a_message(name: str, tmp_path: Path) -> None:
    verdict = checked(name, tmp_path).verdict
    assert verdict == "exact" or verdict.startswith("refused: ")
    assert "\n" not in verdict


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_is_refused(name: str, tmp_path: Path) -> None:
    """None of these predicts a token from those before it alone."""
    assert checked(name, tmp_path).verdict.startswith("refused: ")


# ---------------------------------------------------------------------------------------------------------------------
# The check notices mistakes
# ---------------------------------------------------------------------------------------------------------------------


def scale_logits(policy: Policy) -> None:
    """By a hundredth."""
    policy.model.config.logit_scale *= 1.01


def leave_dropout_on(policy: Policy) -> None:
    """Wherever there is a gradient: whatever a fit does about dropout, it does not find this."""
    layer = policy.model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.1, torch.is_grad_enabled()))


def scale_gradient(policy: Policy) -> None:
    """Of one small parameter, by a tenth; log-probs stay as they are."""
    policy.model.model.norm.weight.register_hook(lambda gradient: 1.1 * gradient)


def lose_a_tensor(policy: Policy) -> None:
    save = policy.save

    def save_less(directory: Path) -> None:
        save(directory)
        tensors = load_file(directory / "model.safetensors")
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    policy.save = save_less


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (scale_logits, "log-probs are off by "),
        # the fit may notice this one first
        (leave_dropout_on, "two fits from the same weights have different gradients"),
        (scale_gradient, "the gradient of a fit has a relative error of "),
        (lose_a_tensor, " tensors 1 are not saved (as model.layers.1.mlp.down_proj.weight), and 0 are new"),
    ],
)
def test_what_is_wrong_is_seen(
    harm: Callable[[Policy], None], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = families.load

    def load_and_harm(*arguments) -> Policy:
        policy = load(*arguments)
        harm(policy)
        return policy

    monkeypatch.setattr(families, "load", load_and_harm)
    row = check("cohere", FAMILIES["cohere"], tmp_path)
    if harm is scale_logits:  # the sampler's own check refuses it, too
        assert row.logps > 1e-3
    if harm not in (scale_logits, leave_dropout_on) or not row.verdict.startswith("refused: "):
        assert row.verdict.startswith("WRONG: ")
        assert fault in row.verdict


def test_a_sampler_that_disagrees_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a run goes on with such samples; not if it refuses them, or samples in another way."""

    def off(groups: list[Group]) -> list[Group]:
        return [replace(g, responses=[replace(r, logp=r.logp + 0.01) for r in g.responses]) for g in groups]

    make_sampler = families.make_sampler
    monkeypatch.setattr(families, "make_sampler", lambda *made: lambda *asked: off(make_sampler(*made)(*asked)))
    runs = []

    def run(source: Path, work: Path) -> list[Group]:
        runs.append(source)
        if len(runs) == 2:
            raise UserError(f"{source}:\nno")
        policy = families.load(source, families.Config(model=str(source), device="cpu", max_new_tokens=12))
        drawn = make_sampler(policy, families.Config(max_new_tokens=12))(families.CONVERSATIONS, 2, [0], lambda n: None)
        return off(drawn) if len(runs) == 1 else drawn

    monkeypatch.setattr(families, "real_run", run)
    wrong, refused, exact = (check("llama", FAMILIES["llama"], tmp_path / str(i)) for i in range(3))
    assert wrong.verdict == "WRONG: sampled log-probs are off by 0.01 nats, and a run goes on"
    assert refused.verdict == "refused: MODEL: no"
    assert exact.verdict == "exact"
    assert exact.notes == ["batches of prompts would be off by 0.01 nats, so a run samples in another way"]


def test_a_family_that_breaks_is_a_row(tmp_path: Path) -> None:
    """So is one that transformers does not have."""
    broken = check("broken", Family("LlamaConfig", {"hidden_size": "wide"}, "a mistake"), tmp_path)
    assert broken.verdict.startswith("WRONG: traceback ")
    assert check("new", Family("NotYetConfig", {}), tmp_path).verdict == "absent"


def test_a_process_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """So is one that takes too long."""

    def end(name: str, *arguments) -> None:
        os._exit(7) if name == "llama" else os.read(os.pipe()[0], 1)

    monkeypatch.setattr(families, "check", end)
    monkeypatch.setattr(families, "MAX_SECONDS", 0.5)
    died, hung = check_all(["llama", "gpt2"], 2)
    assert died.verdict == "WRONG: its process ended with exit status 7"
    assert hung.verdict == "WRONG: its process ended with more than 0.5 s"


ROWS = {
    "llama": FamilyResult("llama", "", "shared", 1e-6, 2e-6, 3e-6, 0.0, [], "exact", 0.1),
    "rwkv": FamilyResult(
        "rwkv", "recurrent", "separate", 1e-6, 2e-6, 3e-6, 0.0, ["one prompt at a time"], "exact", 0.1
    ),
    "t5": FamilyResult("t5", "encoder and decoder", verdict="refused: why"),
    "gpt2": FamilyResult("gpt2", "", "shared", 1.0, verdict="WRONG: log-probs are off by 1 nats"),
    "xlm": FamilyResult("xlm", "", verdict="absent"),
}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Its status is 1 if a family is wrong; the page has what is known of every other one."""
    monkeypatch.setattr(families, "check", lambda name, *arguments: ROWS[name])
    page, data = tmp_path / "models.md", tmp_path / "rows.json"

    def command(*names: str) -> int:
        return main(argparse.Namespace(only=list(names), json=data, page=page, jobs=2))

    assert command("llama", "rwkv", "t5", "xlm") == 0
    text = page.read_text(encoding="utf-8")
    assert "\n4 families: 2 exact, 1 refused, 1 absent.\n" in text
    assert "\n| llama |  | shared | 1e-06 | 2e-06 | 3e-06 | 0 | exact |\n" in text
    assert "\n| t5 | encoder and decoder |  |  |  |  |  | refused |\n" in text
    assert "\n- **t5**: why\n" in text
    assert "\n- **rwkv**: one prompt at a time\n" in text
    assert text.endswith("\nThis version of transformers does not have: xlm.\n")
    assert command("gpt2", "llama") == 1
    assert [row["verdict"].partition(":")[0] for row in json.loads(data.read_text())] == ["WRONG", "exact"]
    assert "\n- **gpt2**: log-probs are off by 1 nats\n" in page.read_text(encoding="utf-8")
    assert "2 families: 1 exact, 1 WRONG, in " in capsys.readouterr().out


def test_the_page_is_that_of_these_families() -> None:
    """docs/models.md was made for the families that there are, and none of them is wrong."""
    text = families.PAGE.read_text(encoding="utf-8")
    absent = text.partition("\n## Absent\n")[2].replace(".", ",")
    assert [name for name in FAMILIES if f"\n| {name} |" not in text and f" {name}," not in absent] == []
    assert "\n## Wrong\n" not in text
