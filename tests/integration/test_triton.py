"""The tests of the Triton kernels, tests/gpu/triton_kernels, run without a GPU by Triton's interpreter.

The interpreter is chosen by a variable that Triton reads once, so they run in processes of their own: several, so that
processes of pytest-xdist share them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = "tests/gpu/triton_kernels"
PARTS = {
    "any problem": [f"{FOLDER}/test_properties.py"],
    "pair loss in float32": [f"{FOLDER}/test_pair_loss.py", "-k", "fp32"],
    "pair loss, the rest": [f"{FOLDER}/test_pair_loss.py", "-k", "not fp32"],
    "the rest": [FOLDER, f"--ignore={FOLDER}/test_properties.py", f"--ignore={FOLDER}/test_pair_loss.py"],
}


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_under_the_interpreter(part: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'kernels'}"]
    line += ["--confcutdir=tests/gpu", "-o", "pythonpath=tests", *PARTS[part]]  # without the fixtures of other tests
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
