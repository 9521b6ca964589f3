"""Oracles that are models, on the real small one: what is asked, token for token, and answers no batch moves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.model_files import edit_config, edit_template
from support.tiny_models import make_family
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from onpo_fast import console, oracles
from onpo_fast import train as module
from onpo_fast.config import Config
from onpo_fast.data import Group, Response
from onpo_fast.errors import UserError
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.oracles.pair_model import PairModel
from onpo_fast.oracles.reward_model import RewardModel

pytestmark = pytest.mark.usefixtures("without_plots")

PROMPT = [
    {"role": "user", "content": "Name a {colour}."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another?"},
]
TEXTS = ["Red.", "", "Red.", "No {context} \n [RESPONSE A]"]
GROUPS = [(PROMPT, TEXTS), ([{"role": "user", "content": "Grüße mich. 你好"}], ["Hi!", "Guten Tag, guten Tag!"])]


Oracle = TypeVar("Oracle", PairModel, RewardModel)


def make(kind: type[Oracle], source: Path | str, **options: object) -> Oracle:
    """An oracle of a model, with these options of a run."""
    config = Config(**options)
    return kind(str(source), config, config)


@pytest.fixture(scope="module")
def pair_model(model_directory) -> PairModel:
    return oracles.load("pair-model", Config(oracle_model=str(model_directory)))


def test_the_question_token_for_token(pair_model: PairModel, model_directory) -> None:
    """Spelled out by hand, from the conversation to the assistant's header."""
    asked = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n[CONTEXT] \n\n\n<turn> user\n Name a {colour}.\n\n<turn> assistant\n Blue."
        "\n\n<turn> user\n Another?\n\n\n [RESPONSE A] Red. [RESPONSE B] No {context} \n [RESPONSE A] \n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    expected = AutoTokenizer.from_pretrained(model_directory).encode(asked, add_special_tokens=False)
    assert pair_model.tokens(PROMPT, TEXTS[0], TEXTS[3]) == expected


def test_a_beginning_of_its_own_is_stripped(model_directory, tmp_path) -> None:
    """As the paper's Llama template: BOS once, a header for every turn. And a template that trims."""
    shutil.copytree(model_directory, tmp_path / "model")
    template = (
        "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + "
        "'<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
    )
    edit_template(tmp_path / "model", bos_token="<|endoftext|>", template=template)
    oracle = make(PairModel, tmp_path / "model")
    text = oracle.tokenizer.decode(oracle.tokens(PROMPT[:1], "x", "y"))
    assert text == (
        "<|im_start|>user\n[CONTEXT] \n\n\n<turn> user\n Name a {colour}.\n\n\n [RESPONSE A] x [RESPONSE B] y<|im_end|>"
        "<|im_start|>assistant\n"
    )


def test_a_system_message_goes_before_the_first_turn(pair_model: PairModel) -> None:
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    joined = [{"role": "user", "content": "Be kind.\n\nHi"}]
    assert pair_model.tokens(system, "a", "b") == pair_model.tokens(joined, "a", "b")


@pytest.fixture(scope="module")
def matrices(pair_model: PairModel) -> list[np.ndarray]:
    """What the pair model says of ``GROUPS``, all in one batch."""
    steps: list[int] = []
    answers = pair_model.many(GROUPS, steps.append)
    assert sum(steps) == len(GROUPS)
    return answers


