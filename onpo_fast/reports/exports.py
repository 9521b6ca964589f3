"""Write what a run made in other programs' formats: pairs for ``datasets``, answers for AlpacaEval, merged adapters."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from .. import streams
from ..config import ModelConfig, SamplingConfig
from ..console import progress
from ..data import Messages, of_iterations
from ..errors import UserError
from ..files import atomic_write_directory, atomic_write_text, read_jsonl
from ..journal import Journal
from ..models.precision import convert_parameters
from ..models.resident import ResidentPolicy, Source
from ..run.outputs import finished_policies, initial_policy
from ..sampling import make_sampler
from ..sources import library, records

COLUMNS = ("prompt", "chosen", "rejected", "preference", "group")


def export_pairs(directory: Path, out: Path, iterations: Sequence[int] | None = None) -> int:
    """Write the pairs of a run as a directory for ``datasets.load_from_disk``; returns their number.

    Args:
        directory: the run directory.
        out: a directory that does not exist yet.
        iterations: numbers of iterations, in the order wanted; default all. Repeated ones count once.

    Raises:
        UserError: if ``out`` exists, an iteration has no pairs, or a file of pairs is damaged.
    """
    datasets = library("datasets", "the export of pairs")
    check_unused(out)
    files = of_iterations(directory, "pairs.jsonl")
    wanted = list(dict.fromkeys(iterations or files))
    if not wanted:
        raise UserError(f"{directory} has no pairs yet")
    for t in wanted:
        if t not in files:
            raise UserError(f"{directory} has no pairs of iteration {t}: it has {_listed(files)}")
    with_tools = any(_has_tools(pair) for t in wanted for pair in read_jsonl(files[t]))
    weighted = any(_is_weighted(pair) for t in wanted for pair in read_jsonl(files[t]))
    features = _pair_features(datasets, with_tools, weighted)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:  # the pairs of a run need not fit into memory
        try:
            rows = partial(_pair_rows, files, wanted, with_tools, weighted)
            table = datasets.Dataset.from_generator(rows, features=features, cache_dir=cache)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError | OSError):
                raise error.__cause__ from None
            raise UserError(f"the pairs of {directory} are damaged: {error.__cause__}") from error
        atomic_write_directory(out, lambda folder: table.save_to_disk(str(folder)))
        return len(table)


def _pair_rows(files: dict[int, Path], wanted: Sequence[int], with_tools: bool, weighted: bool) -> Iterator[dict]:
    for t in wanted:
        for number, pair in enumerate(read_jsonl(files[t]), 1):
            if missing := [name for name in COLUMNS if name not in pair]:
                raise UserError(f"{files[t]}, line {number}: it lacks {', '.join(missing)}")
            if pair.get("loser", 0) is None:
                raise UserError(
                    f"{files[t]} has no pairs to export: sppo labels each response by itself with its win rate"
                )
            tools = {"tools": pair.get("tools") or []} if with_tools else {}
            weight = {"weight": pair.get("weight", 1) * pair.get("importance", 1)} if weighted else {}
            yield {name: pair[name] for name in COLUMNS} | tools | weight | {"iteration": t}


def _pair_features(datasets: ModuleType, with_tools: bool, weighted: bool) -> dict:
    """The types of the columns. With tools, prompts are JSON: a column of one structure would add null for each key."""
    text, integer, number = (datasets.Value(kind) for kind in ("string", "int32", "float64"))
    messages = datasets.List({"role": text, "content": text})
    features = datasets.Features(
        prompt=messages, chosen=messages, rejected=messages, preference=number, group=integer, iteration=integer
    )
    if weighted:
        features["weight"] = number
    if with_tools:
        if not hasattr(datasets, "Json"):
            raise UserError("pairs with tools need a newer package datasets: pip install -U datasets")
        features["prompt"] = features["tools"] = datasets.List(datasets.Json())
    return features


def _is_weighted(pair: dict) -> bool:
    """Whether the pair's loss does not count once, as where pairs were drawn (--select)."""
    return "weight" in pair or "importance" in pair


def _has_tools(pair: dict) -> bool:
    """Whether the prompt has tools, or messages with more than a role and a content."""
    prompt = pair.get("prompt")
    messages = prompt if isinstance(prompt, list) else []
    return bool(pair.get("tools")) or any(isinstance(one, dict) and len(one) > 2 for one in messages)


