"""python -m bench training: whole runs of the trainer, and one fit of a large model.

fit: a Llama-3-8B with random weights, in bf16, with gradient checkpointing, on pairs of 2×1024 tokens, with the fused
losses and with materialised logits: pairs/s, and memory by part. Nothing is downloaded. Where the memory is too small
for all layers, fewer are taken, and the table says so.

run: the default model (or --model) plays three iterations under the embedded oracle, with the anchor cached and live,
on each backend of the loss, from the same seed: tokens/s and seconds by stage, memory. Where two backends round
differently, one sampled token sooner or later differs, and from there on the runs read different texts: the share of
equal responses says when. What rounding does to weights is therefore measured where the data are the same: the first
fit of the first run again, from its files, in several ways; differences are held against the update that the fit makes,
and against two yardsticks, the same sums in another order and the computation in float32.

Every run and every fit is a process of its own. The results file is rewritten after each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from onpo_fast.checkpoint import atomic_write_text, read_jsonl
from onpo_fast.data import read_groups

from .fits import LOSSES, SHAPES, WAYS, Marks
from .kernels import RESULTS

ROOT = Path(__file__).resolve().parents[1]
RUNS = tuple(product(("cached", "live"), ("triton", "torch")))  # anchor, backend
FEWER_LAYERS = 4  # at a time, should the memory be smaller than computed
GB = 1e9

Row = dict[str, Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--part", choices=("fit", "run", "all"), default="all")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop what runs then")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b" if gpu else "tiny", help="of the large model")
    parser.add_argument("--pairs", type=int, default=4, help="a step of its fit")
    parser.add_argument("--steps", type=int, default=8, help="that are timed")
    parser.add_argument("--model", default="smollm2", help="of the runs: a directory, or a name that the trainer knows")
    parser.add_argument("--iterations", type=int, default=3, help="of the runs")
    parser.add_argument("--train", default="", metavar="'OPTIONS'", help="more options of the runs")
    parser.add_argument("--work", type=Path, help="folder for the runs, kept (15 GB); by default one that is removed")


def main(options: argparse.Namespace) -> int:
    bench = Bench(options)
    if options.part in ("fit", "all"):
        bench.fits()
    if options.part in ("run", "all"):
        if options.work:
            bench.runs(options.work)
        else:
            with tempfile.TemporaryDirectory(prefix="bench-training-") as work:
                bench.runs(Path(work))
    bench.show()
    return 1 if any(row["status"] == "failed" for row in bench.rows()) else 0


class Bench:
    """Measures into a results file until the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + options.budget
        found = self.job("here", device=options.device)  # a process that holds the GPU would hold memory of it
        if found.get("status"):
            raise SystemExit(f"--device {options.device}: {found['reason']}")
        self.path = options.out / f"{found['name']}.json"
        self.data: dict[str, Any] = {
            "command": " ".join(["python -m bench", *map(shlex.quote, sys.argv[1:])]),
            "environment": found["environment"], "fits": [], "runs": [], "first_fit": {},
        }  # fmt: skip

    def rows(self) -> Iterator[Row]:
        yield from self.data["fits"]
        yield from self.data["runs"]
        yield from self.data["first_fit"].values()

    def save(self, what: str, row: Row) -> None:
        atomic_write_text(self.path, json.dumps(self.data, indent=1) + "\n")
        reason = f": {row['reason']}" if row.get("reason") else ""
        print(f"{what}: {row['status']}{reason}", file=sys.stderr, flush=True)

    # Processes --------------------------------------------------------------------------------------------------------

    def process(self, command: list[str], **environment: str) -> tuple[Row, str]:
        """How it ended, and what it printed. ``environment``: unless it is set already."""
        left = self.end - time.monotonic()
        if left <= 0:
            return {"status": "skipped", "reason": "no time left"}, ""
        start = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command], cwd=ROOT, env={**environment, **os.environ}, capture_output=True,
                text=True, errors="replace", timeout=None if left == float("inf") else left, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"status": "stopped", "reason": f"no time left after {left:.0f} s"}, ""
        ended = {"wall_seconds": time.monotonic() - start}
        if done.returncode == 0:
            return {"status": "measured", **ended}, done.stdout
        print(done.stdout[-1000:], done.stderr[-3000:], sep="\n", file=sys.stderr, flush=True)
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").split("\n")[-1]
        return {"status": "out of memory" if "OutOfMemoryError" in said else "failed", "reason": said[:300]}, ""

    def job(self, name: str, **arguments: Any) -> Row:
        """Of ``bench.fits``: its result, or how it ended without."""
        # nine tenths of the memory are asked for: what is free must not lie between blocks of fixed sizes
        allocator = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if name == "large" else {}
        row, output = self.process(["bench.fits", name, json.dumps(arguments)], **allocator)
        return json.loads(output.splitlines()[-1]) if output else row

    # The large model --------------------------------------------------------------------------------------------------

    def fits(self) -> None:
        """Every loss at the same number of layers: as many as the first one can have."""
        chosen = self.options
        size = {"shape": chosen.shape, "pairs": chosen.pairs, "steps": chosen.steps}
        layers = None
        for loss in LOSSES:
            while True:
                row = self.job("large", loss=loss, device=chosen.device, layers=layers, **size)
                row = {"loss": loss, **size, **row}
                self.data["fits"].append(row)
                self.save(f"fit with {loss}", row)
                layers = row.get("layers", layers)
                none_yet = not any(row["status"] == "measured" for row in self.data["fits"])
                if not (none_yet and row["status"] == "out of memory" and layers and layers > FEWER_LAYERS):
                    break
                layers -= FEWER_LAYERS

    # Runs -------------------------------------------------------------------------------------------------------------

    def runs(self, work: Path) -> None:
        """The first fit's ways right after the first run: if the time is short, they matter more than further runs."""
        first: Path | None = None
        for anchor, backend in RUNS:
            directory = work / f"{anchor}-{backend}"
            row: Row = {"anchor": anchor, "backend": backend}
            if self.options.device == "cpu" and backend == "triton":
                row |= {"status": "absent", "reason": "needs a GPU"}
            else:
                row |= self.run(directory, anchor, backend)
                if row["status"] == "measured":
                    row |= measures(directory)
                    row["equal_responses"] = equal_responses(directory, first or directory)
            self.data["runs"].append(row)
            self.save(f"run, {anchor} anchor, {backend}", row)
            if first is None and row["status"] == "measured":
                first = directory
                self.ways(first)

    def run(self, directory: Path, anchor: str, backend: str) -> Row:
        chosen = self.options
        row, _ = self.process([
            "onpo_fast.train", "--out", str(directory.resolve()), "--model", chosen.model,
            "--iterations", str(chosen.iterations), "--anchor", anchor, "--loss_backend", backend,
            "--device", chosen.device, "--report_to", "none", *shlex.split(chosen.train),
        ])  # fmt: skip
        return row

    def ways(self, run: Path) -> None:
        rows = self.job("agreement", run=str(run.resolve()), device=self.options.device)
        if "status" in rows:  # it came to no end
            rows = {way: rows for way in WAYS}
        self.data["first_fit"] = rows
        for way, row in rows.items():
            self.save(f"first fit, {way}", row)

    # Tables -----------------------------------------------------------------------------------------------------------

    def show(self) -> None:
        console = Console(width=160, highlight=False)
        device = self.data["environment"]["device"]
        console.print(device, markup=False)
        if self.data["fits"]:
            console.print(fit_table(self.data["fits"], device))
        if self.data["runs"]:
            console.print(run_table(self.data["runs"]))
        if self.data["first_fit"]:
            console.print(ways_table(self.data["first_fit"]))
        print(f"written: {self.path}")


