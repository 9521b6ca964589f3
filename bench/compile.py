"""What the Triton kernels compile to, for GPUs that need not be there: registers, stack, shared memory, instructions.

    python -m bench compile [--architectures 90 …]

Fails if a kernel spills, wants more shared memory than there is, or misses the matrix units. The kernels are compiled
as the host code launches them: it runs here on CPU tensors, with a driver in place of the GPU's that says which
architecture is to be compiled for and launches nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from onpo_fast.kernels import fused, sampled_tokens
from onpo_fast.kernels.groups import Layout
from onpo_fast.kernels.head import Head
from onpo_fast.kernels.rescale import rescale
from onpo_fast.objectives import Onpo

# bytes of shared memory a block may have (CUDA C++ programming guide, technical specifications per compute capability)
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED_MEMORY)
MATRIX_INSTRUCTION = re.compile(r"\b(?:UTCHMMA|UTCQMMA|HGMMA|HMMA)[.\w]*")


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture."""

    kernel: str
    architecture: int
    options: dict[str, object] = field(hash=False)  # its compile-time arguments, and the operands' dtype
    warps: int
    stages: int
    registers: int  # a thread
    stack: int  # bytes a thread: more than 0 is a spill
    shared: int  # bytes a block
    matrix_instructions: tuple[str, ...]

    @property
    def fault(self) -> str | None:
        if self.stack:
            return f"spills: {self.stack} bytes of stack"
        if self.shared > SHARED_MEMORY[self.architecture]:
            return f"{self.shared} bytes of shared memory, of {SHARED_MEMORY[self.architecture]}"
        if "DEPTH" in self.options and not self.matrix_instructions:
            return "no matrix instruction"
        return None


class _Driver:
    """In place of a GPU: knows an architecture, has no device."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling_for(architecture: int) -> Iterator[list[tuple[JITFunction, dict, object]]]:
    """Launches compile, and are collected: kernel, arguments by name, compiled kernel."""
    launches = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self, dict(zip(self.arg_names, args)) | kwargs, compiled))
        return compiled

    driver.set_active(_Driver(architecture))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield launches
    finally:
        driver._active = None  # the driver of this machine, found again when it is needed


def launch_everything(dtype: torch.dtype) -> None:
    """The launches that the host code makes for this dtype, on a problem that fills the tiles.

    Each option of the kernels is on and off: mode, chunks, bias, softcap, leaves in float32 (as under autocast). Tiles
    that are cut to a small problem are not tried.
    """
    vocabulary, features, length, responses = 1024, 4096, 64, 8
    rows = length * responses
    hidden, reference = (torch.zeros(rows, features, dtype=dtype) for _ in range(2))
    weight, bias = torch.zeros(vocabulary, features, dtype=dtype), torch.zeros(vocabulary, dtype=dtype)
    targets = torch.zeros(rows, dtype=torch.int64)
    layout = Layout.of(torch.arange(responses + 1) * length, torch.arange(responses).view(-1, 2))
    ones = torch.ones(responses // 2, dtype=torch.float64)
    for head in (Head(weight), Head(weight, bias), Head(weight, bias, softcap=30.0)):
        everything = (True, True, head.bias is not None)
        for mode, workspace in (("fast", None), ("fast", _workspace_for_chunks(layout, weight)), ("lean", None)):
            for leaves in {(dtype,) * 3, (torch.float32,) * 3}:
                loss = fused.PairLoss(hidden, head, targets, layout, Onpo(eta=1.0), reference, ones, ones, everything,
                                      leaves, mode, workspace).run()  # fmt: skip
        logps = fused.token_logps(hidden, head, targets)
        fused.token_gradients(hidden, head, targets, logps, logps, everything, (dtype,) * 3, None)
    rescale(loss.gradients[1], torch.ones(()))
    for allowed in (None, torch.ones(responses, vocabulary, dtype=torch.bool)):
        sampled_tokens.draw(torch.zeros(responses, vocabulary, dtype=dtype), targets[:responses], 0, 1.0, allowed)


def _workspace_for_chunks(layout: Layout, weight: torch.Tensor) -> int:
    """Bytes of workspace: what mode "fast" needs where each group is a chunk."""
    return fused.plan(layout.groups[:1], weight.shape, weight.dtype, True, "fast", None, None).workspace + (
        weight.numel() // 2
    )


def compile_everything(architecture: int, dtypes=(torch.bfloat16, torch.float16, torch.float32)) -> list[Compiled]:
    """Every kernel as it is launched on this architecture."""
    found = {}
    for dtype in dtypes:
        with _compiling_for(architecture) as launches:
            launch_everything(dtype)
        for kernel, arguments, compiled in launches:
            if compiled.hash not in found:
                found[compiled.hash] = _examine(kernel, architecture, arguments, compiled, dtype)
    return sorted(found.values(), key=lambda c: (c.kernel, str(c.options)))


def _examine(kernel: JITFunction, architecture: int, arguments: dict, compiled, dtype: torch.dtype) -> Compiled:
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _dump("-res-usage", cubin.name)
        assembly = _dump("-sass", cubin.name)
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Compiled(
        kernel=kernel.fn.__name__, architecture=architecture,
        options={"dtype": str(dtype).removeprefix("torch."), **constants},
        warps=compiled.metadata.num_warps, stages=compiled.metadata.num_stages,
        registers=counts["REG"], stack=counts["STACK"], shared=compiled.metadata.shared,
        matrix_instructions=tuple(sorted(set(MATRIX_INSTRUCTION.findall(assembly)))),
    )  # fmt: skip


def _dump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=sorted(SHARED_MEMORY),
        help="compute capabilities without the point, such as 90",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Prints the table; the exit status is 1 if a kernel has a fault."""
    table = Table("kernel", "sm", "dtype", "options", "tile", "warps×stages", "registers", "stack", "shared", "matrix",
                  "fault")  # fmt: skip
    good = True
    for architecture in options.architectures:
        for c in compile_everything(architecture):
            flags = " ".join(name for name, value in c.options.items() if value is True and name != "DESCRIPTORS")
            tile = "×".join(str(c.options[n]) for n in ("ROWS", "COLUMNS", "DEPTH") if n in c.options)
            good &= c.fault is None
            table.add_row(
                c.kernel.removesuffix("_kernel"), str(architecture), str(c.options["dtype"]), flags, tile,
                f"{c.warps}×{c.stages}", str(c.registers), str(c.stack), f"{c.shared >> 10} of "
                f"{SHARED_MEMORY[architecture] >> 10} KiB", " ".join(c.matrix_instructions), c.fault or "",
            )  # fmt: skip
    Console(width=200).print(table)
    return 0 if good else 1
