"""Records from JSON lines, JSON, parquet, a saved dataset or a Hugging Face dataset."""

from __future__ import annotations

import codecs
import importlib
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType

from .errors import UserError, nearest

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (".jsonl", ".json", ".parquet")


def records(source: str | Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, object]]:
    """Yields (place, record) for every record of a source; the place names the file and line, or dataset and row.

    A line that is not JSON in UTF-8 is yielded as a ``UserError``, for the caller to raise or to count. Tables (all
    sources but JSON) store null for each key of a nested object that a row lacks; these nulls are removed.

    Args:
        source: a file (``.parquet``, ``.json`` with a list, otherwise JSON lines, where blank lines are ignored), a
            directory written by ``datasets.save_to_disk``, or a dataset of the Hugging Face hub. Directories and
            datasets may name a split, as in ``org/name:test``; default ``train``.
        columns: columns that are needed. A table reads no others if it has the first.

    Raises:
        UserError: names the source, and the line of a ``.json`` file. Also for a pipe or device, which can be read only
            once or never ends: a run reads its prompts again when it is resumed.
    """
    path, name = Path(source), str(source)
    try:
        special, exists = _is_special(path), path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a folder without permission, a NUL
        raise UserError(f"cannot read {name}: {error.strerror if isinstance(error, OSError) else error}") from None
    if name in ("-", "/dev/stdin") or name.startswith(("/dev/fd/", "/proc/self/fd/")) or special:
        raise UserError(f"cannot read {name}: it cannot be read a second time; save it to a file first")
    where, split = (name, "") if exists else name.partition(":")[::2]
    if path.is_file():
        if path.suffix == ".parquet":
            yield from _parquet(path, columns)
        else:
            yield from _json(path)
    elif Path(where).is_dir():
        yield from _rows(name, _saved(where, split), columns)
    elif HUB_ID.fullmatch(where) and not where.endswith(FILES):
        yield from _rows(name, _hub(where, split), columns)
    else:
        raise UserError(f"cannot read {name}: there is no such file")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings and progress bars of libraries. Their exceptions say what went wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):  # not every progress bar can be switched off
            yield
    finally:
        logging.disable(before)


def library(package: str, purpose: str) -> ModuleType:
    """Imports a package of the extra ``data``.

    Raises:
        UserError: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{purpose} needs the package datasets: pip install 'onpo_fast[data]'") from None


def _json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if any(byte < 32 and byte not in b"\t\n\r" for byte in content[:16]):  # as UTF-16 and compressed files have
        raise UserError(f"cannot read {path}: it is not UTF-8 text; give JSON lines, .json or .parquet")
    if path.suffix == ".json" and content.lstrip().startswith(b"["):
        try:
            listed = json.loads(content.decode())
        except UnicodeDecodeError as error:
            number = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(listed, 1))
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _line(line, f"{path}, line {number}")


def _line(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 ({error.reason})")
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        return UserError(f"{where}: not JSON ({error})")


def _is_special(path: Path) -> bool:
    """Whether this is a pipe, a device or a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _wanted(columns: Sequence[str], there: Sequence[str]) -> list[str] | None:
    """Returns the columns to read; None for all."""
    return [name for name in columns if name in there] if columns and columns[0] in there else None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, object]]:
    parquet = library("pyarrow.parquet", f"the parquet file {path}")
    number = 0
    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(columns=_wanted(columns, file.schema_arrow.names)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", _without_nested_nulls(row)
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise UserError(f"cannot read {path}: {error}") from error


def _rows(name: str, data, columns: Sequence[str]) -> Iterator[tuple[str, object]]:
    if wanted := _wanted(columns, data.column_names):
        data = data.select_columns(wanted)
    yield from ((f"{name}, row {number}", _without_nested_nulls(row)) for number, row in enumerate(data, 1))


def _without_nested_nulls(row: dict[str, object]) -> dict[str, object]:
    """Returns a table's row without nulls inside its values. A column that is null stays."""
    return {name: _drop_nulls(value) for name, value in row.items()}


def _drop_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _saved(directory: str, split: str):
    datasets = library("datasets", f"the saved dataset {directory}")
    try:
        data = datasets.load_from_disk(directory)
    except Exception as error:  # anything may be wrong with a user's directory
        raise UserError(f"cannot read {directory} as a directory that datasets.save_to_disk wrote: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in data:
            raise UserError(f"{directory} has no split {wanted!r}: it has {', '.join(data)}{nearest(wanted, data)}")
        return data[wanted]
    if split:
        raise UserError(f"{directory} has no splits: leave out ':{split}'")
    return data


def _hub(name: str, split: str):
    datasets = library("datasets", f"{name}, which is not a file here and so a dataset of the hub,")
    try:
        with quiet():
            return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of the hub, the network, a cache, or the data
        raise UserError(f"cannot read {name}: it is not a file or directory here, and as a dataset: {error}") from error
