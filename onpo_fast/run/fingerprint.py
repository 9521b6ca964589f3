"""Fingerprints of models and of users' functions: checksums of their files, so that a run notices a replacement."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from ..models.checkpoint import base_of, locate, weight_files

INSTALLED = ("site-packages", "dist-packages")  # folders of installed packages
NO_ORACLES = (*sys.stdlib_module_names, "onpo_fast")  # modules that are not part of a fingerprint
STARTED = ("__main__", "__mp_main__")  # names of the program that was started; multiprocessing has the second
PACKAGE = Path(__file__).resolve().parents[1]
MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")


def model_fingerprint(source: str, commit: str | None, checksum: Callable[[Path], str]) -> dict[str, str]:
    """Returns the SHA-256 of each file that loading a model may read, by name, or the hub's commit.

    Of an adapter, the files of its base are in it as "base/NAME", or the base's commit as "base/commit".

    Whole files are read, since weights can change without their size, and copying changes dates. This takes about 8 s
    for 16 GB on a processor with SHA instructions.

    Args:
        source: a directory, a Hugging Face id, or "smollm2".
        commit: the commit of a model from the hub, if known.
        checksum: computes the checksum of a file from its resolved path.
    """
    if (base := base_of(source)) != source:
        own = {path.name: checksum(path.resolve()) for path in _model_files(Path(source))}
        of_base = model_fingerprint(base, commit, checksum)
        return own | {f"base/{name}": value for name, value in of_base.items()}
    directory = Path(locate(source)["pretrained_model_name_or_path"])
    if directory.is_dir():
        files = _model_files(directory)
        files |= set(weight_files(str(directory)))  # shards may be in folders of it
        return {str(path.relative_to(directory)): checksum(path.resolve()) for path in sorted(files)}
    return {"commit": commit} if commit else {}


def _model_files(directory: Path) -> set[Path]:
    return {path for path in directory.iterdir() if path.suffix in MODEL_FILES}


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The names whose checksums differ between two fingerprints, sorted."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def function_fingerprint(name: str, oracle: Callable, checksum: Callable[[Path], str]) -> dict[str, str]:
    """Returns the SHA-256 of each Python file that a user's function needs, by name: its module and its imports.

    Args:
        name: "module:function".
        oracle: the function, or a callable object.
        checksum: computes the checksum of a file from its resolved path.
    """
    defined = inspect.unwrap(oracle) if inspect.isroutine(oracle) else type(oracle)
    files: dict[str, Path] = {}
    for module in {name.partition(":")[0], defined.__module__ or ""}:
        package = module.partition(".")[0]
        if package in NO_ORACLES:
            continue
        folders = getattr(sys.modules.get(package), "__path__", None)
        if folders is not None:
            own = [(Path(folder).absolute().parent, set(Path(folder).absolute().rglob("*.py"))) for folder in folders]
        else:
            file = _file(sys.modules.get(module))
            own = [(file.parent, {file})] if file else []
        for folder, paths in own:
            if folder.name not in INSTALLED:
                paths |= _imported_from(folder, paths)
            files |= {str(path.relative_to(folder)): path for path in paths}
    return {place: checksum(path.resolve()) for place, path in sorted(files.items())}


def _imported_from(folder: Path, files: set[Path]) -> set[Path]:
    """The files of a folder that these files import, directly or not, and those that have been imported.

    The former are found in the sources, since an import inside a function may not have run yet. The latter may have
    been imported under a name that was computed at run time.
    """
    found, unread = set(files), list(files)
    while unread:
        for name in set(_imported_names(unread.pop())).difference(NO_ORACLES):
            package = folder / name
            paths = package.rglob("*.py") if (package / "__init__.py").is_file() else [folder / f"{name}.py"]
            new = {path for path in paths if path.is_file()} - found
            found |= new
            unread += new
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in (*STARTED, *NO_ORACLES) and (path := _file(module)):
            if PACKAGE in path.resolve().parents:  # imported under another name
                continue
            above = name.count(".") + (path.name == "__init__.py")  # folders between it and where Python looked for it
            looked_in = path.parents[above] if above < len(path.parents) else path
            if folder in (looked_in, looked_in.parent) and looked_in.name not in INSTALLED:
                found.add(path)
    return found


def _imported_names(file: Path) -> Iterator[str]:
    """The top-level names of the modules that a Python file imports by absolute imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # it cannot be imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _file(module: ModuleType | None) -> Path | None:
    """The Python file of a module; None if it has none."""
    path = getattr(module, "__file__", None)
    return Path(path).absolute() if isinstance(path, str) and Path(path).is_file() else None
