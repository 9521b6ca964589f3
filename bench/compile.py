"""Compiles the Triton kernels for GPUs that need not be present: registers, stack, shared memory, instructions.

    python -m bench compile [--architectures 90 …] [--quick] [--record]

The exit status is 1 if a kernel spills registers in the loop of its matrix product, or more than a few values outside
it; needs more shared memory than the GPU has; uses no matrix instructions; makes each matrix instruction wait for the
one before; or has more instructions after its matrix product than ``instructions.json`` allows.

The host code runs on CPU tensors with a stand-in for the GPU driver, which names the architecture to compile for and
launches nothing. So kernels are compiled with the same options as in a real launch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from onpo_fast.files import atomic_write_text
from onpo_fast.kernels import fused, sampled_tokens
from onpo_fast.kernels.groups import PairLayout
from onpo_fast.kernels.head import Head
from onpo_fast.kernels.plan import choose_plan
from onpo_fast.kernels.problem import PairProblem, TokenProblem
from onpo_fast.kernels.rescale import rescale
from onpo_fast.kernels.variants import EPILOGUES, Variant, using
from onpo_fast.objectives import Onpo

from .sass import Listing

# Maximum bytes of shared memory per block (CUDA C++ programming guide, technical specifications per compute capability)
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED_MEMORY)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INSTRUCTIONS = Path(__file__).with_name("instructions.json")
COUNTED_ON = (90, 100)
COUNTED = ("exponentials_kernel", "weight_gradient_kernel")  # their default epilogue is a single path
MAX_STACK_OUTSIDE_LOOPS = 32  # bytes of stack allowed for values that are spilled outside the product's loop
SLACK = 1.1  # allowed instruction count, as a multiple of the recorded one; compilers differ a little


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture."""

    kernel: str
    architecture: int
    options: dict[str, object] = field(hash=False)  # compile-time arguments, and the operands' dtype
    warps: int
    stages: int
    registers: int  # per thread
    stack: int  # bytes spilled per thread
    shared: int  # bytes per block
    matrix_instructions: tuple[str, ...]
    spills_in_a_product: bool = True  # only meaningful if ``stack`` is not 0
    serialised: bool = False  # whether each matrix instruction waits for the one before
    epilogue: float | None = None  # instructions after the product, per element of the tile

    @property
    def name(self) -> str:
        """Kernel, dtype and the options that are on."""
        flags = [name for name, value in self.options.items() if value is True and name != "DESCRIPTORS"]
        return " ".join([self.kernel.removesuffix("_kernel"), str(self.options["dtype"]), *flags])

    @property
    def tile(self) -> str:
        return "×".join(str(self.options[n]) for n in ("ROWS", "COLUMNS", "DEPTH") if n in self.options)

    @property
    def fault(self) -> str | None:
        """What is wrong with the kernel, or None."""
        return self.broken or self.too_many_instructions

    @property
    def too_many_instructions(self) -> str | None:
        """Whether the count exceeds the recorded limit: the fault, or None."""
        allowed = allowed_instructions().get(str(self.architecture))
        if allowed is None or self.epilogue is None:
            return None
        if (limit := allowed.get(f"{self.name} {self.tile}")) is None:
            return f"is not in {INSTRUCTIONS.name}: record it"
        if self.epilogue <= SLACK * limit:
            return None
        return f"{self.epilogue:.2f} instructions an element after the product, {limit:.2f} are in the table"

    @property
    def broken(self) -> str | None:
        """What is wrong with the kernel apart from its instruction count, or None."""
        if self.stack > (0 if self.spills_in_a_product else MAX_STACK_OUTSIDE_LOOPS):
            return f"spills: {self.stack} bytes of stack"
        if self.shared > SHARED_MEMORY[self.architecture]:
            return f"{self.shared} bytes of shared memory, of {SHARED_MEMORY[self.architecture]}"
        if "DEPTH" in self.options and not self.matrix_instructions:
            return "no matrix instruction"
        if self.serialised:
            return "every matrix instruction waits for the one before"
        return None


@cache
def allowed_instructions() -> dict[str, dict[str, float]]:
    """Recorded instructions per element, by architecture, then by kernel name and tile."""
    return json.loads(INSTRUCTIONS.read_text(encoding="utf-8")) if INSTRUCTIONS.exists() else {}


