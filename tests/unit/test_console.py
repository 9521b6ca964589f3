"""The console script ``onpo-fast``, which is also ``python -m onpo_fast``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import onpo_fast
from onpo_fast import __main__ as console
from onpo_fast.config import parse
from onpo_fast.errors import UserError

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("started", "shown"),
    [
        ("/usr/bin/onpo-fast", "onpo-fast train"),
        ("/src/onpo_fast/__main__.py", "python -m onpo_fast train"),
        ("/src/onpo_fast/train.py", "python -m onpo_fast.train"),
    ],
)
def test_the_usage_is_what_was_typed(started: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {shown} [--config FILE]")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from onpo_fast.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_package_has_the_loss() -> None:
    assert {*onpo_fast.__all__} <= {*dir(onpo_fast)}
    assert onpo_fast.objectives.Onpo(eta=1.0).eta == 1.0
    for name in onpo_fast.__all__:
        assert getattr(onpo_fast, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="module 'onpo_fast' has no attribute 'fused_loss'"):
        onpo_fast.fused_loss  # noqa: B018


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


@pytest.mark.parametrize(
    ("command", "sub_command", "about"), [("bench", "summary", "results"), ("experiment", "cyclic-lm", "duality gap")]
)
def test_commands_that_are_in_a_checkout_only(
    command: str, sub_command: str, about: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with pytest.raises(SystemExit) as stopped:
        console.main([command, sub_command, "--help"])
    assert stopped.value.code in (0, None)
    assert about in capsys.readouterr().out
    monkeypatch.setattr(console, "CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        console.main([command, sub_command])
    assert stopped.value.code == 2
    assert "checkout" in capsys.readouterr().err


def test_the_commands_of_the_benchmark(capsys) -> None:
    bench = console._import_from_checkout("bench")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in bench.COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["kernel"])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert "kernel;" in line
    assert all(name in line for name in bench.COMMANDS)
    assert not said.out


def test_a_benchmark_refuses_a_number_that_measures_nothing(tmp_path: Path, capsys) -> None:
    """In one line, and before it writes over results."""
    bench = console._import_from_checkout("bench")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["sampling", "--prompts", "0", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert "--prompts" in line
    assert "from 1 on" in line
    assert not list(tmp_path.iterdir())
