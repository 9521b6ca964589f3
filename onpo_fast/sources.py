"""Records from where people keep them: JSON lines, JSON, parquet, a saved dataset, a Hugging Face dataset."""

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
    """(where it stands, what it says) of every record of a source.

    Args:
        source: a file (``.parquet``, ``.json`` with a list, otherwise JSON lines, whose blank lines are passed over), a
            directory that ``datasets.save_to_disk`` wrote, or a dataset of the hub. The latter two may name a split,
            ``org/name:test``; default ``train``.
        columns: the only ones that are wanted; tables read no others if they have the first.

    Yields:
        A line that is not JSON in UTF-8 as a ``UserError``, for the reader to raise or to count. Rows of tables (all
        but JSON) come without what is null inside their values: a table gives every nested object all keys that any row
        has, and null where there was none, so that the two cannot be told apart.

    Raises:
        UserError: naming the source, and the line of a JSON file that is broken as a whole. Also for a pipe or a
            device: it can be read once or has no end, and a run that goes on reads its prompts again.
    """
    path, name = Path(source), str(source)
    try:
        special, exists = _is_special(path), path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be read, a NUL
        raise UserError(f"cannot read {name}: {error.strerror if isinstance(error, OSError) else error}") from None
    if name in ("-", "/dev/stdin") or name.startswith(("/dev/fd/", "/proc/self/fd/")) or special:
        raise UserError(f"cannot read {name}: it is no file that can be read again; save it to a file first")
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
    """Libraries neither warn nor show bars meanwhile: what has gone wrong is in what they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):  # not every bar has a switch
            yield
    finally:
        logging.disable(before)


def library(package: str, purpose: str) -> ModuleType:
    """A package of the extra ``data``.

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
    if any(byte < 32 and byte not in b"\t\n\r" for byte in content[:16]):  # UTF-16, and what is packed, have some
        raise UserError(f"cannot read {path}: it is no text in UTF-8; a file is JSON lines, .json or .parquet")
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
    except (ValueError, RecursionError) as error:  # also of a number of thousands of digits
        return UserError(f"{where}: not JSON ({error})")


def _is_special(path: Path) -> bool:
    """Whether it is there, and a pipe, a device or a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _wanted(columns: Sequence[str], there: Sequence[str]) -> list[str] | None:
    """The columns to read; None for all."""
    return [name for name in columns if name in there] if columns and columns[0] in there else None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, object]]:
    parquet = library("pyarrow.parquet", f"the parquet file {path}")
    number = 0
    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(columns=_wanted(columns, file.schema_arrow.names)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", _without_nulls(row)
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise UserError(f"cannot read {path}: {error}") from error


def _rows(name: str, data, columns: Sequence[str]) -> Iterator[tuple[str, object]]:
    if wanted := _wanted(columns, data.column_names):
        data = data.select_columns(wanted)
    yield from ((f"{name}, row {number}", _without_nulls(row)) for number, row in enumerate(data, 1))


def _without_nulls(row: dict[str, object]) -> dict[str, object]:
    """A table's row without what is null inside its values. A column that is null stays."""
    return {name: _filled_in(value) for name, value in row.items()}


def _filled_in(value: object) -> object:
    if isinstance(value, dict):
        return {key: _filled_in(item) for key, item in value.items() if item is not None}
    return [_filled_in(item) for item in value] if isinstance(value, list) else value


def _saved(directory: str, split: str):
    datasets = library("datasets", f"the saved dataset {directory}")
    try:
        data = datasets.load_from_disk(directory)
    except Exception as error:  # what is in the directory is the user's: anything may be wrong with it
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
    datasets = library("datasets", f"{name}, which is no file here, so a dataset of the hub,")
    try:
        with quiet():
            return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub, the network, a cache, and data that others wrote
        raise UserError(f"cannot read {name}: it is no file or directory here, and as a dataset: {error}") from error
