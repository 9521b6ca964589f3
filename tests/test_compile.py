"""The Triton kernels compiled for GPUs that need not be there: no spills, memory that fits, matrix units used."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.compile import Compiled, compile_everything

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_launch_compiles(architecture: int) -> None:
    compiled = compile_everything(architecture)
    assert not [(c.kernel, c.options, c.fault) for c in compiled if c.fault]
    kernels = {c.kernel for c in compiled}
    written = {
        name.removeprefix("def ").split("(")[0]
        for path in (ROOT / "kernels").glob("*.py")
        for name in path.read_text(encoding="utf-8").splitlines()
        if name.startswith("def ") and name.split("(")[0].endswith("_kernel")
    }
    assert kernels == written
    if architecture == 90:
        products = [c for c in compiled if "DEPTH" in c.options and c.options["dtype"] == "bfloat16"]
        assert products
        assert all("HGMMA" in name for c in products for name in c.matrix_instructions)


def example(**changes) -> Compiled:
    values = {
        "kernel": "k", "architecture": 90, "options": {"DEPTH": 64}, "warps": 8, "stages": 3, "registers": 100,
        "stack": 0, "shared": 1000, "matrix_instructions": ("HGMMA",),
    }  # fmt: skip
    return Compiled(**{**values, **changes})


def test_faults_are_found() -> None:
    assert example().fault is None
    assert "spills: 8 bytes" in example(stack=8).fault
    assert "of shared memory" in example(shared=228 << 10).fault
    assert example(architecture=80, shared=164 << 10).fault
    assert "no matrix instruction" in example(matrix_instructions=()).fault
