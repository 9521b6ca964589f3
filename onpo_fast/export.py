"""What a run made, for others: its preference pairs as a ``datasets`` directory, a policy's answers for AlpacaEval.

    python -m onpo_fast.export DIR                                 # DIR/pairs: prompt, chosen, rejected
    python -m onpo_fast.export DIR --alpaca instructions.json      # DIR/alpaca_eval_3.json: the answers of π_3

The pairs have the columns that TRL's trainers read, as lists of messages, and ``preference`` (the label), ``iteration``
and ``group`` (the prompt's index in its iteration) beside them. The answers are what AlpacaEval takes as
``--model_outputs``: a JSON list of ``instruction``, ``output`` and ``generator``, and the ``dataset`` of an instruction
that has one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from . import config as configuration
from .config import Config
from .data import Messages, of_iterations
from .errors import CommandParser, UserError, command
from .evaluate import finished_policies, initial_policy
from .files import atomic_write_directory, atomic_write_text, read_jsonl
from .models.loading import load
from .run.journal import Journal
from .run.tracking import progress, say
from .sampling import make_sampler
from .sources import library, records

ASKS = ("trust_remote_code",)  # no oracle is asked: none of its options is needed
COLUMNS = ("prompt", "chosen", "rejected", "preference", "group")


def export_pairs(directory: Path, out: Path, iterations: Sequence[int] | None = None) -> int:
    """Writes the pairs of a run as ``datasets.load_from_disk`` reads them; returns how many.

    Args:
        directory: the run's.
        out: where to; must not exist.
        iterations: which ones, in this order, each once; default all.

    Raises:
        UserError: if ``out`` exists, or an iteration has no pairs.
    """
    datasets = library("datasets", "the export of pairs")
    _check_unused(out)
    there = of_iterations(directory, "pairs.jsonl")
    wanted = list(dict.fromkeys(iterations or there))
    if not wanted:
        raise UserError(f"{directory} has no pairs yet")
    for t in wanted:
        if t not in there:
            raise UserError(f"{directory} has no pairs of iteration {t}: it has {_listed(there)}")

    def rows() -> Iterator[dict]:
        for t in wanted:
            for number, pair in enumerate(read_jsonl(there[t]), 1):
                if missing := [name for name in COLUMNS if name not in pair]:
                    raise UserError(f"{there[t]}, line {number}: it lacks {', '.join(missing)}")
                tools = {"tools": pair.get("tools") or []} if with_tools else {}
                yield {name: pair[name] for name in COLUMNS} | tools | {"iteration": t}

    with_tools = any(_has_tools(pair) for t in wanted for pair in read_jsonl(there[t]))
    text, whole, number = (datasets.Value(kind) for kind in ("string", "int32", "float64"))
    messages = datasets.List({"role": text, "content": text})
    features = datasets.Features(
        prompt=messages, chosen=messages, rejected=messages, preference=number, group=whole, iteration=whole
    )
    if with_tools:  # calls and schemas have keys of their own, which a column of one structure would fill with null
        if not hasattr(datasets, "Json"):
            raise UserError("pairs with tools need a newer package datasets: pip install -U datasets")
        features["prompt"] = features["tools"] = datasets.List(datasets.Json())
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:  # a run's pairs need not fit into memory
        try:
            made = datasets.Dataset.from_generator(rows, features=features, cache_dir=cache)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError | OSError):
                raise error.__cause__ from None
            raise UserError(f"the pairs of {directory} are damaged: {error.__cause__}") from error
        atomic_write_directory(out, lambda partial: made.save_to_disk(str(partial)))
        return len(made)


def _has_tools(pair: dict) -> bool:
    """Whether its prompt has tools, or messages of more than a role and a content."""
    prompt = pair.get("prompt")
    messages = prompt if isinstance(prompt, list) else []
    return bool(pair.get("tools")) or any(isinstance(one, dict) and len(one) > 2 for one in messages)


def export_answers(directory: Path, out: Path, instructions: str, policy: int, config: Config) -> int:
    """Writes a policy's answers, one to each instruction, in AlpacaEval's format; returns how many.

    Args:
        directory: the run's.
        out: where to, a ``.json`` file; must not exist.
        instructions: a source (``sources.records``) whose records have an "instruction", or a "prompt", as a string.
        policy: 1 for π_1, and so on.
        config: the run's, with the sampling as it is to be. The same one gives the same answers.

    Raises:
        UserError: if ``out`` exists, an instruction cannot be used, or there is no such policy.
    """
    _check_unused(out)
    if out.suffix != ".json":
        raise UserError(f"--out {out}: AlpacaEval knows a list of answers by the ending .json")
    policies = _policies(directory, config)
    if policy not in policies:
        raise UserError(f"{directory} has no policy {policy}: it has {_listed(policies)}")
    asked = [_instruction(record, where) for where, record in records(instructions)]
    if not asked:
        raise UserError(f"{instructions} has no instructions")
    prompts: list[Messages] = [[{"role": "user", "content": one["instruction"]}] for one in asked]
    sampler = make_sampler(load(policies[policy], config), config)
    with progress(f"answers of π_{policy}", len(prompts)) as done:
        groups = sampler(prompts, 1, [config.seed, 4, policy], done)
    generator = f"{directory.resolve().name}-policy-{policy}"  # also the name of AlpacaEval's own results folder
    answers = [{**one, "output": group.responses[0].text, "generator": generator} for one, group in zip(asked, groups)]
    atomic_write_text(out, json.dumps(answers, ensure_ascii=False, indent=1) + "\n")
    return len(answers)


def _instruction(record: object, where: str) -> dict[str, str]:
    """The instruction, and the dataset that it says it is from."""
    if isinstance(record, UserError):
        raise record
    text = record.get("instruction", record.get("prompt")) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: expected an object with an "instruction" (or a "prompt") that is not empty')
    if record.get("input"):
        raise UserError(f'{where}: it has an "input", which AlpacaEval no longer reads: put it into the instruction')
    dataset = record.get("dataset")
    return {"dataset": dataset, "instruction": text} if isinstance(dataset, str) else {"instruction": text}


def _policies(directory: Path, config: Config) -> dict[int, str | Path]:
    """t → where π_t is."""
    journal = Journal(directory)
    named = {"π_1": initial_policy(directory, config, journal), **finished_policies(directory, journal)}
    return {int(name.removeprefix("π_")): source for name, source in named.items()}


def _listed(numbers: object) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _check_unused(out: Path) -> None:
    """Before a model is loaded, and asked for hours, for an output that has no place."""
    if out.exists():
        raise UserError(f"--out {out} exists: give a new name")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"--out {out}: nothing can be written into {above}")


@command
def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog="python -m onpo_fast.export",
        description="Export the pairs or the answers of a run.",
        epilog=configuration.TRUST_NOTE,
    )
    parser.add_argument("directory", type=Path, help="the run's output directory")
    parser.add_argument("--out", type=Path, help="default: DIR/pairs, or DIR/alpaca_eval_N.json")
    parser.add_argument("--iterations", type=int, nargs="+", metavar="T", help="whose pairs; default all")
    parser.add_argument("--alpaca", metavar="INSTRUCTIONS", help="answer these instead: JSON, JSON lines, a dataset")
    parser.add_argument("--policy", type=int, metavar="N", help="with --alpaca: 1 for π_1, …; default the last one")
    parser.add_argument("--max_new_tokens", type=int, help="with --alpaca, in tokens; default the run's")
    parser.add_argument("--temperature", type=float, help="with --alpaca; default the run's")
    configuration.add_options(parser, ASKS)
    options = parser.parse_args(argv)
    asks = () if options.alpaca is None else ASKS  # no model is loaded for pairs
    directory = options.directory
    config = configuration.read_run(directory, configuration.given_options(options, ASKS), asks)
    if options.alpaca is None:
        for name in ("policy", "max_new_tokens", "temperature", *ASKS):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} goes with --alpaca")
        out = options.out or directory / "pairs"
        say(f"{export_pairs(directory, out, options.iterations)} pairs: {out}")
        return
    if options.iterations:
        raise UserError("--iterations goes with pairs, not with --alpaca")
    sampling = {name: getattr(options, name) for name in ("max_new_tokens", "temperature")}
    config = replace(config, **{name: value for name, value in sampling.items() if value is not None})
    policy = max(_policies(directory, config)) if options.policy is None else options.policy
    out = options.out or directory / f"alpaca_eval_{policy}.json"
    say(f"{export_answers(directory, out, options.alpaca, policy, config)} answers of π_{policy}: {out}")


if __name__ == "__main__":
    main()
