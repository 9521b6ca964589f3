"""Runs of two ranks (gloo, CPU): the weights of one process, and how they end and go on together."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support import ranks
from support.ranks import Ended, Job
from support.small_runs import prepare
from support.tiny_models import make_family

OPTIONS = {
    "prompts_per_iteration": 5,
    "responses_per_prompt": 3,
    "max_new_tokens": 6,
    "eval_samples": 1,
    "batch_pairs": 6,
    "iterations": 1,
    "checkpoint_steps": 1,
    "learning_rate": 5e-5,
    "eval_fraction": 0.4,
    "sampling_batch_size": 3,
    "tokens_per_microbatch": 64,
    "device": "cpu",
    "report_to": "none",
}
TURNS = ("--environment", "partner", "--turns", "2")
SELECTED = ("--select", "8", "--selection", "variance")
LORA = ("--lora_rank", "2", "--learning_rate", "1e-3")
AUXILIARY = "iteration_01/auxiliary"
LAST = "iteration_01/policy"
TOLERANCE = 1e-5  # of every weight

pytestmark = pytest.mark.long


def new_run(work: Path, *arguments: str) -> list[str]:
    options = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    return ["--model", str(work / "model"), "--prompts", str(work / "prompts.jsonl"), *options, *arguments]


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_model) -> Path:
    work = tmp_path_factory.mktemp("ranks")
    prepare(work, tiny_model)
    make_family("llama", work / "untied")
    return work


@pytest.fixture(scope="module")
def ended(work: Path) -> dict[str, Ended]:
    """How the runs of this page ended, by the name of their directory in ``work``."""
    tied, untied = new_run(work), [*new_run(work), "--model", str(work / "untied")]
    half = [*untied, "--weights", "bf16-sr", "--optimizer", "adamw"]
    jobs = {
        "one": Job(1, tied, ""),
        "two": Job(2, tied, ""),
        "one, untied": Job(1, [*untied, "--gradient_checkpointing"], ""),
        "two, untied": Job(2, [*untied, "--gradient_checkpointing", "--anchor", "live"], ""),
        "two, half": Job(2, half, ""),
        "two, autocast": Job(2, [*tied, "--dtype", "bfloat16"], ""),
        "one, LoRA": Job(1, [*tied, *LORA], ""),
        "two, LoRA": Job(2, [*tied, *LORA], ""),
        "one, turns": Job(1, [*tied, *TURNS], ""),
        "two, turns": Job(2, [*tied, *TURNS], ""),
        "one, selected": Job(1, [*tied, *SELECTED], ""),
        "two, selected": Job(2, [*tied, *SELECTED], ""),
        "stopped, LoRA": Job(2, [*tied, *LORA], "", at=(1, 2, "SIGTERM")),
        "stopped, LoRA, then two": Job(2, ["--resume"], "", begun="stopped, LoRA"),
        "killed": Job(2, tied, "", at=(1, 2, "SIGKILL")),
        "killed, then two": Job(2, ["--resume"], "", begun="killed"),
        "stopped": Job(2, tied, "", at=(1, 2, "SIGTERM")),
        "stopped, then one": Job(1, ["--resume"], "", begun="stopped"),
        "stopped, then two": Job(2, ["--resume"], "", begun="stopped"),
        "one, stopped": Job(1, tied, "", at=(0, 2, "SIGTERM")),
        "one, stopped, then two": Job(2, ["--resume"], "", begun="one, stopped"),
        "error on one": Job(2, tied, "", at=(1, 2, "error")),
        "hung": Job(2, [*tied, "--rank_timeout", "0.1"], "", at=(1, 2, "hang")),
        "too many": Job(3, tied, ""),
    }
    for name, job in jobs.items():
        job.out = str(work / name)
        job.begun = job.begun and str(work / job.begun)
    return dict(zip(jobs, ranks.run(list(jobs.values()), work / "output")))


def weights(directory: Path, policy: str = LAST) -> dict[str, torch.Tensor]:
    return load_file(directory / policy / "model.safetensors")


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of two weights."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance of all weights."""
    return sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("two", "one"),
        ("two, untied", "one, untied"),
        ("two, turns", "one, turns"),
        ("two, selected", "one, selected"),
        ("stopped, then one", "one"),
        ("one, stopped, then two", "one"),
    ],
)
def test_final_weights_are_those_of_one_process(ended: dict[str, Ended], work: Path, ours: str, theirs: str) -> None:
    """Also with states that another number of ranks has written, conversations, and selected pairs.

    Untied with recomputation, and a live anchor.
    """
    assert ended[ours].statuses == [0] * len(ended[ours].statuses), ended[ours].errors
    start = weights(work / ("untied" if "untied" in ours else "model"), ".")
    for policy in (AUXILIARY, LAST):
        fitted, expected = weights(work / ours, policy), weights(work / theirs, policy)
        assert difference(fitted, expected) < TOLERANCE
        assert distance(fitted, expected) < 1e-3 * distance(expected, start)


