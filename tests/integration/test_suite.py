"""The tests themselves: a signal ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = """
import time
from pathlib import Path

from onpo_fast import signals

def test_that_trains():
    signals.listen()
    {during}

def test_that_waits():
    Path("waits").touch()
    time.sleep(300)

def test_after_it():
    Path("went on").touch()
"""
DURING = "Path('trains').touch()\n    while not signals.asked():\n        time.sleep(0.01)"


@pytest.mark.parametrize(
    ("options", "during", "begun"),
    [([], "pass", "waits"), ([], DURING, "trains"), (["-n", "1"], "pass", "waits")],
    ids=["after a run", "during a run", "with workers"],
)
def test_sigterm_ends_the_tests(options: list[str], during: str, begun: str, tmp_path: Path) -> None:
    """After and while a test trains in the process of the tests, as ``train.main`` does."""
    (tmp_path / "test_it.py").write_text(TESTS.format(during=during))
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    line = [sys.executable, "-m", "pytest", "-q", "-p", "support.stopping", "-p", "no:cacheprovider", *options]
    process = subprocess.Popen(line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE)
    try:
        while not (tmp_path / begun).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode != 0
    assert not (tmp_path / "went on").exists()
