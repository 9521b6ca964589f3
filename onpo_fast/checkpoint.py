"""What survives a crash: files that are whole or not there, the journal of a run, and the state inside a fit."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UserError, naming

# ---------------------------------------------------------------------------------------------------------------------
# Whole files: written beside their place, flushed, then renamed into it
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Files that anybody may have made: a run directory can come from a stranger
# ---------------------------------------------------------------------------------------------------------------------

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


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of a directory: the names and contents of its files.

    Raises:
        UserError: if one is no regular file.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.exists() and not file.is_dir())
        listing = "".join(f"{file.relative_to(path)} {checksum(file)}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    digest = hashlib.sha256()
    with naming(path), open_regular(path) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Who works on a run, and what it has done
# ---------------------------------------------------------------------------------------------------------------------


LOCK = ".lock"


def locked(directory: Path, title: str = "") -> RunLock:
    """The run directory, made if need be, for this process alone. The lock goes with the process, however it ends.

    Raises:
        UserError: if another has it, or it cannot be made, or holds a symbolic link. ``title`` goes before its name.
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
        """Raises ``UserError`` if the lock's file is gone or another: then another process may have the run too."""
        if _identity(self.path) != self.file:
            raise UserError(
                f"{self.path} was removed while this process was at work, so that another may be writing the same "
                "files: see that there is none, and start again (a run with --resume)"
            )

    def release(self) -> None:
        self.lock.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, whatever its name; None if there is none."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


LINKED = ("wandb",)  # folders of a run directory in which another program keeps links of its own


def refuse_links(directory: Path) -> None:
    """Raises ``UserError`` if a run directory holds a symbolic link: what is written there would be written elsewhere.

    The directory itself may be one.
    """
    for folder, folders, files in os.walk(directory):
        for name in sorted((*folders, *files)):
            path = Path(folder, name)
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link: what a run writes and removes is to be in its own directory. Put the "
                    "file or folder itself there, or remove the link"
                )
        if Path(folder) == directory:
            folders[:] = [name for name in folders if name not in LINKED]


