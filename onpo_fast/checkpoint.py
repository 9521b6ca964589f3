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
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UserError

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
    _sync(path.parent)


def atomic_write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets ``fill`` write a directory and puts it in place whole; what was there before is replaced."""
    with _partial(path) as partial:
        partial.mkdir(parents=True)
        fill(partial)
        for file in partial.rglob("*"):
            _sync(file)
        _sync(partial)
        remove(path)
        os.replace(partial, path)
    _sync(path.parent)


@contextmanager
def _partial(path: Path, ending: str = PARTIAL) -> Iterator[Path]:
    """Where to write what will be ``path``; gone afterwards, whatever happens."""
    partial = path.with_name(path.name + ending)
    remove(partial)
    try:
        yield partial
    except SafetensorError as error:  # its way of saying what the system said
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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


def parse_json(content: bytes | str) -> Any:
    """``json.loads``, with a ``ValueError`` also for what is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of a directory: the names and contents of its files."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = "".join(f"{file.relative_to(path)} {checksum(file)}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Who works on a run, and what it has done
# ---------------------------------------------------------------------------------------------------------------------


LOCK = ".lock"


def locked(directory: Path, title: str = "") -> FileLock:
    """The run directory, made if need be, for this process alone. The lock goes with the process, however it ends.

    Raises:
        UserError: if another has it, or it cannot be made. ``title`` goes before its name.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{title}{directory} is in use by another process") from None
    except OSError as error:
        raise UserError(f"{title}{directory}: cannot make it ({error})") from None
    return lock


class Journal:
    """The outputs of a run in the order in which they were made, with their checksums and a note each.

    An output counts as made if it is in ``journal.json`` and on disk as it was then. One that is not is made again; if
    it does not come out the same, what was made after it is forgotten, to be made again too.

    The journal has an entry for itself, so that its own damage shows, and is written twice, so that it can be mended.

    Raises:
        UserError: if neither is whole.
    """

    FILES = ("journal.json", "journal.copy.json")

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, dict[str, Any]] = {}
        self.checked: dict[str, bool] = {}  # an output is read once to see whether it is whole
        self.mended = False  # whether the copy had to be taken
        damaged = []
        for name in self.FILES:
            path = directory / name
            if path.exists():
                try:
                    self.entries = _entries(read_regular(path, MOST_LINES_BYTES))
                except ValueError as error:
                    damaged.append(f"{path} is damaged ({error})")
                else:
                    self.mended = name != self.FILES[0]
                    return
        if damaged:
            raise UserError(f"{' and '.join(damaged)}: remove what is damaged, and --resume makes everything again")

    def begin(self, notes: dict[str, dict[str, Any]]) -> None:
        """What a run goes by, noted before all outputs, in one write."""
        known = {name: entry for name, entry in self.entries.items() if name not in notes}
        self.entries = {name: {"checksum": None, "note": note} for name, note in notes.items()} | known
        self._write()

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
        entry = {"checksum": content, "note": note or {}}
        known = self.entries.get(name)
        if known is not None and known["checksum"] != entry["checksum"]:
            names = list(self.entries)
            self.entries = {n: self.entries[n] for n in names[: names.index(name)]}
        self.entries[name] = entry
        self.checked[name] = True
        self._write()

    def forget(self, name: str) -> None:
        """An output that is no longer needed: the record first, so that none is missed that is recorded."""
        self.entries.pop(name, None)
        self._write()
        remove(self.directory / name)

    def within(self, folder: str) -> list[str]:
        """The recorded outputs in a folder, by name."""
        return sorted(name for name in self.entries if name.startswith(f"{folder}/"))

    def forget_folder(self, folder: str) -> None:
        """Also what a kill has left there, and the journal does not list."""
        if names := self.within(folder):
            self.entries = {name: entry for name, entry in self.entries.items() if name not in names}
            self._write()
        remove(self.directory / folder)

    def _is(self, name: str, expected: str) -> bool:
        path = self.directory / name
        return path.exists() and checksum(path) == expected

    def _write(self) -> None:
        own = {"checksum": _digest(self.entries), "note": {}}
        for name in self.FILES:
            atomic_write_text(self.directory / name, json.dumps({**self.entries, self.FILES[0]: own}, indent=1) + "\n")


def _entries(content: bytes) -> dict[str, dict[str, Any]]:
    """What a journal holds; ``ValueError`` if it is not what was written. Early ones have no entry for themselves."""
    entries = parse_json(content)
    if not isinstance(entries, dict) or not entries or not all(map(_is_entry, entries.values())):
        raise ValueError("not the journal of a run")
    own = entries.pop(Journal.FILES[0], None)
    if own is not None and own["checksum"] != _digest(entries):
        raise ValueError("not what was written")
    return entries


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and "checksum" in entry and isinstance(entry.get("note"), dict)


def _digest(entries: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


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

    def __init__(self, journal: Journal, name: str, made_by: object = None) -> None:
        self.journal, self.name, self.made_by = journal, f"{name}.parts", made_by
        self.began = time.perf_counter()  # the part that is being made

    def make(
        self,
        items: Sequence[Item],
        size: int,
        results: Callable[[Sequence[Item], int], list[Result]],
        write: Callable[[Path, Iterable[Result]], None],
        read: Callable[[Path], Iterable[Result]],
        known: Callable[[int], None],
        spent: Callable[[], dict[str, int]] = dict,
    ) -> tuple[list[Result], dict[str, float]]:
        """All results in order, and what they took, also in processes before this one: "seconds", and what was spent.

        ``results`` is given ``size`` items at a time, and the index of the first; ``known`` is told how many items
        were done before; ``spent`` is asked after each part.
        """
        whole: list[Result] = []
        totals: Counter[str] = Counter()
        for first in range(0, len(items), size):
            name = f"{self.name}/{first:08d}.jsonl"
            part = items[first : first + size]
            made_from = hashlib.sha256(repr((self.made_by, part)).encode()).hexdigest()
            note = self.journal.note(name)
            if note is None or note["from"] != made_from:
                self.began = time.perf_counter()
                write(self.journal.directory / name, results(part, first))
                note = {"from": made_from, "spent": {"seconds": time.perf_counter() - self.began, **spent()}}
                self.journal.record(name, note)
            else:
                known(len(part))
            whole += read(self.journal.directory / name)
            totals.update(note["spent"])
        return whole, dict(totals)

    def clear(self) -> None:
        """When the whole is there."""
        self.journal.forget_folder(self.name)


@dataclass(frozen=True)
class _Written:
    """A state on disk, as the thread that wrote it leaves it."""

    name: str  # in the run directory
    step: int
    checksum: str
    at: float  # when it was complete, by time.monotonic


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
        return 0 if newest is None else self.journal.note(newest)["step"]

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Puts the newest whole state back and returns its ``rest``, with the "step"; None if there is none.

        Removes what a kill has left beside the recorded states.
        """
        folder = self.journal.directory / self.name
        for path in folder.iterdir() if folder.is_dir() else ():
            if f"{self.name}/{path.name}" not in self.journal.entries:
                remove(path)
        name = self._newest()
        if name is None:
            return None
        directory = self.journal.directory / name
        rest = json.loads((directory / "state.json").read_text(encoding="utf-8"))
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
        self.last_step = rest["step"]
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
