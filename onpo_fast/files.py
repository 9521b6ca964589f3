"""Files that are written whole or not at all, and read with limits, since anybody may have made them."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError, naming

PARTIAL = ".partial"  # what is added to the name of what is being written


def atomic_write_text(path: Path, text: str | Iterable[str], shared: bool = False) -> None:
    """Writes UTF-8 text, whole or in parts. A crash leaves the old file or the new one, never a part.

    ``shared``: another process may be writing the same file, so that what is half done has this one's number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared:
        _remove_abandoned(path)
    with _partial(path, f".{os.getpid()}{PARTIAL}" if shared else PARTIAL) as partial:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    sync(path.parent)


def atomic_write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets ``fill`` write a directory and puts it in place whole; what was there before is replaced."""
    with _partial(path) as partial:
        partial.mkdir(parents=True)
        fill(partial)
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        remove(path)
        os.replace(partial, path)
    sync(path.parent)


@contextmanager
def _partial(path: Path, ending: str = PARTIAL) -> Iterator[Path]:
    """Where to write what will be ``path``; gone afterwards, whatever happens."""
    partial = path.with_name(path.name + ending)
    remove(partial)
    try:
        with naming(path):
            yield partial
    finally:
        remove(partial)


def _remove_abandoned(path: Path) -> None:
    """Removes what processes of this machine that are gone, as killed ones, have left of a ``shared`` file."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"):
        number = partial.name.removeprefix(f"{path.name}.").removesuffix(PARTIAL)
        if number.isdecimal() and not partial.is_dir() and not Path("/proc", number).exists():
            partial.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A file, a directory with all that is in it, a link; or nothing, if nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a directory, is on the disk.

    Some network file systems cannot do that for a directory, and say so: that is no error.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, atomically."""
    atomic_write_text(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that ``write_jsonl`` wrote.

    Raises:
        UserError: if a line is not one; names it.
    """
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                record = parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield record


MIB = 2**20
LONGEST_LINE = 16 * MIB  # bytes; the longest that a run writes has a prompt's responses of all policies
MOST_LINES_BYTES = 256 * MIB  # read of a file of JSON lines, where only a page is made of it
MOST_LINES = 1_000_000


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Opens a file for reading bytes, if it is a regular one or a link to one.

    A FIFO would wait for a writer, and a device such as /dev/zero never ends. Opening waits for neither, and what was
    opened is looked at, not what the path named before.

    Args:
        most: bytes that it may have.

    Raises:
        UserError: if it is no regular file, or too large.
        OSError: if it is a directory, is not there or cannot be read.
    """
    _check_regular(path, os.stat(path), most)  # before it is opened: opening some devices does something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor), most)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(path: Path, found: os.stat_result, most: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise UserError(f"{path} is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, where a file belongs")
    if most is not None and found.st_size > most:
        raise UserError(f"{path} has {found.st_size:,} bytes: at most {most:,} are read")


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        UserError, OSError: as ``open_regular``.
    """
    with open_regular(path, most) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:  # reading says no name
            error.filename = error.filename or str(path)
            raise
    if len(content) > most:  # it has grown, or says that it has no bytes, as those of /proc
        raise UserError(f"{path} has more than {most:,} bytes, which are read at most")
    return content


def read_lines(path: Path, most_bytes: int = MOST_LINES_BYTES, most_lines: int = MOST_LINES) -> Iterator[bytes | None]:
    """The lines of a regular file, with their ends. None for each longer than ``LONGEST_LINE``, which is not kept.

    Ends after ``most_lines``, or with the first line that begins after ``most_bytes``.

    Raises:
        UserError, OSError: as ``open_regular``.
    """
    with open_regular(path) as file:
        read = 0
        for _ in range(most_lines):
            if read >= most_bytes:
                return
            try:
                line = file.readline(LONGEST_LINE + 1)
                read += len(line)
                whole = len(line) <= LONGEST_LINE
                rest = line
                while len(rest) > LONGEST_LINE and not rest.endswith(b"\n") and read < most_bytes:
                    rest = file.readline(LONGEST_LINE + 1)
                    read += len(rest)
            except OSError as error:
                error.filename = error.filename or str(path)
                raise
            if not line:
                return
            yield line if whole else None


@contextmanager
def advising(remedy: str) -> Iterator[None]:
    """Adds what to do to a ``UserError``, as "…/journal.jsonl is a FIFO, where a file belongs: remove it"."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from error


def is_amount(value: object) -> bool:
    """Whether a value of a JSON file is a number that can be counted with: finite, not negative, below 2**63."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**63


def parse_json(content: bytes | str) -> Any:
    """``json.loads``, with a ``ValueError`` also for what is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


MODEL_CARD = "README.md"  # in a policy's directory


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of a directory: the names and contents of its files.

    A model card in the directory does not count: it describes the policy, and changes after the evaluation.

    Raises:
        UserError: if one is no regular file.
    """
    if path.is_dir():
        cards = (path / MODEL_CARD, path / (MODEL_CARD + PARTIAL))
        files = sorted(file for file in path.rglob("*") if file not in cards and file.exists() and not file.is_dir())
        return checksum_of_files({str(file.relative_to(path)): checksum(file) for file in files})
    digest = hashlib.sha256()
    with naming(path), open_regular(path) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def checksum_of_files(checksums: dict[str, str]) -> str:
    """The checksum of a directory, from those of its files by their paths in it."""
    listing = "".join(f"{path} {checksums[path]}\n" for path in sorted(checksums, key=lambda path: Path(path).parts))
    return hashlib.sha256(listing.encode()).hexdigest()
