"""LoRA: a run whose policies are adapters, what peft and transformers make of them, adapters as --model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.small_runs import SMALL, prepare, small_run
from torch import Tensor

from bench.digest import run_digest
from onpo_fast import evaluate, export, train
from onpo_fast.batches import MicroBatch, plan_steps
from onpo_fast.config import Config, ModelConfig
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.fit import fit
from onpo_fast.kernels import chunked
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, score
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.models.scoring import PairLossOptions
from onpo_fast.objectives import Onpo
from onpo_fast.packing import pack
from onpo_fast.reports.exports import export_merged
from onpo_fast.run.fingerprint import model_fingerprint
from onpo_fast.run.tracking import Tracker

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("without_plots")

PAIRS = [Pair(g, w, lo, p) for g in range(4) for w, lo, p in ((0, 1, 1.0), (2, 0, 0.7), (1, 2, 0.9))]
LORA = {"lora_rank": 4, "learning_rate": 1e-2, "report_to": "none"}


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_model: Path) -> Path:
    """A folder with a model, prompts, and a run of two iterations with LoRA, from the command line."""
    work = tmp_path_factory.mktemp("lora")
    prepare(work, tiny_model)
    options = {**SMALL, **LORA, "model": work / "model", "prompts": work / "prompts.jsonl", "out": work / "run"}
    train.main([f"--{name}={value}" for name, value in options.items()])
    return work


def resident(model: Path, **options: object) -> tuple[ResidentPolicy, Policy]:
    """The model with fresh adapters, whose B is not 0, to be trained."""
    policies = ResidentPolicy(ModelConfig(model=str(model), **{"lora_rank": 4, **options}))
    policy = policies.take(str(model), "a seed")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return policies, policy


def make_groups(policy: Policy) -> list[Group]:
    """Four prompts with three responses each."""
    texts = ["Yes.", "No, thank you very much!", "Perhaps it will rain.", "It is late."]
    groups = []
    for i, question in enumerate(("Tea?", "Will it rain tomorrow?", "Do fish sleep?", "Why?")):
        prompt = [{"role": "user", "content": question}]
        responses = [Response(t, policy.tokenizer(t)["input_ids"], "eos", 0.0) for t in (texts[i:] + texts[:i])[:3]]
        groups.append(Group(prompt, policy.renderer.render(prompt), responses))
    return groups


@torch.no_grad()
def log_probs(model, policy: Policy) -> Tensor:
    """Log-probs of the response tokens of a few groups under any causal language model of transformers or peft."""
    packed = pack([(g.prompt_tokens, [r.tokens for r in g.responses]) for g in make_groups(policy)], "separate")
    logits = model.eval()(input_ids=packed.input_ids, attention_mask=packed.padding_mask).logits
    chosen = logits.flatten(0, 1)[packed.rows].log_softmax(-1)
    return chosen.gather(1, packed.targets[:, None])[:, 0]


# --- A fit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora_targets": "q_proj,down_proj"}])
def test_gradients_are_those_of_pefts_own_forward(tiny_model: Path, options: dict) -> None:
    """Against materialised logits; the frozen head and base have none."""
    _, policy = resident(tiny_model, **options)
    groups = make_groups(policy)
    batch = plan_steps(PAIRS, 1, 12, [0])[0]
    anchor = [torch.zeros(3, dtype=torch.float64)] * 4
    microbatch = MicroBatch.prepare(groups, batch, anchor, "separate")
    policy.begin_fit()
    out = policy.scoring(microbatch.packed, microbatch.labelled, PairLossOptions(Onpo(eta=2.0)))
    out.loss.backward()
    ours = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert set(ours) == {name for name, p in policy.model.named_parameters() if "lora_" in name}
    assert len(ours) == (8 if "lora_targets" in options else 28)
    policy.model.zero_grad()

    packed, labelled = microbatch.packed, microbatch.labelled
    logits = policy.adapter.peft_model(input_ids=packed.input_ids, attention_mask=packed.padding_mask).logits
    logps = logits.flatten(0, 1)[packed.rows].log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    sums = torch.stack([part.sum() for part in logps.split(packed.cu_seqlens.diff().tolist())])
    margins = sums[labelled.winner] - sums[labelled.loser]
    loss = (margins - 2.0 * (labelled.preference - 0.5)).square().mean()
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in policy.model.named_parameters():
        if name in ours:
            scale = parameter.grad.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-5 * scale)


def test_the_frozen_head_costs_no_gradient(tiny_model: Path, monkeypatch) -> None:
    """No gradient of the shape of the head is summed, whether it is tied to the embedding or not."""
    asked: list[tuple] = []
    sums = chunked._GradientSums.__init__

    def counted(self, hidden, head, needs_gradient) -> None:
        asked.append(needs_gradient)
        sums(self, hidden, head, needs_gradient)

    monkeypatch.setattr(chunked._GradientSums, "__init__", counted)
    _, policy = resident(tiny_model)
    _, whole = None, load(tiny_model, ModelConfig())
    for one, wanted in ((policy, (True, False, False)), (whole, (True, True, False))):
        asked.clear()
        groups = make_groups(one)
        batch = plan_steps(PAIRS, 1, 12, [0])[0]
        microbatch = MicroBatch.prepare(groups, batch, [torch.zeros(3)] * 4, one.layout)
        one.scoring(microbatch.packed, microbatch.labelled, PairLossOptions(Onpo(eta=2.0))).loss.backward()
        assert asked
        assert set(asked) == {wanted}


def test_a_fit_leaves_the_base_as_it_is(tiny_model: Path) -> None:
    """Bit for bit; before and after it the model without adapters is π_1, and so is one with fresh adapters."""
    config = Config(model=str(tiny_model), batch_pairs=6, weight_decay=0.1, **{**LORA, "learning_rate": 2e-4})
    policies = ResidentPolicy(config.section(ModelConfig))
    whole = load(tiny_model, config)
    groups = make_groups(whole)
    anchor = score(whole, groups, 1000)
    assert all(map(torch.equal, anchor, score(policies(str(tiny_model)), groups, 1000)))
    policy = policies.take(str(tiny_model), "a seed")
    assert all(map(torch.equal, anchor, score(policy, groups, 1000)))
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters() if "lora_" in name}
    records: list[dict] = []
    fit(policy, groups, plan_steps(PAIRS, 4, 6, [0]), anchor, Onpo(eta=2.0), config, records.append)
    assert records[-1]["loss"] < records[0]["loss"]
    trained = dict(policy.model.named_parameters())
    assert all(not torch.equal(trained[name], tensor) for name, tensor in start.items())
    base = {name.replace(".base_layer", ""): p for name, p in trained.items() if name not in start}
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(base[name], parameter), name
    assert not all(map(torch.equal, anchor, score(policy, groups, 1000)))
    assert policies(str(tiny_model)) is policy
    assert all(map(torch.equal, anchor, score(policy, groups, 1000)))


def test_fresh_adapters_depend_on_the_seed_alone(tiny_model: Path) -> None:
    drawn = {}
    for name, seed in (("a", "1"), ("b", "2"), ("c", "1")):
        torch.manual_seed(hash(name) % 1000)
        policies = ResidentPolicy(ModelConfig(model=str(tiny_model), lora_rank=4))
        policy = policies.take(str(tiny_model), seed)
        drawn[name] = {k: p.detach().clone() for k, p in policy.model.named_parameters() if ".lora_A." in k}
    assert all(torch.equal(drawn["a"][k], drawn["c"][k]) for k in drawn["a"])
    assert not any(torch.equal(drawn["a"][k], drawn["b"][k]) for k in drawn["a"])
    for tensor in drawn["a"].values():  # uniform within 1/sqrt(inputs), as peft's
        assert 0.9 < tensor.abs().max() * math.sqrt(tensor.shape[1]) <= 1


# --- A run ------------------------------------------------------------------------------------------------------------


def test_the_policies_of_a_run_are_adapters(work: Path, tmp_path: Path) -> None:
    run = work / "run"
    for folder in (run / f"iteration_0{t}/{name}" for t in (1, 2) for name in ("auxiliary", "policy")):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= names
        assert not names & {"model.safetensors", "config.json"}
    assert not (run / "initial").exists()
    assert json.loads((run / "evaluation.json").read_text())["policies"] == ["π_1", "π_2", "π_3"]
    card = (run / "iteration_02/policy/README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "lora_rank: 4" in card
    shutil.copytree(run, tmp_path / "run")
    evaluate.main([str(tmp_path / "run")])
    again, before = (json.loads((one / "evaluation.json").read_text()) for one in (tmp_path / "run", run))
    assert again == before


def test_a_policy_is_the_same_in_peft_in_transformers_and_merged(work: Path, capsys) -> None:
    from transformers import AutoModelForCausalLM

    folder, base = work / "run/iteration_02/policy", work / "model"
    policies = ResidentPolicy(ModelConfig(model=str(base), lora_rank=4))
    policy = policies(folder)
    ours = log_probs(policy.model, policy)
    assert (ours - log_probs(policies(str(base)).model, policy)).abs().max() > 0.01
    export.main([str(work / "run"), "--merge"])
    merged = work / "run/merged_3"
    assert str(merged) in capsys.readouterr().out
    assert "adapter_config.json" not in {path.name for path in merged.iterdir()}
    others = {
        "peft": peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
        "transformers": AutoModelForCausalLM.from_pretrained(folder),
        "merged": AutoModelForCausalLM.from_pretrained(merged),
        "merged, here": load(merged, ModelConfig()).model,
        "merged as --model": load(folder, ModelConfig()).model,
    }
    for name, model in others.items():
        assert (ours - log_probs(model, policy)).abs().max() < 2e-5, name
    with pytest.raises(SystemExit):
        export.main([str(work / "run"), "--merge"])
    assert "merged_3 exists: give a new name" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_a_run_of_a_gpu_is_merged_on_a_cpu(work: Path, tmp_path: Path, attention: str) -> None:
    model = ModelConfig(model=str(work / "model"), lora_rank=4, attention=attention)
    export_merged(work / "run", tmp_path / "merged", 3, model)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_over_a_base_in_bfloat16(work: Path) -> None:
    """As on a GPU: adapters and merged policies are float32, and a fit starts at its anchor exactly."""
    config = replace(small_run(work, "bfloat16"), **LORA, weights="bf16-sr")
    train.train(config)
    run = Path(config.out)
    records = list(map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
    fits = [record for record in records if record["stage"] == "fit"]
    assert fits
    assert all(record["margin"] == 0 for record in fits if record["step"] == 1)
    assert all(0.8 < record["margins_kept_forward"] < 1.2 for record in fits if record["step"] == record["steps"])
    folder = run / "iteration_02/policy"
    tensors = peft.load_peft_weights(str(folder), device="cpu")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    policies = ResidentPolicy(ModelConfig(model=config.model, lora_rank=4, weights="bf16-sr"))
    policy = policies(folder)
    assert {p.dtype for n, p in policy.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    export.main([str(run), "--merge"])
    merged = load(run / "merged_3", ModelConfig()).model
    assert merged.dtype == torch.float32
    with policy.in_float32():
        assert (log_probs(policy.model, policy) - log_probs(merged, policy)).abs().max() < 2e-5


class Killed(BaseException):
    """As a kill would: nothing is cleaned up after it."""


def test_a_killed_fit_goes_on_to_the_same_bits(work: Path, monkeypatch) -> None:
    """A fit that starts from fresh adapters, and one that starts from those of a policy."""
    config = replace(small_run(work, "killed"), **LORA)
    log, kills = Tracker.log, [(1, "auxiliary", 2), (2, "policy", 2)]

    def die(tracker, stage: str, t: int, **values) -> None:
        log(tracker, stage, t, **values)
        if kills and stage == "fit" and (t, values["fit"], values["step"]) == kills[0]:
            del kills[0]
            raise Killed

    monkeypatch.setattr(Tracker, "log", die)
    for t, into in ((1, "auxiliary"), (2, "policy")):
        with pytest.raises(Killed):
            train.train(config, resume=t == 2)
        (file,) = Path(config.out, f"iteration_0{t}/{into}.checkpoints").glob("*/*.safetensors")
        assert file.stat().st_size < (work / "model/model.safetensors").stat().st_size
    train.train(config, resume=True)
    assert run_digest(Path(config.out)) == run_digest(work / "run")


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "nash_md", "refresh_reference": 1},
        {"anchor": "live"},
        {"oracle": "reward-model", "gradient_checkpointing": True},
    ],
    ids=["mixture", "live", "another model in memory"],
)
def test_other_algorithms(work: Path, options: dict, monkeypatch) -> None:
    """Two policies at once are two bases; a model as the oracle takes the base's place meanwhile."""
    if "oracle" in options:
        monkeypatch.setattr("onpo_fast.oracles.holds_model", lambda oracle: True)
        options = {**options, "oracle": "population"}
    name = "_".join(map(str, options.values()))
    config = replace(small_run(work, name), **LORA, **options)
    train.train(config)
    if "refresh_reference" in options:
        return
    for t in (1, 2):
        ours, other = (
            peft.load_peft_weights(str(run / f"iteration_0{t}/policy"), device="cpu")
            for run in (Path(config.out), work / "run")
        )
        assert ours.keys() == other.keys()
        for key, tensor in other.items():
            assert (ours[key] - tensor).abs().max() < 1e-3, key


