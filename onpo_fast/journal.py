"""The journal of a run: what has been made, with checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import UserError, naming
from .files import MOST_LINES_BYTES, atomic_write_text, checksum, parse_json, read_regular, remove


class Journal:
    """The outputs of a run in the order in which they were made, with their checksums and a note each.

    An output is done if it is in ``journal.jsonl`` and its checksum still matches. One that is damaged is made again;
    if it comes out different, the outputs after it are forgotten, so that they are made again too.

    The file has one JSON object a line: what was recorded or forgotten, and a checksum of this line and all lines
    before it. Each change appends a line. Everything is written twice, to ``journal.copy.jsonl`` too, so that a damaged
    file can be replaced. An incomplete last line, which a power cut leaves, is ignored. The first change of a process
    writes both files anew, without outdated lines.

    Attributes:
        before_record: functions called before each change is written, to check or flush what it depends on.

    Raises:
        UserError: if neither file is whole, or an entry's name is a path outside the run directory.
    """

    FILES = ("journal.jsonl", "journal.copy.jsonl")
    EARLIER_FILES = ("journal.json", "journal.copy.json")  # format of earlier versions: one JSON object

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, dict[str, Any]] = {}
        self.checked: dict[str, bool] = {}  # whether an output's checksum matches; each is read once
        self.file = directory / self.FILES[0]  # the file that was read, or will be written
        self.mended = False  # whether the copy was read in place of a damaged file
        self.before_record: list[Callable[[], None]] = []
        self.last = ""  # checksum of the last line, once both files end with it
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
            raise UserError(f"{' and '.join(damaged)}: remove the damaged files, and --resume makes everything again")
        name, content = whole[0]
        if len(whole) == 2 and content.lines[-1:] and content.lines[-1] in whole[1][1].lines[:-1]:
            name, content = whole[1]  # the copy has more lines
        self.file = self.directory / name
        self.mended = name != names[0]
        self.entries = content.entries
        checked: set[Path] = set()
        for entry in self.entries:
            _check_name(self.directory, name, entry, checked)

    def begin(self, notes: dict[str, dict[str, Any]]) -> None:
        """Records what a run depends on (notes without files), before all outputs, in one write."""
        known = {name: entry for name, entry in self.entries.items() if name not in notes}
        self.entries = {name: {"checksum": None, "note": note} for name, note in notes.items()} | known
        self._write_anew()

    def note(self, name: str) -> dict[str, Any] | None:
        """The note of an output that is done and whole, else None; ``name`` is its path in the run directory."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if name not in self.checked:
            self.checked[name] = entry["checksum"] is None or self._is(name, entry["checksum"])
        return entry["note"] if self.checked[name] else None

    def damaged(self, name: str) -> bool:
        """Whether an output was recorded, and its checksum no longer matches."""
        return name in self.entries and self.note(name) is None

    def record(
        self, name: str, note: dict[str, Any] | None = None, file: bool = True, content: str | None = None
    ) -> None:
        """Records an output as done.

        Args:
            name: path of the output in the run directory.
            note: JSON to keep with it.
            file: whether there is a file or folder of this name.
            content: checksum of the output; by default it is computed.
        """
        if file and content is None:
            content = checksum(self.directory / name)
        self._change({"name": name, "checksum": content, "note": note or {}})
        self.checked[name] = True

    def forget(self, *names: str) -> None:
        """Removes outputs: first from the journal, then from disk."""
        self.forget_records(*names)
        for name in names:
            remove(self.directory / name)

    def forget_records(self, *names: str) -> None:
        """Removes outputs from the journal. Their files stay."""
        if known := [name for name in names if name in self.entries]:
            self._change({"forget": known})

    def within(self, folder: str) -> list[str]:
        """Names of the recorded outputs in a folder, sorted."""
        return sorted(name for name in self.entries if name.startswith(f"{folder}/"))

    def forget_folder(self, folder: str) -> None:
        """Removes a folder and all recorded outputs in it, also files that the journal does not list."""
        self.forget_records(*self.within(folder))
        remove(self.directory / folder)

    def _is(self, name: str, expected: str) -> bool:
        path = self.directory / name
        try:
            return path.exists() and checksum(path) == expected
        except UserError:  # not a regular file
            return False

    def _change(self, change: dict[str, Any]) -> None:
        _apply(change, self.entries)
        if not self.last:
            self._write_anew()
            return
        for act in self.before_record:
            act()
        line, last = _line(change, self.last)
        self.last = ""  # if writing fails, a file may end with half a line: then both are written anew
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


