"""The judge's answers on disk, so that no question is asked twice: one SQLite file, a row an answer."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    """A file of answers. Each is on disk when ``put`` returns.

    Each has a checksum, and one that is not what it was is not there. Several runs may use a file at a time: who asks a
    question claims it first, and the others wait for the answer. A claim ends when it is released, and some seconds
    after its run was killed.

    Raises:
        UserError: wherever the file cannot be used.
    """

    CLAIM_SECONDS = 20.0  # that a claim is good for if it is not renewed

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = uuid.uuid4().hex
        self.claimed: set[str] = set()  # keys
        self.has_claims = False  # whether the table is there: a file that holds every answer may be read-only
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

    def put(self, key: str, answer: Answer) -> Answer:
        """Keeps an answer, unless there is one already, and ends the claim; returns the answer that is kept."""
        with self._naming(), self._transaction():
            if not (kept := self.get(key)):
                row = (key, *astuple(answer))
                values = (*row, _checksum(*row))
                self.connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", values)
            self._end_claim(key)
        self.claimed.discard(key)
        return kept or answer

    def drop(self, keys: Iterable[str]) -> None:
        with self._naming():
            self.connection.executemany("DELETE FROM answers WHERE key = ?", ((key,) for key in keys))

    def claim(self, keys: Sequence[str]) -> bool:
        """Makes questions this run's to ask, until ``release``, as far as no other run has them. Whether all are."""
        wanted = [key for key in keys if key not in self.claimed]
        now = time.time()
        latest = now + 2 * self.CLAIM_SECONDS  # a claim that ends later is of a clock that was put back since

        def has_other(key: str) -> bool:
            held = "SELECT 1 FROM claims WHERE key = ? AND expires BETWEEN ? AND ?"
            return self.connection.execute(held, (key, now, latest)).fetchone() is not None

        with self._naming():
            if wanted and not self.has_claims:
                self.connection.execute(
                    "CREATE TABLE IF NOT EXISTS claims "
                    "(key TEXT PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL)"
                )
                self.has_claims = True
            if any(not has_other(key) for key in wanted):  # a look takes no lock
                with self._transaction():
                    free = [key for key in wanted if not has_other(key)]
                    rows = [(key, self.owner, now + self.CLAIM_SECONDS) for key in free]
                    self.connection.executemany("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", rows)
                self.claimed.update(free)
        return self.claimed.issuperset(keys)

    def renew(self) -> None:
        """Puts off the end of this run's claims."""
        if self.claimed:
            with self._naming():
                self.connection.execute(
                    "UPDATE claims SET expires = ? WHERE owner = ?", (time.time() + self.CLAIM_SECONDS, self.owner)
                )

    def release(self, key: str) -> None:
        """Leaves a question to others, if this run has claimed it."""
        if key in self.claimed:
            self.claimed.remove(key)
            with self._naming():
                self._end_claim(key)

    def _end_claim(self, key: str) -> None:
        if self.has_claims:
            self.connection.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self.owner))

    def close(self) -> None:
        """Ends all claims too."""
        try:
            if self.claimed:
                with self._naming():
                    self.connection.execute("DELETE FROM claims WHERE owner = ?", (self.owner,))
        finally:
            self.connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.commit()
        except BaseException:
            self.connection.rollback()
            raise

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