def test_a_folder_of_a_run_that_became_an_adapter_is_refused(work: Path, tmp_path: Path) -> None:
    """A run directory may come from a stranger, and the base that an adapter names may be anywhere."""
    policies = ResidentPolicy(ModelConfig(model=str(work / "model")))
    with pytest.raises(UserError, match="is an adapter, and the policies of this run are whole models"):
        policies(work / "run/iteration_02/policy")
    with pytest.raises(UserError, match="another --lora_rank, --lora_alpha or --lora_targets"):
        ResidentPolicy(ModelConfig(model=str(work / "model"), lora_rank=4, lora_alpha=3.0))(
            work / "run/iteration_02/policy"
        )


# --- An adapter as --model --------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(work: Path, tmp_path: Path) -> Path:
    """An adapter directory as peft saves it, over a model in a folder of its own."""
    directory = tmp_path / "adapter"
    shutil.copytree(work / "model", directory / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "model")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.mlp.up_proj": 5},
        init_lora_weights=False,
    )
    peft.get_peft_model(model, config).save_pretrained(directory)
    edit(directory, base_model_name_or_path="base")
    return directory


def edit(directory: Path, **values: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("lora", [{}, LORA], ids=["all weights", "lora"])
def test_a_run_from_an_adapter(work: Path, adapter: Path, tmp_path: Path, lora: dict, capsys) -> None:
    """It is merged into its base as π_1, which the run keeps."""
    from transformers import AutoModelForCausalLM

    config = replace(
        small_run(work, tmp_path.name), **lora, model=str(adapter), iterations=1, out=str(tmp_path / "run")
    )
    train.train(config)
    assert (
        f"{adapter} is an adapter: merged into its base model {adapter / 'base'}, in float32"
        in capsys.readouterr().out.replace("\n", " ")
    )
    initial = load(tmp_path / "run/initial", ModelConfig())
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter / "base"), adapter)
    difference = log_probs(initial.model, initial) - log_probs(theirs, initial)
    assert difference.abs().max() < 2e-5
    assert initial.model.config.tie_word_embeddings
    assert (tmp_path / "run/iteration_01/policy/adapter_config.json").exists() == bool(lora)
    train.train(config, resume=True)
    weights = adapter / "base/model.safetensors"
    before = model_fingerprint(str(adapter), None, lambda path: path.name)
    assert {"adapter_config.json", "adapter_model.safetensors", "base/model.safetensors"} <= set(before)
    weights.write_bytes((work / "run/iteration_01/policy/adapter_model.safetensors").read_bytes())
    with pytest.raises(UserError):
        train.train(config, resume=True)


