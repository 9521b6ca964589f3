"""What a model on disk is: a run tells by the checksums of its files that one was replaced under the same name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .loading import locate, weight_files

MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")


def model_fingerprint(source: str, commit: str | None, checksum: Callable[[Path], str]) -> dict[str, str]:
    """Returns the SHA-256 of each file that loading a model may read, by name, or the hub's commit.

    Whole files are read: a size stays the same when weights change, and a date changes when they are copied. That is
    8 s for 16 GB where the processor has instructions for it; the journal does as much for every policy of a run.

    Args:
        source: a directory, a Hugging Face id, or "smollm2".
        commit: of a model from the hub, if it is known.
        checksum: of a file, given its resolved path.
    """
    directory = Path(locate(source)["pretrained_model_name_or_path"])
    if directory.is_dir():
        files = {path for path in directory.iterdir() if path.suffix in MODEL_FILES}
        files |= set(weight_files(str(directory)))  # shards may be in folders of it
        return {str(path.relative_to(directory)): checksum(path.resolve()) for path in sorted(files)}
    return {"commit": commit} if commit else {}


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The names under which two fingerprints differ, in order."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
