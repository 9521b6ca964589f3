"""The lock of a run directory: one process at a time works on a run."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError

LOCK = ".lock"


def locked(directory: Path, title: str = "") -> RunLock:
    """Locks a run directory for this process, and creates it if it is missing.

    The lock ends with the process, however that ends.

    Args:
        title: what error messages put before the name of the directory.

    Raises:
        UserError: if another process has the lock, or the directory cannot be created or holds a symbolic link.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        refuse_links(directory)
        return RunLock(directory)
    except Timeout:
        raise UserError(f"{title}{directory} is in use by another process") from None
    except OSError as error:
        raise UserError(f"{title}{directory}: cannot make it ({error})") from None


class RunLock:
    """The lock of a run directory, held until ``release`` or the end of a ``with``."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self.lock = FileLock(self.path)
        self.lock.acquire(timeout=0)
        self.file = _identity(self.path)

    def check(self) -> None:
        """Raises ``UserError`` if the lock's file was removed or replaced: another process may work on the run too."""
        if _identity(self.path) != self.file:
            raise UserError(
                f"{self.path} was removed while this process was at work, so another process may be writing the same "
                "files: make sure that there is none, and start again (a run with --resume)"
            )

    def release(self) -> None:
        """Lets another process lock the directory."""
        self.lock.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if there is none."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


LINKED = ("wandb",)  # folders in which another program keeps links of its own


def refuse_links(directory: Path) -> None:
    """Raises ``UserError`` if a run directory holds a symbolic link, through which a run would write elsewhere.

    The directory itself may be a symbolic link.
    """
    for folder, folders, files in os.walk(directory):
        for name in sorted((*folders, *files)):
            path = Path(folder, name)
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link: a run writes and removes files in its own directory only. Put the "
                    "file or folder itself there, or remove the link"
                )
        if Path(folder) == directory:
            folders[:] = [name for name in folders if name not in LINKED]