@dataclass(frozen=True)
class JournalElsewhere:
    """The journal on a rank that does not have it. Rank 0 does; anything but the directory is asked of that."""

    directory: Path


VERSION = 1  # of the format


@dataclass(frozen=True)
class _Content:
    """The content of a journal file."""

    entries: dict[str, dict[str, Any]]
    lines: list[str]  # checksums of the lines


def _line(change: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """A line of a journal and its checksum, which covers all lines before it."""
    body = json.dumps(change)
    own = hashlib.sha256(f"{previous}{body}".encode()).hexdigest()
    return f'{body[:-1]}, "sha256": "{own}"}}\n'.encode(), own


class _OtherVersion(ValueError):
    """A journal that is whole, but in the format of another version."""


def _apply(change: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    """Applies the change of a line to the entries."""
    for name in change.get("forget", ()):
        entries.pop(name, None)
    if "name" in change:
        name, entry = change["name"], {"checksum": change["checksum"], "note": change["note"]}
        if name in entries and entries[name]["checksum"] != entry["checksum"]:
            for later in list(entries)[list(entries).index(name) :]:
                del entries[later]
        entries[name] = entry


def _parse_lines(content: bytes) -> _Content:
    """Reads the lines of a journal. Raises ``ValueError`` if a line before the last one is damaged."""
    *lines, rest = content.split(b"\n")
    entries: dict[str, dict[str, Any]] = {}
    checksums: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            change = parse_json(line)
            own = change.pop("sha256")
            written = _line(change, checksums[-1] if checksums else "")[1] == own
            if not checksums and written and type(change.get("version")) is int and change["version"] != VERSION:
                raise _OtherVersion("it was written by another version of onpo_fast")
            if not written or not _is_change(change, first=not checksums):
                raise ValueError
        except _OtherVersion:
            raise
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            if checksums and number == len(lines) and not rest:
                break  # an incomplete line, which a power cut leaves
            raise ValueError(f"line {number} is not what was written") from None
        checksums.append(own)
        _apply(change, entries)
    if not checksums:
        raise ValueError("not the journal of a run")
    return _Content(entries, checksums)


def _is_change(change: dict[str, Any], first: bool) -> bool:
    """Whether a line is valid: the first has the version, others an output or what was forgotten."""
    if first:
        return change.keys() == {"version"} and type(change["version"]) is int
    if change.keys() == {"forget"}:
        return isinstance(change["forget"], list) and all(isinstance(name, str) for name in change["forget"])
    return change.keys() == {"name", "checksum", "note"} and isinstance(change["name"], str) and _is_entry(change)


def _parse_object(content: bytes) -> _Content:
    """Reads the journal of an earlier version: an object with an entry for itself, which the first versions lacked."""
    entries = parse_json(content)
    if not isinstance(entries, dict) or not entries or not all(map(_is_entry, entries.values())):
        raise ValueError("not the journal of a run")
    own = entries.pop(Journal.EARLIER_FILES[0], None)
    if own is not None and own["checksum"] != hashlib.sha256(json.dumps(entries).encode()).hexdigest():
        raise ValueError("not what was written")
    return _Content(entries, [])


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("checksum", 0), str | None)
        and isinstance(entry.get("note"), dict)
    )


def _check_name(directory: Path, journal: str, name: str, checked: set[Path]) -> None:
    """Raises ``UserError`` if the name of an entry does not lie in the run directory.

    ``checked`` collects paths that are known not to be symbolic links.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in ("", ".") or "\0" in name:
        raise UserError(
            f"{directory / journal}: its entry {name!r} is not a path in the run directory: do not use this run"
        )
    for part in (*reversed(path.parents), path):
        place = directory / part
        if place not in checked and part != PurePosixPath():
            if place.is_symlink():
                raise UserError(
                    f"{directory / journal}: its entry {name!r} is reached through the symbolic link {place}: put the "
                    "file or folder itself there"
                )
            checked.add(place)


def not_made(journal: Journal, name: str) -> str:
    """Error message for an output whose note in the journal is not valid."""
    return (
        f"{journal.directory / name}: its entry in {journal.file.name} is not what a run notes there. Remove "
        f"{journal.directory / name}, and it is made again"
    )
