"""Algorithm 1 end to end, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.small_runs import prepare, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from onpo_fast import evaluate
from onpo_fast import train as module
from onpo_fast.config import Config
from onpo_fast.errors import UserError
from onpo_fast.journal import Journal
from onpo_fast.models.policy import Policy

pytestmark = pytest.mark.usefixtures("without_plots")

PROMPTS = [
    {"prompt": "Nenne drei Farben."},
    {"prompt": "用一句话介绍北京。"},
    {"prompt": "¿Qué hora es? <script>alert(1)</script>"},
    {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Who are you?"},
        ]
    },
    {"prompt": [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Where is the gold?"}]},
    *({"prompt": f"What is {i} plus {i}?"} for i in range(11)),
]

ORACLE = '''
def shorter(prompt, responses):
    """Shorter wins, the more the surer; nothing of the prompt but its type is used."""
    assert isinstance(prompt, list) and prompt[-1]["role"] == "user"
    return [[1 / (1 + 2 ** ((len(a) - len(b)) / 10)) for b in responses] for a in responses]
'''
TINY = {"prompts_per_iteration": 2, "responses_per_prompt": 2, "max_new_tokens": 6, "eval_samples": 1, "batch_pairs": 2}


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "onpo_fast.train", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory, tiny_model) -> Path:
    """A run of the tiny model on a prompts file with an oracle function, from the command line."""
    cwd = tmp_path_factory.mktemp("run")
    (cwd / "prompts.jsonl").write_text(
        "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in PROMPTS), encoding="utf-8"
    )
    (cwd / "taste.py").write_text(ORACLE)
    done = command(
        "--model",
        tiny_model,
        "--prompts",
        "prompts.jsonl",
        "--oracle",
        "taste:shorter",
        "--out",
        "out",
        "--iterations",
        2,
        "--prompts_per_iteration",
        3,
        "--responses_per_prompt",
        3,
        "--max_new_tokens",
        8,
        "--eval_samples",
        1,
        "--batch_pairs",
        6,
        "--learning_rate",
        1e-3,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    assert "π_3 wins against π_1 in" in done.stdout
    return cwd / "out"


def metrics(directory: Path, stage: str) -> list[dict]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["stage"] == stage]


def test_a_live_anchor(tiny_model, tmp_path) -> None:
    """The whole loop with the anchor in memory: the losses of the loop with cached log-probs."""
    losses = []
    for anchor in ("cached", "live"):
        out = tmp_path / anchor
        module.train(Config(model=str(tiny_model), out=str(out), anchor=anchor, iterations=1, **TINY))
        losses.append([record["loss"] for record in metrics(out, "fit")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    with pytest.raises(UserError, match="--anchor live"):
        Config(objective="inpo", anchor="live")


def test_cudnns_attention_is_off(policy: Policy) -> None:
    """Where it is the default it gives NaN gradients with masks; a CPU can only see that the switch is thrown."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_run_directory(run_directory: Path) -> None:
    config = yaml.safe_load((run_directory / "config.yaml").read_text())
    assert config["oracle"] == "taste:shorter"
    assert config["temperature"] == 1.0
    assert set(config) == set(Config.__dataclass_fields__)
    environment = json.loads((run_directory / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    for t in (1, 2):
        directory = run_directory / f"iteration_{t:02d}"
        groups, preferences = (
            (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            for name in ("responses", "preferences")
        )
        assert len(groups) == len(preferences) == 3
        assert len((directory / "pairs.jsonl").read_text(encoding="utf-8").splitlines()) == 9
        for name in ("auxiliary", "policy"):
            assert (directory / name / "model.safetensors").is_file()
            assert (directory / name / "tokenizer.json").is_file()
            card = (directory / name / "README.md").read_text(encoding="utf-8")
            assert ("Win rate against the start policy" in card) == (name == "policy")
    assert not list(run_directory.rglob("*.partial"))
    assert not [p for p in run_directory.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    assert (run_directory / "report.html").is_file()


def test_prompts_differ_between_iterations_and_from_the_held_out(run_directory: Path) -> None:
    def prompts(path: Path) -> list[str]:
        return [str(json.loads(line)["prompt"]) for line in path.read_text(encoding="utf-8").splitlines()]

    used = prompts(run_directory / "iteration_01/responses.jsonl") + prompts(
        run_directory / "iteration_02/responses.jsonl"
    )
    held_out = prompts(run_directory / "evaluation_responses.jsonl")
    assert len(held_out) == 3  # a fifth of 16
    assert len(set(used + held_out)) == 9


def test_every_fit_starts_from_its_anchor(run_directory: Path) -> None:
    first = [r for r in metrics(run_directory, "fit") if r["step"] == 1]
    assert [(r["iteration"], r["fit"]) for r in first] == [
        (1, "auxiliary"),
        (1, "policy"),
        (2, "auxiliary"),
        (2, "policy"),
    ]
    assert all(abs(r["margin"]) < 1e-3 for r in first)


def test_metrics(run_directory: Path) -> None:
    one, two = metrics(run_directory, "iteration")
    assert abs(one["kl_to_initial"]) < 1e-3
    assert abs(one["kl_to_anchor"]) < 1e-3  # π_1 = π′_1
    assert abs(two["kl_to_initial"]) > 1e-2
    assert abs(two["kl_to_anchor"]) > 1e-2  # π_2 is not π′_2
    assert set(two["stage_seconds"]) == {"sample", "judge", "pair", "score", "fit auxiliary", "fit policy"}
    board = EventAccumulator(str(run_directory / "tensorboard"))
    board.Reload()
    assert len(board.Scalars("fit/policy/loss_normalised")) == len(
        [r for r in metrics(run_directory, "fit") if r["fit"] == "policy"]
    )


def test_evaluation(run_directory: Path, monkeypatch, capsys) -> None:
    before = (run_directory / "evaluation.json").read_bytes()
    monkeypatch.chdir(run_directory.parent)
    evaluate.main(["out", "--oracle", "taste:shorter"])
    assert "π_3 wins against π_1 in" in capsys.readouterr().out
    assert (run_directory / "evaluation.json").read_bytes() == before
    result = json.loads((run_directory / "evaluation.json").read_text(encoding="utf-8"))
    assert result["policies"] == ["π_1", "π_2", "π_3"]
    for i in range(3):
        assert result["win_rate"][i][i] == 0.5
        for j in range(3):
            low, high = result["interval"][i][j]
            assert low <= result["win_rate"][i][j] <= high
            assert result["win_rate"][i][j] + result["win_rate"][j][i] == pytest.approx(1)
    rates = np.array(result["win_rate"])
    assert result["duality_gap"] == pytest.approx([rates[:, t].max() - rates[t].min() for t in range(3)])


def test_a_directory_in_use_is_refused(run_directory: Path, tiny_model) -> None:
    before = sorted(run_directory.rglob("*"))
    done = command("--model", tiny_model, "--out", "out", cwd=run_directory.parent)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert said == "error: --out out is not empty: give a new directory, or --resume to go on with it"
    assert "Traceback" not in done.stderr
    assert sorted(run_directory.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"objective": "onpo_direct"}, ["auxiliary", "policy"]),
        (
            {"objective": "onpo_from_policy", "pairing": "knockout", "labels": "sampled"},
            ["auxiliary", "policy"],
        ),
        ({"objective": "onpo_direct_from_policy"}, ["auxiliary", "policy"]),
        ({"objective": "omd", "pairing": "iid"}, ["policy"]),
        ({"objective": "inpo", "eta": 0.5, "tau": 0.1}, ["policy"]),
        ({"objective": "ipo", "pairing": "best_worst"}, ["policy"]),
        ({"objective": "dpo", "labels": "sampled"}, ["policy"]),
    ],
)
def test_the_same_loop_runs_every_objective(tmp_path, tiny_model, write_lines, options: dict, fits: list[str]) -> None:
    prompts = write_lines("prompts.jsonl", *PROMPTS[:6])
    config = Config(model=str(tiny_model), prompts=str(prompts), out=str(tmp_path / "out"), **{**TINY, **options})
    module.train(config)
    seen = [(r["iteration"], r["fit"]) for r in metrics(tmp_path / "out", "fit")]
    assert sorted(set(seen)) == [(t, name) for t in (1, 2) for name in fits]
    scored = [(r["iteration"], r["model"]) for r in metrics(tmp_path / "out", "score")]
    assert [s for s in scored if s[1] == "initial"] == [(1, "initial"), (2, "initial")]
    if options["objective"].startswith("onpo"):
        chained = "direct" not in options["objective"]
        expected = [(1, "auxiliary")] * chained + [(2, "auxiliary")] * (1 + chained)
    else:
        expected = [] if options["objective"] == "ipo" else [(2, "policy")]
    assert [s for s in scored if s[1] != "initial"] == expected


def test_the_same_seed_ends_with_the_same_bits(tmp_path, tiny_model, write_lines) -> None:
    prompts = write_lines("prompts.jsonl", *PROMPTS[:6])
    weights = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        out = tmp_path / name
        module.train(Config(model=str(tiny_model), prompts=str(prompts), out=str(out), seed=seed, **TINY))
        weights.append(load_file(out / "iteration_02/policy/model.safetensors"))
    a, b, c = weights
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates
# ---------------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n{{ mood }}"
)
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def templated(tmp_path, tiny_model) -> Callable[..., Config]:
    """A small run of a random model with this chat template."""
    prepare(tmp_path, tiny_model)

    def make(template: str, **options) -> Config:
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        return replace(small_run(tmp_path, "run"), **{"iterations": 1, "prompts_per_iteration": 2, **options})

    return make


