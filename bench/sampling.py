"""python -m bench sampling: measures ways to sample: tokens/s, seconds and memory.

Compared are this package's decode loop (--sampler local; on a GPU also with --cuda_graphs), its batches of
transformers' `generate` (what the decode loop replaced, and what it falls back to), transformers' `generate` itself
and, with --vllm_python, vLLM: its own offline throughput, --sampler vllm (with the start of an engine, as in each stage
of a run) and --sampler server. Prompts are the bundled ones, and responses have the lengths that they come to. Each way
runs in a process of its own, some times with other seeds; medians are reported. The results file, sampling.json, is
rewritten after each.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from onpo_fast.arguments import at_least, positive
from onpo_fast.config import Config
from onpo_fast.files import atomic_write_text
from onpo_fast.models.loading import load

from .jobs import Jobs, Row
from .kernels import RESULTS
from .runner import ROOT
from .samplers import SAMPLERS
from .summary import sampler_table

ON_GPU = ("local graphs",)
WITH_VLLM = ("vllm offline", "vllm", "server")


def arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument(
        "--samplers",
        nargs="+",
        choices=(*SAMPLERS, "vllm offline"),
        metavar="NAME",
        help=f"What to measure, of: {', '.join((*SAMPLERS, 'vllm offline'))} (default: all; vLLM with --vllm_python, "
        "graphs on a GPU).",
    )
    parser.add_argument("--model", default="smollm2", help="Model to sample from (default: smollm2).")
    parser.add_argument("--prompts", type=at_least(1), default=40, help="Number of prompts (default: 40).")
    parser.add_argument("--responses", type=at_least(1), default=4, metavar="K", help="Responses to each (default: 4).")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=128, help="Tokens at most (default: 128).")
    parser.add_argument(
        "--batch_size",
        type=at_least(1),
        default=256 if gpu else 32,
        help="Responses sampled at the same time in this process (default: 32; 256 if there is a GPU).",
    )
    parser.add_argument("--times", type=at_least(1), default=3, help="Repetitions; medians are reported (default: 3).")
    parser.add_argument(
        "--device", default="cuda" if gpu else "cpu", help="Device (default: cuda if there is a GPU, otherwise cpu)."
    )
    parser.add_argument(
        "--vllm_python",
        metavar="FILE",
        help="Python of an environment with vLLM, such as .vllm/bin/python (make vllm-env).",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=float("inf"),
        metavar="SECONDS",
        help="Stop the running measurement after this many seconds and start no other (default: no limit).",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder for sampling.json (default: bench/results).")


def main(options: argparse.Namespace) -> int:
    left_out = WITH_VLLM + (() if options.device.startswith("cuda") else ON_GPU)
    names = options.samplers or [name for name in SAMPLERS if name not in left_out]
    if options.samplers is None and options.vllm_python:
        names += WITH_VLLM
    jobs, path = Jobs(options.budget), options.out / "sampling.json"
    data: Row = {
        "command": " ".join(["python -m bench", *map(shlex.quote, sys.argv[1:])]),
        "environment": None,
        "samplers": [],
    }
    with tempfile.TemporaryDirectory(prefix="bench-sampling-") as work:
        model = Path(work) / "model"
        load(options.model, Config(model=options.model, device="cpu")).save(model)  # vLLM reads no other format
        case = {
            "model": str(model),
            "prompts": str(ROOT / "onpo_fast" / "prompts" / "train.jsonl"),
            "device": options.device,
            "count": options.prompts,
            "responses": options.responses,
            "max_new_tokens": options.max_new_tokens,
            "batch_size": options.batch_size,
            "times": options.times,
            "vllm_python": options.vllm_python,
        }
        for name in names:
            row = jobs.job("bench.samplers", sampler=name, **case)
            data["environment"] = row.pop("environment", None) or data["environment"]
            shown = {key: case[key] for key in ("device", "count", "responses", "max_new_tokens", "batch_size")}
            data["samplers"].append({"sampler": name, "model": options.model, **shown, **row})
            atomic_write_text(path, json.dumps(data, indent=1) + "\n")
            reason = f": {row['reason']}" if row.get("reason") else ""
            print(f"{name}: {row['status']}{reason}", file=sys.stderr, flush=True)
    print("\n".join(sampler_table(data["samplers"])))
    print(f"written: {path}")
    return 1 if any(row["status"] == "failed" for row in data["samplers"]) else 0
