"""The memory plan: what a step takes, counted on fake tensors, and which settings fit."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_fit import PAIRS, make_groups
from transformers import LlamaConfig, LlamaForCausalLM

from onpo_fast.batches import MicroBatch, compared_tokens, plan_steps
from onpo_fast.config import Config, FitConfig, ModelConfig, parse
from onpo_fast.errors import UserError
from onpo_fast.fit import fit
from onpo_fast.memory import watch
from onpo_fast.memory.__main__ import main, settings_of_options, verdict
from onpo_fast.memory.counting import CannotCount, LiveStorages
from onpo_fast.memory.plan import ACTIVATIONS, GRADIENTS, HEAD, LOSS, STATES, WEIGHTS, Planner, Settings
from onpo_fast.memory.shapes import builder, read_config
from onpo_fast.memory.watch import MemoryWatch, longest_group, planner_of, with_token_budget
from onpo_fast.models.execution import apply_liger
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, score
from onpo_fast.models.scoring import PairLossOptions
from onpo_fast.objectives import Onpo
from onpo_fast.train import train

CONFIGS = Path(__file__).parents[2] / "configs"
GROUP = [1] * 20, [[2] * 12] * 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def planner(tiny_model) -> Planner:
    return Planner(builder(read_config(str(tiny_model)), str(tiny_model)), device=CPU, backend="torch")


def test_bytes_a_parameter(planner: Planner) -> None:
    """Those of docs/tuning.md, and shares of them on several ranks."""
    parameters = sum(one.numel() for one in LlamaForCausalLM(planner._model(Settings()).model.config).parameters())
    half = {"weights": "bf16-sr", "compute_dtype": torch.bfloat16}
    for settings, weights, states in [
        (Settings(), 4, 8),
        (Settings(optimizer="adamw-8bit"), 4, 2.03125),
        (Settings(**half), 2, 4),
        (Settings(optimizer="adamw-4bit", **half), 2, 1.0625),
    ]:
        plan = planner.plan(settings, [GROUP])
        got = plan.backward[WEIGHTS], plan.backward[GRADIENTS], plan.backward[STATES]
        assert got == pytest.approx((weights * parameters, weights * parameters, states * parameters), rel=1e-3)
        shared = planner.plan(replace(settings, ranks=4), [GROUP])
        sharded = shared.backward[WEIGHTS], shared.backward[GRADIENTS], shared.backward[STATES]
        assert sharded == pytest.approx([size / 4 for size in got], rel=1e-3)
        assert shared.total > plan.total / 4  # blocks are gathered, and activations are each rank's own
    adapters = planner.plan(Settings(lora_rank=1), [GROUP])
    assert adapters.backward[STATES] == 2 * adapters.backward.get(GRADIENTS, 0) < parameters
    assert adapters.backward[WEIGHTS] > 4 * parameters
    assert HEAD not in adapters.backward  # frozen


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_allocates_what_is_counted(tiny_model, checkpointing: bool, dtype: str, layout: str, k: int) -> None:
    """The operators of a real micro-batch, with its real loss, after the first of a step."""
    options = {"gradient_checkpointing": checkpointing, "dtype": dtype}
    policy = load(tiny_model, Config(**options))
    policy.layout = layout
    groups = make_groups(policy, k)
    batch = plan_steps([pair for pair in PAIRS if max(pair.winner, pair.loser) < k], 1, 100, [0])[0]
    microbatch = MicroBatch.prepare(groups, batch, score(policy, groups, 1000), layout)
    policy.begin_fit()
    counter = LiveStorages()
    for parameter in policy.model.parameters():
        counter.assign(parameter, None)
        parameter.grad = torch.zeros_like(parameter)
        counter.assign(parameter.grad, GRADIENTS)
    with counter:
        with policy.autocast(cached=False):
            loss = policy.scoring(microbatch.packed, microbatch.labelled, PairLossOptions(Onpo(eta=2.0))).loss
        loss.backward()
    settings = watch.settings_of_policy(policy, ModelConfig(**options), FitConfig(), live_anchor=False)
    tokens = [compared_tokens(groups[g], pairs) for g, pairs in batch.items()]
    plan = planner_of(policy, "auto").plan(settings, tokens)
    planned = sum(plan.backward.get(part, 0) for part in (GRADIENTS, ACTIVATIONS, LOSS, HEAD))
    assert planned == pytest.approx(counter.peak, rel=0.05)


RUN = """
import sys
sys.path.insert(0, {tests!r})
from test_memory import measured
measured({directory!r}, {checkpointing})
"""


def measured(directory: str, checkpointing: bool) -> None:
    """Prints the planned and the measured bytes of a fit of this process."""
    from onpo_fast.data import Group, Response

    config = Config(
        model=directory, batch_pairs=6, tokens_per_microbatch=700, gradient_checkpointing=checkpointing, iterations=1
    )
    policy = load(directory, config)
    prompt = [7] * 60
    groups = [Group([], prompt, [Response("", [9 + k] * 90, "eos", 0.0) for k in range(3)]) for _ in range(4)]
    batches = plan_steps(PAIRS, 1, 6, [0])
    fitting = config.section(FitConfig)
    watched = MemoryWatch(policy, groups, batches, config.section(ModelConfig), fitting, live_anchor=False)
    steps: list[dict] = []

    def on_step(metrics: dict) -> None:
        if record := watched.after(metrics["step"]):
            steps.append(record)

    anchor = [torch.zeros(3, dtype=torch.float64)] * 4
    fit(policy, groups, batches, anchor, Onpo(eta=2.0), fitting, on_step)
    print(steps[0]["planned_memory_bytes"], steps[0]["peak_memory_bytes"])


@pytest.fixture(scope="module")
def middle_model(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 38 million weights: a step takes twice what the process does."""
    directory = tmp_path_factory.mktemp("middle") / "model"
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    for file in tiny_model.glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    for file in tiny_model.glob("*.jinja"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_within_a_tenth_of_the_measured_peak(middle_model: Path, checkpointing: bool) -> None:
    program = RUN.format(tests=str(Path(__file__).parent), directory=str(middle_model), checkpointing=checkpointing)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    planned, peak = map(int, done.stdout.split()[-2:])
    assert planned == pytest.approx(peak, rel=0.1)


def test_ligers_layers_are_one_models_own(tiny_model, planner: Planner) -> None:
    """A plan counts another model, on tensors without data, whose null pointers Liger's kernels would read."""
    pytest.importorskip("liger_kernel.transformers")
    model = load(tiny_model, Config()).model
    module = sys.modules[type(model).__module__]
    before, plan = dict(vars(module)), planner.plan(Settings(), [GROUP])
    apply_liger(model, torch.device("cuda"), "on")  # replaces methods, and runs nothing
    layers = model.model.layers[0]
    assert {layers.mlp._get_name(), layers.input_layernorm._get_name()} == {"LigerSwiGLUMLP", "LigerRMSNorm"}
    assert vars(module) == before
    other = Planner(builder(read_config(str(tiny_model)), str(tiny_model)), device=CPU, backend="torch")
    assert other.plan(Settings(), [GROUP]).total == plan.total


def test_the_most_tokens_that_fit(planner: Planner) -> None:
    settings = Settings()
    unlimited = planner.choose_tokens(settings, GROUP)
    assert unlimited.tokens == 16384
    some = planner.largest(settings, GROUP, 3000).total
    limited = replace(planner, memory=some)
    chosen = limited.choose_tokens(settings, GROUP)
    assert chosen.tokens < 4096
    assert chosen.total <= some < limited.largest(settings, GROUP, 2 * chosen.tokens).total
    least = planner.largest(settings, GROUP, 1)
    assert least.tokens == 20 + 3 * 11
    assert replace(planner, memory=least.total - 1).choose_tokens(settings, GROUP) is None
    assert replace(planner, memory=least.total).choose_tokens(settings, GROUP).tokens == least.tokens


@pytest.fixture
def on_device(tiny_model, monkeypatch):
    """Returns a policy whose device has so many bytes, all of them free."""

    def policy_with(size: int) -> Policy:
        monkeypatch.setattr(watch, "device_bytes", lambda device: size)
        monkeypatch.setattr(watch, "resident_bytes", lambda: None)
        return load(tiny_model, Config())

    return policy_with


def test_a_run_chooses_its_micro_batches(on_device) -> None:
    config = replace(Config(max_new_tokens=12, responses_per_prompt=3), tokens_per_microbatch=None)
    assert with_token_budget(replace_tokens(config, None), on_device(2**40), 20).tokens_per_microbatch == 16384
    few = with_token_budget(replace_tokens(config, None), on_device(12_000_000), 20).tokens_per_microbatch
    assert 53 < few < 16384
    assert with_token_budget(replace_tokens(config, 700), on_device(2**40), 20).tokens_per_microbatch == 700


def replace_tokens(config: Config, tokens: int | None) -> Config:
    """The options as on a GPU, where the number is not filled in."""
    changed = copy.copy(config)
    changed.tokens_per_microbatch = tokens
    return changed


def test_what_does_not_fit_is_refused_with_what_would(on_device, planner: Planner) -> None:
    config = replace_tokens(Config(max_new_tokens=12, responses_per_prompt=3), 8192)
    group = longest_group(config, 20, 12)
    with pytest.raises(UserError, match="--tokens_per_microbatch") as error:
        with_token_budget(config, on_device(planner.largest(Settings(), group, 1000).total), 20)
    assert "\n" not in str(error.value)
    fewer = int(re.search(r"--tokens_per_microbatch (\d+)", str(error.value))[1])
    assert fewer < 8192
    least = planner.largest(Settings(), group, 1).total
    with pytest.raises(UserError, match=r"--gradient_checkpointing|--weights bf16-sr") as error:
        with_token_budget(config, on_device(least - 1), 20)
    for name in re.findall(r"--(\w+) ", str(error.value)):
        assert name in {"weights", "optimizer", "lora_rank", "gradient_checkpointing"}
    with pytest.raises(UserError, match="smaller model"):
        with_token_budget(config, on_device(1000), 20)


def test_a_budget_below_one_response_is_refused(tmp_path) -> None:
    """Before anything is loaded or written. The default on a CPU grows with the responses."""
    config = Config(tokens_per_microbatch=31, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"--tokens_per_microbatch 31 .*--max_new_tokens 32"):
        train(config)
    assert not (tmp_path / "run").exists()
    assert Config(max_new_tokens=2048, device="cpu").tokens_per_microbatch == 2048


def test_adapters_are_not_sharded(planner: Planner) -> None:
    """Each rank has the base and the adapters; a fit of all weights has its share of them."""
    one, two = (planner.largest(Settings(lora_rank=4, ranks=ranks), GROUP, 1000) for ranks in (1, 2))
    assert one.backward == two.backward
    one, two = (planner.largest(Settings(ranks=ranks), GROUP, 1000) for ranks in (1, 2))
    assert two.backward["weights"] == one.backward["weights"] // 2


def test_a_family_that_cannot_be_counted_runs_without_a_plan(on_device, monkeypatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CannotCount("DataDependentOutputException: aten.nonzero")

    policy = on_device(2**30)
    monkeypatch.setattr(Planner, "plan", refuse)
    assert with_token_budget(replace_tokens(Config(), None), policy, 20).tokens_per_microbatch == 16384
    assert "cannot be counted" in capsys.readouterr().out
    batches = plan_steps(PAIRS, 1, 6, [0])
    watched = MemoryWatch(policy, make_groups(policy), batches, ModelConfig(), FitConfig(), live_anchor=False)
    assert watched.after(2) is None


def test_the_command_prints_a_table(tiny_model, capsys) -> None:
    main(["--model", str(tiny_model), "--gpus", "2", "--memory", "1", "--gradient_checkpointing"])
    out = capsys.readouterr().out
    assert "2 × 1 GiB, 16384 tokens a micro-batch, with gradient checkpointing" in out
    rows = {line[:23].strip(): line.split()[-1] for line in out.splitlines() if line.startswith(("fp32", "bf16"))}
    # quantised moments of bfloat16 weights do not run on several ranks
    assert set(rows) == {"fp32 adamw", "bf16-sr adamw", "fp32 adamw-8bit", "bf16-sr adamw LoRA 16"}
    assert set(rows.values()) == {"yes"}
    main(["--model", str(tiny_model), "--gpus", "0", "--tokens_per_microbatch", "300"])
    out = capsys.readouterr().out
    assert "on a CPU with" in out
    assert "allocator" in out
    main(["--model", str(tiny_model), "--gpus", "0", "--prompt_tokens", "20"])
    assert 512 < int(re.search(r"(\d+) tokens a micro-batch", capsys.readouterr().out)[1]) <= 1024  # a CPU's default


def rows(capsys) -> dict[str, str]:
    """Returns the verdict of each row that the command has printed."""
    found = [
        re.match(r"((?:fp32|bf16-sr) \S+(?: LoRA \d+)?) .* (yes|no.*)$", line)
        for line in capsys.readouterr().out.splitlines()
    ]
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize(
    ("gpus", "options", "weights"),
    [
        (1, [], "bf16-sr"),
        (2, [], "fp32"),
        (1, ["--optimizer=adamw-8bit"], "fp32"),
        (2, ["--learning_rate=5e-7"], "bf16-sr"),
    ],
    ids=str,
)
def test_the_command_plans_the_weights_that_training_takes(
    tiny_model, monkeypatch, capsys, gpus: int, options: list[str], weights: str
) -> None:
    monkeypatch.setattr(Planner, "count_parameters", lambda planner: 80 * 10**6)  # 1.2 GiB of states in float32
    main(["--model", str(tiny_model), "--gpus", str(gpus), "--memory", "1", *options])
    assert next(iter(rows(capsys))).split()[0] == weights


def test_loading_must_fit_too(planner: Planner, on_device, monkeypatch) -> None:
    """The whole model is float32 on every rank, however many share the step."""
    settings = Settings("bf16-sr", ranks=64, compute_dtype=torch.bfloat16)
    plan = replace(planner.plan(settings, [GROUP]), backward={WEIGHTS: 1}, update={})
    assert plan.loading == 4 * planner.count_parameters()
    enough, less = replace(planner, memory=plan.loading), replace(planner, memory=plan.loading - 1)
    assert (verdict(enough, plan, 0), verdict(less, plan, 0)) == ("yes", "no (loading)")
    assert (enough.fits(plan), less.fits(plan)) == (True, False)
    policy = on_device(plan.loading - 1)
    monkeypatch.setattr(Planner, "largest", lambda *_: plan)
    with pytest.raises(UserError, match="loading and checks take"):
        with_token_budget(replace_tokens(Config(), 100), policy, 20)


def test_sampling_that_does_not_fit_is_said(tiny_model, capsys) -> None:
    line = ["--model", str(tiny_model), "--memory", "1", "--tokens_per_microbatch", "64"]
    main([*line, "--sampling_batch_size", "1000000"])
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith("fits")
    assert "no (sampling)" in out
    fewer = re.search(r"sampling fits with --sampling_batch_size (\d+)", out)[1]
    main([*line, "--sampling_batch_size", fewer])
    assert next(iter(rows(capsys).values())) == "yes"


def test_the_targets_of_adapters_count(planner: Planner) -> None:
    every, some = (
        planner.plan(Settings(lora_rank=4, lora_targets=names), [GROUP]) for names in ("all-linear", "q_proj, v_proj")
    )
    assert some.backward[STATES] < every.backward[STATES]


def test_an_adapter_is_planned_as_its_base(tiny_model, tmp_path, capsys) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    main(["--model", str(tmp_path), "--memory", "1", "--tokens_per_microbatch", "64"])
    assert set(rows(capsys).values()) == {"yes"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpus", "-1"], "--gpus"),
        (["--memory", "0"], "--memory"),
        (["--memory", "nan"], "--memory"),
        (["--memory", "inf"], "--memory"),
        (["--memory", "1e300"], "--memory"),
        (["--prompt_tokens", "0"], "--prompt_tokens"),
        (["--prompt_tokens", str(10**13)], "--prompt_tokens"),
        (["--gpus", "2", "--weights", "bf16-sr", "--optimizer", "adamw-8bit"], "--optimizer adamw-8bit"),
        (["--lora_rank", "4", "--lora_targets", "no_such"], "--lora_targets no_such"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--gpu", "1"], "--gpu"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], named: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.long
@pytest.mark.parametrize(("name", "shape"), [("llama3", "llama3-8b"), ("mistral", "mistral-7b")])
def test_the_papers_settings_take_what_their_files_say(name: str, shape: str) -> None:
    file = CONFIGS / f"paper-{name}.yaml"
    said = re.search(r"([\d.]+) GiB on one GPU, ([\d.]+) GiB on each of eight", file.read_text())
    config = parse([f"--config={file}", "--model", shape])
    group = longest_group(config, 1024, config.max_new_tokens)
    for gpus, memory, planned in ((1, 80, said[1]), (8, 40, said[2])):
        planner = Planner(builder(read_config(shape), shape), masked=False, memory=memory * 2**30)
        plan = planner.largest(
            settings_of_options(config, config.weights, True, gpus), group, config.tokens_per_microbatch
        )
        assert f"{plan.total / 2**30:.1f}" == planned
        assert planner.fits(plan)
