"""Read the files of a run directory that may come from a stranger.

Nothing in the directory is executed. Every file is read up to a limit, and a pipe or device in its place is an error.
A damaged line is skipped and counted; a damaged file is a ``UserError`` of one line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import read_yaml
from ..data import of_iterations
from ..errors import UserError
from ..files import MIB, MOST_LINES, MOST_LINES_BYTES, advising, parse_json, read_lines, read_regular
from ..run.tracking import STAGE_FIELDS, parse_record
from .formatting import json_text, shorten

# Limits of what a page shows, so that it stays a few MB for any run
MAX_EVALUATION_PROMPTS = 40
MAX_TRAINING_PROMPTS = 10  # shown until there are responses to held-out prompts
MAX_MESSAGES = 20  # of one conversation
MAX_CLASSES = 40  # of responses, in a table

MAX_JSON_BYTES = 64 * MIB  # of evaluation.json or environment.json
MAX_COLUMNS = 200  # different names in metrics.jsonl
LARGEST_NUMBER = 1e100  # larger measurements are treated as not finite: they cannot be drawn
LARGEST_ITERATION, LARGEST_STEP = 10**6, 10**9
REMEDY = "put the run's own file there, or remove it"
FITS = ("auxiliary", "policy")
STAGES = ("fit policy", "fit auxiliary", "sample", "judge", "score", "pair")
POLICY_NAME = re.compile(r"π_[0-9]{1,9}")


class LineReader:
    """Reads the JSON-lines files of a run directory.

    Attributes:
        damaged_lines: file name → number of lines that could not be used.
        truncated_files: names of files that are longer than what is read of a file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.damaged_lines: Counter[str] = Counter()
        self.truncated_files: list[str] = []

    def read(self, name: str, parse: Callable[[bytes], Any]) -> Iterator[Any]:
        """Yield ``parse(line)`` for each line of a file; None, which ``parse`` may return, counts as damaged.

        A file that does not exist has no lines.
        """
        path = self.directory / name
        if not path.exists():
            return
        count = 0
        with advising(REMEDY):
            for line in read_lines(path):
                count += 1
                parsed = None if line is None else parse(line)
                self.damaged_lines[name] += parsed is None
                yield parsed
        if count == MOST_LINES or path.stat().st_size > MOST_LINES_BYTES:
            self.truncated_files.append(name)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a run's config.yaml.

    Raises:
        UserError: if it is not a mapping of names to values, or the number of iterations is impossible.
    """
    _, options = read_yaml(path)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UserError(f'{path} is damaged: expected "name: value"')
    iterations = options.get("iterations", 0)
    if not isinstance(iterations, int) or not 0 <= iterations <= LARGEST_ITERATION:
        raise UserError(f"{path} is damaged: iterations must be a whole number of at most {LARGEST_ITERATION}")
    return options


def read_json_object(path: Path, parse: Callable[[dict], dict | None] = lambda document: document) -> dict[str, Any]:
    """Return ``parse`` of the JSON object in a file, or an empty dictionary if the file does not exist.

    Raises:
        UserError: if it is not a JSON object, or ``parse`` returns None.
    """
    if not path.exists():
        return {}
    try:
        with advising(REMEDY):
            document = parse_json(read_regular(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error}); --resume writes it again") from None
    parsed = parse(document) if isinstance(document, dict) else None
    if parsed is None:
        raise UserError(f"{path} is damaged: it lacks what a run writes there; --resume writes it again")
    return parsed


def parse_json_line(line: bytes) -> Any:
    """The value of a line of JSON; None if it is not JSON."""
    try:
        return parse_json(line)
    except ValueError:
        return None


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def read_records(lines: LineReader) -> list[dict[str, Any]]:
    """The usable records of metrics.jsonl, in order."""
    columns: dict[str, str] = {}
    records = lines.read("metrics.jsonl", lambda line: _finite_record(parse_record(line), columns))
    return [record for record in records if record is not None]


def _finite_record(record: dict[str, Any] | None, columns: dict[str, str]) -> dict[str, Any] | None:
    """A record with None in place of numbers that are not finite; None if a field that its stage requires is missing.

    ``columns`` collects the names of all records, each string once; names beyond ``MAX_COLUMNS`` are dropped.
    """
    if record is None or not 0 <= record["iteration"] <= LARGEST_ITERATION:
        return None
    finite: dict[str, Any] = {}
    for name, value in record.items():
        if name in columns or len(columns) < MAX_COLUMNS:
            usable = not isinstance(value, float) or abs(value) <= LARGEST_NUMBER  # false for NaN
            finite[columns.setdefault(name, name)] = value if usable else None
    stage, required = record["stage"], STAGE_FIELDS.get(record["stage"], {})
    if any(finite.get(name) is None for name in required):
        return None
    if stage == "fit" and not (record["fit"] in FITS and 1 <= record["step"] <= record["steps"] <= LARGEST_STEP):
        return None
    if stage == "iteration":
        seconds = {name: value for name, value in record["stage_seconds"].items() if name in STAGES}
        if not all(abs(value) <= LARGEST_NUMBER for value in seconds.values()):
            return None
        finite["stage_seconds"] = seconds
    return finite


# --- evaluation.json --------------------------------------------------------------------------------------------------


def parse_evaluation(document: dict[str, Any]) -> dict[str, Any] | None:
    """The checked fields of evaluation.json; None if one is missing or of the wrong type, shape or range."""
    try:
        policies, oracle = document["policies"], document["oracle"]
        counts = {name: document[name] for name in ("prompts", "samples_per_prompt")}
        if not (isinstance(policies, list) and policies and isinstance(oracle, str)):
            return None
        if not all(isinstance(name, str) and POLICY_NAME.fullmatch(name) for name in policies):
            return None
        if not all(type(value) is int and 0 <= value < 2**63 for value in counts.values()):
            return None
        count = len(policies)
        probabilities = {"win_rate": (count, count), "interval": (count, count, 2), "confidence": ()}
        columns = ["duality_gap", *(name for name in ("kl_to_initial", "response_tokens_mean") if document.get(name))]
        numbers = {name: _numbers(document[name], shape, 0, 1) for name, shape in probabilities.items()}
        numbers |= {name: _numbers(document[name], (count,), -LARGEST_NUMBER, LARGEST_NUMBER) for name in columns}
        if "best_of_nash" in document:
            numbers["best_of_nash"] = _parse_best_of_nash(document["best_of_nash"], count)
        numbers["class_shares"] = _class_shares(document.get("class_shares"), count)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return {"policies": policies, "oracle": shorten(oracle, "evaluation.json"), **counts, **numbers}


def _parse_best_of_nash(chosen: Any, policies: int) -> dict[str, Any]:
    """The checked field "best_of_nash"; raises one of the errors of ``parse_evaluation`` if it does not fit."""
    samples = chosen["samples"]
    if type(samples) is not int or not 2 <= samples < 2**63:
        raise ValueError
    return {
        "samples": samples,
        "responses_played": _numbers(chosen["responses_played"], (), 1, samples),
        "win_rate": _numbers(chosen["win_rate"], (policies,), 0, 1),
        "interval": _numbers(chosen["interval"], (policies, 2), 0, 1),
    }


def is_evaluation(document: Any) -> bool:
    """Whether a JSON value has all fields of an evaluation.json."""
    return isinstance(document, dict) and parse_evaluation(document) is not None


def _class_shares(value: Any, policies: int) -> dict[str, Any] | None:
    """The first classes, each policy's shares of them, and the number of all classes; None if the oracle had none.

    Raises:
        KeyError, TypeError, ValueError: if a field is missing or of the wrong type, shape or range.
    """
    if value is None:
        return None
    classes = value["classes"]
    if not _are_texts(classes):
        raise ValueError
    shares = _numbers(value["shares"], (policies, len(classes)), 0, 1)
    return {
        "classes": [shorten(name, "evaluation.json") for name in classes[:MAX_CLASSES]],
        "shares": [row[:MAX_CLASSES] for row in shares],
        "best_response": _numbers(value["best_response"], (policies,), 0, 1),
        "count": len(classes),
    }


def _numbers(value: Any, shape: tuple[int, ...], low: float, high: float) -> Any:
    """A number, or nested lists of numbers; ``ValueError`` if the shape differs or one is not in [low, high]."""
    array = np.array(value, dtype=float)
    if array.shape != shape or not ((low <= array) & (array <= high)).all():
        raise ValueError
    return array.tolist()


# --- Prompts with responses -------------------------------------------------------------------------------------------


def read_training_examples(directory: Path, lines: LineReader) -> tuple[int, list[dict[str, Any]]]:
    """Return the newest iteration that has responses (0 if none has), and its first prompts with two responses each.

    An example has "prompt", "responses" and "preference", the probability that the oracle prefers the first response
    (None if it was not asked), and "conversations", the messages of responses that are conversations.
    """
    newest, path = max(of_iterations(directory, "responses.jsonl").items(), default=(0, directory))
    if not newest:
        return 0, []
    name = f"{path.parent.name}/conversations.jsonl"
    if not (directory / name).exists():
        name = f"{path.parent.name}/responses.jsonl"
    preferences = lines.read(f"{path.parent.name}/preferences.jsonl", _parse_first_preference)
    selected = f"{path.parent.name}/selected.jsonl"
    asked = set(lines.read(selected, _parse_selected)) if (directory / selected).exists() else None
    examples: list[dict[str, Any]] = []
    for index, example in enumerate(lines.read(name, partial(_parse_sampled, file=name))):
        preference = next(preferences, None)
        if asked is not None and (index, 0, 1) not in asked:
            preference = None
        if example is not None:
            examples.append(example | {"preference": preference})
        if len(examples) == MAX_TRAINING_PROMPTS:
            break
    return newest, examples


def _parse_sampled(line: bytes, file: str) -> dict[str, Any] | None:
    """The prompt and the first two responses of a line of an iteration's responses.jsonl or conversations.jsonl."""
    row = parse_json_line(line)
    if not isinstance(row, dict) or not _are_texts(row.get("responses")):
        return None
    if (prompt := parse_conversation(row.get("prompt"), file)) is None:
        return None
    conversations = row["conversations"] if isinstance(row.get("conversations"), list) else []
    return {
        "prompt": prompt,
        "responses": [shorten(text, file) for text in row["responses"][:2]],
        "conversations": [parse_conversation(one, file) for one in conversations[:2]],
    }


