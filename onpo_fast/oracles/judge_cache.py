"""The judge's answers on disk, so that no question is asked twice: one SQLite file with one row per answer."""

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
from typing import Any

from ..errors import UserError

BUSY_SECONDS = 60.0  # how long a write waits for another run's write
CLAIM_SECONDS = 20.0  # how long a claim is valid unless it is renewed

_TABLES = {
    "answers": "key TEXT PRIMARY KEY, preference REAL, text TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, "
    "completion_tokens INTEGER NOT NULL, checksum TEXT NOT NULL",
    "claims": "key TEXT PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL",
}


@dataclass(frozen=True)
class Answer:
    """A judge's answer to one question: two responses to a prompt in one order."""

    preference: float | None
    """P(the response shown first is better); None if the answer has no verdict."""
    text: str
    """What the judge said, for people to read."""
    prompt_tokens: int
    """Tokens of the question as the server counted them; 0 if it did not."""
    completion_tokens: int
    """Tokens of the answer as the server counted them; 0 if it did not."""


class JudgeCache:
    """A file of answers, which several runs may use at a time.

    An answer is on disk when ``put`` returns. Each row has a checksum; a row that does not match its checksum counts as
    absent. A run claims a question before it asks it, and the other runs wait for the answer. A claim ends when it is
    released, or ``CLAIM_SECONDS`` after it was last renewed, in case its run was killed.

    Raises:
        UserError: by every method, if the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = uuid.uuid4().hex
        self.claimed: set[str] = set()  # the keys of this run's claims
        self._has_claims_table = False  # made when needed: a file that holds every answer may be read-only
        with self._readable_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)  # autocommit
            self.connection.text_factory = lambda text: text.decode("utf-8", "replace")
            self._create_table("answers")

    def get(self, key: str) -> Answer | None:
        """Returns the answer of this key; None if there is none or its row is damaged."""
        with self._readable_errors():
            row = self.connection.execute(
                "SELECT preference, text, prompt_tokens, completion_tokens, checksum FROM answers WHERE key = ?", (key,)
            ).fetchone()
        return Answer(*row[:-1]) if row and row[-1] == row_checksum(key, *row[:-1]) else None

    def put(self, key: str, answer: Answer) -> Answer:
        """Saves an answer unless there is one already, and ends the claim on it; returns the answer in the file."""
        with self._readable_errors(), self._transaction():
            saved = self.get(key)
            if saved is None:
                row = (key, *astuple(answer))
                values = (*row, row_checksum(*row))
                self.connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", values)
            self._delete_claim(key)
        self.claimed.discard(key)
        return saved or answer

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes the answers of these keys."""
        with self._readable_errors():
            self.connection.executemany("DELETE FROM answers WHERE key = ?", ((key,) for key in keys))

    def claim(self, keys: Sequence[str]) -> bool:
        """Claims the questions that no other run has claimed; returns whether all of them are now this run's."""
        wanted = [key for key in keys if key not in self.claimed]
        now = time.time()
        latest = now + 2 * CLAIM_SECONDS  # a later end was written before the clock was set back: it is not valid

        def is_anothers(key: str) -> bool:
            query = "SELECT 1 FROM claims WHERE key = ? AND expires BETWEEN ? AND ?"
            return self.connection.execute(query, (key, now, latest)).fetchone() is not None

        with self._readable_errors():
            if wanted and not self._has_claims_table:
                self._create_table("claims")
                self._has_claims_table = True
            if any(not is_anothers(key) for key in wanted):  # a read takes no lock; most waits end here
                with self._transaction():
                    free = [key for key in wanted if not is_anothers(key)]
                    rows = [(key, self.owner, now + CLAIM_SECONDS) for key in free]
                    self.connection.executemany("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", rows)
                self.claimed.update(free)
        return self.claimed.issuperset(keys)

    def renew(self) -> None:
        """Extends all claims of this run to ``CLAIM_SECONDS`` from now."""
        if self.claimed:
            with self._readable_errors():
                self.connection.execute(
                    "UPDATE claims SET expires = ? WHERE owner = ?", (time.time() + CLAIM_SECONDS, self.owner)
                )

    def release(self, key: str) -> None:
        """Ends this run's claim on a question, if it has one."""
        if key in self.claimed:
            self.claimed.remove(key)
            with self._readable_errors():
                self._delete_claim(key)

    def close(self) -> None:
        """Ends all claims of this run and closes the file."""
        try:
            if self.claimed:
                with self._readable_errors():
                    self.connection.execute("DELETE FROM claims WHERE owner = ?", (self.owner,))
        finally:
            self.connection.close()

    def _create_table(self, name: str) -> None:
        self.connection.execute(f"CREATE TABLE IF NOT EXISTS {name} ({_TABLES[name]})")

    def _delete_claim(self, key: str) -> None:
        if self._has_claims_table:
            self.connection.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self.owner))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.commit()
        except BaseException:
            self.connection.rollback()
            raise

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turns errors of SQLite and the file system into a ``UserError`` that names the file."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            damaged = re.search("malformed|not a database|no such column", str(error))
            hint = "; move or delete the file, and every question is asked again" if damaged else ""
            raise UserError(f"cannot use {self.path} for the judge's answers: {error}{hint}") from error


def answer_key(url: str, request: dict[str, Any], parser_version: int) -> str:
    """Returns the key of an answer: a SHA-256 of all that determines it.

    Do not change how it is computed: answers in existing caches are found by it.
    """
    determined_by = {"url": url, "request": request, "reading": parser_version}
    return hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()


def row_checksum(*row: object) -> str:
    """Returns a SHA-256 of a row's values, saved with the row."""
    return hashlib.sha256(repr(row).encode()).hexdigest()
