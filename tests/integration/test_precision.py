"""Precision of weights, optimizer and saved policies: what a run keeps of its fits, and that it says so."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import prepare, small_run

from bench.__main__ import main as bench_main
from bench.digest import run_digest
from bench.precision import AUTO, FITS, NEAREST, REFERENCE
from onpo_fast import opening
from onpo_fast.batches import plan_steps
from onpo_fast.config import Config, FitConfig, ModelConfig, read_run
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.files import read_jsonl
from onpo_fast.fit import fit, score_as_in_fit
from onpo_fast.fit_precision import KeptMargins
from onpo_fast.journal import Journal
from onpo_fast.models import precision
from onpo_fast.models.loading import load
from onpo_fast.models.optimizers import check_optimizer, make_optimizer
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.objectives import Onpo
from onpo_fast.run.fit_states import FitStates
from onpo_fast.run.tracking import Tracker
from onpo_fast.train import main, train

pytestmark = pytest.mark.usefixtures("without_plots")
SIZES = {"bf16-sr": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture
def work(tmp_path: Path, tiny_model: Path) -> Path:
    prepare(tmp_path, tiny_model)
    return tmp_path


def run(work: Path, name: str, **options: object) -> Config:
    return replace(small_run(work, name), report_to="none", iterations=1, **options)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"weights": "bf16-sr"}, torch.bfloat16),
        ({"weights": "bf16-sr", "save_dtype": "float32"}, torch.float32),
        ({"save_dtype": "bfloat16"}, torch.bfloat16),
        ({}, torch.float32),
    ],
    ids=str,
)
def test_what_is_saved_has_the_dtype_that_was_asked_for_and_the_values_in_memory(
    work: Path, monkeypatch, options: dict, dtype: torch.dtype
) -> None:
    in_memory: dict[str, dict[str, torch.Tensor]] = {}
    save = ResidentPolicy.save

    def remember(self, folder, policy) -> None:
        save(self, folder, policy)
        in_memory[folder.name] = {name: p.detach().clone() for name, p in policy.model.named_parameters()}

    monkeypatch.setattr(ResidentPolicy, "save", remember)
    config = run(work, "run", **options)
    train(config)
    weights = SIZES[config.weights if config.weights != "auto" else "fp32"]
    for name, parameters in in_memory.items():
        folder = work / "run" / "iteration_01" / name
        saved = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {dtype}
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert ("weights are bfloat16" in (folder / "README.md").read_text()) is (dtype == torch.bfloat16)
        assert {tensor.dtype for tensor in parameters.values()} == {weights}
        assert all(torch.equal(saved[key].float(), tensor.float()) for key, tensor in parameters.items())
        again = load(folder, replace(config, weights=config.weights))
        assert all(torch.equal(p, parameters[key]) for key, p in again.model.named_parameters())
    assert in_memory.keys() == {"auxiliary", "policy"}


class Killed(BaseException):
    """As a kill would: nothing is cleaned up after it."""


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "bf16-sr"},
        {"weights": "bf16-sr", "optimizer": "adamw-8bit"},
        {"weights": "bf16-sr", "optimizer": "adamw-4bit"},
        {"optimizer": "adamw-8bit", "save_dtype": "bfloat16", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_fit_that_was_killed_goes_on_to_the_same_bits(work: Path, monkeypatch, options: dict) -> None:
    monkeypatch.setattr(FitStates, "spacing", 0)
    train(run(work, "whole", **options))
    log = Tracker.log
    killed = run(work, "killed", **options)

    def kill(self, stage, iteration, **values) -> None:
        if stage == "fit" and values["fit"] == "policy" and values["step"] == 3:
            raise Killed
        log(self, stage, iteration, **values)

    monkeypatch.setattr(Tracker, "log", kill)
    with pytest.raises(Killed):
        train(killed)
    monkeypatch.setattr(Tracker, "log", log)
    assert Journal(work / "killed").within("iteration_01/policy.checkpoints")
    torch.rand(1)  # the noise does not depend on what has been drawn before
    train(killed, resume=True)
    assert run_digest(work / "killed") == run_digest(work / "whole")


def test_a_resumed_run_does_not_choose_its_weights_anew(work: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(opening, "choose_weights", lambda *_: ("bf16-sr", "a reason"))
    config = run(work, "run")
    train(config)
    assert "weights bf16-sr (a reason)" in capsys.readouterr().out
    assert read_run(work / "run").weights == "bf16-sr"
    before = run_digest(work / "run")
    monkeypatch.undo()
    line = ["--resume", f"--out={work / 'run'}", "--weights=auto", "--iterations=1"]
    main(line)
    assert "weights bf16-sr (as the run began)" in capsys.readouterr().out
    assert run_digest(work / "run") == before


def test_a_run_from_before_the_choice_goes_on_in_float32(work: Path, monkeypatch) -> None:
    monkeypatch.setattr(opening, "choose_weights", lambda *_: ("bf16-sr", "a reason"))
    config = run(work, "run")
    options = {name: value for name, value in vars(config).items() if name not in ("weights", "save_dtype")}
    (work / "run").mkdir()
    Journal(work / "run").begin({"options": options})
    assert opening._with_weights(config)[0].weights == "fp32"


@pytest.mark.parametrize(
    ("options", "parameters", "expected"),
    [
        ({"learning_rate": 5e-7}, 10**9, "bf16-sr"),
        ({"learning_rate": 1e-5}, 10**9, "fp32"),
        ({"learning_rate": 1e-5}, 8 * 10**9, "bf16-sr"),
        ({"learning_rate": 5e-7, "dtype": "float32"}, 8 * 10**9, "fp32"),
    ],
    ids=str,
)
def test_auto_on_a_gpu_goes_by_learning_rate_and_size(
    monkeypatch, options: dict, parameters: int, expected: str
) -> None:
    monkeypatch.setattr(precision, "device_of", lambda name: torch.device("cuda"))
    memory = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    model = ModelConfig(dtype=options.pop("dtype", "auto"))
    chosen, reason = precision.choose_weights(model, FitConfig(**options), lambda: parameters)
    assert chosen == expected
    assert reason


@pytest.mark.parametrize(
    ("optimizer", "ranks", "gibibytes", "expected"),
    [
        ("adamw", 1, 80, "bf16-sr"),  # 119 GiB
        ("adamw", 2, 80, "fp32"),
        ("adamw", 2, 40, "bf16-sr"),
        ("adamw-8bit", 1, 80, "fp32"),  # 75 GiB
        ("adamw-8bit", 1, 70, "bf16-sr"),
        ("adamw-4bit", 1, 70, "fp32"),  # 67 GiB
    ],
)
def test_auto_counts_the_states_of_a_rank(optimizer: str, ranks: int, gibibytes: int, expected: str) -> None:
    """The memory that is given counts, and not the device of these tests."""
    fit = FitConfig(learning_rate=1e-4, optimizer=optimizer)
    chosen, _ = precision.choose_weights(ModelConfig(), fit, lambda: 8 * 10**9, ranks, gibibytes * 2**30)
    assert chosen == expected


def test_float32_weights_that_are_rounded_while_loading_are_told(tiny_model: Path, tmp_path: Path) -> None:
    policy = load(tiny_model, Config(weights="bf16-sr"))
    assert any("float32 on disk" in note for note in policy.notes)
    policy.save(tmp_path / "half")
    assert load(tmp_path / "half", Config(weights="bf16-sr")).notes == []


def test_auto_on_a_cpu_is_float32() -> None:
    chosen, _ = precision.choose_weights(ModelConfig(device="cpu"), FitConfig(learning_rate=5e-7), lambda: 10**11)
    assert chosen == "fp32"


@pytest.mark.parametrize(
    ("options", "flag"),
    [(["--optimizer=adamw-8bit"], "--optimizer adamw-8bit"), (["--weights=bf16-sr"], "--weights bf16-sr")],
)
def test_without_torchao_there_is_one_line(work: Path, monkeypatch, capsys, options: list[str], flag: str) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(SystemExit):
        main([f"--model={work / 'model'}", f"--out={work / 'run'}", *options])
    error = capsys.readouterr().err
    assert flag in error
    assert "pip install torchao" in error
    assert error.count("\n") == 1
    assert not (work / "run").exists()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match="--weights bf16-sr computes in bfloat16"):
        Config(weights="bf16-sr", dtype="float32")
    with pytest.raises(UserError, match="--optimizer adamw-8bit with --weights bf16-sr"):
        check_optimizer("bf16-sr", "adamw-8bit", ranks=2)
    check_optimizer("fp32", "adamw-8bit", ranks=2)


PRECISIONS = [{"weights": "bf16-sr"}, {"weights": "fp32", "dtype": "bfloat16"}]
PAIRS = [Pair(g, w, lo, p) for g in range(4) for w, lo, p in ((0, 1, 1.0), (2, 0, 0.7), (1, 2, 0.9))]


def fitted(model: Path, epochs: int = 1, batch_pairs: int = 6, **options: object) -> list[dict]:
    """The metrics of a fit that starts at its anchor."""
    config = Config(model=str(model), warmup_ratio=0.0, tokens_per_microbatch=1024, **options)
    policy = load(model, config)
    texts = ["Yes.", "No, thank you very much!", "Perhaps it will rain."]
    groups = []
    for i, question in enumerate(("Tea?", "Will it rain tomorrow?", "Do fish sleep?", "Why?")):
        prompt = [{"role": "user", "content": question}]
        responses = [Response(t, policy.tokenizer(t)["input_ids"], "length", 0.0) for t in texts[i:] + texts[:i]]
        groups.append(Group(prompt, policy.renderer.render(prompt), responses))
    batches = plan_steps(PAIRS, epochs, batch_pairs, [0])
    anchor = score_as_in_fit(policy, groups, plan_steps(PAIRS, 1, batch_pairs, [0]), config)
    records: list[dict] = []
    fit(policy, groups, batches, anchor, Onpo(eta=2.0), config, records.append, starts_at_anchor=True, seed=[0])
    return records


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
def test_the_margins_of_the_first_step_are_exactly_0(tiny_model: Path, options: dict) -> None:
    assert fitted(tiny_model, learning_rate=1e-4, **options)[0]["margin"] == 0.0


@pytest.mark.parametrize("options", [*PRECISIONS, {"save_dtype": "bfloat16"}, {}], ids=str)
def test_what_a_fit_keeps_is_measured_where_something_may_be_lost(tiny_model: Path, options: dict) -> None:
    *earlier, last = fitted(tiny_model, learning_rate=1e-3, **options)
    kept = {name: value for name, value in last.items() if name.startswith("margins_")}
    where = {"save_dtype": "saved", "dtype": "forward", "weights": "forward"}.get(next(reversed(options), ""))
    assert kept.keys() == ({f"margins_kept_{where}", f"margins_error_{where}"} if where else set())
    assert not any(name.startswith("margins_") for record in earlier for name in record)
    if where:
        assert kept[f"margins_kept_{where}"] == pytest.approx(1, abs=0.1)
        assert kept[f"margins_error_{where}"] < 0.2


@pytest.mark.parametrize("fails_at", [1, 2], ids=["at the start", "at the end"])
@pytest.mark.parametrize("options", [{"weights": "bf16-sr"}, {"save_dtype": "bfloat16"}], ids=str)
def test_a_measurement_that_does_not_fit_the_memory_costs_nothing(
    tiny_model: Path, monkeypatch, capsys, options: dict, fails_at: int
) -> None:
    """The fit ends as with it, but for the figures; weights are rounded all the same."""
    measured = fitted(tiny_model, learning_rate=1e-3, **options)
    calls, margins = [], KeptMargins._margins_in_float32

    def limited(self: KeptMargins) -> torch.Tensor:
        calls.append(self.policy)
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return margins(self)

    monkeypatch.setattr(KeptMargins, "_margins_in_float32", limited)
    monkeypatch.setattr("onpo_fast.console.announced", set())
    records = fitted(tiny_model, learning_rate=1e-3, **options)
    assert not any(name.startswith("margins_") for record in records for name in record)
    assert [record["loss"] for record in records] == [record["loss"] for record in measured]
    assert "is not measured" in capsys.readouterr().out
    if "save_dtype" in options:
        assert all(torch.equal(one, one.bfloat16().float()) for one in calls[-1].model.parameters())


@pytest.mark.parametrize(("learning_rate", "warns"), [(5e-7, True), (1e-3, False)])
def test_a_forward_pass_that_does_not_see_the_fit_is_warned_of(
    work: Path, capsys, learning_rate: float, warns: bool
) -> None:
    train(run(work, "run", dtype="bfloat16", learning_rate=learning_rate))
    lines = [line for line in capsys.readouterr().out.splitlines() if "--weights bf16-sr" in line]
    assert len(lines) == 2 * warns
    assert all("in float32" in line and "%" in line for line in lines)
    last = [r for r in read_jsonl(work / "run" / "metrics.jsonl") if r["stage"] == "fit"][-1]
    assert (last["margins_error_forward"] > 0.5) is warns


def test_stochastic_rounding_keeps_the_mean() -> None:
    values = torch.tensor([1.001, -1.001, 3e-5, 1.0, -0.0, 100.3]).repeat(4000, 1)
    model = torch.nn.ParameterList([values.clone()])
    precision.round_to_bfloat16(model, [1, 2])
    rounded = model[0].data
    assert torch.equal(rounded, rounded.bfloat16().float())
    spacing = torch.finfo(torch.bfloat16).eps * values[0].abs()
    assert ((rounded.mean(0) - values[0]).abs() <= 4 * spacing / 4000**0.5).all()
    assert ((rounded - values).abs() <= spacing).all()
    assert torch.equal(rounded[:, 3:5], values[:, 3:5])  # what bfloat16 has is left alone
    again = torch.nn.ParameterList([values.clone()])
    precision.round_to_bfloat16(again, [1, 2])
    assert torch.equal(again[0], model[0])


def test_the_step_of_torchao_is_not_compiled_on_a_cpu(tiny_model: Path) -> None:
    policy = load(tiny_model, Config(weights="bf16-sr"))
    optimizer = make_optimizer(policy, FitConfig(optimizer="adamw-8bit", learning_rate=1e-3))
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    frames = torch._dynamo.utils.counters["frames"].copy()
    optimizer.step()
    assert torch._dynamo.utils.counters["frames"] == frames
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3]
    assert all(not torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


def test_the_benchmark_reads_back_what_it_saved(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """On a model of a few thousand weights its figures are noise, but not those of what is exact."""
    line = ["precision", f"--model={tiny_model}", f"--out={tmp_path}", "--steps=2", "--tokens=4", "--pairs=2"]
    monkeypatch.setattr(sys, "argv", ["bench", *line])
    with pytest.raises(SystemExit) as ended:
        bench_main([*line, "--learning_rate=1e-3"])
    assert ended.value.code in (0, 1)
    rows = {row["fit"]: row for row in json.loads((tmp_path / "precision-cpu.json").read_text())["rows"]}
    exact = rows[REFERENCE]
    assert exact["kept"] == pytest.approx(1)
    assert len(exact["losses"]) == 2
    assert rows[AUTO]["margins_kept_forward"] != 0
    assert rows[f"{REFERENCE}; cast to bf16 by a server"]["kept"] != exact["kept"]
    assert len(rows) == len(FITS) + len(NEAREST) + 1