# ---------------------------------------------------------------------------------------------------------------------
# What a run has left
# ---------------------------------------------------------------------------------------------------------------------


def measures(run: Path) -> Row:
    """Of a finished run: by stage, medians of tokens/s (over iterations, in fits over steps), seconds in all, peaks."""
    records = list(read_jsonl(run / "metrics.jsonl"))
    rates: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for record in records:
        stage = record["stage"]
        if "tokens_per_second" in record:
            rates.setdefault(stage, []).append(record["tokens_per_second"])
        if "peak_memory_bytes" in record and record["iteration"] == 1:  # it is the most so far: see the table
            peaks[stage] = max(peaks.get(stage, 0), record["peak_memory_bytes"])
        for name, spent in record.get("stage_seconds", {}).items():
            seconds[name] = seconds.get(name, 0.0) + spent
        if stage == "evaluate":
            seconds[stage] = record["seconds"]
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    return {
        "tokens_per_second": {stage: statistics.median(values) for stage, values in rates.items()},
        "peak_bytes": peaks, "stage_seconds": seconds,
        "win_rate": evaluation["win_rate"][-1][0], "interval": evaluation["interval"][-1][0],
        "kl_to_initial": evaluation["kl_to_initial"][-1],
    }  # fmt: skip


def equal_responses(run: Path, other: Path) -> list[float]:
    """The share of responses that are the same token by token, by iteration."""
    shares = []
    for file in sorted(run.glob("iteration_*/responses.jsonl")):
        groups = zip(read_groups(file), read_groups(other / file.relative_to(run)))
        same = [a.tokens == b.tokens for ours, theirs in groups for a, b in zip(ours.responses, theirs.responses)]
        shares.append(sum(same) / len(same))
    return shares


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def fit_table(rows: list[Row], device: str) -> Table:
    title = f"A fit of {rows[0]['shape']} with random weights"
    if sized := next((row for row in rows if "parameters" in row), None):
        expected = ", ".join(f"{part} {size / GB:.3g}" for part, size in sized["expected_bytes"].items())
        title += (f", {sized['parameters']:.3g} parameters in bf16, {sized['pairs']} pairs a step, of 2×"
                  f"{SHAPES[sized['shape']].response} tokens. To expect, GB: {expected}")  # fmt: skip
    if device.startswith("cpu"):
        title += ". On a CPU the memory is the process's, which seldom gives any back"
    table = _table(
        title, "loss", "layers", "pairs/s", "s\na step", "± iqr", "weights\nGB", "gradients\nGB", "moments\nGB",
        "kept by\nforward, GB", "added by\nloss, GB", *(f"peak, GB\n{phase}" for phase in Marks.PHASES),
    )  # fmt: skip
    for row in rows:
        layers = f"{row['layers']} of {row['of_layers']}" if "layers" in row else ""
        if row["status"] != "measured":
            table.add_row(row["loss"], layers, row["status"])
            continue
        parts = ("weights", "gradients", "moments", "kept by the forward pass", "loss")
        table.add_row(
            row["loss"], layers, f"{row['pairs_per_second']:.3g}",
            *(f"{row['seconds'][k]:.3g}" for k in ("median", "iqr")), *(_gb(row["bytes"][part]) for part in parts),
            *(_gb(size) for size in row["peak_bytes"].values()),
        )  # fmt: skip
    return table


