"""The benchmark of sampling: every way samples what was asked, and what fails is a row of its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import samplers, sampling
from bench.samplers import Case


@pytest.fixture
def case(tiny_model: Path, tmp_path: Path) -> dict:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {word}."}}\n' for word in ("red", "blue, or green", "nothing")))
    sizes = {"count": 3, "responses": 2, "max_new_tokens": 6, "batch_size": 4, "times": 2}
    return {"model": str(tiny_model), "prompts": str(prompts), "device": "cpu", **sizes}


@pytest.mark.parametrize("sampler", ["transformers generate", "batches of generate", "local"])
def test_lengths_and_rates(sampler: str, case: dict) -> None:
    with samplers.SAMPLERS[sampler](Case(sampler=sampler, **case)) as sample:
        first, second, again = sample(0), sample(1), sample(0)
    assert len(first) == 6
    assert all(1 <= length <= 6 for length in first + second)
    assert again == first  # what a seed samples is fixed
    row = samplers.measure(Case(sampler=sampler, **case))
    assert row["tokens_mean"] == pytest.approx(sum(first + second) / 12)
    assert row["cut_off"] == pytest.approx(sum(length == 6 for length in first + second) / 12)
    assert row["tokens_per_second"]["median"] > 0


def test_the_peak_is_that_of_the_samples(case: dict, monkeypatch) -> None:
    size = 2**28  # bytes: far above what this process may hold already

    @contextmanager
    def greedy(case: Case) -> Iterator[Callable[[int], list[int]]]:
        yield lambda seed: [int(torch.ones(size, dtype=torch.uint8)[-1])]

    monkeypatch.setitem(samplers.SAMPLERS, "greedy", greedy)
    assert samplers.measure(Case(sampler="greedy", **case))["peak_bytes"] == pytest.approx(size, rel=0.2)


def test_both_of_this_packages_samplers_give_the_same_responses(case: dict) -> None:
    lengths = []
    for name in ("batches of generate", "local"):
        with samplers.SAMPLERS[name](Case(sampler=name, **case)) as sample:
            lengths.append(sample(3))
    assert lengths[0] == lengths[1]


def test_the_table_and_what_fails(tiny_model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def job(self, module: str, **arguments) -> dict:
        assert module == "bench.samplers"
        case = Case(**arguments)
        if case.sampler == "vllm offline":
            return {"status": "failed", "reason": "no vLLM"}
        return samplers.measure(case)

    monkeypatch.setattr(sampling.Jobs, "job", job)
    parser = argparse.ArgumentParser()
    sampling.arguments(parser)
    names = ["transformers generate", "local", "vllm offline"]
    sizes = ["--prompts", "2", "--responses", "2", "--max_new_tokens", "4", "--batch_size", "3", "--times", "1"]
    where = ["--model", str(tiny_model), "--device", "cpu", "--out", str(tmp_path)]
    assert sampling.main(parser.parse_args(["--samplers", *names, *sizes, *where])) == 1
    rows = json.loads((tmp_path / "sampling.json").read_text())["samplers"]
    assert [(row["sampler"], row["status"]) for row in rows] == [
        ("transformers generate", "measured"),
        ("local", "measured"),
        ("vllm offline", "failed"),
    ]
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rates = {row["sampler"]: row["tokens_per_second"]["median"] for row in rows[:2]}
    ratio = rates["local"] / rates["transformers generate"]
    assert float(table[3][3]) == pytest.approx(ratio, abs=0.01)
    assert table[4][2].strip() == "failed"
