"""The benchmark compares like with like, says what it could not measure, and judges by the numbers alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import accuracy, checks, inputs, kernels, peers, plots
from bench.accuracy import Exact, relative_error
from bench.memory import gradient_bytes, peak_bytes
from bench.peers import (
    CACHED,
    COMPILED,
    FAST,
    FROZEN,
    FULL,
    LEAN,
    LIGER_DPO,
    MATERIALISED,
    METHODS,
    OURS,
    SCORING,
    TORCH,
    TRL,
    Method,
    Outcome,
    run,
)
from bench.problems import DPO, ONPO, SHAPES, TARGET, Problem, Shape
from bench.targets import GIB, TARGETS, verdicts
from bench.timing import Clock, Products, Spread
from onpo_fast import fused_linear_pair_loss

PAIRS = Shape("tiny-pairs", 3, 2, 9, features=16, vocabulary=77)
GROUP = Shape("tiny-group", 2, 4, 5, features=16, vocabulary=130)
CPU = torch.device("cpu")
TRL_IS_HERE = importlib.util.find_spec("trl") is not None  # it wants Python 3.11

# the compiled peer takes seconds to compile, and is the materialised one otherwise
HERE = [(m, t) for m in METHODS for t in m.tasks if m is not COMPILED and m.absent(Problem.make(PAIRS)) is None]


@pytest.fixture(scope="module", params=[PAIRS, GROUP], ids=lambda shape: shape.model)
def exact(request) -> Exact:
    problem = Problem.make(request.param)
    exact = Exact.of(problem, {ONPO, DPO})
    problem.ref_logps = exact.ref_logps
    return exact


@pytest.mark.parametrize("objective", [ONPO, DPO])
def test_the_float64_reference_is_the_definition(exact: Exact, objective) -> None:
    problem = exact.problem
    hidden, weight = (x.double().requires_grad_() for x in (problem.hidden, problem.weight))
    out = fused_linear_pair_loss(
        hidden,
        weight,
        problem.targets,
        problem.cu_seqlens,
        problem.pairs,
        objective=objective,
        backend="reference",
        ref_hidden=problem.ref_hidden.double(),
        ref_weight=problem.ref_weight.double(),
    )
    out.loss.backward()
    torch.testing.assert_close(exact.logps, out.logps)
    torch.testing.assert_close(exact.ref_logps, out.ref_logps)
    torch.testing.assert_close(exact.problem.loss(exact.logps, exact.ref_logps, objective), out.loss.detach())
    torch.testing.assert_close(accuracy.exact_logps(problem), out.logps)
    for got, want in zip(exact.gradients[objective], (hidden.grad, weight.grad)):
        assert relative_error(got, want) < 1e-7


@pytest.mark.parametrize(("method", "task"), HERE, ids=lambda x: x.name)
def test_methods_agree(exact: Exact, method: Method, task) -> None:
    result = run(method, task, exact.problem)
    errors = exact.errors(result, method.objective)
    assert errors.pop("logps_nats_max") < 0.02  # as if of 1000 tokens, where these have under ten
    assert max(errors.values()) < 2e-3
    assert (result.hidden_gradient is not None) == (task.hidden > 0)
    assert (result.weight_gradient is not None) == (task.weight > 0)
    if task.trains:
        want = exact.problem.loss(exact.logps, exact.ref_logps, method.objective)
        torch.testing.assert_close(result.loss.double(), want, rtol=1e-4, atol=1e-6)


def test_peers_are_here_or_named_as_absent() -> None:
    problem = Problem.make(PAIRS)
    present = {method.name for method in METHODS if method.absent(problem) is None}
    assert {TORCH.name, MATERIALISED.name, LIGER_DPO.name} <= present
    assert (TRL.name in present) == TRL_IS_HERE
    assert FAST.absent(problem) == LEAN.absent(problem) == "needs a GPU"
    assert "no_such_package" in peers.needs("no_such_package")(problem)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    problem = Problem.make(SHAPES["smollm2-1x2x1024"])
    logits = 4 * problem.shape.rows * problem.shape.vocabulary
    extra = peak_bytes(TORCH, FULL, problem) - gradient_bytes(FULL, problem)
    assert 0 < extra < logits


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_block_warms_up_and_keeps_to_its_rounds() -> None:
    calls = 0

    def call(mark) -> None:
        nonlocal calls
        calls += 1
        mark()
        time.sleep(0.002)
        mark()
        mark()

    for seconds, fewest, most, rounds in ((0.0, 3, 9, 3), (10.0, 1, 4, 4)):
        calls = 0
        laps = Clock(CPU).block(call, seconds, fewest, most)
        assert (len(laps), calls) == (rounds, rounds + 1)
        assert all(work > 0.0015 > rest for work, rest in laps)


def test_spread() -> None:
    assert Spread.of([3.0]) == (3.0, 0.0, 3.0, 1)
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 1.0, 5)


def test_the_bare_products_are_the_products() -> None:
    problem = Problem.make(PAIRS)
    bare = Products(problem.hidden, problem.weight)
    bare.parts = [slice(0, 20), slice(20, 40), slice(40, 60)]  # as if the memory were small
    logits = problem.hidden @ problem.weight.T
    for part in bare.parts:
        bare.buffer[: len(logits[part])] = logits[part]
    whole = Products(problem.hidden, problem.weight)
    assert len(Clock(CPU).laps(whole.all)) == 3
    torch.testing.assert_close(whole.buffer, logits)
    torch.testing.assert_close(whole.hidden_gradient, logits @ problem.weight)
    torch.testing.assert_close(whole.weight_gradient, logits.T @ problem.hidden)


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def _broken(error: Exception) -> peers.Forward:
    def forward(*_) -> Outcome:
        raise error

    return forward


NO_MEMORY = Method("too large", _broken(torch.OutOfMemoryError("it wanted more")), (FULL,))
NO_LUCK = Method("broken", _broken(RuntimeError("no such kernel\nmore")), (FULL,))


@pytest.fixture
def bench(tmp_path, monkeypatch) -> kernels.KernelBench:
    monkeypatch.setattr(kernels, "peak_bytes", lambda *_: 10**6)
    monkeypatch.setitem(plots.STYLES, NO_MEMORY.name, {})
    report = kernels.Report.open(tmp_path / "kernels-cpu.json", CPU, resume=False)
    return kernels.KernelBench(report, CPU, None, time.monotonic() + 60, block_seconds=0.0)


def test_a_run(bench: kernels.KernelBench, capsys) -> None:
    methods = [TORCH, MATERIALISED, TRL, FAST, NO_MEMORY, NO_LUCK]
    bench.shape(PAIRS, methods, thorough=False)
    bench.shape(GROUP, [MATERIALISED], thorough=True)
    bench.report.finish()
    printed = capsys.readouterr().out
    data = json.loads(bench.report.path.read_text())
    assert {"device", "torch", "triton", "trl", "commit", "quack-kernels"} <= data["environment"].keys()
    pairs, group = data["shapes"]
    assert pairs["floor_seconds"].keys() == {"logits", "hidden", "weight"}
    status = {(row["method"], row["task"]): row["status"] for row in pairs["rows"]}
    assert status == {
        **{(TORCH.name, task.name): "measured" for task in TORCH.tasks},
        **{(FAST.name, task.name): "absent" for task in FAST.tasks},
        (MATERIALISED.name, FULL.name): "measured",
        (TRL.name, FULL.name): "measured" if TRL_IS_HERE else "absent",
        (NO_MEMORY.name, FULL.name): "out of memory",
        (NO_LUCK.name, FULL.name): "failed",
    }
    assert {row["task"] for row in group["rows"]} == {task.name for task in (FULL, CACHED, FROZEN, SCORING)}
    for row in (row for record in data["shapes"] for row in record["rows"] if row["status"] == "measured"):
        assert row["seconds"]["both"].keys() == {"median", "iqr", "least", "rounds"}
        assert row["seconds"]["both"]["rounds"] == 6  # two blocks of three
        assert row["seconds"]["forward"]["median"] <= row["seconds"]["both"]["median"]
        assert min(row["over_floor"], row["tflops_per_second"]) > 0
        assert {"first_call_seconds", "peak_extra_bytes", "gradient_bytes"} <= row.keys()
        assert 0 <= row["error"]["logps_nats_rms"] <= row["error"]["logps_nats_max"] < 0.02
    assert "absent: onpo_fast fast: needs a GPU" in printed
    assert "out of memory at tiny-pairs-3x2x9: too large: OutOfMemoryError: it wanted more" in printed
    assert "failed at tiny-pairs-3x2x9: broken: RuntimeError: no such kernel\n" in printed
    assert printed.count("not measured") == len(TARGETS)
    assert "(they are set for an H100 or H200)" in printed
    assert "<svg" in bench.report.path.with_suffix(".svg").read_text()


def test_a_run_goes_on_where_it_stopped(bench: kernels.KernelBench) -> None:
    record = bench.report.shape(PAIRS, torch.float32)
    bench.report.begin(record, MATERIALISED, FULL)  # and there the process ended
    again = kernels.Report.open(bench.report.path, CPU, resume=True)
    bench.report = again
    bench.shape(PAIRS, [MATERIALISED, TORCH], thorough=False)
    status = {row["method"]: row["status"] for row in again.data["shapes"][0]["rows"] if row["task"] == FULL.name}
    assert status == {MATERIALISED.name: kernels.DID_NOT_RETURN, TORCH.name: "measured"}


def test_the_order_of_measurement() -> None:
    """What matters most first; what compiles for long last."""
    methods = list(METHODS)
    first, second, third = kernels.waves(methods, thorough=True, gpu=True)
    assert [row[1] for row in first[:4]] == [FULL, CACHED, FROZEN, SCORING]
    assert [row[0] for row in first[:8]] == [FAST] * 4 + [LEAN] * 2 + [MATERIALISED, TRL]
    assert {row[0] for row in second} == {MATERIALISED, TRL}
    assert [method for method, _ in third] == [*peers.SLOW, *[TORCH] * 4]
    rows = [*first, *second, *third]
    assert len(rows) == len(set(rows))
    assert {row[0] for row in rows} == set(METHODS)
    on_cpu = kernels.waves(methods, thorough=False, gpu=False)
    assert TORCH in [method for method, _ in on_cpu[0]]
    assert len(on_cpu) == 2


def test_no_time_and_no_inputs_are_said(bench: kernels.KernelBench, tmp_path, capsys) -> None:
    bench.inputs = tmp_path / "few.npz"
    inputs.save(bench.inputs, torch.randn(4, 576), torch.randn(7, 576), torch.arange(4))
    bench.shape(SHAPES["smollm2-text-4x2x256"], [TORCH], thorough=True)
    bench.deadline = time.monotonic() + 5
    bench.shape(PAIRS, [TORCH], thorough=True)
    bench.report.finish()
    printed = capsys.readouterr().out
    assert "few.npz has 4 tokens, 2048 are needed" in printed
    assert "tiny-pairs-3x2x9: not measured: no time left" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------


def _row(method: Method, task, seconds: float, extra_gib: float = 0, nats: float = 1, gradient: float = 1) -> dict:
    return {
        "method": method.name,
        "task": task.name,
        "status": "measured",
        "seconds": {"both": {"median": seconds}},
        "peak_extra_bytes": extra_gib * GIB,
        "error": {
            "logps_nats_max": nats,
            "logps_nats_rms": nats / 2,
            "hidden_gradient": gradient,
            "weight_gradient": gradient,
        },
    }


def test_verdicts_are_computed() -> None:
    rows = [
        _row(FAST, FULL, 4.5, extra_gib=0.9, nats=0.009, gradient=1.6),
        _row(FAST, CACHED, 3.3),
        _row(FAST, SCORING, 1.05),
        _row(LEAN, FULL, 5.5, extra_gib=0.4, nats=0.001),
        _row(TRL, FULL, 5.1, nats=0.9),
        _row(LIGER_DPO, FULL, 12.0, nats=0.01),
        _row(MATERIALISED, FULL, 9.0),
        _row(TORCH, FULL, 1.0, nats=0.001),  # ours is no peer
        _row(TRL, CACHED, 2.0),
    ]
    record = {"shape": TARGET.name, "floor_seconds": {"logits": 1.0, "hidden": 1.0, "weight": 1.0}, "rows": rows}
    found = verdicts([record])
    assert [v["measured"] for v in found] == pytest.approx(
        [4.5 / 4, 4.5 / 5.1, 0.9, 5.5 / 5, 0.4, 3.3 / 3, 1.05, 0.009, 0.9, 1.6, 1.6]
    )
    words = "missed met met met missed met met met met missed missed"
    assert [v["verdict"] for v in found] == words.split()
    assert [v["claim"] for v in found if "peer" in v["claim"]] == [
        "fast: time over the fastest peer's (TRL)",
        "fast: log-prob error over that of the most exact peer (Liger FusedLinearDPO)",
    ]
    rows[0]["error"]["logps_nats_max"] = rows[5]["error"]["logps_nats_rms"] = float("nan")
    rows[4]["status"] = "out of memory"
    found = verdicts([record])
    words = "missed met met met missed met met missed met missed missed"
    assert [v["verdict"] for v in found] == words.split()
    assert [v["claim"].rpartition("(")[2] for v in (found[1], found[8])] == [f"{MATERIALISED.name})"] * 2
    for row in rows:
        row["status"] = row["status"] if row["method"] in {method.name for method in OURS} else "absent"
    assert [v["verdict"] for v in verdicts([record]) if "peer" in v["claim"]] == ["not measured"] * 2
    assert {v["verdict"] for v in verdicts([{**record, "shape": "another"}])} == {"not measured"}


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_targets_are_for_hopper_gpus(device: str, bench: kernels.KernelBench, capsys) -> None:
    bench.report.data["environment"]["device"] = device
    bench.report.finish()
    assert "they are set for" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and checks
# ---------------------------------------------------------------------------------------------------------------------


def test_the_real_models_inputs(real_policy, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("onpo_fast.models.loading.load", lambda *_: real_policy)
    hidden, weight, targets = inputs.text_inputs(60, 30, "cpu")
    assert (hidden.shape, weight.shape, targets.shape) == ((60, 576), (49152, 576), (60,))
    assert hidden.abs().sum(1).min() > 0
    assert weight.abs().sum(1).min() > 0
    logps = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None])
    assert logps.mean() > -6  # nats a token; a guess among the vocabulary is at −10.8
    inputs.save(tmp_path / "inputs", hidden, weight, targets)
    for got, want in zip(inputs.text_inputs(50, 25, "cpu", tmp_path / "inputs"), (hidden, weight, targets)):
        torch.testing.assert_close(got, want[: len(got)], rtol=2**-8, atol=0)


def test_random_inputs_are_the_same_in_every_dtype() -> None:
    single, half = Problem.make(PAIRS), Problem.make(PAIRS, torch.bfloat16)
    assert torch.equal(single.weight.bfloat16(), half.weight)
    assert Problem.make(GROUP).pairs.tolist()[:7] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3], [4, 5]]


def test_checks_catch_what_they_are_for(exact: Exact) -> None:
    assert checks.faults_of(TORCH, FULL, exact.problem, exact) == []
    calls = iter(range(100))

    def spoiled(by) -> Method:
        def forward(problem, task, hidden, weight) -> Outcome:
            loss, logps = TORCH.forward(problem, task, hidden, weight)
            return Outcome(loss, logps.double() + by())

        return replace(TORCH, forward=forward)

    racing, unwritten, wrong = (
        checks.faults_of(spoiled(by), FULL, exact.problem, exact)
        for by in (lambda: 1e-9 * next(calls), lambda: float("nan"), lambda: 1.0)
    )
    assert racing == ["logps differs between runs"]
    assert "logps is not finite" in unwritten
    assert wrong[0].startswith("error of logps_nats_max")
    assert checks.faults_of(NO_LUCK, FULL, exact.problem, exact) == ["RuntimeError: no such kernel"]


def test_memory_that_does_not_suffice_is_no_fault(monkeypatch, capsys) -> None:
    monkeypatch.setattr(checks, "OURS", (TORCH, NO_MEMORY))
    parser = argparse.ArgumentParser()
    checks.arguments(parser)
    assert checks.main(parser.parse_args(["--device", "cpu", "--tiny"])) == 0
    printed = capsys.readouterr().out
    assert "tiny-2x2x40: too large, policy + reference: not checked: out of memory\n" in printed
    assert printed.endswith("0 faults, 1 not checked\n")


def test_one_slow_sample_does_not_make_float64_slow(monkeypatch) -> None:
    ticks = iter([0.0, 60.0, 100.0, 100.001, 200.0, 205.0])
    monkeypatch.setattr(accuracy.time, "perf_counter", lambda: next(ticks))
    problem = Problem.make(PAIRS)
    product = 2 * 1024 * 1024 * 2048
    assert accuracy.seconds(problem, 1) == pytest.approx(0.001 * 5 * problem.shape.gemm_flops / product)


def test_commands() -> None:
    usage = subprocess.run([sys.executable, "-m", "bench"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "kernels" in usage.stdout
