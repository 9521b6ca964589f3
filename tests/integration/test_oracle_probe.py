"""Oracles are tried before anything is sampled: on a short question for each kind of conversation in the prompts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.model_files import edit_config, edit_template, edit_weights
from support.small_runs import prepare, small_run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from onpo_fast import oracles
from onpo_fast import train as module
from onpo_fast.config import Config
from onpo_fast.conversations import Prompt
from onpo_fast.errors import UserError, one_line
from onpo_fast.models import resident
from onpo_fast.oracles.reward_model import RewardModel

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model in "model", a reward model in "reward", and prompts.jsonl."""
    work = tmp_path_factory.mktemp("tiny")
    prepare(work, tiny_model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(work / "model", num_labels=1, dtype=torch.float32)
    model.save_pretrained(work / "reward")
    AutoTokenizer.from_pretrained(work / "model").save_pretrained(work / "reward")
    return work


def run_config(tiny: Path, out: Path, **options: object) -> Config:
    """A run of a second or two with the files of ``tiny``."""
    return replace(small_run(tiny, "unused"), out=str(out), **options)


def _value_head(weights: dict[str, torch.Tensor]) -> None:
    weights.pop("score.weight", None)
    weights["v_head.summary.weight"] = torch.zeros(1, 32)


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"

UNUSABLE = {
    "encoder": (
        "pair-model",
        "model",
        lambda d: edit_config(d, model_type="deberta-v2"),
        "is not a pair-model: its config.json says deberta-v2, and a pair-model is a causal language model that",
    ),
    "PairRM": (
        "pair-model",
        "model",
        lambda d: (d / "config.json").write_text('{"model_type": "deberta", "r": 1}'),
        "is not a pair-model: its config.json says deberta, and",
    ),
    "classifier": (
        "pair-model",
        "reward",
        lambda d: None,
        "is not a pair-model: its config.json names LlamaForSequenceClassification, ",
    ),
    "language model": (
        "reward-model",
        "model",
        lambda d: None,
        "is not a reward-model: its config.json names LlamaForCausalLM, a language model, and",
    ),
    "value head": (
        "reward-model",
        "reward",
        lambda d: edit_weights(d, _value_head),
        "it has a value head (v_head.summary.weight), not a sequence-classification score. Save it as",
    ),
    "language model with a value head": (
        "reward-model",
        "model",
        lambda d: edit_weights(d, _value_head),
        "it has a value head (v_head.summary.weight), not a",
    ),
    "no score": (
        "reward-model",
        "reward",
        lambda d: edit_weights(d, lambda w: w.update(other=w.pop("score.weight"))),
        "is not a reward-model: it lacks the weights score.weight, and has other; a reward-model is a sequence-",
    ),
    "a layer less": (
        "pair-model",
        "model",
        lambda d: edit_config(d, num_hidden_layers=3),
        "is not a pair-model: it lacks the weights model.layers.2.",
    ),
    "labels": (
        "reward-model",
        "reward",
        lambda d: edit_config(d, id2label={"0": "a", "1": "b", "2": "c"}),
        "is not a reward-model: its config.json has 3 labels, and a reward-model has one",
    ),
    "shapes": (
        "reward-model",
        "reward",
        lambda d: edit_weights(d, lambda w: w.update({"score.weight": torch.ones(2, 32)})),
        "do not fit its config.json: score.weight is (2, 32) where it says (1, 32)",
    ),
    "not a number": (
        "reward-model",
        "reward",
        lambda d: edit_weights(d, lambda w: w["score.weight"].fill_(float("nan"))),
        "answers nan instead of a finite number: its weights are damaged, or the range of --dtype",
    ),
    "not a number, A or B": (
        "pair-model",
        "model",
        lambda d: edit_weights(d, lambda w: w["model.norm.weight"].mul_(1e39)),
        "answers nan instead of a finite number",
    ),
    "adapter": (
        "reward-model",
        "reward",
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "is an adapter: merge it into its model first",
    ),
    "no template": (
        "reward-model",
        "reward",
        lambda d: (d / "chat_template.jinja").unlink(),
        "has no chat template, which a reward-model needs",
    ),
    "an empty template": (
        "reward-model",
        "reward",
        lambda d: edit_template(d, "{# nothing #}"),
        "renders the conversation as an empty text",
    ),
    "an empty template, A or B": (
        "pair-model",
        "model",
        lambda d: edit_template(d, " "),
        "renders the conversation as an empty text",
    ),
    "no response": (
        "reward-model",
        "reward",
        lambda d: edit_template(d, CHATML.replace("m['content']", "'x'")),
        "cannot be a reward-model: its chat template leaves out the assistant's message",
    ),
    "no question": (
        "pair-model",
        "model",
        lambda d: edit_template(
            d,
            CHATML.replace("m['content']", "(m['content'] if m['role'] == 'assistant' else 'x')")
            + "{{ '<|im_start|>assistant\n' }}",
        ),
        "cannot be a pair-model: its chat template leaves out the user's message",
    ),
    "rows": ("reward-model", "reward", lambda d: _narrow(d, 100), "does not fit its model: it produces the token "),
    "another architecture": (
        "pair-model",
        "model",
        lambda d: edit_config(d, model_type="gpt2"),
        "is not a pair-model: it lacks the weights",
    ),
}


def _narrow(directory: Path, rows: int) -> None:
    name = "model.embed_tokens.weight"
    edit_weights(directory, lambda weights: weights.update({name: weights[name][:rows].clone()}))
    edit_config(directory, vocab_size=rows)


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_oracle_of_no_use_is_found_before_the_policy_is_loaded(tiny, tmp_path, monkeypatch, case: str) -> None:
    """One line of bearable length that names the model, and nothing is written."""
    kind, source, harm, message = UNUSABLE[case]
    directory = Path(shutil.copytree(tiny / source, tmp_path / "judging"))
    harm(directory)
    monkeypatch.setattr(resident, "load", lambda *arguments: pytest.fail("the policy was loaded"))
    config = run_config(tiny, tmp_path / "run", oracle=kind, oracle_model=str(directory))
    with pytest.raises(UserError) as error:
        module.train(config)
    said = one_line(str(error.value))
    assert message in said
    assert str(directory) in said
    assert len(said.replace(str(directory), "")) < 450
    assert not (tmp_path / "run").exists()


REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
SYSTEM = [{"role": "system", "content": "Be warm."}, {"role": "user", "content": "Where do you live, and why there?"}]


@pytest.mark.parametrize("where", ["prompts", "eval_prompts"])
@pytest.mark.parametrize("oracle", ["reward-model={}", "population + 2*reward-model={}"])
def test_a_template_that_refuses_some_of_the_prompts(tiny, tmp_path, write_lines, where: str, oracle: str) -> None:
    """One prompt of each kind of conversation is tried, the held-out ones included."""
    directory = Path(shutil.copytree(tiny / "reward", tmp_path / "judging"))
    edit_template(directory, REFUSES_SYSTEM)
    plain = [{"prompt": f"What is {i} plus {i}?"} for i in range(6)]
    files = {
        "prompts": write_lines("plain.jsonl", *plain),
        where: write_lines("mixed.jsonl", *plain[:4], {"prompt": SYSTEM}),
    }
    config = run_config(
        tiny,
        tmp_path / "run",
        oracle=oracle.format(directory),
        **{name: str(file) for name, file in files.items()},
    )
    with pytest.raises(UserError, match=r"tried before .* refuses the conversation: no system; .*system message"):
        module.train(config)
    assert not (tmp_path / "run").exists()


def test_one_prompt_of_each_kind() -> None:
    user, later = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And what is that?"}
    said = {"role": "assistant", "content": "A thing."}
    chosen = oracles.shortest_by_kind([[later], [user], SYSTEM, [user, said, later], [user, said, later, said, later]])
    assert list(chosen.values()) == [[user], SYSTEM, [user, said, later]]
    assert len(oracles.shortest_by_kind([[{"role": str(i), "content": "x"}] for i in range(19)])) == 8


def test_a_kind_is_what_follows_what() -> None:
    """Two turns of the user in a row, a later system message, tools and calls; nothing that another kind has."""
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A thing."}
    system, tool = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "12:00"}
    called = {**said, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    plain = [[user]] * 5
    for other in (
        [user, user],
        [user, system, user],
        [user, called, tool],
        [user, said, tool],
        Prompt([user], tools=[{"name": "clock"}]),
    ):
        assert list(oracles.shortest_by_kind([*plain, other, *plain]).values()) == [[user], other]
        assert list(oracles.shortest_by_kind([other, other]).values()) == [other]
    both = [system, user, said, user]
    chosen = oracles.shortest_by_kind([[user], [system, user], [user, said, user], both])
    assert both not in chosen.values()
    assert len(chosen) == 3


def test_an_oracle_that_wants_turns_to_alternate_is_found_before_sampling(tiny, tmp_path, write_lines) -> None:
    """One prompt among many of single turns, and none of its roles is new."""
    twice = [{"role": "user", "content": "Here is one about the weather."}, {"role": "user", "content": "Is it?"}]
    plain = [{"prompt": f"What is {i} plus {i}?"} for i in range(9)]
    (tmp_path / "alternating.py").write_text(
        "def prefer(prompt, responses):\n"
        "    roles = [message['role'] for message in prompt]\n"
        "    assert all(a != b for a, b in zip(roles, roles[1:])), 'roles must alternate'\n"
        "    return [[0.5] * len(responses)] * len(responses)\n"
    )
    config = run_config(
        tiny,
        tmp_path / "run",
        oracle="alternating:prefer",
        prompts=str(write_lines("p.jsonl", *plain, {"prompt": twice}, *plain)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(UserError, match=r"tried before anything is sampled, prompt . .*: roles must alternate"):
            module.train(config)
    assert not (tmp_path / "run").exists()


def test_an_oracle_is_tried_once_and_let_go(tiny, tmp_path, monkeypatch) -> None:
    """Before the policy is there, on two texts; a run that has nothing left to judge loads no oracle."""
    events: list[str] = []
    many, load = RewardModel.many, resident.load

    def asked(self: RewardModel, groups: list, *rest: object) -> list[np.ndarray]:
        events.append(f"{len(groups)} × {len(groups[0][1])}")
        return many(self, groups, *rest)

    monkeypatch.setattr(RewardModel, "many", asked)
    monkeypatch.setattr(resident, "load", lambda *arguments: (events.append("policy"), load(*arguments))[1])
    config = run_config(tiny, tmp_path / "run", oracle=f"reward-model={tiny / 'reward'}", iterations=1)
    module.train(config)
    assert events[:2] == ["1 × 2", "policy"]
    assert [event for event in events if event != "policy"] == ["1 × 2", "3 × 3", "4 × 2"]  # and the evaluation
    events.clear()
    module.train(config, resume=True)
    assert events == ["policy"]
    (tmp_path / "run" / "evaluation.json").unlink()
    module.train(config, resume=True)
    assert events[1:3] == ["1 × 2", "policy"]
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    (record,) = [record for record in map(json.loads, kept.splitlines()) if record["stage"] == "judge"]
    assert record["comparisons"] == 3 * 3


def test_another_helper_of_a_function_is_another_oracle(tiny, tmp_path, monkeypatch) -> None:
    """Also of one that is imported when the function is called: what has nothing left to judge does not call it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("orc").mkdir()
    Path("orc/__init__.py").write_text(
        "def prefer(prompt, responses):\n    from . import k\n    return [[k.K] * len(responses)] * len(responses)\n"
    )
    Path("orc/k.py").write_text("K = 0.5\n")
    config = run_config(tiny, tmp_path / "run", oracle="orc:prefer", iterations=1)
    module.train(config)
    module.train(config, resume=True)
    Path("run/evaluation.json").unlink()
    Path("orc/k.py").write_text("K = 0.5  # another\n")
    with pytest.raises(UserError, match=r"orc:prefer is not what .* began with: orc/k\.py of orc:prefer changed"):
        module.train(config, resume=True)
