"""The judge's answers on disk, so that no question is asked twice: one SQLite file, a row an answer."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from ..errors import UserError

BUSY_SECONDS = 60.0  # that a writer waits for another run's


@dataclass(frozen=True)
class Answer:
    """What a judge said to one question in one order."""

    preference: float | None  # P(the response shown first is better); None for no verdict
    text: str  # what it said, for people to read
    prompt_tokens: int  # as the server counted them; 0 if it did not
    completion_tokens: int


class Answers:
    """A file of answers. Each is on disk when ``put`` returns; several runs may use a file at a time.

    Each has a checksum, and one that is not what it was is not there.

    Raises:
        UserError: wherever the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._naming():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)  # commits by itself
            self.connection.text_factory = lambda text: text.decode("utf-8", "replace")
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, preference REAL, text TEXT NOT NULL, "
                "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, checksum TEXT NOT NULL)"
            )

    def get(self, key: str) -> Answer | None:
        with self._naming():
            row = self.connection.execute(
                "SELECT preference, text, prompt_tokens, completion_tokens, checksum FROM answers WHERE key = ?", (key,)
            ).fetchone()
        return Answer(*row[:-1]) if row and row[-1] == _checksum(key, *row[:-1]) else None

    def put(self, key: str, answer: Answer) -> None:
        with self._naming():
            row = (key, *astuple(answer))
            self.connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", (*row, _checksum(*row)))

    def drop(self, keys: Iterable[str]) -> None:
        with self._naming():
            self.connection.executemany("DELETE FROM answers WHERE key = ?", ((key,) for key in keys))

    def close(self) -> None:
        self.connection.close()

    def _naming(self) -> _Naming:
        return _Naming(self.path)


def key_of(**shaped_by: object) -> str:
    """One name for everything that shapes an answer."""
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()


def _checksum(*row: object) -> str:
    return hashlib.sha256(repr(row).encode()).hexdigest()


class _Naming:
    """Turns what SQLite and the file system raise into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (sqlite3.Error, OSError)):
            broken = re.search("malformed|not a database|no such column", str(error))
            hint = "; move it away, or delete it, and every question is asked anew" if broken else ""
            raise UserError(f"cannot use {self.path} for the judge's answers: {error}{hint}") from error