def test_adapters_are_those_of_one_process(ended: dict[str, Ended], work: Path) -> None:
    """Each rank has them whole, and the base is left alone; a run that was stopped ends with the same bits."""
    ours, theirs, resumed = (
        load_file(work / name / LAST / "adapter_model.safetensors")
        for name in ("two, LoRA", "one, LoRA", "stopped, LoRA, then two")
    )
    assert ended["two, LoRA"].statuses == ended["stopped, LoRA, then two"].statuses == [0, 0]
    assert difference(ours, theirs) < TOLERANCE
    assert max(float(weight.abs().max()) for name, weight in ours.items() if "lora_B" in name) > 100 * TOLERANCE
    assert difference(resumed, ours) == 0
    norms = [  # which a sum in place of a mean would change, where AdamW's steps do not show it
        [record["gradient_norm"] for record in records(work / name) if record["stage"] == "fit"]
        for name in ("two, LoRA", "one, LoRA")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("name", ["killed, then two", "stopped, then two"])
def test_a_run_that_goes_on_has_the_same_bits_with_as_many_ranks(ended, work: Path, name: str) -> None:
    assert ended[name].statuses == [0, 0], ended[name].errors
    for policy in (AUXILIARY, LAST):
        assert difference(weights(work / name, policy), weights(work / "two", policy)) == 0


@pytest.mark.parametrize(
    ("begun", "name"),
    [
        ("stopped", "stopped, then two"),
        ("stopped", "stopped, then one"),
        ("one, stopped", "one, stopped, then two"),
    ],
)
def test_finished_steps_are_not_taken_again(ended: dict[str, Ended], work: Path, begun: str, name: str) -> None:
    before, after = ([one for one in records(work / run) if one["stage"] == "fit"] for run in (begun, name))
    assert [record["step"] for record in before] == [1, 2]
    assert after[:2] == before  # at the same times
    assert after[2]["step"] == 3


def test_a_rank_that_was_killed_ends_the_others(ended: dict[str, Ended]) -> None:
    killed = ended["killed"]
    assert killed.statuses == [1, -signal.SIGKILL]
    lines = killed.errors.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [line for line in lines if "rank 1" in line]
    assert "has died; to go on: torchrun --nproc-per-node 2 -m onpo_fast.train --resume --out" in killed.errors
    assert "Traceback" not in killed.errors
    assert killed.seconds < 60


def test_a_signal_to_one_rank_stops_all_after_the_step(ended: dict[str, Ended], work: Path) -> None:
    stopped = ended["stopped"]
    assert stopped.statuses == [128 + signal.SIGTERM] * 2, stopped.errors
    assert stopped.output.count("stopped by SIGTERM; to go on: torchrun --nproc-per-node 2") == 1
    assert "Traceback" not in stopped.errors
    assert (work / "stopped" / f"{AUXILIARY}.checkpoints" / "step_00000002" / "rank_00001.safetensors").is_file()


@pytest.mark.parametrize(("name", "names"), [("error on one", "--this_rank"), ("too many", "--batch_pairs 6")])
def test_an_error_is_one_line(ended: dict[str, Ended], name: str, names: str) -> None:
    failed = ended[name]
    assert set(failed.statuses) == {2}
    assert failed.errors.count("error: ") == failed.errors.count(names) == 1
    assert "Traceback" not in failed.errors
    assert failed.seconds < 60


def test_a_rank_that_hangs_ends_the_others_after_the_time_out(ended: dict[str, Ended]) -> None:
    hung = ended["hung"]
    assert hung.statuses == [2, 2]
    assert hung.errors.count("error: ") == hung.errors.count("--rank_timeout") == 1
    assert "to go on: torchrun --nproc-per-node 2" in hung.errors
    assert "Traceback" not in hung.errors
    assert hung.seconds < 60


def test_rank_0_alone_writes_metrics(ended: dict[str, Ended], work: Path) -> None:
    """With the numbers of one process: each pair counts once, whichever rank had it."""
    one, two = records(work / "one"), records(work / "two")
    assert [record["stage"] for record in one] == [record["stage"] for record in two]
    for ours, theirs in zip(two, one):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "margin", "pair_accuracy", "gradient_norm", "pairs", "responses", "kl_to_initial"):
            if theirs.get(name) is not None:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4)


def test_bfloat16_weights_are_saved_as_they_are_in_memory(ended: dict[str, Ended], work: Path) -> None:
    """``check_saved`` compares them on rank 0."""
    assert ended["two, half"].statuses == [0, 0], ended["two, half"].errors
    assert {weight.dtype for weight in weights(work / "two, half").values()} == {torch.bfloat16}


def test_float32_weights_under_autocast_are_saved_in_float32(ended: dict[str, Ended], work: Path) -> None:
    """Of a tied model too: autocast's copies of gathered weights are no weights."""
    assert ended["two, autocast"].statuses == [0, 0], ended["two, autocast"].errors
    start = weights(work / "model", ".")
    for policy in (AUXILIARY, LAST):
        fitted = weights(work / "two, autocast", policy)
        assert 0 < difference(fitted, start) < 100 * OPTIONS["learning_rate"]
        for name, weight in fitted.items():
            assert (weight != weight.bfloat16().float()).float().mean() > 0.5, name


def test_states_are_a_checkpoint_of_torch_distributed(ended: dict[str, Ended], work: Path) -> None:
    """In its format of safetensors files, with the shards of each rank."""
    state = work / "stopped" / f"{AUXILIARY}.checkpoints" / "step_00000002"
    files = [load_file(state / f"rank_0000{rank}.safetensors") for rank in range(2)]
    reader = dcp.HuggingFaceStorageReader(str(state))
    whole = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(whole, storage_reader=reader, no_dist=True)
    name = "exp_avg.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(whole[name], torch.cat([file[name] for file in files]))


def test_torchrun_hands_a_signal_on(work: Path, ended: dict[str, Ended]) -> None:
    out = work / "torchrun"
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "onpo_fast.train"]
    process = subprocess.Popen(
        [*line, *new_run(work), "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "iteration_01" / "responses.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert stdout.count("stopped by SIGTERM; to go on: torchrun --nproc-per-node 2") == 1, stdout + stderr
    assert "error: " not in stderr
    shutil.rmtree(out)
