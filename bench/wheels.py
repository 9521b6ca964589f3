"""Fetches wheels for a machine without a network, and installs them there.

    python -m bench.wheels fetch FOLDER [PIP OPTIONS]    download the wheels of bench/wheels.txt, split large ones, and
                                                         list the files (make wheels)
    python -m bench.wheels install FOLDER SITE           join and install missing packages into the folder SITE

A wheel of more than 60 MiB is split into NAME.whl.part1of2, NAME.whl.part2of2, …, with its SHA-256 in NAME.whl.sha256.
Only the standard library is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

LIST = Path(__file__).with_name("wheels.txt")
MOST_BYTES = 60 * 2**20  # maximum size of a piece
# Python reads .pth files, with which a package may add folders, only in site folders, not in folders on PYTHONPATH.
# This sitecustomize.py adds its own folder as a site folder. Only the first sitecustomize.py on the path is run, so it
# also adds the other site-packages folders on PYTHONPATH.
READ_PTH_FILES = """\
import os, site
own = os.path.dirname(os.path.abspath(__file__))
for folder in dict.fromkeys([own, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]):
    if folder == own or os.path.basename(os.path.normpath(folder)) == "site-packages":
        site.addsitedir(folder)
"""
PART = re.compile(r"(?P<wheel>.+\.whl)\.part(?P<number>\d+)of(?P<count>\d+)")


class Broken(Exception):
    """A wheel that cannot be joined; the message says why in one line."""


def fetch(folder: Path, options: list[str]) -> int:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "--requirement", str(LIST)]
    status = subprocess.run([*command, *options], check=False).returncode
    if status == 0:
        split(folder)
        print(listing(folder))
    return status


def split(folder: Path, most: int = MOST_BYTES) -> None:
    """Replaces every wheel of more than ``most`` bytes by pieces and a checksum file."""
    for wheel in sorted(folder.glob("*.whl")):
        count = -(-wheel.stat().st_size // most)
        if count < 2:
            continue
        for old in folder.glob(f"{wheel.name}.*"):
            old.unlink()
        digest = hashlib.sha256()
        size = -(-wheel.stat().st_size // count)
        with open(wheel, "rb") as whole:
            for number in range(1, count + 1):
                piece = whole.read(size)
                digest.update(piece)
                (folder / f"{wheel.name}.part{number}of{count}").write_bytes(piece)
        (folder / f"{wheel.name}.sha256").write_text(f"{digest.hexdigest()}  {wheel.name}\n", encoding="utf-8")
        wheel.unlink()


def listing(folder: Path) -> str:
    """Lists the files to copy to the machine with their sizes, and the total size."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    sizes = [path.stat().st_size for path in files]
    lines = [f"{size / 2**20:8.1f} MiB  {path.name}" for size, path in zip(sizes, files)]
    return "\n".join([*lines, f"{sum(sizes) / 2**20:8.1f} MiB  in all, {len(files)} files in {folder}"])


def split_wheels(folder: Path) -> list[str]:
    """Names of the split wheels in a folder, complete or not."""
    found = {match["wheel"] for path in folder.glob("*.whl.part*") if (match := PART.fullmatch(path.name))}
    return sorted(found | {path.name.removesuffix(".sha256") for path in folder.glob("*.whl.sha256")})


def join(folder: Path, name: str, destination: Path) -> Path:
    """Joins the pieces of the wheel ``name`` into a file in ``destination``.

    Raises:
        Broken: if a piece or the checksum is missing, or the checksum differs.
    """
    record = folder / f"{name}.sha256"
    if not record.is_file():
        raise Broken(f"{record.name} is missing: copy it again from where `make wheels` ran")
    counts = {int(PART.fullmatch(path.name)["count"]) for path in folder.glob(f"{name}.part*of*")}
    count = max(counts, default=2)
    parts = [folder / f"{name}.part{number}of{count}" for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise Broken(f"{', '.join(missing)} is missing: copy it again from where `make wheels` ran")
    digest = hashlib.sha256()
    whole = destination / name
    with open(whole, "wb") as file:
        for part in parts:
            piece = part.read_bytes()
            digest.update(piece)
            file.write(piece)
    if record.read_text(encoding="utf-8", errors="replace").split()[:1] != [digest.hexdigest()]:
        whole.unlink()
        raise Broken(f"{name}: its {count} pieces or {record.name} are damaged (SHA-256 differs): copy them again")
    return whole


def install(folder: Path, site: Path) -> int:
    """Installs missing packages into ``site``, a folder for PYTHONPATH; returns 1 if a wheel could not be installed.

    Installed packages are not replaced, because torch and triton must match the GPU's driver.
    """
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(READ_PTH_FILES, encoding="utf-8")
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="wheels-") as work:
        wheels = [wheel for wheel in sorted(folder.glob("*.whl")) if not installed(wheel.name)]
        for name in split_wheels(folder):
            if not installed(name):
                try:
                    wheels.append(join(folder, name, Path(work)))
                except Broken as error:
                    broken.append(str(error))
        refused = pip_install(wheels, site)
    print("\n".join(broken), end="\n" if broken else "")
    print(f"{len(wheels) - len(refused)} wheels installed from {folder}")
    if refused:
        print(f"refused by pip: {', '.join(refused)}")
    return 1 if broken or refused else 0


def pip_install(wheels: list[Path], site: Path) -> list[str]:
    """Installs wheels; returns the names of those that pip refused.

    pip installs nothing if one wheel does not fit the machine, and names that wheel; it is called again without it.
    """
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--disable-pip-version-check",
        "--target",
        str(site),
    ]
    refused: list[str] = []
    while wheels:
        done = subprocess.run([*pip, *map(str, wheels)], stderr=subprocess.PIPE, text=True, check=False)
        print(done.stderr, end="", file=sys.stderr, flush=True)
        if done.returncode == 0:
            break
        wrong = [wheel for wheel in wheels if is_named(wheel, done.stderr)] or wheels
        refused += [wheel.name for wheel in wrong]
        wheels = [wheel for wheel in wheels if wheel not in wrong]
    return refused


def is_named(wheel: Path, said: str) -> bool:
    """Whether an error message of pip names the file or the package of this wheel."""
    package = re.escape(wheel.name.split("-")[0]).replace("_", "[-_.]")
    about = rf"\b{re.escape(wheel.name)}|['\s]{package}['\s]"
    return any(re.search(about, line, re.IGNORECASE) for line in said.splitlines() if line.startswith("ERROR"))


def installed(wheel: str) -> bool:
    """Whether the package of the wheel with this file name is installed, in any version."""
    try:
        metadata.version(wheel.split("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.wheels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="Download the wheels of bench/wheels.txt.", allow_abbrev=False)
    fetching.add_argument("folder", type=Path, help="Folder into which the wheels are downloaded.")
    fetching.add_argument("pip_options", nargs=argparse.REMAINDER, help="Further options of `pip download`.")
    installing = commands.add_parser("install", help="Install the wheels whose packages are missing.")
    installing.add_argument("folder", type=Path, help="Folder with the wheels.")
    installing.add_argument("site", type=Path, help="Folder into which the packages are installed.")
    options = parser.parse_args(arguments)
    if options.command == "fetch":
        return fetch(options.folder, options.pip_options)
    return install(options.folder, options.site)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