def tensors(change) -> object:
    from safetensors.torch import load_file, save_file

    def edit_file(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)

    return edit_file


def pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: edit(d, base_model_name_or_path=None), "names no base model (base_model_name_or_path)"),
        (lambda d: edit(d, base_model_name_or_path="./gone"), "adapter_config.json names it as the base model"),
        (lambda d: edit(d, base_model_name_or_path="."), "adapter_config.json names it as the base model"),
        *(
            (lambda d, name=name: edit(d, base_model_name_or_path=name), "adapter_config.json names it as the base")
            for name in ("my model", "C:\\models\\x", "unsloth/llama:latest", "\ud800", "a" * 5000)
        ),
        (lambda d: (d / "adapter_config.json").write_text("3"), "adapter_config.json is not a JSON object"),
        (pickled, "adapter has no adapter_model.safetensors: of adapters, too, only safetensors are read"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x"), "cannot load the adapter "),
        (lambda d: edit(d, peft_type="IA3"), "is an adapter of the kind 'IA3', and only LORA is read"),
        (lambda d: edit(d, use_dora=True), "adapter_config.json has use_dora, which is not known here"),
        (lambda d: edit(d, init_lora_weights="pissa"), "adapter_config.json has init_lora_weights, which is not"),
        (lambda d: edit(d, modules_to_save=["lm_head"]), "adapter_config.json has modules_to_save, which is not"),
        (lambda d: edit(d, new_thing={"a": 1}), "adapter_config.json has new_thing, which is not known here"),
        (lambda d: (d / "adapter_config.json").write_text(" " * (2**26 + 1)), "adapter_config.json has 67,108,865"),
        *(
            (lambda d, name=name, value=value: edit(d, **{name: value}), f"adapter_config.json: {name} must be ")
            for name, values in {
                "r": (10**12, 65537, -1, 0, True, 2.0, "2", None, [2]),
                "lora_alpha": (None, 1e300, 10**400, 0, float("nan"), float("inf"), "3", True),
                "use_rslora": ("false", 1, [0]),
                "rank_pattern": ([1], "abc", 5),
                "alpha_pattern": (5, [["a", 1]], "abc"),
            }.items()
            for value in values
        ),
        (lambda d: edit(d, rank_pattern={"x": "5"}), "adapter_config.json: rank_pattern['x'] must be an integer"),
        (lambda d: edit(d, alpha_pattern={"x": 1e300}), "adapter_config.json: alpha_pattern['x'] must be a positive"),
        (lambda d: edit(d, rank_pattern={"(.*)*x": 5}), "has the pattern '(.*)*x'"),
        (tensors(lambda t: t.pop(QUERY)), "cannot load the adapter "),
        (tensors(lambda t: t.update({QUERY: t[QUERY][:, :7].clone()})), "cannot load the adapter "),
        (tensors(lambda t: t.update({QUERY.replace(".0.", ".9."): t[QUERY].clone()})), "which has no linear layer"),
        (tensors(lambda t: t.update({"lm_head.weight": t[QUERY].clone()})), "has lm_head.weight, which is no weight"),
        (
            tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[QUERY].clone()})),
            "adapts lm_head, whose weight is also the embedding",
        ),
        (tensors(lambda t: t[QUERY].fill_(float("nan"))), "cannot load the adapter "),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(adapter: Path, change, message: str) -> None:
    """In one line, without importing what they name."""
    edit(adapter, auto_mapping={"base_model_class": "system", "parent_library": "antigravity"})
    change(adapter)
    with pytest.raises(UserError) as raised:
        load(adapter, ModelConfig())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_code_is_not_trusted_through_an_adapter(adapter: Path) -> None:
    with pytest.raises(UserError, match="--trust_remote_code would also run the code of any base model"):
        load(adapter, ModelConfig(trust_remote_code=True))


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "--lora_rank must be at least 1"),
        ({"lora_rank": 2**20}, "--lora_rank must be at most"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora_alpha must be positive"),
        ({"lora_rank": 4, "lora_targets": "q_proj,,"}, "--lora_targets must be all-linear or names"),
        ({"lora_alpha": 8.0}, "--lora_alpha needs --lora_rank"),
        ({"lora_targets": "q_proj"}, "--lora_targets needs --lora_rank"),
        ({"lora_rank": 4, "save_dtype": "bfloat16"}, "--save_dtype is for whole models"),
    ],
)
def test_options_that_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", "--lora_targets q_prj: .* llama has no layer of this name; did you mean q_proj"),
        ("c_attn", "--lora_targets c_attn: .* no layer of this name; it has down_proj, gate_proj"),
        ("q_proj, lm_head", "--lora_targets lm_head is the LM head, which stays frozen"),
        ("embed_tokens", r"--lora_targets embed_tokens: .* is no linear layer \(Embedding\)"),
        ("mlp", r"--lora_targets mlp: model.layers.0.mlp is no linear layer"),
    ],
)
def test_targets_that_are_refused(tiny_model: Path, targets: str, message: str) -> None:
    config = ModelConfig(model=str(tiny_model), lora_rank=2, lora_targets=targets)
    with pytest.raises(UserError, match=message):
        ResidentPolicy(config)(str(tiny_model))


def test_a_scale_that_is_too_large(tiny_model: Path) -> None:
    config = ModelConfig(model=str(tiny_model), lora_rank=2, lora_alpha=1e300)
    with pytest.raises(UserError, match="--lora_alpha must be at most 1048576"):
        ResidentPolicy(config)(str(tiny_model))


def test_without_peft(tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora_rank needs the package peft: pip install 'onpo_fast\[lora\]'"):
        ResidentPolicy(ModelConfig(model=str(tiny_model), lora_rank=2))(str(tiny_model))


def test_an_upload_of_adapters_over_a_local_model_is_refused(work: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit):
        export.main([str(work / "run"), "--push_to_hub", "org/name"])
    assert "--push_to_hub org/name: the policies are adapters over" in capsys.readouterr().err
    config = replace(small_run(work, "new"), **LORA, push_to_hub="org/name")
    with pytest.raises(UserError, match="export DIR --merge writes"):
        train.train(config)
    assert not (work / "new").exists()
