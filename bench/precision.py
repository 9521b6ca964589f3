"""How much of a fit at a small learning rate each precision keeps: fits of SmolLM2 by the trainer, on a CPU.

    python -m bench precision [--steps N] [--learning_rate X] [--out DIR]

SmolLM2-135M with its weights rounded to bfloat16, as models are published, is fitted to four pairs of its own
responses, all in one step, with a target margin of 1 nat. The fits differ only in precision. Each fitted policy is
saved and read back, and its margins are computed in float32. The movement of the margins is compared with that of a fit
in float32 throughout. Writes precision-cpu.json; the exit status is 1 if what --weights auto takes on a GPU keeps less
than 95%.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from onpo_fast.arguments import at_least, positive
from onpo_fast.batches import plan_steps
from onpo_fast.config import Config
from onpo_fast.data import Group, Pair, split_prompts
from onpo_fast.files import atomic_write_text
from onpo_fast.fit import fit, score_as_in_fit
from onpo_fast.models.checkpoint import SMOLLM2
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy
from onpo_fast.models.precision import convert_parameters, round_to_bfloat16
from onpo_fast.objectives import Onpo
from onpo_fast.sampling import make_sampler

from .kernels import RESULTS, surroundings

LEAST = 0.95  # share of the float32 margins that --weights auto must keep in what is saved
MOST = 1.5  # a fit that does not see its own margins overshoots: under autocast, twofold
OBJECTIVE = Onpo(eta=2.0)  # a target margin of 1 nat for a certain preference
FITS: dict[str, dict[str, Any]] = {  # options by name of the fit
    "fp32, computed in fp32": {"weights": "fp32", "dtype": "float32"},
    "fp32 under bf16 autocast": {"weights": "fp32", "dtype": "bfloat16"},
    "bf16-sr (--weights auto on a GPU)": {"weights": "bf16-sr"},
    "bf16-sr, adamw-8bit": {"weights": "bf16-sr", "optimizer": "adamw-8bit"},
}
REFERENCE, AUTO = "fp32, computed in fp32", "bf16-sr (--weights auto on a GPU)"
NEAREST = (REFERENCE, "fp32 under bf16 autocast")  # fits whose saved weights are also rounded to nearest bfloat16


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=at_least(1), default=8, help="Optimizer steps of a fit (default: %(default)s).")
    parser.add_argument(
        "--learning_rate", type=positive, default=5e-7, help="Peak learning rate (default: %(default)s, the paper's)."
    )
    parser.add_argument("--tokens", type=at_least(1), default=64, help="Tokens of a response (default: %(default)s).")
    parser.add_argument("--pairs", type=at_least(1), default=4, help="Pairs, one a prompt (default: %(default)s).")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="Seeds of stochastic rounding (default: 1).")
    parser.add_argument("--fits", nargs="+", choices=FITS, default=list(FITS), help="Fits to make (default: all).")
    parser.add_argument("--model", default=SMOLLM2, help="Model to fit (default: %(default)s).")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="Folder for precision-cpu.json (default: bench/results)."
    )


def main(options: argparse.Namespace) -> int:
    began, environment = time.monotonic(), surroundings(torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="bench-precision-") as work:
        rows = Experiment(options, Path(work)).rows()
    data = {
        "command": " ".join(["python -m bench", *map(shlex.quote, sys.argv[1:])]),
        "environment": environment,
        "seconds": time.monotonic() - began,
        "rows": rows,
    }
    path = options.out / "precision-cpu.json"
    atomic_write_text(path, json.dumps(data, indent=1) + "\n")
    show(rows)
    print(f"written: {path}")
    return 1 if any(row["fit"] == AUTO and not LEAST <= row["kept"] <= MOST for row in rows) else 0


class Experiment:
    """Fits of one model to the same pairs, in several precisions."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.config = Config(
            device="cpu",
            learning_rate=options.learning_rate,
            warmup_ratio=0.0,
            batch_pairs=options.pairs,
            max_new_tokens=options.tokens,
        )
        self.pairs = [Pair(g, 0, 1, 1.0) for g in range(options.pairs)]
        self.epoch = plan_steps(self.pairs, 1, options.pairs, [0])
        self.groups = self._prepare()
        self.start = self._margins("start")

    def _prepare(self) -> list[Group]:
        """Saves the model on the grid of bfloat16, and returns two of its responses to each prompt."""
        policy = load(self.options.model, self.config)
        convert_parameters(policy.model, torch.bfloat16)
        convert_parameters(policy.model, torch.float32)
        policy.save(self.work / "start")
        prompts, _ = split_prompts(None, None, 0.2, seed=0)
        return make_sampler(policy, self.config)(prompts[: self.options.pairs], 2, [0], lambda done: None)

    def rows(self) -> list[dict[str, Any]]:
        """Makes the fits; the first must be that in float32."""
        rows: list[dict[str, Any]] = []
        reference: Tensor | None = None
        for name in [REFERENCE, *(other for other in self.options.fits if other != REFERENCE)]:
            for seed in range(1 if name in NEAREST else self.options.seeds):
                records = self._fit(name, seed)
                moved = self._margins("fitted") - self.start
                reference = moved if reference is None else reference
                seen = {key: value for key, value in records[-1].items() if key.startswith("margins_")}
                losses = [record["loss"] for record in records]
                rows.append(self._row(name, moved, reference, seed=seed, **seen, losses=losses))
                if name in NEAREST:
                    rounded = self._margins("fitted", weights="bf16-sr") - self.start
                    rows.append(self._row(f"{name}; cast to bf16 by a server", rounded, reference))
                if name == REFERENCE:
                    rows += [self._save_in_bfloat16(reference, seed) for seed in range(self.options.seeds)]
        return rows

    def _fit(self, name: str, seed: int) -> list[dict[str, float | None]]:
        """Fits and saves a policy; returns the metrics of the steps."""
        config = replace(self.config, **FITS[name])
        policy, records = load(self.work / "start", config), []
        anchor = score_as_in_fit(policy, self.groups, self.epoch, config)
        batches = self.epoch * self.options.steps
        fit(policy, self.groups, batches, anchor, OBJECTIVE, config, records.append, starts_at_anchor=True, seed=[seed])
        policy.save(self.work / "fitted", policy.save_dtype)
        return records

    def _save_in_bfloat16(self, reference: Tensor, seed: int) -> dict[str, Any]:
        """Saves the fitted policy again, as the end of a fit does with --save_dtype bfloat16."""
        policy = load(self.work / "fitted", self.config)
        round_to_bfloat16(policy.model, [seed])
        policy.save(self.work / "rounded", torch.bfloat16)
        return self._row(f"{REFERENCE}; --save_dtype bfloat16", self._margins("rounded") - self.start, reference)

    def _margins(self, folder: str, weights: str = "fp32") -> Tensor:
        """Returns the margins (P,) of a saved policy in nats, computed in float32.

        Args:
            weights: "bf16-sr" rounds them to nearest bfloat16 while loading, as a server does.
        """
        policy: Policy = load(self.work / folder, replace(self.config, weights=weights))
        with policy.in_float32():
            logps = score_as_in_fit(policy, self.groups, self.epoch, self.config)
        return torch.stack([logps[pair.group][pair.winner] - logps[pair.group][pair.loser] for pair in self.pairs])

    @staticmethod
    def _row(name: str, moved: Tensor, reference: Tensor, **rest: Any) -> dict[str, Any]:
        row = {
            "fit": name,
            "margin": float(moved.mean()),
            "kept": float(moved @ reference / (reference @ reference)),
            **rest,
        }
        print(name, {key: value for key, value in row.items() if key not in ("fit", "losses")}, file=sys.stderr)
        return row


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "weights",
        "margin moved, nats",
        "of the fp32 fit's",
        "seen by its forward pass",
        title="What is saved, read back and computed in float32",
    )
    for row in rows:
        seen = row.get("margins_kept_forward")
        table.add_row(row["fit"], f"{row['margin']:.3f}", f"{row['kept']:.1%}", "" if seen is None else f"{seen:.1%}")
    Console().print(table)
