"""The Triton kernels compiled for GPUs that need not be there: no spills, memory that fits, matrix units used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import compile as compiling
from bench.compile import Compiled, compile_everything
from bench.sass import Listing

ROOT = Path(__file__).parents[2]


def faults(compiled: list[Compiled]) -> list[tuple[str, str, str]]:
    return [(c.name, c.tile, c.fault) for c in compiled if c.fault]


@pytest.mark.long
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_launch_compiles(architecture: int) -> None:
    variants = ("variants",) if architecture == 90 else ()
    compiled = compile_everything(architecture, launches=("default", *variants))
    assert faults(compiled) == []
    written = {
        name.removeprefix("def ").split("(")[0]
        for path in (ROOT / "kernels").glob("*.py")
        if architecture == 90 or "variants" not in path.name
        for name in path.read_text(encoding="utf-8").splitlines()
        if name.startswith("def ") and name.split("(")[0].endswith("_kernel")
    }
    assert {c.kernel for c in compiled} == written
    if architecture == 90:
        products = [c for c in compiled if "DEPTH" in c.options and c.options["dtype"] == "bfloat16"]
        assert products
        assert all("HGMMA" in name for c in products for name in c.matrix_instructions)
        counted = {f"{c.name} {c.tile}": c.epilogue for c in products}
        assert counted["exponentials bfloat16 SUMS STORE 128×256×64"] <= 6.0
        assert counted["weight_gradient bfloat16 ADD CARRY_IN CARRY_OUT 128×256×64"] <= 9.0


@pytest.mark.long
def test_tiles_of_small_problems_compile() -> None:
    compiled = compile_everything(90, [torch.bfloat16], ["small"])
    assert faults(compiled) == []
    tiles = {(c.options["ROWS"], c.options["COLUMNS"], c.options["DEPTH"]) for c in compiled if "DEPTH" in c.options}
    assert {(16, 32, 16), (16, 256, 64), (128, 128, 16), (128, 256, 64)} <= tiles


def example(**changes) -> Compiled:
    values = {
        "kernel": "k_kernel",
        "architecture": 90,
        "warps": 8,
        "stages": 3,
        "registers": 100,
        "stack": 0,
        "options": {"ROWS": 128, "COLUMNS": 256, "DEPTH": 64, "dtype": "bfloat16", "SUMS": True, "STORE": False},
        "shared": 1000,
        "matrix_instructions": ("HGMMA",),
        "epilogue": 5.5,
    }
    return Compiled(**{**values, **changes})


def test_faults_are_found(monkeypatch) -> None:
    table = {"90": {"k bfloat16 SUMS 128×256×64": 5.5}}
    monkeypatch.setattr(compiling, "allowed_instructions", lambda: table)
    assert example().fault is None
    assert "spills: 8 bytes" in example(stack=8).fault
    assert example(stack=8, spills_in_a_product=False).fault is None
    assert "spills: 40 bytes" in example(stack=40, spills_in_a_product=False).fault
    assert "of shared memory" in example(shared=228 << 10).fault
    assert example(architecture=80, shared=164 << 10).fault
    assert "no matrix instruction" in example(matrix_instructions=()).fault
    assert "waits for the one before" in example(serialised=True).fault
    assert "6.20 instructions an element after the product, 5.50 are" in example(epilogue=6.2).fault
    assert "is not in instructions.json" in example(warps=4, options={"dtype": "float16"}).fault
    assert example(epilogue=6.2, architecture=100).fault is None  # nothing is recorded for it


# ---------------------------------------------------------------------------------------------------------------------
# What is read from machine code
# ---------------------------------------------------------------------------------------------------------------------

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24{wait} ;
        /*0020*/                   {between} ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR28], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/              @!P4 BRA P5, 0x90 ;
        /*0070*/                   FSEL R1, R2, R3, P0 ;
        /*0080*/                   FSEL R2, R2, R3, P0 ;
        /*0090*/                   FFMA R1, R2, R3, R4 ;
        /*00a0*/              @P1 EXIT ;
        /*00b0*/                   {store} ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""


def listing(wait: str = "", between: str = "NOP", store: str = "STG.E [R4], R1") -> Listing:
    return Listing(LISTING.replace("{wait}", wait).replace("{between}", between).replace("{store}", store))


def test_an_epilogue_is_counted_without_the_branch_that_few_tiles_take() -> None:
    whole = listing()
    assert whole.matrix_instructions == ("HGMMA.64x256x16.F32.BF16",)
    assert whole.epilogue() == 7  # 0x40, 0x50, 0x60, 0x90, 0xa0, 0xb0, 0xc0 come after 0x30
    assert Listing("/*0000*/ EXIT ;").epilogue() is None


def test_serialised_products_are_found() -> None:
    assert not listing().serialised()  # the first begins, and the second ends their group
    assert listing(wait=", gsb0", between="WARPGROUP.DEPBAR.LE gsb0, 0x0").serialised()
    assert not listing(wait=", gsb0", between="WARPGROUP.DEPBAR.LE gsb0, 0x1").serialised()


def test_spills_in_a_product_are_told_from_those_around_it() -> None:
    assert not listing().spills_in_a_product()
    assert listing(between="STL [R1], R36").spills_in_a_product()
    assert not listing(store="LDL R36, [R1]").spills_in_a_product()


@triton.jit
def _loop_with_a_branch_kernel(
    hidden,
    weight,
    stored,
    rows,
    columns,
    limit,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A flattened loop over tiles whose epilogue branches on a scalar: what serialises Hopper's products."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    for program in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * column_tiles, tl.num_programs(0), flatten=True):
        row, column = program // column_tiles * ROWS, program % column_tiles * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, FEATURES, DEPTH):
            total = tl.dot(hidden.load([row, depth]), weight.load([column, depth]).T, total)
        if column + COLUMNS > limit:
            total = tl.where((column + tl.arange(0, COLUMNS) < limit)[None, :], total, 0.0)
        stored.store([row, column], total.to(tl.bfloat16))


@pytest.mark.parametrize("depth", [16, 64])
def test_a_kernel_whose_products_wait_is_a_fault(depth: int) -> None:
    def matrix(rows: int, columns: int, tile: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(torch.zeros(rows, columns, dtype=torch.bfloat16), tile)

    with compiling._compiling_for(90) as launches:
        _loop_with_a_branch_kernel[(1,)](
            matrix(512, 4096, [128, depth]),
            matrix(1024, 4096, [256, depth]),
            matrix(512, 1024, [128, 256]),
            512,
            1024,
            1000,
            FEATURES=4096,
            ROWS=128,
            COLUMNS=256,
            DEPTH=depth,
            num_warps=8,
            num_stages=3,
        )
    ((kernel, arguments, compiled),) = launches
    found = compiling._examine(kernel, 90, arguments, compiled, torch.bfloat16)
    assert "waits for the one before" in found.fault
