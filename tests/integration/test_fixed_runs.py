"""The same bits as before: final weights against a table that was made by an earlier version."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from support import fixed_runs

TABLE = json.loads(fixed_runs.TABLE.read_text())


@pytest.mark.skipif(
    torch.__version__.partition("+")[0] != TABLE["torch"] or platform.machine() != "x86_64",
    reason=f"the table was made with torch {TABLE['torch']} on x86-64",
)
@pytest.mark.long
def test_final_weights_have_the_same_bits() -> None:
    assert fixed_runs.digests()["sha256"] == TABLE["sha256"]