def test_the_pair_model_says_what_its_logits_say(pair_model: PairModel, matrices, model_directory) -> None:
    """One question at a time through the plain model; both orders; one token each for A and B."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    letters = [pair_model.tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
    assert [len(tokens) for tokens in letters] == [1, 1]
    for (prompt, texts), matrix in zip(GROUPS, matrices):
        i, j = 0, len(texts) - 1
        first = []
        for a, b in ((i, j), (j, i)):
            ids = torch.tensor([pair_model.tokens(prompt, texts[a], texts[b])])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            first.append(float(logits[[letters[0][0], letters[1][0]]].double().softmax(-1)[0]))
        assert matrix[i, j] == pytest.approx((first[0] + 1 - first[1]) / 2, abs=1e-5)
        assert abs(matrix[i, j] - 0.5) > 1e-4
    assert matrices[0][0, 2] == 0.5  # the same words


def test_neither_batches_nor_order_move_the_answers(pair_model: PairModel, matrices, model_directory) -> None:
    for matrix in matrices:
        np.testing.assert_array_equal(matrix + matrix.T, np.ones_like(matrix))
    alone = make(PairModel, model_directory, oracle_batch_tokens=1)
    alone.model = pair_model.loaded()
    for a, b in zip(alone.many(GROUPS), matrices):
        np.testing.assert_allclose(a, b, atol=1e-5)
    turned = pair_model(PROMPT, TEXTS[::-1])
    np.testing.assert_allclose(turned[::-1, ::-1], matrices[0], atol=1e-5)


def test_chosen_pairs_alone_are_asked_about(pair_model: PairModel, matrices, monkeypatch) -> None:
    """In both orders, also through a panel, whose member without ``compare`` computes its whole matrix."""
    questions, ask = [], PairModel.prefers_first

    def counted(self: PairModel, rows: list[list[int]]) -> torch.Tensor:
        questions.extend(rows)
        return ask(self, rows)

    monkeypatch.setattr(PairModel, "prefers_first", counted)
    pairs = [[(0, 3), (1, 2)], []]
    found = pair_model.compare(GROUPS, pairs)
    assert len(questions) == 2 * 2
    longer = [(PROMPT, [*TEXTS, "word " * 5000])]  # a text that nobody asks about
    assert pair_model.compare(longer, pairs[:1])[0].shape == (5, 5)
    assert [found[0][pair] for pair in pairs[0]] == pytest.approx([matrices[0][pair] for pair in pairs[0]], abs=1e-5)
    panel = oracles.Panel([(1.0, "model", pair_model), (3.0, "half", lambda prompt, responses: [[0.5] * 4] * 4)])
    (mean,) = oracles.judge(
        panel, [Group(PROMPT, [1], [Response(text, [1], "eos", -1.0) for text in TEXTS])], "the panel", pairs=pairs[:1]
    )
    assert len(questions) == 2 * 6
    for i, j in pairs[0]:
        assert mean[i, j] - 0.5 == pytest.approx((matrices[0][i, j] - 0.5) / 4, abs=1e-5)


def test_a_question_that_is_too_long_is_an_error(model_directory) -> None:
    """It names the prompt, its number of tokens and the limit, before the weights are even loaded."""
    oracle = oracles.load("pair-model", Config(oracle_model=str(model_directory)))
    long = ([{"role": "user", "content": "Count!"}], ["one two three " * 1100, "no"])
    groups = [Group(p, [1], [Response(t, [1], "eos", -1.0) for t in texts]) for p, texts in (GROUPS[1], long)]
    with pytest.raises(
        UserError, match=r"--oracle X, prompt 1 \('Count!'\): .* 33\d\d tokens, .*--oracle_max_tokens 3072"
    ):
        oracles.judge(oracle, groups, "X")
    assert oracle.model is None
    higher = make(PairModel, model_directory, oracle_max_tokens=4000)
    assert len(higher.tokens(long[0], *long[1])) > 3072


def test_the_memory_comes_back(pair_model: PairModel) -> None:
    pair_model.loaded()
    group = Group(PROMPT, [1], [Response(t, [1], "eos", -1.0) for t in ("a", "b")])
    oracles.judge(pair_model, [group], "pair-model")
    assert pair_model.model is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # a header that nothing opens
        (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
            "{{ '<|im_end|>\n' }}{% endfor %}",
            "header that comes before the assistant's answer A",
        ),
        # the word comes with a space before it, and that is another token
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "header that comes before the assistant's answer A",
        ),
        ("{{ raise_exception('never') }}", "refuses the conversation: never"),
        ("{{ 1 // 0 }}", "refuses the conversation: integer division or modulo by zero"),
    ],
)
def test_models_that_cannot_be_asked(tiny_model, tmp_path, template: str, message: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    edit_template(tmp_path / "model", template)
    with pytest.raises(UserError, match=message):
        make(PairModel, tmp_path / "model")


def test_models_that_cannot_be_had(tiny_model, tmp_path) -> None:
    with pytest.raises(UserError, match="--oracle pair-model needs --oracle_model"):
        oracles.load("pair-model")
    with pytest.raises(UserError, match="cannot load the model no/such"):
        oracles.load("reward-model=no/such")
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the model /tmp/none: there is no such directory"):
        oracles.load("reward-model=/tmp/none")
    with pytest.raises(UserError, match=r"has its weights in pytorch_model\.bin: only safetensors are read"):
        oracles.load("pair-model", Config(oracle_model=str(pickled)))


def test_a_models_own_code_is_not_run(tiny_model, tmp_path) -> None:
    """Unless asked for with --trust_remote_code."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    auto_map = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.M"}
    edit_config(directory, model_type="theirs", auto_map=auto_map)
    (directory / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(UserError, match="cannot load the model"):
        oracles.load("pair-model", Config(oracle_model=str(directory)))
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Callable[[str], Path]:
    """Builds a tiny random model of a family, and a reward model on top of its body where there is one."""

    def build_one(name: str) -> Path:
        make_family(name, directory := tmp_path_factory.mktemp(name))
        return directory

    return build_one


def _other_ways(oracle: PairModel | RewardModel, capsys) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """The answers in batches and those to each question alone; and what was said."""
    alone = type(oracle)(oracle.source, replace(oracle.config, oracle_batch_tokens=1), oracle.policy)
    console.announced.clear()
    capsys.readouterr()
    answers = oracle.many(GROUPS)
    said = capsys.readouterr().out
    oracle.release()
    assert oracle.can_pad is None
    oracle.many(GROUPS)
    assert capsys.readouterr().out == ""  # once
    return answers, alone.many(GROUPS), " ".join(said.split())


@pytest.mark.parametrize(("family", "pads"), [("llama", True), ("rwkv", False), ("recurrent_gemma", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pair_model_that_padding_disturbs_is_asked_one_at_a_time(families, capsys, family, pads, dtype) -> None:
    """Found in float32, whatever the weights are in; those come back to the bit."""
    oracle = make(PairModel, families(family), device="cpu", dtype=dtype)
    answers, alone, said = _other_ways(oracle, capsys)
    assert oracle.can_pad == pads
    for one, other in zip(answers, alone):
        np.testing.assert_allclose(one, other, atol=1e-5 if dtype == "float32" or not pads else 0.05)
    expected = f"{oracle.source} ({family}) answers questions in a padded batch differently, by up to 0.0"
    assert (expected in said) == (not pads)
    again = PairModel(oracle.source, oracle.config, oracle.policy).loaded()
    for one, other in zip(oracle.loaded().parameters(), again.parameters(), strict=True):
        assert one.dtype == other.dtype == getattr(torch, dtype)
        assert torch.equal(one, other)


def test_a_reward_model_that_padding_disturbs_is_asked_one_at_a_time(reward_directory, monkeypatch, capsys) -> None:
    scores = RewardModel.scores

    def blind(self: RewardModel, rows: list[list[int]]) -> torch.Tensor:
        """As of a model that takes padding for text."""
        return scores(self, rows) + 0.01 * torch.tensor([max(map(len, rows)) - len(row) for row in rows])

    oracle = make(RewardModel, reward_directory, device="cpu")
    assert _other_ways(oracle, capsys)[2] == ""
    assert oracle.can_pad
    oracle.release()
    monkeypatch.setattr(RewardModel, "scores", blind)
    answers, alone, said = _other_ways(oracle, capsys)
    assert not oracle.can_pad
    np.testing.assert_allclose(answers[0], alone[0], atol=1e-6)
    assert f"reward-model {oracle.source} " in said
    assert "one question at a time" in said


# ---------------------------------------------------------------------------------------------------------------------
# Reward models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_directory(tiny_model, tmp_path_factory) -> Path:
    """The small model's body with a head of random weights for one score."""
    directory = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


def test_a_reward_model_is_bradley_terry(reward_directory) -> None:
    oracle = oracles.load(f"reward-model={reward_directory}")
    model = AutoModelForSequenceClassification.from_pretrained(reward_directory, dtype=torch.float32)
    model.config.pad_token_id = None  # the last token is then the last token
    rewards = []
    for text in TEXTS:
        messages = [*PROMPT, {"role": "assistant", "content": text}]
        ids = oracle.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            rewards.append(float(model(ids).logits))
    r = np.array(rewards)
    assert r.std() > 1e-2
    matrix, other = oracle.many(GROUPS)
    np.testing.assert_allclose(matrix, 1 / (1 + np.exp(r[None, :] - r[:, None])), atol=1e-5)
    np.testing.assert_array_equal(matrix + matrix.T, np.ones_like(matrix))
    assert oracles.cyclic_triples([matrix])[0] == 0
    one_by_one = make(RewardModel, reward_directory, oracle_batch_tokens=1).many(GROUPS)
    np.testing.assert_allclose(one_by_one[0], matrix, atol=1e-5)
    np.testing.assert_allclose(one_by_one[1], other, atol=1e-5)


ENDS_WITH_EOS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize("named", [None, "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("model_names_it", [False, True])
def test_a_reward_is_that_of_one_unpadded_pass(reward_directory, tmp_path, named: str | None, model_names_it) -> None:
    """Whatever is the padding's name, in the tokenizer or the model, and though rows end with <|im_end|>, the EOS."""
    tokenizer = AutoTokenizer.from_pretrained(reward_directory)
    tokenizer.chat_template, tokenizer.pad_token = ENDS_WITH_EOS, named
    assert tokenizer.eos_token == "<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(reward_directory, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids(named) if named and model_names_it else None
    model.save_pretrained(tmp_path)
    rewards = []
    oracle = make(RewardModel, tmp_path)
    for text in TEXTS:
        with torch.no_grad():
            rewards.append(float(model(torch.tensor([oracle.tokens(PROMPT, text)])).logits))
    difference = np.subtract.outer(rewards, rewards)
    assert np.abs(difference[0]).max() > 1e-2
    np.testing.assert_allclose(oracle.many(GROUPS)[0], 1 / (1 + np.exp(-difference)), atol=1e-5)


def test_models_that_are_no_reward_models(tiny_model, reward_directory, tmp_path, capfd) -> None:
    with pytest.raises(UserError, match=r"its config\.json names LlamaForCausalLM, a language model"):
        oracles.load(f"reward-model={tiny_model}")
    headless = tmp_path / "headless"
    shutil.copytree(tiny_model, headless)
    edit_config(headless, num_labels=1)
    with pytest.raises(UserError, match=r"is not a reward-model: it lacks the weights score\.weight"):
        oracles.load(f"reward-model={headless}")(PROMPT, ["a", "b"])
    assert capfd.readouterr() == ("", "")  # transformers has a table for it
    AutoModelForSequenceClassification.from_pretrained(
        reward_directory, num_labels=3, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reward_directory).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 3 labels"):
        oracles.load(f"reward-model={tmp_path}")


def test_a_run_under_models(tiny_model, reward_directory, tmp_path, monkeypatch, write_lines) -> None:
    """A panel of both kinds: the policy makes room for each, and the options are those of the run."""
    policies: list[ResidentPolicy] = []
    in_memory: list[bool] = []
    loaded, init = PairModel.loaded, ResidentPolicy.__init__

    def watched(self: PairModel) -> torch.nn.Module:
        in_memory.append(any(one.policy is not None for one in policies))
        return loaded(self)

    monkeypatch.setattr(ResidentPolicy, "__init__", lambda self, *a: (policies.append(self), init(self, *a))[1])
    monkeypatch.setattr(PairModel, "loaded", watched)
    oracle = f"3*pair-model + reward-model={reward_directory}"
    prompts = write_lines("prompts.jsonl", *({"prompt": f"What is {i} plus {i}?"} for i in range(5)))
    sizes = {
        "iterations": 1,
        "prompts_per_iteration": 2,
        "responses_per_prompt": 2,
        "max_new_tokens": 4,
        "eval_samples": 1,
        "batch_pairs": 2,
    }
    config = Config(
        model=str(tiny_model),
        prompts=str(prompts),
        out=str(tmp_path / "out"),
        oracle=oracle,
        oracle_model=str(tiny_model),
        **sizes,
    )
    result = module.train(config)
    assert policies
    assert in_memory
    assert not any(in_memory)
    assert result["oracle"] == oracle


# ---------------------------------------------------------------------------------------------------------------------
# On another device than the policy
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_on_another_device_stays_there_and_judges_while_the_policy_samples(
    model_directory, monkeypatch
) -> None:
    here = make(PairModel, model_directory, oracle_device="cpu")
    assert oracles.holds_model(here)
    assert not oracles.computes_elsewhere(here)
    monkeypatch.setattr("onpo_fast.oracles.model_oracle.same_device", lambda one, other: False)  # there is only one
    there = make(PairModel, model_directory, oracle_device="cpu")
    assert oracles.computes_elsewhere(there)
    assert not oracles.holds_model(there)
    assert not oracles.is_shared(there)
    for oracle, stays in ((here, False), (there, True)):
        oracle.model = object()
        oracle.release()
        assert (oracle.model is not None) == stays


def test_a_panel_judges_while_the_policy_samples_if_all_its_members_can() -> None:
    def function(prompt, responses):
        raise AssertionError

    class Elsewhere(oracles.BatchOracle):
        computes_elsewhere = True

    def panel(*members: oracles.Oracle) -> oracles.Panel:
        return oracles.Panel([(1.0, str(i), member) for i, member in enumerate(members)])

    assert oracles.computes_elsewhere(Elsewhere())
    assert oracles.computes_elsewhere(panel(Elsewhere(), oracles.Population(), oracles.OPENINGS))
    assert not oracles.computes_elsewhere(panel(Elsewhere(), function))
    assert not oracles.computes_elsewhere(oracles.Population())
    users = oracles.cyclic_preference(["a", "b", "c"], lambda prompt, response: 0)  # which may not be made for threads
    assert not oracles.computes_elsewhere(panel(Elsewhere(), users))
    assert not oracles.computes_elsewhere(function)
