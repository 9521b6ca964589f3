"""Prompts, preference groups and pairs: the data structures and their files of JSON lines.

A *preference group* is one prompt with its K responses. It is sampled, judged, paired, packed and scored together.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .conversations import Messages, Prompt, check_names, columns_of, read_conversation
from .errors import UserError
from .files import read_jsonl, write_jsonl
from .sources import records

Item = TypeVar("Item")


@dataclass(frozen=True)
class Response:
    """A response that was sampled from a policy."""

    text: str
    tokens: list[int]  # as sampled; the last is an end-of-sequence token if the model stopped by itself
    stop_reason: str  # "eos" or "length"
    logp: float  # summed log-prob under the policy that sampled it, at temperature 1, nats


@dataclass(frozen=True)
class Group:
    """A prompt and its K responses."""

    prompt: Messages
    prompt_tokens: list[int]  # rendered by the chat template, up to the start of the assistant's turn
    responses: list[Response]


@dataclass(frozen=True)
class Pair:
    """A comparison of two responses of one group, or a single response with its win rate."""

    group: int  # index of the group
    winner: int  # index of the response in its group
    loser: int | None  # None: an empty response, whose log-prob is 0 (SPPO)
    preference: float  # the label P(winner ≻ loser): a probability, or 1 for a sampled label
    weight: float = 1.0  # in the mean over pairs
    importance: float = 1.0  # what its loss counts; the mean is over the weights alone


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Skipped:
    """Count of bad prompts that were skipped."""

    count: int = 0
    first: str = ""  # error of the first one

    def add(self, error: UserError) -> None:
        self.first = self.first or str(error)
        self.count += 1

    def __str__(self) -> str:
        return f"{self.count} bad prompts skipped, the first: {self.first}"


def read_prompts(source: str | Path, column: str = "prompt", skipped: Skipped | None = None) -> list[Messages]:
    """Reads the prompts of a source in its order.

    A final assistant message is dropped, since the policy is to write it. The column "tools" is kept with a prompt.

    Args:
        source: a file, directory or dataset, as in ``sources.records``.
        column: column with the prompt, a string or a list of messages.
        skipped: counts bad prompts, which are otherwise an error.

    Raises:
        UserError: names the file and line, or the dataset and row.
    """
    prompts = []
    for where, record in records(source, (column, "tools")):
        try:
            prompts.append(_messages(record, column, where))
        except UserError as error:
            if skipped is None:
                raise
            skipped.add(error)
    if not prompts:
        reason = str(skipped) if skipped and skipped.count else f'each record needs a "{column}"'
        raise UserError(f"{source} has no prompts: {reason}")
    return prompts


def _messages(record: object, column: str, where: str) -> Prompt:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict) or column not in record:
        others = ""
        if isinstance(record, dict) and record:
            others = f" (it has {', '.join(map(str, record))}; see --prompt_column)"
            for name in record:
                check_names(record, name, where)
        raise UserError(f'{where}: expected an object with a "{column}"{others}')
    return read_conversation(record, column, where)


def split_prompts(
    prompts: str | None,
    eval_prompts: str | None,
    eval_fraction: float,
    seed: int,
    column: str = "prompt",
    skipped: Skipped | None = None,
    usable: Callable[[list[Messages]], list[Messages]] = lambda prompts: prompts,
) -> tuple[list[Messages], list[Messages]]:
    """Returns training prompts, shuffled by the seed, and held-out prompts, without duplicates or overlap.

    Args:
        prompts: source of training prompts; default the bundled ones.
        eval_prompts: source of held-out prompts; default the bundled ones or, with ``prompts``, a share of those.
        eval_fraction: that share, at least one prompt.
        column, skipped: as in ``read_prompts``, for sources that are not bundled.
        usable: selects the prompts that the model can take. Called after reading, before prompts are held out.

    Raises:
        UserError: if a source cannot be read, or no training prompts are left.
    """

    def read(source: str | None, name: str) -> list[Messages]:
        if source:
            return _unique(read_prompts(source, column, skipped))
        return _unique(read_prompts(files("onpo_fast.prompts") / name))

    train = read(prompts, "train.jsonl")
    random.Random(f"{seed} prompts").shuffle(train)
    if eval_prompts or not prompts:
        held_out = read(eval_prompts, "heldout.jsonl")
        seen = {_key(prompt) for prompt in held_out}
        train = [prompt for prompt in train if _key(prompt) not in seen]
        if not train:
            raise UserError(f"every prompt of {prompts} is held out by --eval_prompts {eval_prompts}")
        return usable(train), usable(held_out)
    train = usable(train)
    count = max(1, round(eval_fraction * len(train)))
    if count >= len(train):
        raise UserError(
            f"{prompts} has {len(train)} different prompt{'s' * (len(train) != 1)}: holding out {count} leaves none to "
            f"train on; add prompts{', lower --eval_fraction' * (count > 1)} or give --eval_prompts"
        )
    return train[count:], train[:count]


def _unique(prompts: list[Messages]) -> list[Messages]:
    return list({_key(prompt): prompt for prompt in prompts}.values())


def _key(prompt: Messages) -> str:
    """Returns the messages and tools of a prompt as text, equal for equal prompts."""
    return json.dumps(columns_of(prompt))


def prompts_digest(train: Sequence[Messages], held_out: Sequence[Messages]) -> str:
    """Returns the SHA-256 of all prompts in hexadecimal. A prompt without tools counts as its list of messages."""

    def listed(prompts: Sequence[Messages]) -> list:
        return [columns if "tools" in (columns := columns_of(prompt)) else prompt for prompt in prompts]

    return hashlib.sha256(json.dumps([listed(train), listed(held_out)]).encode()).hexdigest()


def prompts_of_iteration(prompts: Sequence[Messages], iteration: int, iterations: int, wanted: int) -> list[Messages]:
    """Returns the prompts of an iteration, counted from 1: ``wanted``, or an even share if there are too few.

    Iterations have different prompts, unless there are fewer prompts than iterations: then prompts are used again.
    """
    count = min(wanted, max(1, len(prompts) // iterations))
    start = (iteration - 1) * count
    return [prompts[i % len(prompts)] for i in range(start, start + count)]


def write_prompts(path: Path, prompts: Iterable[Messages]) -> None:
    write_jsonl(path, map(columns_of, prompts))


# ---------------------------------------------------------------------------------------------------------------------
# Files of an iteration
# ---------------------------------------------------------------------------------------------------------------------


def of_iterations(directory: Path, name: str) -> dict[int, Path]:
    """Returns the paths ``iteration_TT/name`` that exist, by iteration and in order. Other folders are ignored."""
    found = {path.parent.name.removeprefix("iteration_"): path for path in directory.glob(f"iteration_*/{name}")}
    return dict(sorted((int(t), path) for t, path in found.items() if t.isdecimal()))


def write_groups(path: Path, groups: Iterable[Group]) -> None:
    write_jsonl(path, map(_group_record, groups))


def _group_record(group: Group) -> dict:
    responses = group.responses
    return {
        **columns_of(group.prompt),
        "responses": [r.text for r in responses],
        "prompt_tokens": group.prompt_tokens,
        "response_tokens": [r.tokens for r in responses],
        "stop_reasons": [r.stop_reason for r in responses],
        "logps": [r.logp for r in responses],
    }


REMEDY = "remove the file, and --resume makes it again"  # for a file of a run that is not what a run writes


def read_items(path: Path, make: Callable[[dict, Any], Item], items: Sequence | None, what: str) -> list[Item]:
    """Reads a file with one line per item. The file may be damaged, or come from a stranger.

    Args:
        make: returns the result for a line and its item, or None as the item if ``items`` is None.
        items: items that the file must have a line of, in order; None allows any number.
        what: name of the items in a message.

    Raises:
        UserError: if a line lacks something or has another type, or there are too few, too many or no lines.
    """
    made = []
    for number, record in enumerate(read_jsonl(path), 1):
        try:
            made.append(make(record, items[number - 1] if items is not None and number <= len(items) else None))
        except Misfit as error:
            raise UserError(f"{path}, line {number}: {error}; {REMEDY}") from None
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            raise UserError(
                f"{path}, line {number}: it lacks what a run writes there, or has another type; {REMEDY}"
            ) from None
        if items is not None and number > len(items):
            break
    if items is not None and len(made) != len(items):
        lines = f"more than {len(items)} lines" if len(made) > len(items) else f"{len(made)} lines"
        raise UserError(f"{path} has {lines} where there are {len(items)} {what}: {REMEDY}")
    if items is None and not made:
        raise UserError(f"{path} has no lines: {REMEDY}")
    return made


class Misfit(ValueError):
    """A line that does not fit its item; the message says why."""


def _list(values: object, kind: type | tuple[type, ...]) -> list:
    """Returns the values; ``TypeError`` if they are not a list of this type."""
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise TypeError
    return values


def read_groups(
    path: Path, prompts: Sequence[Messages] | None = None, responses: int | None = None, vocabulary: int | None = None
) -> list[Group]:
    """Reads groups that ``write_groups`` wrote.

    Args:
        prompts: the prompts of the groups, in order; default any.
        responses: number of responses to each prompt; default any number from 1.
        vocabulary: exclusive upper bound of tokens; default 2**31.

    Raises:
        UserError: names the file, and the line that does not fit.
    """

    def make(record: dict, asked: Messages | None) -> Group:
        texts, tokens = _list(record["responses"], str), _list(record["response_tokens"], list)
        columns = (texts, tokens, _list(record["stop_reasons"], str), _list(record["logps"], (int, float)))
        if len(set(map(len, columns))) > 1:
            raise ValueError
        if not texts or responses not in (None, len(texts)):
            raise Misfit(f"it has {len(texts)} responses{f' where {responses} were sampled' if responses else ''}")
        for some in (record["prompt_tokens"], *tokens):
            if not all(0 <= token < (vocabulary or 2**31) for token in _list(some, int)):
                raise Misfit(f"it has a token beyond the model's vocabulary of {vocabulary or 2**31}")
        if not record["prompt_tokens"]:
            raise Misfit("its prompt has no tokens")
        tools = record.get("tools")
        prompt = Prompt(_list(record["prompt"], dict), tools=None if tools is None else _list(tools, dict))
        if asked is not None and columns_of(prompt) != columns_of(asked):
            raise Misfit("it belongs to another prompt")
        return Group(prompt, record["prompt_tokens"], [Response(*row) for row in zip(*columns)])

    return read_items(path, make, prompts, "prompts")


def check_tokens(groups: Iterable[Group], vocabulary: int, file: Path) -> None:
    """Checks that a model has all tokens of these groups.

    Raises:
        UserError: names the file that they come from.
    """
    for group in groups:
        highest = max(max(tokens, default=0) for tokens in (group.prompt_tokens, *(r.tokens for r in group.responses)))
        if highest >= vocabulary:
            raise UserError(f"{file}: it has the token {highest}, and the model has {vocabulary} tokens; {REMEDY}")


def write_preferences(path: Path, preferences: Iterable[np.ndarray]) -> None:
    write_jsonl(path, ({"preferences": matrix.tolist()} for matrix in preferences))


def read_preferences(path: Path, groups: Sequence[Group] | None = None) -> list[np.ndarray]:
    """Reads what ``write_preferences`` wrote: for each group a (K, K) float64 matrix of P(i ≻ j).

    Args:
        groups: the groups, in order; default any.

    Raises:
        UserError: names the file, and the line that does not fit.
    """

    def make(record: dict, group: Group | None) -> np.ndarray:
        matrix = np.array(record["preferences"], dtype=float)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not ((matrix >= 0) & (matrix <= 1)).all():
            raise ValueError
        if group is not None and len(matrix) != len(group.responses):
            raise Misfit(f"it has {len(matrix)} responses where the group has {len(group.responses)}")
        return matrix

    return read_items(path, make, groups, "groups of responses")


def write_scores(path: Path, scores: Iterable[Tensor]) -> None:
    """Writes summed log-probs in nats, for each group a (K,) float64 tensor. Reading gives the same bits."""
    write_jsonl(path, ({"logps": values.tolist()} for values in scores))


def read_scores(path: Path, groups: Sequence[Group] | None = None) -> list[Tensor]:
    """Reads what ``write_scores`` wrote: for each group a (K,) float64 tensor, in nats.

    Args:
        groups: the groups, in order; default any.

    Raises:
        UserError: names the file, and the line that does not fit.
    """

    def make(record: dict, group: Group | None) -> Tensor:
        values = torch.tensor(_list(record["logps"], (int, float)), dtype=torch.float64)
        if group is not None and len(values) != len(group.responses):
            raise Misfit(f"it has {len(values)} responses where the group has {len(group.responses)}")
        return values

    return read_items(path, make, groups, "groups of responses")


def read_pairs(path: Path, groups: Sequence[Group] | None = None) -> list[Pair]:
    """Reads pairs that ``write_pairs`` wrote, at least one.

    Args:
        groups: the groups whose responses are compared; default any.

    Raises:
        UserError: names the file, and the line that does not fit.
    """

    def make(record: dict, _: None) -> Pair:
        has_loser = record["loser"] is not None
        numbers = _list([record[name] for name in ("group", "winner", *(["loser"] if has_loser else []))], int)
        (preference,) = _list([record["preference"]], (int, float))
        if min(numbers) < 0 or not 0 <= preference <= 1:
            raise ValueError
        extra = _list([record.get("weight", 1.0), record.get("importance", 1.0)], (int, float))
        if not all(0 < value < math.inf for value in extra):
            raise ValueError
        one = Pair(numbers[0], numbers[1], numbers[2] if has_loser else None, preference, *extra)
        if one.winner == one.loser:
            raise Misfit("it compares a response with itself")
        if groups is not None and one.group >= len(groups):
            raise Misfit(f"it names group {one.group} of {len(groups)}, counted from 0")
        if groups is not None and max(numbers[1:]) >= len(groups[one.group].responses):
            raise Misfit(f"it compares a response that group {one.group} does not have")
        return one

    return read_items(path, make, None, "pairs")


def write_pairs(path: Path, pairs: Iterable[Pair], groups: Sequence[Group]) -> None:
    """Writes pairs with ``prompt``, ``chosen``, ``rejected`` and any ``tools``, as TRL and datasets read them.

    The indices of group and responses and the label are kept beside them, and weight and importance if they are not 1.
    A pair without a loser has the loser null, and an empty text as ``rejected``.
    """

    def answer(group: Group, index: int | None) -> Messages:
        return [{"role": "assistant", "content": "" if index is None else group.responses[index].text}]

    write_jsonl(
        path,
        (
            {
                **columns_of(groups[pair.group].prompt),
                "chosen": answer(groups[pair.group], pair.winner),
                "rejected": answer(groups[pair.group], pair.loser),
                "group": pair.group,
                "winner": pair.winner,
                "loser": pair.loser,
                "preference": pair.preference,
                **{name: value for name in ("weight", "importance") if (value := getattr(pair, name)) != 1},
            }
            for pair in pairs
        ),
    )