def export_answers(
    directory: Path, out: Path, instructions: str, policy: int, model: ModelConfig, sampling: SamplingConfig, seed: int
) -> int:
    """Write one answer of a policy to each instruction, in AlpacaEval's format; returns their number.

    The same arguments give the same answers.

    Args:
        directory: the run directory.
        out: a ``.json`` file that does not exist yet.
        instructions: a source (``sources.records``) whose records have an "instruction" or a "prompt", a string.
        policy: t of π_t; 1 is the start policy.
        model: how to load the policy; its ``model`` is π_1.
        sampling: how to sample.
        seed: of the random numbers.

    Raises:
        UserError: if ``out`` exists, an instruction cannot be used, or there is no such policy.
    """
    check_unused(out)
    if out.suffix != ".json":
        raise UserError(f"--out {out}: the name must end in .json, by which AlpacaEval knows a list of answers")
    policies = policy_sources(directory, model)
    source = _chosen(policies, policy, directory)
    asked = [_instruction(record, where) for where, record in records(instructions)]
    if not asked:
        raise UserError(f"{instructions} has no instructions")
    prompts: list[Messages] = [[{"role": "user", "content": one["instruction"]}] for one in asked]
    sampler = make_sampler(ResidentPolicy(model, policies[1])(source), sampling)
    with progress(f"answers of π_{policy}", len(prompts)) as done:
        groups = sampler(prompts, 1, [seed, streams.EXPORT, policy], done)
    generator = f"{directory.resolve().name}-policy-{policy}"  # AlpacaEval names its results folder after it
    answers = [{**one, "output": group.responses[0].text, "generator": generator} for one, group in zip(asked, groups)]
    atomic_write_text(out, json.dumps(answers, ensure_ascii=False, indent=1) + "\n")
    return len(answers)


def _instruction(record: object, where: str) -> dict[str, str]:
    """The "instruction" of a record, and its "dataset" if it has one."""
    if isinstance(record, UserError):
        raise record
    text = record.get("instruction", record.get("prompt")) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: expected an object with an "instruction" (or a "prompt") that is not empty')
    if record.get("input"):
        raise UserError(f'{where}: it has an "input", which AlpacaEval no longer reads: put it into the instruction')
    dataset = record.get("dataset")
    return {"dataset": dataset, "instruction": text} if isinstance(dataset, str) else {"instruction": text}


def export_merged(directory: Path, out: Path, policy: int, model: ModelConfig) -> None:
    """Write a policy that is a LoRA adapter as a whole model, its base with the adapter merged, in float32.

    Args:
        directory: the run directory.
        out: a directory that does not exist yet.
        policy: t of π_t, at least 2.
        model: how to load the policy; its ``model`` is π_1.

    Raises:
        UserError: if ``out`` exists, there is no such policy, or policies of the run are whole models.
    """
    check_unused(out)
    policies = policy_sources(directory, model)
    source = _chosen(policies, policy, directory)
    if model.lora_rank is None or policy == 1:
        raise UserError(f"--merge: π_{policy} is no adapter but a whole model already: {source}")
    whole = ResidentPolicy(replace(model, device="cpu", dtype="auto", attention="auto"), policies[1])(source)
    convert_parameters(whole.model, torch.float32)  # bfloat16, as of the base in the run, may not hold the adapter
    whole.adapter.merge()
    whole.adapter = None
    whole.save(out)


def _chosen(policies: dict[int, Source], policy: int, directory: Path) -> Source:
    """Where a policy is. Raises ``UserError`` if there is none of this number."""
    if policy not in policies:
        raise UserError(f"--policy {policy}: {directory} has no policy of this number; it has {_listed(policies)}")
    return policies[policy]


def policy_sources(directory: Path, model: ModelConfig) -> dict[int, Source]:
    """t → where π_t can be loaded from.

    Raises:
        UserError: if a policy in the run directory is not as it was saved.
    """
    journal = Journal(directory)
    named = {"π_1": initial_policy(directory, model.model, journal), **finished_policies(directory, journal)}
    return {int(name.removeprefix("π_")): source for name, source in named.items()}


def check_unused(out: Path) -> None:
    """Check that an output can be written, before a model is loaded and asked for hours.

    Raises:
        UserError: if ``out`` exists, or nothing can be written there.
    """
    if out.exists():
        raise UserError(f"--out {out} exists: give a new name")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"--out {out}: nothing can be written into {above}")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
