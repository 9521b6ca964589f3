"""The responses of the part in work, in a file, so that a run that is killed does not ask a server for them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import IO

from ...errors import naming
from ...files import advising, parse_json, read_lines, write_jsonl

UNFINISHED = "unfinished_responses"  # how the names of the files in the run directory begin


def unfinished_file(directory: Path, rank: int, evaluation: bool) -> Path:
    """Returns the file of a rank, one for training and one for the evaluation."""
    return directory / f"{_beginning(evaluation)}{rank}.jsonl"


def remove_unfinished(directory: Path, evaluation: bool) -> None:
    """Removes the files of all ranks, once all parts of a stage are recorded or another sampler goes on."""
    for path in directory.glob(f"{_beginning(evaluation)}[0-9]*.jsonl"):
        path.unlink(missing_ok=True)


def _beginning(evaluation: bool) -> str:
    return f"{UNFINISHED}_evaluation_" if evaluation else f"{UNFINISHED}_"


class UnfinishedPart:
    """Responses as tokens and summed log-prob, by the key of their request, one JSON object a line.

    Args:
        path: the file, which need not exist; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: IO[str] | None = None

    @staticmethod
    def key(*parts: object) -> str:
        """Returns the key of a request: a hash of everything that its response depends on."""
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def begin(self, keys: Collection[str]) -> dict[str, tuple[object, object]]:
        """Begins a part: returns the responses with one of the keys, and drops all others.

        The file may come from a stranger: the caller checks tokens and log-prob.

        Raises:
            UserError: if something that is no file has its name.
        """
        self.close()
        if self.path is None:
            return {}
        found: dict[str, tuple[object, object]] = {}
        if self.path.exists():
            with advising("remove it"):
                for line in read_lines(self.path):
                    try:
                        record = parse_json(line or b"")
                        if record["key"] in keys:
                            found[record["key"]] = record["tokens"], record["logp"]
                    except (ValueError, TypeError, KeyError):  # half a line, as a crash leaves it
                        continue
        write_jsonl(self.path, (_record(key, *response) for key, response in found.items()))
        with naming(self.path):
            self._file = open(self.path, "a", encoding="utf-8")
        return found

    def add(self, key: str, tokens: list[int], logp: float) -> None:
        """Appends a response.

        Raises:
            OSError: if that fails, as on a full disk; names the file.
        """
        if self._file is not None:
            with naming(self.path):
                self._file.write(json.dumps(_record(key, tokens, logp)) + "\n")
                self._file.flush()

    def end_with(self, keys: Collection[str]) -> None:
        """Keeps only the responses with these keys, and takes no further ones."""
        self.begin(keys)
        self.close()

    def close(self) -> None:
        """Closes the file and keeps it."""
        file, self._file = self._file, None
        if file is not None:
            with naming(self.path):
                file.close()


def _record(key: str, tokens: object, logp: object) -> dict[str, object]:
    return {"key": key, "tokens": tokens, "logp": logp}
