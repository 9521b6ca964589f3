"""The house: configurations against the paper, packaging, and what the documentation promises."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import signal
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import onpo_fast
from experiments.cyclic_lm.jobs import Job
from experiments.cyclic_lm.recipe import ETA, LAST_TURN
from onpo_fast import files, oracles
from onpo_fast.config import Config, parse, read_run
from onpo_fast.errors import UserError, command

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "onpo_fast" / "kernels"

PAPER = {  # arXiv 2502.16852, section 5 and appendix
    "objective": "onpo",
    "eta": 1 / 0.01,
    "responses_per_prompt": 8,
    "pairing": "best_worst",
    "labels": "sampled",
    "learning_rate": 5e-7,
    "warmup_ratio": 0.03,
    "batch_pairs": 128,
    "prompts_per_iteration": 20000,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 2048,
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("paper-llama3", {"model": "RLHFlow/LLaMA3-SFT", "iterations": 5, "epochs_auxiliary": 2, "epochs_policy": 1}),
        (
            "paper-mistral",
            {"model": "mistralai/Mistral-7B-Instruct-v0.3", "iterations": 3, "epochs_auxiliary": 1, "epochs_policy": 2},
        ),
    ],
)
def test_the_papers_settings(name: str, own: dict) -> None:
    config = parse(["--config", str(ROOT / f"configs/{name}.yaml"), "--seed", "3"])
    for key, value in {**PAPER, **own}.items():
        assert getattr(config, key) == value, key
    assert config.seed == 3
    assert config.make_objective().normaliser == pytest.approx(100.0**2)


def test_the_demonstration_is_the_beginning_of_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts, oracle and step; an oracle whose preference is cyclic."""
    monkeypatch.chdir(ROOT)
    config = parse(["--config", "configs/cpu-demo.yaml"])
    experiment = Config(**Job("onpo", 0, ETA).options())
    for name in ("prompts", "eval_prompts"):
        assert Path(getattr(config, name)).resolve() == Path(getattr(experiment, name))
    for name in ("model", "oracle", "objective", "eta", "max_new_tokens", "responses_per_prompt", "batch_pairs"):
        assert getattr(config, name) == getattr(experiment, name)
    assert oracles.load(config.oracle) is oracles.OPENINGS


def test_conversations_are_those_of_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts, environment, oracle and step."""
    monkeypatch.chdir(ROOT)
    config = parse(["--config", "configs/cpu-multi-turn.yaml"])
    experiment = Config(**Job("onpo", 0, ETA, LAST_TURN).options())
    for name in ("prompts", "eval_prompts"):
        assert Path(getattr(config, name)).resolve() == Path(getattr(experiment, name))
    for name in ("model", "oracle", "environment", "turns", "multi_turn_target", "objective", "eta", "max_new_tokens"):
        assert getattr(config, name) == getattr(experiment, name)
    assert oracles.load(config.oracle).names == oracles.OPENINGS.names


def test_flags_override_the_file(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("eta: 7.0\niterations: 4\n")
    for order in (["--config", str(path), "--iterations", "5"], ["--iterations", "5", f"--config={path}"]):
        config = parse(order)
        assert (config.eta, config.iterations) == (7.0, 5)
    path.write_text(config.to_yaml())
    assert parse(["--config", str(path)]) == config


def test_a_baseline_takes_the_same_step_by_default() -> None:
    sure = torch.ones(1)
    targets = {
        name: Config(objective=name).make_objective().target(sure).item() for name in ("onpo", "omd", "inpo", "ipo")
    }
    assert set(targets.values()) == {10.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "--seed"),
        ({"warmup_ratio": -0.5}, "--warmup_ratio"),
        ({"warmup_ratio": 1.0}, "--warmup_ratio"),
        ({"model": None}, "--model"),
        ({"top_p": 0.0}, "--top_p"),
        ({"learning_rate": float("nan")}, "--learning_rate"),
        ({"objective": "onp"}, "--objective"),
        ({"objective": "inpo", "eta": 0.1, "tau": 0.2}, "--objective inpo: tau"),
    ],
)
def test_values_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**change)


def test_a_configuration_that_is_none(tmp_path) -> None:
    for text in ("unknown: 1\n", "- list\n", "a: [1\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="is not the configuration of a run"):
            read_run(tmp_path)


def modules(*folders: str) -> list[Path]:
    """Every Python file below these folders; the link onpo_fast/kernels is not followed."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if KERNELS not in path.parents]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, by their absolute names."""
    package = path.relative_to(ROOT).parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_layers() -> None:
    """kernels/ imports nothing of onpo_fast, and only loss.py and, to draw tokens, sampling/draw.py import kernels."""
    for path in modules("kernels"):
        assert not [name for name in imported(path) if name.split(".")[0] == "onpo_fast"], path
    taken = {}
    for path in modules("onpo_fast"):
        if names := {name for name in imported(path) if name.startswith("onpo_fast.kernels.")}:
            taken[str(path.relative_to(ROOT / "onpo_fast"))] = {name.split(".")[2] for name in names}
    assert taken.keys() == {"loss.py", "sampling/draw.py"}
    assert taken["sampling/draw.py"] == {"noise", "sampled_tokens"}


