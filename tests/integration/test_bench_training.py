"""The benchmark of training: the losses it compares are one loss, its memory has the right names, its runs end."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from bench import fits, jobs, trainers, training
from bench.fits import WORKLOADS, Marks, large, materialised_pair_loss
from bench.problems import ONPO, Problem, Shape
from bench.runner import ROOT
from onpo_fast import fused_linear_pair_loss
from onpo_fast.data import Group

SIZE = {"shape": "tiny", "pairs": 2, "steps": 3, "device": "cpu"}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A benchmark with these options, whose jobs run in this process."""

    def make(**options) -> training.TrainingBench:
        parser = argparse.ArgumentParser()
        training.arguments(parser)
        defaults = vars(parser.parse_args(["--part", "fit", "--out", str(tmp_path), "--device", "cpu"]))
        return training.TrainingBench(argparse.Namespace(**{**defaults, **options}))

    monkeypatch.setattr(training.TrainingBench, "job", lambda self, module, **arguments: fits.large(**arguments))
    return make


def written(bench: training.TrainingBench) -> dict:
    return json.loads(bench.path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# The fit of a large model
# ---------------------------------------------------------------------------------------------------------------------


def test_the_materialised_loss_is_the_loss() -> None:
    problem = Problem.make(Shape("tiny", 3, 2, 9, features=16, vocabulary=77))
    results = []
    for loss in (fused_linear_pair_loss, materialised_pair_loss):
        hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
        out = loss(
            hidden,
            weight,
            problem.targets,
            problem.cu_seqlens,
            problem.pairs,
            objective=ONPO,
            ref_logps=problem.ref_logps,
            preference=torch.tensor([0.9, 0.2, 1.0], dtype=torch.float64),
        )
        out.loss.backward()
        results.append((*(x.float() for x in out), hidden.grad, weight.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


def test_llama_3_8b_and_the_layers_that_fit(monkeypatch) -> None:
    shape = WORKLOADS["llama3-8b"]
    assert shape.parameters(32) == 8_030_261_248
    gpu = torch.device("cuda")
    for free, layers in ((84.5e9, 32), (60e9, 28), (10e9, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 85e9))
        assert fits._layers_that_fit(shape, gpu) == layers
        assert layers == 1 or 8 * shape.parameters(layers) < 0.97 * free


def test_memory_is_noted_by_phase(monkeypatch) -> None:
    """Whatever the gauge says, in the order of a step; what was noted in the first step is forgotten."""
    phases: list[str] = []
    end = Marks.end

    def noted(marks: Marks, phase: str, first: bool = False) -> None:
        assert marks.phase == phase
        phases.append(phase)
        end(marks, phase, first)
        assert not first or marks.held.keys() == {"rest"}

    monkeypatch.setattr(Marks, "end", noted)
    large("torch", **SIZE)
    assert phases == [*Marks.PHASES, "rest"] * 4


def test_a_fit_with_each_loss(bench, capsys) -> None:
    tried = bench(pairs=2, steps=3, losses=fits.LOSSES)
    tried.fits()
    tried.show()
    triton, torch_, materialised = written(tried)["fits"]
    assert triton["status"] == "absent"
    assert "needs triton and an NVIDIA GPU" in triton["reason"]
    for row in (torch_, materialised):
        assert row["status"] == "measured"
        assert row["seconds"]["rounds"] == 3
        assert row["expected_bytes"]["weights"] == 2 * row["parameters"]
        assert row["peak_bytes"].keys() == set(Marks.PHASES)
    assert materialised["loss_last"] == pytest.approx(torch_["loss_last"], rel=0.02)  # in bf16
    assert written(tried)["environment"]["device"].startswith("cpu: ")
    printed = capsys.readouterr().out
    assert "2 pairs a step" in printed
    assert any(line.startswith("| triton ") and "| absent " in line for line in printed.splitlines())


def test_a_loss_that_does_not_fit_is_a_result(monkeypatch) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(fits, "fit", full)
    row = large("torch", **SIZE)
    assert (row["status"], row["reason"], row["layers"]) == ("out of memory", "forward: CUDA out of memory.", 2)


def test_fewer_layers_where_the_memory_is_smaller_than_computed(bench, monkeypatch) -> None:
    def job(module: str, loss: str, layers: int | None, **_) -> dict:
        layers = layers or 32
        fits_in = layers <= 24 and loss != "materialised"
        return {"status": "measured" if fits_in else "out of memory", "layers": layers, "of_layers": 32}

    tried = bench(losses=fits.LOSSES)
    monkeypatch.setattr(tried, "job", job)
    tried.fits()
    rows = [(row["loss"], row["layers"], row["status"]) for row in written(tried)["fits"]]
    assert rows == [
        ("triton", 32, "out of memory"),
        ("triton", 28, "out of memory"),
        ("triton", 24, "measured"),
        ("torch", 24, "measured"),
        ("materialised", 24, "out of memory"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Fits against TRL's trainer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [2, 4])
def test_both_trainers_take_the_same_steps_on_the_same_pairs(bench, monkeypatch, capsys, responses: int) -> None:
    """As many pairs and FLOPs that they need a step, whichever trainer it is."""
    pytest.importorskip("trl")
    tried = bench(part="trl", model="tiny", responses=[responses], pairs_per_step=6, timed_steps=2, tokens=12)
    tried.options.trl_batches, tried.options.microbatches = [2], [64]
    monkeypatch.setattr(tried, "job", lambda module, **case: trainers.measure(trainers.Case(**case)))
    tried.against_trl()
    tried.show()
    ours, theirs = written(tried)["trainers"]
    for row in (ours, theirs):
        assert row["status"] == "measured"
        assert row["pairs"] == 6
        assert row["seconds"]["rounds"] == 2
    assert ours["model_flops"] == theirs["model_flops"] > 0
    assert ours["layout"] == "shared"
    printed = capsys.readouterr().out
    assert f"| {responses} " in printed
    assert "TRL DPOTrainer, 2 pairs at once" in printed


def test_flops_count_each_prompt_and_response_once() -> None:
    case = trainers.Case("onpo_fast", "tiny", "cpu", 3, 1, 1, tokens=12)
    policy = trainers._policy(case)
    (group, _) = case.groups(policy.vocabulary)
    whole = trainers._useful_flops(policy, group)
    pairs = [
        Group([], group.prompt_tokens, [group.responses[i], group.responses[j]]) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert 1.9 * whole < sum(trainers._useful_flops(policy, pair) for pair in pairs) < 3 * whole


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run(bench, capsys, tmp_path) -> None:
    tried = bench(tiny=True, train="--iterations 1")
    tried.run(tmp_path / "work")
    tried.show()
    found = written(tried)
    (run,) = found["runs"]
    assert run["status"] == "measured", run
    assert run["tokens_per_second"].keys() == {"sample", "score", "fit"}
    assert run["stage_seconds"].keys() == {
        "sample",
        "judge",
        "pair",
        "score",
        "fit auxiliary",
        "fit policy",
        "evaluate",
    }
    assert run["peak_bytes"]["fit"] >= run["peak_bytes"]["sample"] > 0
    assert 0 <= run["win_rate"] <= 1
    assert found["environment"]["device"].startswith("cpu: ")
    assert "| fit auxiliary |" in capsys.readouterr().out


def test_what_fails_and_what_time_does_not_allow(bench, tmp_path, monkeypatch) -> None:
    tried = bench(train=f"--model {tmp_path / 'none'}")
    tried.run(tmp_path)
    tried.end = 0.0
    tried.run(tmp_path)
    failed, skipped = written(tried)["runs"]
    assert failed["status"] == "failed"
    assert "there is no such directory" in failed["reason"]
    assert (skipped["status"], skipped["reason"]) == ("skipped", "no time left")
    monkeypatch.undo()
    assert tried.job("bench.fits", loss="torch")["status"] == "skipped"


def test_a_run_that_was_stopped_has_the_stages_up_to_there(tmp_path) -> None:
    records = [
        {"stage": "sample", "iteration": 1, "tokens_per_second": 10.0, "peak_memory_bytes": 5},
        {"stage": "sample", "iteration": 2, "tokens_per_second": 30.0, "peak_memory_bytes": 9},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert training.measures(tmp_path) == {
        "tokens_per_second": {"sample": 20.0},
        "peak_bytes": {"sample": 5},
        "stage_seconds": {},
    }


def test_rates_are_written_as_they_come(bench, tmp_path, monkeypatch) -> None:
    """What a run has shown is in the results before it ends, should this process be killed."""
    tried = bench()

    def killed(command: list[str], meanwhile) -> None:
        directory = tmp_path / "run"
        meanwhile()  # nothing yet
        directory.mkdir()
        (directory / "environment.json").write_text('{"device": "some GPU"}')
        (directory / "metrics.jsonl").write_text(
            '{"stage": "sample", "iteration": 1, "tokens_per_second": 10.0}\n{"stage": "score", "iter'
        )
        meanwhile()
        raise KeyboardInterrupt

    monkeypatch.setattr(tried, "process", killed)
    with pytest.raises(KeyboardInterrupt):
        tried.run(tmp_path)
    found = written(tried)
    assert found["environment"] == {"device": "some GPU"}
    (run,) = found["runs"]
    assert (run["status"], run["tokens_per_second"]) == ("did not return", {"sample": 10.0})


def test_a_process_is_looked_at_while_it_runs_and_stopped_in_time(bench, monkeypatch) -> None:
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.1)
    tried, looks = bench(budget=1.0), []
    row, _ = tried.process(["http.server", "0", "--bind", "127.0.0.1"], meanwhile=lambda: looks.append(1))
    assert (row["status"], row["reason"]) == ("stopped", "no time left after 1 s")
    assert len(looks) > 2


def test_fits_are_processes() -> None:
    command = [sys.executable, "-m", "bench.fits", json.dumps({"loss": "torch", **SIZE})]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "measured"