def test_tools_stay_with_their_prompts(templated, write_lines, tmp_path) -> None:
    """From the file to the tokens, the held-out prompts, the pairs, the evaluation and a run that goes on."""
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    prompts = [
        {
            "prompt": [
                {"role": "user", "content": f"Is it {i} o'clock?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "no"},
            ],
            "tools": [CLOCK],
        }
        for i in range(5)
    ]
    prompts_file = write_lines("with_tools.jsonl", *prompts)
    config = templated(TEMPLATE, prompts=str(prompts_file), chat_template_kwargs={"mood": "calm"})
    module.train(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    run = tmp_path / "run"
    for name in (
        "heldout.jsonl",
        "iteration_01/responses.jsonl",
        "iteration_01/pairs.jsonl",
        "evaluation_responses.jsonl",
    ):
        records = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        assert all(record["tools"] == [CLOCK] for record in records), name
        assert all(record["prompt"][1]["tool_calls"] == [call] for record in records), name
        for record in records if "prompt_tokens" in records[0] else ():
            text = tokenizer.decode(record["prompt_tokens"])
            assert text.startswith('{"type": "function", "function": {"name": "clock"')
            assert '{"name": "clock", "arguments": {}}<|im_end|>\n<|im_start|>tool\nno' in text
            assert text.endswith("<|im_start|>assistant\ncalm")
    before = (run / "evaluation.json").read_bytes()
    assert module.train(config, resume=True) == json.loads(before)
    evaluate.main([str(run)])
    assert (run / "evaluation.json").read_bytes() == before


def test_a_template_that_writes_the_date(templated, monkeypatch, capsys, tmp_path) -> None:
    """A run goes on with the tokens that it began with, whatever the day; one of before that was noted goes on."""

    def on(day: int) -> None:
        clock = type("clock", (datetime,), {"now": classmethod(lambda cls: datetime(2026, 1, day))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)

    dated = TEMPLATE + "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    config = templated(dated)
    on(1)
    module.train(config)
    assert "note: the model's chat template writes today's date" in capsys.readouterr().out
    module.train(config, resume=True)
    on(2)
    refusal = """the chat template renders the prompts differently now .* '{"date_string": .* with --force"""
    with pytest.raises(UserError, match=refusal):
        module.train(config, resume=True)
    journal = Journal(tmp_path / "run")
    journal.forget("rendering")
    module.train(config, resume=True)
    on(3)
    module.train(config, resume=True, force=True)
    capsys.readouterr()
    pinned = replace(config, chat_template_kwargs={"date_string": "03 Jan 2026"})
    on(4)
    module.train(pinned, resume=True)
    assert "today's date" not in capsys.readouterr().out


def test_responses_that_are_all_cut_off(templated, capsys, tmp_path) -> None:
    """One line a run says what may help: more tokens, or the template's end of a turn among what ends responses."""
    config = templated(TEMPLATE)
    module.train(config)
    warning = "warning: every response of iteration 1 was cut off at 6 tokens: "
    said = capsys.readouterr().out
    assert f"{warning}--max_new_tokens 6 may be too small\n" in said
    assert said.count("cut off") == 1
    module.train(replace(config, iterations=2), resume=True, force=True)
    assert "cut off" not in capsys.readouterr().out
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        values = json.loads(path.read_text())
        values |= {"eos_token": "<|endoftext|>"} if name.startswith("tok") else {"eos_token_id": 0}
        path.write_text(json.dumps(values))
    module.train(replace(config, out=str(tmp_path / "other")))
    said = capsys.readouterr().out
    assert f"{warning}the chat template ends a turn of the assistant with the token 2 ('<|im_end|>'), which" in said
    assert "only 0 ('<|endoftext|>') does" in said
    assert "add 2 to eos_token_id in the model's generation_config.json" in said
    assert said.count("cut off") == 1
