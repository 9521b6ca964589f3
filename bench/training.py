"""python -m bench training: measures fits against TRL's trainer, fits of a large model, or a run of the trainer.

--part trl: a fit of SmolLM2 by this package and by TRL's DPOTrainer on the same tokens, with two responses a prompt and
with eight, all pairs of which are compared. Prompts and responses have about 128 tokens. Reports pairs/s, response
tokens/s, peak memory above that before the model was loaded, and utilisation: the FLOP/s of what the pairs need, with
each prompt and response computed once, as a share of a plain product's.

--part fit: a Llama-3-8B with random weights in bf16, with gradient checkpointing, on pairs of 2×1024 tokens in one
micro-batch, or in its halves if that does not fit, with the fused loss and with materialised logits. Reports pairs/s
and memory by part. Nothing is downloaded. If the memory is too small for all layers, fewer are used, and the table says
so.

--part run: the trainer with its defaults or the options of --train. Reports tokens/s, seconds and memory by stage, also
if the time ends before the run.

Every fit and run is a process of its own. The results file, training.json, is rewritten after each, and every few
seconds during a run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from onpo_fast.arguments import at_least, positive
from onpo_fast.files import atomic_write_text

from . import crash_test
from .fits import LOSSES, WORKLOADS
from .jobs import Jobs, Row
from .kernels import DID_NOT_RETURN, RESULTS
from .summary import fit_table, run_table, trainer_table

FEWER_LAYERS = 4  # number of layers removed after each out-of-memory error


def arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument(
        "--part",
        choices=("trl", "fit", "run"),
        default="trl",
        help="What to measure: fits against TRL's, fits of a large model, or a whole run (default: %(default)s).",
    )
    parser.add_argument(
        "--device",
        default="cuda" if gpu else "cpu",
        help="Device on which to train (default: cuda if there is a GPU, otherwise cpu).",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=float("inf"),
        metavar="SECONDS",
        help="Stop the running measurement after this many seconds and start no other (default: no limit).",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder for training.json (default: bench/results).")
    trl = parser.add_argument_group("options of --part trl")
    trl.add_argument(
        "--model",
        choices=("smollm2", *WORKLOADS),
        default="smollm2",
        help="Model to fit: the bundled one, or random weights of a shape (default: %(default)s).",
    )
    trl.add_argument(
        "--responses",
        type=at_least(2),
        nargs="+",
        default=[2, 8],
        metavar="K",
        help="Responses of a prompt, one comparison each (default: 2 8).",
    )
    trl.add_argument(
        "--pairs_per_step", type=at_least(1), default=8, help="Least number of pairs in an optimizer step (default: 8)."
    )
    trl.add_argument("--timed_steps", type=at_least(1), default=3, help="Steps to time after a first one (default: 3).")
    trl.add_argument(
        "--tokens", type=at_least(1), default=128, help="Mean tokens of prompts and responses (default: 128)."
    )
    trl.add_argument(
        "--trl_batches",
        type=at_least(1),
        nargs="+",
        default=[1, 2, 4],
        metavar="PAIRS",
        help="TRL's per_device_train_batch_size: it is measured with each (default: 1 2 4).",
    )
    trl.add_argument(
        "--microbatches",
        type=at_least(1),
        nargs="+",
        default=[512, 1024] if not gpu else [4096, 16384],
        metavar="TOKENS",
        help="This package's tokens_per_microbatch: it is measured with each (default: 512 1024; on a GPU 4096 16384).",
    )
    fit = parser.add_argument_group("options of --part fit")
    fit.add_argument(
        "--shape",
        choices=WORKLOADS,
        default="llama3-8b" if gpu else "tiny",
        help="Model and sequence lengths (default: llama3-8b if there is a GPU, otherwise tiny).",
    )
    fit.add_argument(
        "--losses",
        nargs="+",
        choices=LOSSES,
        default=["triton", "materialised"],
        help="Loss implementations to fit with, one fit each (default: triton materialised).",
    )
    fit.add_argument("--pairs", type=at_least(1), default=4, help="Pairs per optimizer step (default: %(default)s).")
    fit.add_argument("--steps", type=at_least(1), default=8, help="Number of timed steps (default: %(default)s).")
    run = parser.add_argument_group("options of --part run")
    run.add_argument(
        "--train",
        default="",
        metavar="'OPTIONS'",
        help="Options of `python -m onpo_fast.train` for the run, as one word (default: none).",
    )
    run.add_argument("--tiny", action="store_true", help="Train a random model of two layers on ten prompts.")


def main(options: argparse.Namespace) -> int:
    bench = TrainingBench(options)
    if options.part == "trl":
        bench.against_trl()
    elif options.part == "fit":
        bench.fits()
    else:
        with tempfile.TemporaryDirectory(prefix="bench-training-") as work:
            bench.run(Path(work))
    bench.show()
    rows = (row for kind in ("trainers", "fits", "runs") for row in bench.data[kind])
    return 1 if any(row["status"] == "failed" for row in rows) else 0


class TrainingBench(Jobs):
    """Measures fits and runs into a results file until the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        super().__init__(options.budget)
        self.path = options.out / "training.json"
        self.data: dict[str, Any] = {
            "command": " ".join(["python -m bench", *map(shlex.quote, sys.argv[1:])]),
            "environment": None,
            "trainers": [],
            "fits": [],
            "runs": [],
        }

    def save(self, row: Row) -> None:
        self.data["environment"] = row.pop("environment", None) or self.data["environment"]
        atomic_write_text(self.path, json.dumps(self.data, indent=1) + "\n")

    def ended(self, what: str, row: Row) -> None:
        self.save(row)
        reason = f": {row['reason']}" if row.get("reason") else ""
        print(f"{what}: {row['status']}{reason}", file=sys.stderr, flush=True)

    def against_trl(self) -> None:
        """Measures fits by this package and by TRL's trainer, each with its batch sizes, by number of responses."""
        chosen = self.options
        for responses in chosen.responses:
            pairs = responses * (responses - 1) // 2
            case = {
                "model": chosen.model,
                "device": chosen.device,
                "responses": responses,
                "prompts": -(-chosen.pairs_per_step // pairs),
                "steps": chosen.timed_steps,
                "tokens": chosen.tokens,
            }
            ours = [{"trainer": "onpo_fast", "microbatch": tokens} for tokens in chosen.microbatches]
            for trainer in (*ours, *({"trainer": "trl", "at_once": n} for n in chosen.trl_batches)):
                row = {**trainer, **case, **self.job("bench.trainers", **trainer, **case)}
                self.data["trainers"].append(row)
                self.ended(f"{trainer['trainer']}, {responses} responses a prompt", row)

    def fits(self) -> None:
        """Measures a fit with each loss, all with the number of layers that fits with the first loss."""
        chosen = self.options
        size = {"shape": chosen.shape, "pairs": chosen.pairs, "steps": chosen.steps}
        layers = None
        for loss in chosen.losses:
            while True:
                row = self.job("bench.fits", loss=loss, device=chosen.device, layers=layers, **size)
                row = {"loss": loss, **size, **row}
                self.data["fits"].append(row)
                self.ended(f"fit with {loss}", row)
                layers = row.get("layers", layers)
                none_yet = not any(row["status"] == "measured" for row in self.data["fits"])
                if not (none_yet and row["status"] == "out of memory" and layers and layers > FEWER_LAYERS):
                    break
                layers -= FEWER_LAYERS

    def run(self, work: Path) -> None:
        directory = work.resolve() / "run"
        train = self.options.train
        if self.options.tiny:
            crash_test.write_small_model(work, "smollm2")
            tiny = {"model": work / "model", "prompts": work / "prompts.jsonl", **crash_test.SMALL_RUN_OPTIONS}
            train = " ".join([*(f"--{name} {value}" for name, value in tiny.items()), train])
        command = [
            "onpo_fast.train",
            "--out",
            str(directory),
            "--device",
            self.options.device,
            "--report_to",
            "none",
            *shlex.split(train),
        ]
        row: Row = {"options": self.options.train or "defaults", "status": DID_NOT_RETURN}
        self.data["runs"].append(row)

        def look() -> None:
            if (directory / "metrics.jsonl").is_file():
                row.update(measures(directory), environment=read_json(directory / "environment.json"))
                self.save(row)

        ended, _ = self.process(command, meanwhile=look)
        row |= ended
        look()
        self.ended("run", row)

    def show(self) -> None:
        tables = (trainer_table(self.data["trainers"]), fit_table(self.data["fits"]), run_table(self.data["runs"]))
        print("\n".join(line for table in tables for line in table))
        print(f"written: {self.path}")


def measures(run: Path) -> Row:
    """Median tokens/s (over steps in fits), total seconds and peak memory of a run by stage; it may be unfinished."""
    rates: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    for line in text[: text.rfind("\n") + 1].splitlines():  # the last line may be incomplete
        record = json.loads(line)
        stage = record["stage"]
        if "tokens_per_second" in record:
            rates.setdefault(stage, []).append(record["tokens_per_second"])
        if "peak_memory_bytes" in record and record["iteration"] == 1:  # the peak up to this stage
            peaks[stage] = max(peaks.get(stage, 0), record["peak_memory_bytes"])
        for name, spent in record.get("stage_seconds", {}).items():
            seconds[name] = seconds.get(name, 0.0) + spent
        if stage == "evaluate":
            seconds[stage] = record["seconds"]
    found: Row = {
        "tokens_per_second": {stage: statistics.median(values) for stage, values in rates.items()},
        "peak_bytes": peaks,
        "stage_seconds": seconds,
    }
    if (run / "evaluation.json").is_file():
        evaluation = read_json(run / "evaluation.json")
        found |= {"win_rate": evaluation["win_rate"][-1][0], "kl_to_initial": evaluation["kl_to_initial"][-1]}
    return found


def read_json(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8"))
