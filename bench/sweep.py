"""python -m bench sweep: measures variants of the loss's kernels at one or more shapes, and prints predictions beside.

A line is a variant of the logits product (epilogue and tile) with a size of the workspace. A forward and backward pass
with the reference through its own head is timed and divided by the time of the four bare products of the same run.
Lines about the logits product also time scoring, divided by one bare product. Gradients are compared with those of the
first line that ran, log-probs with float64. A variant that does not compile or does not fit the GPU is reported failed.
``--resume`` continues after a lost GPU.

``--compile`` only compiles every variant into Triton's cache, in several processes, on a small problem: in one chunk
and, for lines with a small workspace, in several. The exit status is 1 if an epilogue fails with its default tile.
Other tiles may fail, since they may need more than the GPU has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onpo_fast import fused_linear_pair_loss, linear_logprobs
from onpo_fast.arguments import at_least, positive
from onpo_fast.files import atomic_write_text
from onpo_fast.kernels.variants import Variant, using

from .accuracy import exact_logps, nats_off, product_seconds, relative_error
from .kernels import DID_NOT_RETURN, reason_of, release_memory, surroundings
from .problems import ONPO, SHAPES, SMALL_HEAD, TARGET, Problem, Shape
from .runner import GPU_GONE
from .timing import Clock, Products, Spread

GIB = 2**30
ONE_CHUNK_GIB = 3  # workspace that holds all exponentials of TARGET in bf16
EXACT_SECONDS = 10.0  # time limit of a float64 product; without it, log-probs are not compared
MOST_DIFFERENCE = 0.02  # allowed relative difference of dX to the first line's; correct ones differ by about 0.003

# Predicted milliseconds at TARGET on an H100, from the machine code of the kernels compiled for sm_90 and a product of
# 13.7 ms (745 TFLOP/s). The masked epilogue in four chunks: scoring the reference 15.8, the policy's exponentials 16.2,
# the second launch for rows whose shift moved 0.45, dX by cuBLAS 14.0, dW carried over the chunks 17.3, and small
# launches: 64.2.
PRODUCT, FOUR_CHUNKS, LOGITS, SCORING = 13.7, 64.2, 15.8 + 16.2, 15.8
LIGHT = 0.035 * LOGITS  # ms saved by the light epilogue, 3 to 4% of a pass over the logits
LOOPING = 0.4  # ms saved by a looping grid for rows whose shift moved; counted with the light epilogue
ONE_CHUNK = 3.5  # ms saved if all exponentials fit at once, so that no partial dW is carried
PERSISTENT = 0.02 * FOUR_CHUNKS  # ms saved by a persistent grid, beyond the light epilogue
SAVED = {"masked": 0.0, "light": LIGHT + LOOPING, "persistent": LIGHT + LOOPING + PERSISTENT}


def predicted(epilogue: str, gib: int) -> float | None:
    """Predicted time over four bare products, default tile; workspaces of 1 and 3 GiB are four chunks and one."""
    if gib == 2:
        return None
    return (FOUR_CHUNKS - SAVED[epilogue] - (ONE_CHUNK if gib == ONE_CHUNK_GIB else 0)) / (4 * PRODUCT)


def predicted_scoring(epilogue: str) -> float:
    """Predicted time of scoring over one bare product, default tile; epilogues save the shares given above."""
    shares = {"masked": 1.0, "light": 1 - 0.035, "persistent": (1 - 0.035) * (1 - 0.02)}
    return shares[epilogue] * SCORING / PRODUCT


@dataclass(frozen=True)
class Line:
    """A variant of the kernels with a size of the workspace."""

    variant: Variant
    gib: int = 3
    predicted: float | None = None  # predicted time over four bare products
    predicted_scoring: float | None = None  # predicted time of scoring over one bare product
    scores: bool = True  # whether scoring is measured too

    @property
    def name(self) -> str:
        tile = "×".join(str(x or "·") for x in (self.variant.rows, self.variant.columns, self.variant.depth))
        parts = [self.variant.epilogue, "" if tile == "·×·×·" else tile]
        options = {"warps": self.variant.warps, "stages": self.variant.stages, "group": self.variant.tile_group}
        parts += [f"{word} {value}" for word, value in options.items() if value]
        return ", ".join([*filter(None, parts), f"{self.gib} GiB"])


def epilogue_line(epilogue: str, gib: int) -> Line:
    return Line(
        Variant(epilogue),
        gib,
        predicted(epilogue, gib),
        predicted_scoring(epilogue) if gib == 3 else None,
        scores=gib == 3,
    )


# Tiles (rows, columns, warps, stages) of which two or three programs fit on a multiprocessor of sm_90, so that one can
# compute its product while another is in its epilogue.
SHARING = ((128, 128, 4, 2), (128, 128, 4, 3), (128, 128, 8, 3), (64, 256, 4, 2))

LINES = (
    *(epilogue_line(epilogue, gib) for gib in (3, 1) for epilogue in ("masked", "light", "persistent")),
    epilogue_line("light", 2),
    *(Line(Variant(stages=stages)) for stages in (3, 4)),
    *(Line(Variant("persistent", stages=stages)) for stages in (3, 4)),
    *(
        Line(Variant(rows=rows, columns=columns, depth=64, warps=warps, stages=stages))
        for rows, columns, warps, stages in SHARING
    ),
    *(Line(Variant(rows=rows, columns=columns, depth=64)) for rows, columns in ((128, 256), (256, 128), (128, 128))),
    Line(Variant("persistent", rows=128, columns=128, depth=64, warps=4, stages=3)),
    Line(Variant(rows=128, columns=256, depth=128, stages=2)),
    *(Line(Variant(tile_group=size)) for size in (8, 16, 32)),
    *(Line(Variant("persistent", tile_group=size)) for size in (8, 32)),
)


def lines_of(shape: Shape) -> list[Line]:
    """Lines to measure at a shape; at the small head, only those with the large workspace.

    Predictions are kept at ``TARGET`` only.
    """
    if shape == TARGET:
        return list(LINES)
    lines = [line for line in LINES if shape != SMALL_HEAD or line.gib == ONE_CHUNK_GIB]
    return [replace(line, predicted=None, predicted_scoring=None) for line in lines]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device on which to run (default: cuda if there is a GPU, otherwise cpu).",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=SHAPES,
        default=[TARGET.name],
        metavar="SHAPE",
        help=f"Shapes to measure, one after the other (default: {TARGET.name}). Choices: {', '.join(SHAPES)}.",
    )
    parser.add_argument(
        "--lines",
        nargs="*",
        metavar="TEXT",
        help="Measure only the variants whose names contain one of these texts (default: all).",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=float("inf"),
        metavar="SECONDS",
        help="Start no measurement after this many seconds (default: no limit).",
    )
    parser.add_argument(
        "--block",
        type=positive,
        default=0.3,
        metavar="SECONDS",
        help="Seconds per timing block; two blocks per variant (default: %(default)s).",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="Folder for sweep.json (default: the current directory)."
    )
    parser.add_argument("--resume", action="store_true", help="Continue the sweep.json in the --out folder.")
    parser.add_argument("--compile", action="store_true", help="Only compile the variants; measure nothing.")
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=4,
        help="Compiling processes with --compile (default: %(default)s).",
    )


def main(options: argparse.Namespace) -> int:
    parts = options.lines or [""]
    lines = {
        shape: [line for line in lines_of(shape) if any(part in line.name for part in parts)]
        for shape in map(SHAPES.get, options.shape)
    }
    if options.compile:
        return compile_lines(lines, options.device, options.workers)
    path, device, deadline = options.out / "sweep.json", torch.device(options.device), time.monotonic() + options.budget
    data = {"environment": surroundings(device), "shapes": []}
    if options.resume and path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
        if "shapes" not in data:
            raise SystemExit(f"{path} was written by an earlier version: move it away, or leave --resume out")
    for shape in lines:
        Sweep(path, data, device, shape, deadline, options.block).run(lines[shape])
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def train(problem: Problem, workspace: int, mark: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor]:
    """Runs a forward and a backward pass; returns dX (N, H) and the policy's summed log-probs (S,)."""
    hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden, problem.weight))
    mark()
    out = fused_linear_pair_loss(
        hidden,
        weight,
        problem.targets,
        problem.cu_seqlens,
        problem.pairs,
        objective=ONPO,
        ref_hidden=problem.ref_hidden,
        ref_weight=problem.ref_weight,
        backend="triton",
        mode="fast",
        workspace_bytes=workspace,
    )
    out.loss.backward()
    mark()
    return hidden.grad, out.logps.detach()