def _parse_selected(line: bytes) -> tuple[int, int, int] | None:
    """The group and the two responses of a line of an iteration's selected.jsonl."""
    try:
        g, i, j = parse_json_line(line)["pair"]
    except (KeyError, TypeError, ValueError):
        return None
    return (g, i, j) if all(type(one) is int for one in (g, i, j)) else None


def _parse_first_preference(line: bytes) -> float | None:
    """P(first response ≻ second) of a line of an iteration's preferences.jsonl."""
    try:
        preference = float(parse_json_line(line)["preferences"][0][1])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return None
    return preference if 0 <= preference <= 1 else None


def read_evaluation_examples(lines: LineReader, policies: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the first ``MAX_EVALUATION_PROMPTS`` rows of evaluation_responses.jsonl, and how many rows there are.

    An example has one response of the first and of the last policy. ``policies`` may be empty: then the policies are
    those of the first row.
    """
    examples: list[dict[str, Any]] = []
    count = 0
    name = "evaluation_responses.jsonl"
    for row in lines.read(name, _parse_evaluated):
        if row is None:
            continue
        count += 1
        if len(examples) < MAX_EVALUATION_PROMPTS:
            policies = policies or list(row["responses"])
            compared = {policy: row["responses"].get(policy) for policy in {policies[0], policies[-1]}}
            conversations = row.get("conversations") if isinstance(row.get("conversations"), dict) else {}
            examples.append(
                {
                    "prompt": parse_conversation(row["prompt"], name),
                    "responses": {policy: shorten(texts[0], name) for policy, texts in compared.items() if texts},
                    "conversations": {
                        policy: parse_conversation(own[0], name)
                        for policy, own in conversations.items()
                        if policy in compared and isinstance(own, list) and own
                    },
                    "preference": row["preference"],
                    "policies": [policies[0], policies[-1]],
                }
            )
    return examples, count


def _parse_evaluated(line: bytes) -> dict[str, Any] | None:
    """A row of evaluation_responses.jsonl; None if a field is missing or of the wrong type."""
    row = parse_json_line(line)
    if not isinstance(row, dict) or not isinstance(row.get("responses"), dict) or not row["responses"]:
        return None
    preference = row.get("preference", "")
    if preference is not None and not (isinstance(preference, (int, float)) and 0 <= preference <= 1):
        return None
    usable = all(POLICY_NAME.fullmatch(name) and _are_texts(texts) for name, texts in row["responses"].items())
    return row if usable and parse_conversation(row.get("prompt"), "") is not None else None


def parse_conversation(prompt: Any, file: str) -> list[dict[str, str]] | None:
    """The messages of a prompt, shortened, as "role" and "content"; None if the prompt is not a list of messages."""
    if not isinstance(prompt, list) or not prompt:
        return None
    messages = []
    for message in prompt[:MAX_MESSAGES]:
        role, text = (message.get("role"), _message_text(message)) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or text is None:
            return None
        messages.append({"role": role[:50], "content": shorten(text, file)})
    if (missing := len(prompt) - MAX_MESSAGES) > 0:
        messages.append({"role": "…", "content": f"({missing:,} more messages: see {file})"})
    return messages


def _message_text(message: dict[str, Any]) -> str | None:
    """The text of a message, of its parts, or of its tool calls as JSON; None if it has no text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in content):
        return "\n".join(part["text"] for part in content)
    return json_text(message["tool_calls"]) if content is None and "tool_calls" in message else None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