def run_table(rows: list[Row]) -> Table:
    stages = ("sample", "score", "fit")
    table = _table(
        "Runs: tokens/s and seconds by stage; the most memory up to the end of the first sampling and first fits; "
        "responses that are the first run's, by iteration; the last policy against π_1 (win rate, KL in nats)",
        "anchor", "backend", *(f"{stage}\ntok/s" for stage in stages), "sample\ns", "judge\ns", "score\ns",
        "fits\ns", "evaluate\ns", "sample\nGB", "fit\nGB", "equal\nresponses", "win\nrate", "KL",
    )  # fmt: skip
    for row in rows:
        if row["status"] != "measured":
            table.add_row(row["anchor"], row["backend"], row["status"])
            continue
        seconds = row["stage_seconds"]
        fits = sum(spent for name, spent in seconds.items() if name.startswith("fit"))
        table.add_row(
            row["anchor"], row["backend"], *(f"{row['tokens_per_second'].get(stage, 0):.4g}" for stage in stages),
            *(f"{seconds.get(stage, 0):.3g}" for stage in ("sample", "judge", "score")), f"{fits:.3g}",
            f"{seconds['evaluate']:.3g}", *(_gb(row["peak_bytes"][stage]) for stage in ("sample", "fit")),
            " ".join(f"{share:.0%}" for share in row["equal_responses"]), f"{row['win_rate']:.1%}",
            f"{row['kl_to_initial']:.2f}",
        )  # fmt: skip
    return table


def ways_table(rows: dict[str, Row]) -> Table:
    first = next(iter(rows))
    table = _table(
        f"The first fit again on the same data: weights against those of «{first}», as shares of its update",
        "", "seconds", "rms", "greatest", "loss in the last step", "loss, greatest difference",
    )  # fmt: skip
    for way, row in rows.items():
        if row["status"] != "measured":
            table.add_row(way, row["status"])
            continue
        table.add_row(
            way, f"{row['seconds']:.3g}", *(f"{row['difference'][k] / row['update'][k]:.2e}" for k in ("rms", "max")),
            f"{row['loss_last']:.6f}", f"{row['loss_difference']:.1e}",
        )  # fmt: skip
    return table


def _gb(size: int) -> str:
    return f"{size / GB:.2f}"


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", title_style="bold")
