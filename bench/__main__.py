"""Runs the benchmark of the loss and writes what it found.

python -m bench loss        time, memory and error of the pairwise loss on this machine, beside its peers
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from onpo_fast import fused_linear_pair_loss
from onpo_fast.objectives import Onpo
from onpo_fast.tracking import environment

from .memory import peak_extra_bytes
from .peers import PEERS
from .problems import ETA, SHAPES, Problem

RESULTS = Path(__file__).parent / "results"


def relative_errors(shape: str) -> dict[str, dict[str, float]]:
    """Of loss and gradients against float64, in fp32."""
    problem = Problem.make(SHAPES[shape])
    hidden, weight = (x.double().requires_grad_() for x in (problem.hidden, problem.weight))
    loss = fused_linear_pair_loss(
        hidden, weight, problem.targets, problem.cu_seqlens, objective=Onpo(eta=ETA), backend="reference",
        ref_hidden=problem.ref_hidden.double(), ref_weight=problem.ref_weight.double(),
    ).loss  # fmt: skip
    loss.backward()
    exact = (loss.detach(), hidden.grad, weight.grad)
    names = ("loss", "hidden gradient", "weight gradient")
    return {
        peer: {
            n: float((got.double() - want).norm() / want.norm()) for n, got, want in zip(names, call(problem), exact)
        }
        for peer, call in PEERS.items()
    }


def loss() -> None:
    with tempfile.TemporaryDirectory() as directory:
        raw = Path(directory) / "benchmark.json"
        code = pytest.main([str(Path(__file__).parent), "--benchmark-only", "-q", f"--benchmark-json={raw}"])
        if code:
            raise SystemExit(code)
        measured = json.loads(raw.read_text())["benchmarks"]
    rows = []
    for shape in SHAPES:
        times = {b["extra_info"]["peer"]: b["stats"] for b in measured if b["group"] == shape}
        errors = relative_errors(shape)
        base = times["materialised"]["median"]
        for peer, stats in times.items():
            flops = 4 * SHAPES[shape].gemm_flops
            row = {
                "shape": shape, "peer": peer, "median_seconds": stats["median"], "iqr_seconds": stats["iqr"],
                "gflops_per_second": flops / stats["median"] / 1e9, "time_over_materialised": stats["median"] / base,
                "time_over_bare_gemms": stats["median"] / times["bare_gemms"]["median"],
            }  # fmt: skip
            if peer in PEERS:
                row |= {"peak_extra_bytes": peak_extra_bytes(peer, shape), "relative_error": errors[peer]}
            rows.append(row)
    _print(rows)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "loss-cpu.json"
    path.write_text(json.dumps({"environment": environment(torch.device("cpu")), "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


def _print(rows: list[dict]) -> None:
    table = Table("shape", "", "median s", "± iqr", "× materialised", "× bare GEMMs", "peak extra MB", "gradient error")
    for row in rows:
        memory = f"{row['peak_extra_bytes'] / 1e6:.0f}" if "peak_extra_bytes" in row else ""
        error = f"{row['relative_error']['weight gradient']:.1e}" if memory else ""
        table.add_row(
            row["shape"], row["peer"], f"{row['median_seconds']:.2f}", f"{row['iqr_seconds']:.2f}",
            f"{row['time_over_materialised']:.2f}", f"{row['time_over_bare_gemms']:.2f}", memory, error,
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    if sys.argv[1:] != ["loss"]:
        raise SystemExit("usage: python -m bench loss")
    loss()