def test_imports_have_no_cycle() -> None:
    """No folder or module of the package imports one that imports it, also not on a detour or within a function."""
    graph: dict[str, set[str]] = {}
    for path in modules("onpo_fast"):
        unit = path.relative_to(ROOT / "onpo_fast").parts[0].removesuffix(".py")
        names = {name.split(".")[1] for name in imported(path) if name.startswith("onpo_fast.")}
        graph.setdefault(unit, set()).update(names - {unit})
    assert len(graph) > 30
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_functions_and_files_are_short() -> None:
    """At most 60 lines a function, without its docstring, and 500 a file."""
    too_long = []
    for path in modules("onpo_fast"):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 500:
            too_long.append(str(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
                lines = node.end_lineno - node.lineno + 1
                lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                if lines > 60:
                    too_long.append(f"{path}: {node.name} has {lines} lines")
    assert not too_long


def test_the_snippets_of_the_readme() -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, {})


@pytest.mark.parametrize(
    ("program", "environment", "spins"),
    [
        ("onpo-fast", {}, "10000"),
        ("onpo-fast", {"GOMP_SPINCOUNT": "5"}, "5"),
        ("onpo-fast", {"OMP_WAIT_POLICY": "active"}, None),
        ("mine.py", {}, None),  # the package imported by somebody's program
    ],
)
def test_threads_of_a_command_spin_less(
    program: str, environment: dict, spins: str | None, monkeypatch, own_interrupt: None
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(os, "environ", environment)
    importlib.reload(onpo_fast)
    assert environment.get("GOMP_SPINCOUNT") == spins


@pytest.fixture
def own_interrupt() -> Iterator[None]:
    """The handler of Ctrl-C is that of before, after the test."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_command_is_imported(monkeypatch, own_interrupt: None) -> None:
    """It ends the program without a traceback of half an import; then the command says how it ends."""
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    importlib.reload(onpo_fast)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(sys, "argv", ["onpo-fast"])
    importlib.reload(onpo_fast)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    seen = []
    command(lambda argv: seen.append(signal.getsignal(signal.SIGINT)))([])
    assert seen == [signal.default_int_handler]


def test_version() -> None:
    assert importlib.metadata.version("onpo_fast") == onpo_fast.__version__


def test_files_are_whole_or_not_there(tmp_path) -> None:
    path = tmp_path / "deep" / "file.txt"
    files.atomic_write_text(path, "one")
    files.atomic_write_text(path, "zwei\n")
    assert path.read_text(encoding="utf-8") == "zwei\n"

    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    target = tmp_path / "model"
    files.atomic_write_directory(target, lambda d: (d / "a").write_text("1"))
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write_directory(target, fail)
    assert [p.name for p in target.iterdir()] == ["a"]
    files.atomic_write_directory(target, lambda d: (d / "b").write_text("2"))
    assert [p.name for p in target.iterdir()] == ["b"]
