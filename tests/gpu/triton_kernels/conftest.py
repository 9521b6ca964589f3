"""The Triton kernels' tests run where a GPU is, or under the interpreter in a process of its own.

python -m pytest tests/gpu/triton_kernels                       on a GPU
TRITON_INTERPRET=1 python -m pytest tests/gpu/triton_kernels    on a CPU; tests/integration/test_triton.py does this
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN: what a kernel was to write and did not shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