@torch.no_grad()
def score(problem: Problem, mark: Callable[[], None]) -> None:
    """Computes per-token log-probs under the policy."""
    mark()
    linear_logprobs(problem.hidden, problem.weight, problem.targets, backend="triton")
    mark()


class Sweep:
    """Measures lines at a shape until the deadline, in seconds of the monotonic clock.

    Results are added to the shape's record in ``data``, which is rewritten to ``path`` after every line.
    """

    def __init__(
        self, path: Path, data: dict[str, Any], device: torch.device, shape: Shape, deadline: float, block: float
    ) -> None:
        self.path, self.data, self.device, self.shape, self.deadline = path, data, device, shape, deadline
        self.block = (block, 3, 20)  # seconds, minimum and maximum number of rounds
        self.exact: Tensor | None = None  # (S,) float64, the policy's log-probs
        records = {record["shape"]: record for record in data["shapes"]}
        self.record = records.get(shape.name, {"shape": shape.name, "rows": []})
        if shape.name not in records:
            data["shapes"].append(self.record)

    def run(self, lines: list[Line]) -> None:
        """Measures the lines that are not in the record yet."""
        done = {row["line"] for row in self.record["rows"]}
        if done.issuperset(line.name for line in lines):
            return
        if time.monotonic() < self.deadline:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            problem, clock = Problem.make(self.shape, dtype, self.device), Clock(self.device)
            self.floor(problem, clock)
            self.reference(problem)
            first = self.again(problem)
        samples: dict[Line, tuple[list[float], list[float]]] = {}
        for line in lines:
            if line.name in done:
                continue
            row = {
                "line": line.name,
                "epilogue": line.variant.epilogue,
                "variant": asdict(line.variant),
                "gib": line.gib,
                "predicted": line.predicted,
                "predicted_scoring": line.predicted_scoring,
                "status": DID_NOT_RETURN,
            }
            self.record["rows"].append(row)
            self.save()
            if time.monotonic() >= self.deadline:
                row |= {"status": "skipped", "reason": "no time left"}
                continue
            if self.guarded(row, partial(self.check, line, problem, first, row)):
                samples[line] = [], []
                self.guarded(row, partial(self.time, line, problem, clock, samples[line], row))
            said = row.get("reason") or f"{row.get('over_products', 0):.3f} of the four products"
            print(f"{self.shape.name}: {line.name}: {row['status']}: {said}", file=sys.stderr, flush=True)
        for line in reversed(samples):
            row = next(row for row in self.record["rows"] if row["line"] == line.name)
            if time.monotonic() < self.deadline and row["status"] == "measured":
                self.guarded(row, partial(self.time, line, problem, clock, samples[line], row))
        self.save()

    def floor(self, problem: Problem, clock: Clock) -> None:
        if "floor_seconds" in self.record:  # earlier rows were divided by it
            return
        bare = Products(problem.hidden, problem.weight)
        laps = clock.block(bare.all, *self.block)
        names = ("logits", "hidden", "weight")
        self.record["floor_seconds"] = {n: Spread.of(list(x)).median for n, x in zip(names, zip(*laps))}

    def reference(self, problem: Problem) -> None:
        """Computes float64 log-probs; if they are too slow or too large, notes so in the record."""
        if product_seconds(problem) > EXACT_SECONDS:
            self.record["no_nats"] = "float64 would take too long here"
            return
        try:
            self.exact = exact_logps(problem)
        except RuntimeError as error:  # out of memory, for which cuBLAS has its own error type
            self.record["no_nats"] = reason_of(error)
        release_memory(self.device)

    def again(self, problem: Problem) -> list[Tensor]:
        """Recomputes dX of the line that earlier rows were compared with; empty if there is none or it fails."""
        found: list[Tensor] = []
        for row in self.record["rows"]:
            if row["line"] == self.record.get("compared_with"):
                line = next(line for line in LINES if line.name == row["line"])
                self.guarded(row, partial(self.check, line, problem, found, row))
        return found

    def check(self, line: Line, problem: Problem, first: list[Tensor], row: dict[str, Any]) -> None:
        """Makes the first call, which may compile, and checks its log-probs and gradients."""
        with using(line.variant):
            gradient, logps = train(problem, line.gib * GIB)
        if self.exact is not None:
            row["nats"] = float(nats_off(logps, self.exact, problem).max())
        if not first:
            first.append(gradient)
            self.record["compared_with"] = line.name
        row["difference"] = relative_error(gradient, first[0])
        if not row["difference"] <= MOST_DIFFERENCE:  # ``not <=``, so that NaN fails too
            raise ArithmeticError(f"dX differs by {row['difference']:.1e} from the first line's")

    def time(
        self, line: Line, problem: Problem, clock: Clock, samples: tuple[list[float], list[float]], row: dict[str, Any]
    ) -> None:
        """Times a block of calls, adds it to ``samples`` and updates the row with statistics over all of them."""
        floor = self.record["floor_seconds"]
        with using(line.variant):
            samples[0].extend(
                sum(x) for x in clock.block(lambda mark: train(problem, line.gib * GIB, mark), *self.block)
            )
            if line.scores:
                samples[1].extend(sum(x) for x in clock.block(lambda mark: score(problem, mark), *self.block))
        row["seconds"] = Spread.of(samples[0])._asdict()
        row["over_products"] = row["seconds"]["median"] / (2 * floor["logits"] + floor["hidden"] + floor["weight"])
        if line.scores:
            row["scoring_seconds"] = Spread.of(samples[1])._asdict()
            row["scoring_over_product"] = row["scoring_seconds"]["median"] / floor["logits"]
        row["status"] = "measured"

    def guarded(self, row: dict[str, Any], measure: Callable[[], None]) -> bool:
        """Calls ``measure``; returns whether it succeeded. A lost GPU ends the process with status ``GPU_GONE``."""
        try:
            measure()
        except Exception as error:
            row |= {"status": "failed", "reason": reason_of(error)}
        lost = release_memory(self.device)
        if lost:
            row |= {"status": "failed", "reason": lost}
        self.save()
        if lost:
            os._exit(GPU_GONE)  # an ordinary exit would wait for the GPU
        return row["status"] != "failed"

    def save(self) -> None:
        atomic_write_text(self.path, json.dumps(self.data, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Compiling beforehand
# ---------------------------------------------------------------------------------------------------------------------


def compile_lines(lines: dict[Shape, list[Line]], device: str, workers: int) -> int:
    """Compiles the lines of each shape; returns the exit status."""
    in_chunks: dict[tuple[Variant, Shape], bool] = {}  # whether a line has too small a workspace for one chunk
    for shape in lines:
        small = small_problem(shape)
        for line in lines[shape]:
            key = line.variant, small
            in_chunks[key] = in_chunks.get(key, False) or line.gib < ONE_CHUNK_GIB
    status = 0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        tried = pool.map(partial(compile_variant, device=device), in_chunks, in_chunks.values())
        for (variant, _), (ok, said) in zip(in_chunks, tried):
            print(said, flush=True)
            if not ok and variant == Variant(variant.epilogue):
                status = 1
    return status


def small_problem(shape: Shape) -> Shape:
    """A smaller shape for which the same kernels are compiled; they depend on tile, dtype and H only."""
    return replace(shape, groups=4, responses=2, tokens=min(256, shape.tokens), vocabulary=min(4096, shape.vocabulary))


def compile_variant(compiled: tuple[Variant, Shape], in_chunks: bool, device: str) -> tuple[bool, str]:
    """Compiles a variant; returns whether it succeeded, and a line about it."""
    start = time.perf_counter()
    variant, shape = compiled
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        problem = Problem.make(shape, dtype, device)
        with using(variant):
            for workspace in (GIB, chunk_bytes(shape, dtype.itemsize))[: 1 + in_chunks]:
                train(problem, workspace)
        outcome = None
    except Exception as error:
        outcome = reason_of(error)
    return outcome is None, f"H {shape.features}, {variant}: {outcome or 'ok'} ({time.perf_counter() - start:.1f} s)"


def chunk_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes of a workspace for one group per chunk: exponentials and scaled states of 1.5 groups, and partial dW."""
    row = itemsize * shape.vocabulary + (itemsize + 4) * shape.features
    return row * shape.responses * shape.tokens * 3 // 2 + shape.vocabulary * shape.features // 2
