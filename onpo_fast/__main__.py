"""The console script: ``onpo-fast COMMAND``, the same as ``python -m onpo_fast COMMAND``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from . import __version__
from .arguments import CommandParser
from .errors import UserError, command, nearest

COMMANDS = {
    "train": ("onpo_fast.train", "train a model by self-play, or continue a run"),
    "evaluate": ("onpo_fast.evaluate", "evaluate the policies of a run"),
    "report": ("onpo_fast.report", "write a run's report.html"),
    "export": ("onpo_fast.export", "export the pairs or the answers of a run"),
    "memory": ("onpo_fast.memory.__main__", "print the memory that a training step will take"),
    "games": ("onpo_fast.games.__main__", "play games whose Nash policy is known"),
    "experiment": (
        "experiments.__main__",
        "compare methods on a language model (in a checkout only)",
    ),
    "bench": ("bench.__main__", "measure the loss and the trainer (in a checkout only)"),
    "env": ("", "print versions, device and installed extras, to paste into an issue"),
}
CHECKOUT = Path(__file__).resolve().parents[1]
ONLY_IN_CHECKOUT = ("experiment", "bench")  # commands whose packages are not installed


def usage() -> str:
    """Returns the help of the console script."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items())
    return (
        "usage: onpo-fast COMMAND [OPTIONS]\n\n"
        "Train a language model to a Nash policy of a preference game by self-play (arXiv 2502.16852).\n\n"
        f"commands:\n{commands}\n\n"
        "onpo-fast COMMAND --help lists the options of a command."
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command that the first argument names. A command's modules are imported only when it is chosen."""
    argv = sys.argv[1:] if argv is None else argv
    module = COMMANDS[argv[0]][0] if argv and argv[0] in COMMANDS else ""
    if module and argv[0] not in ONLY_IN_CHECKOUT:
        importlib.import_module(module).main(argv[1:])
    else:
        _run_here(argv)


@command
def _run_here(argv: list[str]) -> None:
    name, arguments = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name == "env":
        CommandParser(prog="onpo-fast env", description=f"{COMMANDS[name][1].capitalize()}.").parse_args(arguments)
        print(environment_report())
    elif name in ONLY_IN_CHECKOUT:
        module = _import_from_checkout(COMMANDS[name][0].partition(".")[0])
        if name == "bench":
            sys.argv = ["bench", *arguments]  # results record the command
        raise SystemExit(module.main(arguments))
    else:
        raise UserError(f"there is no command {name}{nearest(name, COMMANDS) or ' (see --help)'}")


def _import_from_checkout(package: str) -> ModuleType:
    """Imports ``package.__main__`` from the checkout that this file is in; other modules come from where they did.

    Raises:
        UserError: if this is not a checkout.
    """
    folder = CHECKOUT / package
    if not (folder / "__main__.py").is_file():
        raise UserError(f"{package} is only in a checkout of the repository: clone it, and run this there")
    spec = importlib.util.spec_from_file_location(package, folder / "__init__.py")
    sys.modules[package] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.__main__")


def environment_report() -> str:
    """Returns what an issue should say about the machine, one fact a line."""
    import torch

    from .device import device_of
    from .run.tracking import environment

    facts = environment(device_of("auto"))
    facts |= {"platform": platform.platform(), "CUDA of torch": torch.version.cuda, "CPUs": str(os.cpu_count())}
    facts |= {f"extra {name}": missing or "installed" for name, missing in _extras().items()}
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {'none' if fact is None else fact}" for name, fact in facts.items())


def _extras() -> dict[str, str]:
    """Returns, for each optional extra of the package, which of its requirements are missing or too old; "" if none."""
    from packaging.requirements import Requirement

    try:
        own = metadata.metadata("onpo_fast")
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(text) for text in metadata.requires("onpo_fast") or ()]
    missing: dict[str, str] = {}
    for extra in own.get_all("Provides-Extra") or ():
        wanted = [one for one in requirements if one.marker and _is_of(one, extra)]
        missing[extra] = ", ".join(str(one.name) for one in wanted if not _is_met(one))
        missing[extra] = f"without {missing[extra]}" if missing[extra] else ""
    return missing


def _is_of(requirement, extra: str) -> bool:
    return requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate({"extra": ""})


def _is_met(requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
