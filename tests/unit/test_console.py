"""The console script ``onpo-fast``, which is also ``python -m onpo_fast``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import onpo_fast
from onpo_fast import __main__ as console
from onpo_fast.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys\nfrom onpo_fast.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.fixture
def script(tmp_path_factory) -> list[str]:
    """The command of the script as pip writes it, in a folder of its own."""
    file = tmp_path_factory.mktemp("bin") / "onpo-fast"
    file.write_text(SCRIPT)
    return [sys.executable, str(file)]


def test_the_entry_point_is_there() -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (points,) = [ast.literal_eval(node.value) for node in calls if node.arg == "entry_points"]
    assert points == {"console_scripts": ["onpo-fast = onpo_fast.__main__:main"]}
    assert callable(console.main)


@pytest.mark.parametrize("name", ["train", "evaluate", "report", "export", "games"])
def test_a_command_gets_its_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    module = ModuleType("stand-in")
    module.main = got.append
    monkeypatch.setitem(sys.modules, console.COMMANDS[name][0], module)
    console.main([name, "--debug", "DIR"])
    assert got == [["--debug", "DIR"]]


@pytest.mark.parametrize("name", ["train", "evaluate", "report", "export", "games"])
def test_commands_are_modules(name: str) -> None:
    place = ROOT / (console.COMMANDS[name][0].replace(".", "/") + ".py")
    assert "\ndef main(argv" in place.read_text(encoding="utf-8")


def test_help_and_version(capsys) -> None:
    for line in ([], ["--help"], ["-h"]):
        console.main(line)
        said = capsys.readouterr().out
        assert all(f"  {name} " in said for name in console.COMMANDS)
    console.main(["--version"])
    assert capsys.readouterr().out.strip() == onpo_fast.__version__


def test_an_unknown_command(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        console.main(["trian"])
    assert stopped.value.code == 2
    assert "train" in capsys.readouterr().err
    with pytest.raises(UserError, match="xyzzy"):
        console.main(["xyzzy", "--debug"])


def test_the_environment(capsys) -> None:
    console.main(["env"])
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["onpo_fast"].strip() == onpo_fast.__version__
    assert {"torch", "python", "platform", "extra data", "extra judge"} <= {name.strip() for name in facts}
    with pytest.raises(SystemExit) as stopped:
        console.main(["env", "--all"])
    assert stopped.value.code == 2


def test_the_benchmark_is_in_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        console.main(["bench", "summary", "--help"])
    assert stopped.value.code == 0
    assert "results" in capsys.readouterr().out
    monkeypatch.setattr(console, "CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        console.main(["bench", "kernels"])
    assert stopped.value.code == 2
    assert "checkout" in capsys.readouterr().err


def test_the_script_imports_nothing_from_the_current_folder(script: list[str], tmp_path: Path) -> None:
    """Nor does it read a matplotlibrc there, which here would never end. No command is imported for the help."""
    for name in ("numpy", "torch", "yaml", "report", "bench"):
        (tmp_path / f"{name}.py").write_text("open('owned', 'w').close()\n")
    os.mkfifo(tmp_path / "matplotlibrc")
    for module in (["-m", "onpo_fast"], script[1:]):
        for line in (["report", "--help"], ["report", "."]):
            words = [sys.executable, *module, *line]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
            assert done.returncode == (0 if "--help" in line else 2), done.stderr
            assert "onpo_fast.report" in done.stdout or done.stderr.startswith("error: . is not a run"), done.stderr
    assert not (tmp_path / "owned").exists()


def test_help_imports_no_command(script: list[str], tmp_path: Path) -> None:
    code = f"import sys; sys.argv = {script[1:]}; from onpo_fast.__main__ import main; main(['--help']); " + (
        "print([name for name in ('transformers', 'matplotlib', 'onpo_fast.train') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