class Journal:
    """The outputs of a run in the order in which they were made, with their checksums and a note each.

    An output counts as made if it is in ``journal.jsonl`` and on disk as it was then. One that is not is made again; if
    it does not come out the same, what was made after it is forgotten, to be made again too.

    The file is one JSON object a line: what was recorded or forgotten, and a checksum of the line and all before it. A
    line is added for each change, so that a change costs the same however many there were. Everything is written
    twice, so that damage can be mended; a last line that is not whole is what a power cut leaves, and is left out.
    The first change of a process writes both files anew, without the lines that no longer count.

    Attributes:
        before_record: called before each change is written: what has to be on disk by then, or still hold.

    Raises:
        UserError: if neither file is whole, or an entry's name is a path that is not in the run directory.
    """

    FILES = ("journal.jsonl", "journal.copy.jsonl")
    EARLIER_FILES = ("journal.json", "journal.copy.json")  # of earlier runs: an object, written anew for each change

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, dict[str, Any]] = {}
        self.checked: dict[str, bool] = {}  # an output is read once to see whether it is whole
        self.file = directory / self.FILES[0]  # the one that was read, or will be written
        self.mended = False  # whether the copy had to be taken
        self.before_record: list[Callable[[], None]] = []
        self.last = ""  # the checksum of the last line, once both files end with it
        for names, parse in ((self.FILES, _parse_lines), (self.EARLIER_FILES, _parse_object)):
            if any(os.path.lexists(directory / name) for name in names):
                self._read(names, parse)
                return

    def _read(self, names: Sequence[str], parse: Callable[[bytes], _Content]) -> None:
        whole: list[tuple[str, _Content]] = []
        damaged = []
        for name in names:
            path = self.directory / name
            if os.path.lexists(path):
                try:
                    whole.append((name, parse(read_regular(path, MOST_LINES_BYTES))))
                except (ValueError, RecursionError) as error:
                    damaged.append(f"{path} is damaged ({error})")
                except UserError as error:  # no regular file, or too large
                    damaged.append(str(error))
        if not whole:
            raise UserError(f"{' and '.join(damaged)}: remove what is damaged, and --resume makes everything again")
        name, content = whole[0]
        if len(whole) == 2 and content.lines[-1:] and content.lines[-1] in whole[1][1].lines[:-1]:
            name, content = whole[1]  # it goes on where the first one ends
        self.file = self.directory / name
        self.mended = name != names[0]
        self.entries = content.entries
        checked: set[Path] = set()
        for entry in self.entries:
            _check_name(self.directory, name, entry, checked)

    def begin(self, notes: dict[str, dict[str, Any]]) -> None:
        """What a run goes by, noted before all outputs, in one write."""
        known = {name: entry for name, entry in self.entries.items() if name not in notes}
        self.entries = {name: {"checksum": None, "note": note} for name, note in notes.items()} | known
        self._write_anew()

    def note(self, name: str) -> dict[str, Any] | None:
        """What was noted with an output, if it was made and is whole; ``name`` is its path in the run directory."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if name not in self.checked:
            self.checked[name] = entry["checksum"] is None or self._is(name, entry["checksum"])
        return entry["note"] if self.checked[name] else None

    def damaged(self, name: str) -> bool:
        """Whether an output was made, and is no longer what it was."""
        return name in self.entries and self.note(name) is None

    def record(
        self, name: str, note: dict[str, Any] | None = None, file: bool = True, content: str | None = None
    ) -> None:
        """An output is made.

        Args:
            name: its path in the run directory.
            note: what to keep with it.
            file: whether there is a file or directory of that name.
            content: its checksum, if that is known already; otherwise it is computed.
        """
        if file and content is None:
            content = checksum(self.directory / name)
        self._change({"name": name, "checksum": content, "note": note or {}})
        self.checked[name] = True

    def forget(self, *names: str) -> None:
        """Outputs that are no longer needed: the record first, so that none is missed that is recorded."""
        self.forget_records(*names)
        for name in names:
            remove(self.directory / name)

    def forget_records(self, *names: str) -> None:
        """Outputs that are about to be made again. Their files stay."""
        if known := [name for name in names if name in self.entries]:
            self._change({"forget": known})

    def within(self, folder: str) -> list[str]:
        """The recorded outputs in a folder, by name."""
        return sorted(name for name in self.entries if name.startswith(f"{folder}/"))

    def forget_folder(self, folder: str) -> None:
        """Also what a kill has left there, and the journal does not list."""
        self.forget_records(*self.within(folder))
        remove(self.directory / folder)

    def _is(self, name: str, expected: str) -> bool:
        path = self.directory / name
        try:
            return path.exists() and checksum(path) == expected
        except UserError:  # no regular file
            return False

    def _change(self, change: dict[str, Any]) -> None:
        _apply(change, self.entries)
        if not self.last:
            self._write_anew()
            return
        for act in self.before_record:
            act()
        line, last = _line(change, self.last)
        self.last = ""  # after a failure a file may end with half a line: then both are written anew
        for name in self.FILES:
            path = self.directory / name
            with naming(path), open(path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.last = last

    def _write_anew(self) -> None:
        for act in self.before_record:
            act()
        lines, last = [], ""
        for change in ({"version": VERSION}, *({"name": name, **entry} for name, entry in self.entries.items())):
            line, last = _line(change, last)
            lines.append(line.decode())
        for name in self.FILES:
            atomic_write_text(self.directory / name, lines)
        for name in self.EARLIER_FILES:
            remove(self.directory / name)
        self.last = last


VERSION = 1  # of the lines of a journal


@dataclass(frozen=True)
class _Content:
    """What a file of a journal says."""

    entries: dict[str, dict[str, Any]]
    lines: list[str]  # their checksums


def _line(change: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """A line of a journal, and its checksum, which is one of all lines before it too."""
    body = json.dumps(change)
    own = hashlib.sha256(f"{previous}{body}".encode()).hexdigest()
    return f'{body[:-1]}, "sha256": "{own}"}}\n'.encode(), own


class _OtherVersion(ValueError):
    """The journal is whole, and of another version of this package."""


def _apply(change: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    """Changes the entries as a line says."""
    for name in change.get("forget", ()):
        entries.pop(name, None)
    if "name" in change:
        name, entry = change["name"], {"checksum": change["checksum"], "note": change["note"]}
        if name in entries and entries[name]["checksum"] != entry["checksum"]:
            for later in list(entries)[list(entries).index(name) :]:
                del entries[later]
        entries[name] = entry


def _parse_lines(content: bytes) -> _Content:
    """What the lines of a journal come to; ``ValueError`` if one before the last is not what was written."""
    *lines, rest = content.split(b"\n")
    entries: dict[str, dict[str, Any]] = {}
    checksums: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            change = parse_json(line)
            own = change.pop("sha256")
            written = _line(change, checksums[-1] if checksums else "")[1] == own
            if not checksums and written and type(change.get("version")) is int and change["version"] != VERSION:
                raise _OtherVersion("it is of another version of onpo_fast")
            if not written or not _is_change(change, first=not checksums):
                raise ValueError
        except _OtherVersion:
            raise
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            if checksums and number == len(lines) and not rest:
                break  # as a power cut leaves it
            raise ValueError(f"line {number} is not what was written") from None
        checksums.append(own)
        _apply(change, entries)
    if not checksums:
        raise ValueError("not the journal of a run")
    return _Content(entries, checksums)


def _is_change(change: dict[str, Any], first: bool) -> bool:
    """Whether it is what a line says: the version, in the first one; what was forgotten, or an output, in others."""
    if first:
        return change.keys() == {"version"} and type(change["version"]) is int
    if change.keys() == {"forget"}:
        return isinstance(change["forget"], list) and all(isinstance(name, str) for name in change["forget"])
    return change.keys() == {"name", "checksum", "note"} and isinstance(change["name"], str) and _is_entry(change)


def _parse_object(content: bytes) -> _Content:
    """What an early journal holds: an object with an entry for itself, which the earliest did not have."""
    entries = parse_json(content)
    if not isinstance(entries, dict) or not entries or not all(map(_is_entry, entries.values())):
        raise ValueError("not the journal of a run")
    own = entries.pop(Journal.EARLIER_FILES[0], None)
    if own is not None and own["checksum"] != hashlib.sha256(json.dumps(entries).encode()).hexdigest():
        raise ValueError("not what was written")
    return _Content(entries, [])


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict) and isinstance(entry.get("checksum", 0), str | None)
        and isinstance(entry.get("note"), dict)
    )  # fmt: skip


def _check_name(directory: Path, journal: str, name: str, checked: set[Path]) -> None:
    """Raises ``UserError`` if the name of an entry is not one of a file or folder in the run directory.

    ``checked`` collects the paths that are known to be no symbolic links.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in ("", ".") or "\0" in name:
        raise UserError(f"{directory / journal}: its entry {name!r} is no path in the run directory: do not use it")
    for part in (*reversed(path.parents), path):
        place = directory / part
        if place not in checked and part != PurePosixPath():
            if place.is_symlink():
                raise UserError(
                    f"{directory / journal}: its entry {name!r} is reached through the symbolic link {place}: put the "
                    "file or folder itself there"
                )
            checked.add(place)


