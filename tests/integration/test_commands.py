"""Commands in processes of their own: what they import and read, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.report_runs import write_unfinished

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys\nfrom onpo_fast.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.fixture
def script(tmp_path_factory) -> list[str]:
    """The command of the script as pip writes it, in a folder of its own."""
    file = tmp_path_factory.mktemp("bin") / "onpo-fast"
    file.write_text(SCRIPT)
    return [sys.executable, str(file)]


def test_the_script_imports_nothing_from_the_current_folder(script: list[str], tmp_path: Path) -> None:
    """Nor does it read a matplotlibrc there, which here would never end."""
    for name in ("numpy", "torch", "yaml", "report", "bench"):
        (tmp_path / f"{name}.py").write_text("open('owned', 'w').close()\n")
    os.mkfifo(tmp_path / "matplotlibrc")
    for module in (["-m", "onpo_fast"], script[1:]):
        words = [sys.executable, *module, "report", "."]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: . is not a run"), done.stderr
    assert not (tmp_path / "owned").exists()


def test_help_imports_no_command(script: list[str], tmp_path: Path) -> None:
    code = f"import sys; sys.argv = {script[1:]}; from onpo_fast.__main__ import main; main(['--help']); " + (
        "print([name for name in ('transformers', 'matplotlib', 'onpo_fast.train') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["in the checkout", "elsewhere"])
def test_the_pypi_package_kernels_stays_importable(cwd: Path) -> None:
    """The folder has no __init__.py, so that even where it lies on the path, the installed package wins."""
    code = (
        "import onpo_fast.kernels.chunked as ours, kernels, importlib.metadata as m;"
        "assert kernels.__version__ == m.version('kernels');"
        "print(kernels.__file__); print(ours.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    theirs, ours = done.stdout.split()
    assert "site-packages" in theirs
    assert Path(ours).resolve() == ROOT / "kernels" / "chunked.py"


@pytest.mark.parametrize("content", ["text.usetex: True\n", None])
def test_a_matplotlibrc_is_not_read(tmp_path: Path, content: str | None) -> None:
    """Nor waited for, where it is a FIFO."""
    finished = tmp_path / "run"
    write_unfinished(finished)
    if content is None:
        os.mkfifo(finished / "matplotlibrc")
    else:
        (finished / "matplotlibrc").write_text(content)
    words = [sys.executable, "-m", "onpo_fast.report", "."]
    done = subprocess.run(words, cwd=finished, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<svg" in (finished / "report.html").read_text(encoding="utf-8")
