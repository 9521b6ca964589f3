"""Files that are either whole or not there: written beside their place, flushed, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def atomic_write_text(path: Path, text: str | Iterable[str]) -> None:
    """Writes UTF-8 text, whole or in parts. A crash leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def atomic_write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets ``fill`` write a directory and puts it in place whole; one that was there before is replaced."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, atomically."""
    atomic_write_text(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that ``write_jsonl`` wrote."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)