class _Driver:
    """A stand-in for Triton's GPU driver, which names an architecture and has no device."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling_for(architecture: int, known: set | None = None) -> Iterator[list[tuple[JITFunction, dict, object]]]:
    """Makes launches compile only, and yields the list of them: kernel, arguments by name, compiled kernel.

    ``known``: combinations of kernel, tile and options that are not compiled again; extended by each launch.
    """
    launches = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        arguments = dict(zip(self.arg_names, args)) | kwargs
        if known is not None:
            constants = tuple(str(v) for n, v in kwargs.items() if n != "FEATURES")
            key = (self.fn.__name__, arguments.get("FEATURES", 0) % 16, constants)
            if key in known:
                return None
            known.add(key)
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self, arguments, compiled))
        return compiled

    driver.set_active(_Driver(architecture))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield launches
    finally:
        driver._active = None  # Triton looks for this machine's driver at the next use


def launch_everything(dtype: torch.dtype) -> None:
    """Makes all launches of the host code for a dtype, on a problem that fills the tiles.

    Each option of the kernels is tried on and off: mode, chunks, bias, softcap, float32 leaves (as under autocast) and
    a negative logit scale.
    """
    size = {"vocabulary": 1024, "features": 4096, "length": 64}
    for head in ({}, {"bias": True}, {"bias": True, "softcap": 30.0}):
        _launch(dtype, **size, **head)
    _launch(dtype, **size, logit_scale=-1.0)
    rescale(torch.zeros(8, dtype=dtype), torch.ones(()))
    logits, keys = torch.zeros(8, size["vocabulary"], dtype=dtype), torch.zeros(8, dtype=torch.int64)
    for allowed in (None, torch.ones(logits.shape, dtype=torch.bool)):
        sampled_tokens.draw(logits, keys, 0, 1.0, allowed)


def launch_variants(dtype: torch.dtype) -> None:
    """Launches the other epilogues of the logits kernel."""
    for epilogue in EPILOGUES[1:]:
        with using(Variant(epilogue)):
            _launch(dtype, vocabulary=1024, features=4096, length=64)
            _launch(dtype, vocabulary=1024, features=4096, length=64, bias=True, softcap=30.0)


def launch_small(dtype: torch.dtype) -> None:
    """Launches on problems that are smaller than the tile in some dimension, with 8 responses."""
    for length, vocabulary, features in product((2, 8, 64), (32, 128, 1024), (16, 64, 128, 256)):
        _launch(dtype, vocabulary, features, length)


def _launch(
    dtype: torch.dtype, vocabulary: int, features: int, length: int, bias: bool = False, **options: float
) -> None:
    """Runs every mode of the loss, and per-token log-probs with their gradients, on 8 responses in pairs."""
    responses = 8
    rows = length * responses
    hidden, reference = (torch.zeros(rows, features, dtype=dtype) for _ in range(2))
    head = Head(
        torch.zeros(vocabulary, features, dtype=dtype),
        torch.zeros(vocabulary, dtype=dtype) if bias else None,
        **options,
    )
    targets = torch.zeros(rows, dtype=torch.int64)
    layout = PairLayout.of(torch.arange(responses + 1) * length, torch.arange(responses).view(-1, 2))
    ones = torch.ones(responses // 2, dtype=torch.float64)
    everything = (True, True, bias)
    for mode, workspace in (("fast", 2**40), ("fast", _workspace_for_chunks(layout, head.weight)), ("lean", None)):
        for leaves in {(dtype,) * 3, (torch.float32,) * 3}:
            problem = PairProblem(
                hidden,
                head,
                targets,
                layout,
                Onpo(eta=1.0),
                ref_logps=None,
                ref_hidden=reference,
                preference=ones,
                pair_weight=ones,
                needs_gradient=everything,
                leaf_dtypes=leaves,
                mode=mode,
                workspace=workspace,
            )
            fused.pair_loss(problem)
    tokens = TokenProblem(hidden, head, targets, everything, (dtype,) * 3)
    logps = fused.token_logps(tokens)
    fused.token_gradients(tokens, logps, logps)


def _workspace_for_chunks(layout: PairLayout, weight: torch.Tensor) -> int:
    """Bytes of workspace with which mode "fast" takes one group per chunk."""
    plan = choose_plan(layout.groups[:1], weight.shape, weight.dtype, True, "fast", None, None)
    return plan.workspace + weight.numel() // 2


LAUNCHES = {"default": launch_everything, "variants": launch_variants, "small": launch_small}


def compile_everything(
    architecture: int, dtypes: Sequence[torch.dtype] = DTYPES, launches: Sequence[str] = ("default",)
) -> list[Compiled]:
    """Compiles the kernels of these ``LAUNCHES`` for one architecture."""
    found = {}
    for dtype in dtypes:
        known: set = set()
        for kind in launches:
            with _compiling_for(architecture, known) as launched:
                LAUNCHES[kind](dtype)
            for kernel, arguments, compiled in launched:
                if compiled.hash not in found:
                    found[compiled.hash] = _examine(kernel, architecture, arguments, compiled, dtype)
    return sorted(found.values(), key=lambda c: (c.kernel, str(c.options)))


def _examine(kernel: JITFunction, architecture: int, arguments: dict, compiled, dtype: torch.dtype) -> Compiled:
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _dump("-res-usage", cubin.name)
        listing = Listing(_dump("-sass", cubin.name))
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    name, warps = kernel.fn.__name__, compiled.metadata.num_warps
    epilogue = None
    if name in COUNTED and (instructions := listing.epilogue()) is not None:
        epilogue = instructions * 32 * warps / (constants["ROWS"] * constants["COLUMNS"])
    return Compiled(
        kernel=name,
        architecture=architecture,
        options={"dtype": str(dtype).removeprefix("torch."), **constants},
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=counts["REG"],
        stack=counts["STACK"],
        shared=compiled.metadata.shared,
        matrix_instructions=listing.matrix_instructions,
        spills_in_a_product=listing.spills_in_a_product(),
        serialised=compiled.metadata.num_stages > 1 and listing.serialised(),
        epilogue=epilogue,
    )


def _dump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        default=ARCHITECTURES,
        choices=sorted(SHARED_MEMORY),
        help="Compute capabilities to compile for, without the point, such as 90 (default: all of the choices).",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Leave out the kernels of small problems and the variants of `bench sweep`.",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help=f"Write the instruction counts to {INSTRUCTIONS.name}, instead of comparing with it; excludes --quick.",
    )


def _launches(architecture: int, quick: bool) -> tuple[str, ...]:
    """Names of the launches to compile. Variants are measured on Hopper only, so other architectures leave them out."""
    return ("default",) if quick else ("default", "small", *(("variants",) if architecture == 90 else ()))


def main(options: argparse.Namespace) -> int:
    """Prints the table; the exit status is 1 if a kernel has a fault."""
    if options.record and options.quick:
        raise SystemExit("--record needs all kernels: leave out --quick")
    table = Table(
        "kernel",
        "sm",
        "options",
        "tile",
        "warps×stages",
        "registers",
        "stack",
        "shared",
        "matrix",
        "instructions\nan element",
        "fault",
    )
    jobs = [
        (architecture, (dtype,), _launches(architecture, options.quick))
        for architecture in options.architectures
        for dtype in DTYPES
    ]
    counted: dict[str, dict[str, float]] = {}
    faults = number = 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for (architecture, *_), found in zip(jobs, pool.map(compile_everything, *zip(*jobs))):
            for c in found:
                kernel, _, flags = c.name.partition(" ")
                table.add_row(
                    kernel,
                    str(architecture),
                    flags,
                    c.tile,
                    f"{c.warps}×{c.stages}",
                    str(c.registers),
                    str(c.stack),
                    f"{c.shared >> 10} of {SHARED_MEMORY[architecture] >> 10} KiB",
                    " ".join(c.matrix_instructions),
                    "" if c.epilogue is None else f"{c.epilogue:.2f}",
                    (c.broken if options.record else c.fault) or "",
                )
                number, faults = number + 1, faults + bool(c.broken if options.record else c.fault)
                if c.epilogue is not None and architecture in COUNTED_ON:
                    of_architecture = counted.setdefault(str(architecture), {})
                    key = f"{c.name} {c.tile}"
                    of_architecture[key] = max(of_architecture.get(key, 0.0), round(c.epilogue, 2))
    Console(width=200).print(table)
    print(f"{number} kernels, {faults} faults")
    if options.record:
        table_now = dict(sorted((allowed_instructions() | counted).items()))
        atomic_write_text(INSTRUCTIONS, json.dumps(table_now, indent=1, ensure_ascii=False) + "\n")
    return 1 if faults else 0
