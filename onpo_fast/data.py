"""Prompts in, preference groups and pairs out: the data structures, and their JSON lines.

A *preference group* is one prompt with its K responses. It is sampled, judged, paired, packed and scored together.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from .checkpoint import read_jsonl, write_jsonl
from .errors import UserError

Messages = list[dict[str, str]]  # [{"role": "user", "content": "…"}, …], ending with the user

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Response:
    """What a policy said."""

    text: str
    tokens: list[int]  # the sampled tokens; ends with an end-of-sequence token if it stopped by itself
    stop_reason: str  # "eos" or "length"
    logp: float  # summed log-prob under the policy that sampled it, at temperature 1, nats


@dataclass(frozen=True)
class Group:
    """A prompt and its K responses."""

    prompt: Messages
    prompt_tokens: list[int]  # as rendered by the chat template, up to where the assistant speaks
    responses: list[Response]


@dataclass(frozen=True)
class Pair:
    """A comparison of two responses of one group."""

    group: int  # index of the group
    winner: int  # index of the response in its group
    loser: int
    preference: float  # the label P(winner ≻ loser): a probability, or 1 for a bit


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[Messages]:
    """The prompts of a JSON-lines file. Blank lines are passed over.

    Raises:
        UserError: naming the file and the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts file {path}: {error}") from None
    prompts = [_messages(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f'{path} has no prompts: it needs one JSON object a line, with a "prompt"')
    return prompts


def _messages(line: str, where: str) -> Messages:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or "prompt" not in record:
        raise UserError(f'{where}: expected an object with a "prompt"')
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "prompt" must be a string or a list of messages')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f'{where}: each message needs a "role" and a "content" string')
        if message.get("role") not in ROLES:
            raise UserError(f"{where}: the role {message.get('role')!r} is not one of {', '.join(ROLES)}")
        if not message["content"].strip():
            raise UserError(f"{where}: a message is empty")
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise UserError(f"{where}: a message holds half of a surrogate pair, which is no character")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise UserError(
            f"{where}: after an optional system message, user and assistant must alternate, from user to user"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def split_prompts(
    prompts: str | None, eval_prompts: str | None, eval_fraction: float, seed: int
) -> tuple[list[Messages], list[Messages]]:
    """Training and held-out prompts, without repeats or overlap; the training prompts shuffled by the seed."""
    bundled = files("onpo_fast.prompts")
    train = _unique(read_prompts(prompts or bundled / "train.jsonl"))
    random.Random(f"{seed} prompts").shuffle(train)
    if eval_prompts or not prompts:
        held_out = _unique(read_prompts(eval_prompts or bundled / "heldout.jsonl"))
        seen = {json.dumps(prompt) for prompt in held_out}
        train = [prompt for prompt in train if json.dumps(prompt) not in seen]
        if not train:
            raise UserError(f"every prompt of {prompts} is held out by --eval_prompts {eval_prompts}")
        return train, held_out
    count = max(1, round(eval_fraction * len(train)))
    if count >= len(train):
        raise UserError(
            f"{prompts} has {len(train)} different prompts: holding out {count} leaves none to train on; "
            "add prompts, lower --eval_fraction or give --eval_prompts"
        )
    return train[count:], train[:count]


def _unique(prompts: list[Messages]) -> list[Messages]:
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())


def prompts_of_iteration(prompts: Sequence[Messages], iteration: int, iterations: int, wanted: int) -> list[Messages]:
    """Different prompts each iteration: ``wanted`` of them, or an even share if there are too few for all.

    With fewer prompts than iterations, they come round again.
    """
    count = min(wanted, max(1, len(prompts) // iterations))
    start = (iteration - 1) * count
    return [prompts[i % len(prompts)] for i in range(start, start + count)]


def write_prompts(path: Path, prompts: Iterable[Messages]) -> None:
    write_jsonl(path, ({"prompt": prompt} for prompt in prompts))


# ---------------------------------------------------------------------------------------------------------------------
# Files of an iteration
# ---------------------------------------------------------------------------------------------------------------------


def write_groups(path: Path, groups: Iterable[Group]) -> None:
    write_jsonl(path, map(_group_record, groups))


def _group_record(group: Group) -> dict:
    responses = group.responses
    return {
        "prompt": group.prompt,
        "responses": [r.text for r in responses],
        "prompt_tokens": group.prompt_tokens,
        "response_tokens": [r.tokens for r in responses],
        "stop_reasons": [r.stop_reason for r in responses],
        "logps": [r.logp for r in responses],
    }


def read_groups(path: Path) -> Iterator[Group]:
    for record in read_jsonl(path):
        columns = (record[key] for key in ("responses", "response_tokens", "stop_reasons", "logps"))
        yield Group(record["prompt"], record["prompt_tokens"], [Response(*row) for row in zip(*columns)])


def write_preferences(path: Path, preferences: Iterable[np.ndarray]) -> None:
    write_jsonl(path, ({"preferences": matrix.tolist()} for matrix in preferences))


def write_pairs(path: Path, pairs: Iterable[Pair], groups: Sequence[Group]) -> None:
    """``prompt``, ``chosen`` and ``rejected`` as TRL and datasets read them, and where they come from."""

    def answer(group: Group, index: int) -> Messages:
        return [{"role": "assistant", "content": group.responses[index].text}]

    write_jsonl(
        path,
        (
            {
                "prompt": groups[pair.group].prompt,
                "chosen": answer(groups[pair.group], pair.winner),
                "rejected": answer(groups[pair.group], pair.loser),
                "group": pair.group,
                "winner": pair.winner,
                "loser": pair.loser,
                "preference": pair.preference,
            }
            for pair in pairs
        ),
    )