# ---------------------------------------------------------------------------------------------------------------------
# Inside a stage
# ---------------------------------------------------------------------------------------------------------------------

Item, Result = TypeVar("Item"), TypeVar("Result")


class Parts:
    """The output of a long stage, part by part: a kill costs the part that was being made.

    What is in a part does not depend on where a run was killed, so that the whole has the same bits.

    Args:
        journal: keeps their checksums; a damaged one is made again.
        name: of the whole, in the run directory.
        made_by: what the results go by beside the items. It may change with --force: a whole is of one kind.
    """

    BATCHES = 8  # of sampling in a part
    GROUPS = 512  # in a part: a model that is loaded for each part is to be little beside the work with it

    def __init__(self, journal: Journal, name: str, made_by: object = None) -> None:
        self.journal, self.name, self.made_by = journal, f"{name}.parts", made_by
        self.began = time.perf_counter()  # the part that is being made

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return self.journal.directory / self.name

    @classmethod
    def sampling_size(cls, batch_size: int, responses: int) -> int:
        """The prompts in a part that is sampled: ``responses`` to each, ``batch_size`` responses at a time."""
        return max(1, cls.BATCHES * batch_size // responses)

    @classmethod
    def judging_size(cls, groups: int) -> int:
        """The groups in a part that is judged. Parts are of one size: shares are counted in each."""
        count = max(1, -(-groups // cls.GROUPS))
        return max(1, -(-groups // count))

    def make(
        self,
        items: Sequence[Item],
        size: int,
        results: Callable[[Sequence[Item], int], list[Result]],
        write: Callable[[Path, Iterable[Result]], None],
        read: Callable[[Path, Sequence[Item]], Iterable[Result]],
        known: Callable[[int], None],
        spent: Callable[[], dict[str, int]] = dict,
    ) -> tuple[list[Result], dict[str, float]]:
        """All results in order, and what they took, also in processes before this one: "seconds", and what was spent.

        ``results`` is given ``size`` items at a time, and the index of the first; ``read`` is given the items that a
        file must be of; ``known`` is told how many items were done before; ``spent`` is asked after each part.

        Raises:
            UserError: by ``read``, or if the journal's note on a part is none; names the part.
        """
        whole: list[Result] = []
        totals: Counter[str] = Counter()
        for first in range(0, len(items), size):
            name = f"{self.name}/{first:08d}.jsonl"
            part = items[first : first + size]
            made_from = hashlib.sha256(repr((self.made_by, part)).encode()).hexdigest()
            note = self.journal.note(name)
            if note is None or note.get("from") != made_from:
                self.began = time.perf_counter()
                write(self.journal.directory / name, results(part, first))
                note = {"from": made_from, "spent": {"seconds": time.perf_counter() - self.began, **spent()}}
                self.journal.record(name, note)
            else:
                if not _is_spent(note.get("spent")):
                    raise UserError(not_made(self.journal, name))
                known(len(part))
            whole += read(self.journal.directory / name, part)
            totals.update(note["spent"])
        return whole, dict(totals)

    def clear(self) -> None:
        """When the whole is there."""
        self.journal.forget_folder(self.name)


RESERVED = {"time", "stage", "iteration", "part", "self"}  # names that a record of metrics.jsonl has for itself


def _is_spent(spent: object) -> bool:
    """Whether it is what a part took: "seconds", and counts."""
    if not isinstance(spent, dict) or not all(map(is_amount, spent.values())):
        return False
    return spent.get("seconds", 0) > 0 and not spent.keys() & RESERVED


def not_made(journal: Journal, name: str) -> str:
    """What is wrong with an output whose entry in the journal has another note than a run makes."""
    return (
        f"{journal.directory / name}: its entry in {journal.file.name} is not what a run notes there. Remove "
        f"{journal.directory / name}, and it is made again"
    )


@dataclass(frozen=True)
class _Written:
    """A state on disk, as the thread that wrote it leaves it."""

    name: str  # in the run directory
    step: int
    checksum: str
    at: float  # when it was complete, by time.monotonic


NO_STATE = (  # what reading a state raises that is not one of this fit
    AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError,
)  # fmt: skip


def not_a_state(directory: Path, error: Exception) -> str:
    """What is wrong with a saved state that is whole, and does not fit the model, the optimizer or the schedule."""
    return f"{directory} is no state of this fit ({type(error).__name__}: {error}): remove it, and start again"


class Checkpoints:
    """The newest two states of a fit: weights, optimizer and schedule, to the last bit. No pickle.

    ``save`` copies the state to host memory: 12 bytes a parameter, where weights and both moments are float32. A thread
    then writes the copy and lets go of it, while training goes on. The journal is touched by the calling thread alone:
    a written state counts once ``record_written`` or ``finish`` has recorded it. What a kill leaves unrecorded is
    never restored; ``restore`` and ``clear`` remove it.

    Args:
        journal: keeps their checksums; a damaged one is passed over.
        name: their folder in the run directory.
        every_steps, every_seconds: how often one is saved; whichever comes first, within ``spacing``.
    """

    KEPT = 2
    spacing = 20  # a state is due no sooner after the last one than this many times what saving that one took

    def __init__(self, journal: Journal, name: str, every_steps: int, every_seconds: float) -> None:
        self.journal, self.name = journal, name
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self.last_step = 0
        self.began = time.monotonic()  # saving the last state
        self.ended: float | None = self.began  # None while it is being written
        self.executor = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[_Written] | None = None

    def due(self, step: int) -> bool:
        """Whether to save a state after this step."""
        now = time.monotonic()
        passed = now - self.began
        took = (now if self.ended is None else self.ended) - self.began
        wanted = step - self.last_step >= self.every_steps or passed >= self.every_seconds
        return wanted and passed >= (1 + self.spacing) * took  # false while one is being written, unless spacing is 0

    def save(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None:
        """Copies the state and begins to write it, after the one before is written.

        Args:
            step: the number of steps done; nothing is saved if it is that of the last state.
            rest: JSON that ``restore`` returns; numbers come back exactly.

        Raises:
            OSError: if the state before could not be written.
        """
        if step == self.last_step:
            return
        self.finish()
        self.began, self.ended = time.monotonic(), None
        state = optimizer.state_dict()
        names = [name for name, _ in model.named_parameters()]
        tensors = {f"model.{name}": _copy(parameter) for name, parameter in model.named_parameters()}
        for index, values in state["state"].items():
            tensors |= {f"{key}.{names[index]}": _copy(value) for key, value in values.items()}
        document = json.dumps({"step": step, "param_groups": state["param_groups"], **rest})
        self.writing = self.executor.submit(self._write, step, tensors, document)
        self.last_step = step

    def _write(self, step: int, tensors: dict[str, Tensor], document: str) -> _Written:
        """In the thread."""
        name = f"{self.name}/step_{step:08d}"

        def fill(directory: Path) -> None:
            save_file(tensors, directory / "state.safetensors")
            (directory / "state.json").write_text(document, encoding="utf-8")

        atomic_write_directory(self.journal.directory / name, fill)
        tensors.clear()
        return _Written(name, step, checksum(self.journal.directory / name), time.monotonic())

    def record_written(self) -> None:
        """Records the state that was being written, if it is complete by now, and forgets those that are too old.

        Raises:
            OSError: if it could not be written.
        """
        if self.writing is not None and self.writing.done():
            self.finish()

    def finish(self) -> None:
        """Waits until the state that is being written is complete, and records it.

        Raises:
            OSError: if it could not be written.
        """
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        written = writing.result()
        self.ended = written.at
        self.journal.record(written.name, {"step": written.step}, content=written.checksum)
        for old in self.journal.within(self.name)[: -self.KEPT]:
            self.journal.forget(old)

    def step(self) -> int:
        """Of the newest whole state; 0 if there is none."""
        newest = self._newest()
        if newest is None:
            return 0
        step = self.journal.note(newest).get("step")
        if type(step) is not int or not 0 < step < 2**63:
            raise UserError(not_made(self.journal, newest))
        return step

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Puts the newest whole state back and returns its ``rest``, with the "step"; None if there is none.

        Removes what a kill has left beside the recorded states.

        Raises:
            UserError: if that state is not one of this model and optimizer; names it.
        """
        folder = self.journal.directory / self.name
        for path in folder.iterdir() if folder.is_dir() else ():
            if f"{self.name}/{path.name}" not in self.journal.entries:
                remove(path)
        name = self._newest()
        if name is None:
            return None
        directory = self.journal.directory / name
        try:
            rest = self._put_back(directory, model, optimizer)
        except NO_STATE as error:
            raise UserError(not_a_state(directory, error)) from error
        self.last_step = rest["step"]
        return rest

    def _put_back(
        self, directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:  # fmt: skip
        rest = parse_json(read_regular(directory / "state.json", MOST_LINES_BYTES))
        if rest["step"] != self.step():
            raise ValueError(f"it is of step {rest['step']}, and its entry in the journal of another")
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(directory / "state.safetensors").items():
            kind, parameter_name = key.split(".", 1)
            by_parameter.setdefault(parameter_name, {})[kind] = tensor
        state: dict[int, dict[str, Tensor]] = {}
        for index, (parameter_name, parameter) in enumerate(model.named_parameters()):
            own = by_parameter[parameter_name]
            with torch.no_grad():
                parameter.copy_(own.pop("model"))
            if own:  # a parameter that has not had a gradient has no state
                state[index] = own
        optimizer.load_state_dict({"state": state, "param_groups": rest.pop("param_groups")})
        return rest

    def _newest(self) -> str | None:
        names = reversed(self.journal.within(self.name))
        return next((name for name in names if self.journal.note(name) is not None), None)

    def clear(self) -> None:
        """Removes all states, after the one that is being written is complete: the fit is done, or has failed.

        Raises:
            OSError: if it could not be written.
        """
        try:
            self.finish()
        finally:
            self.journal.forget_folder(self.name)


def _copy(tensor: Tensor) -> Tensor:
    """In host memory. It waits for a GPU: the optimizer is about to change the tensor.

    Not pinned: torch would keep the memory, rounded up to powers of two, for good.
    """
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
