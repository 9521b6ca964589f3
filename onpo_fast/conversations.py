"""Conversations: how they are read from records, and the forms that chat templates and oracles need.

A conversation is a list of messages with a "role" and a "content" in the format of OpenAI's chat API, including tool
calls, tool results and content in parts. After reading it is a ``Prompt``, where the content is always a string.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .errors import UserError

Messages = list[dict[str, Any]]  # [{"role": "user", "content": "…"}, …], up to the assistant's turn

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {  # their names in other formats
    "human": "user",
    **dict.fromkeys(("gpt", "model", "bot", "ai", "chatbot"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "tool_plan")
TEXT_FIELDS = ("name", "tool_call_id", *REASONING_FIELDS)  # fields that templates read
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of a text part in OpenAI's two APIs
DEEPEST = 50  # levels of nesting in a tool call or a tool's schema


class Prompt(Messages):
    """The messages of a conversation, up to the assistant's turn, and the tools that the assistant may call.

    A prompt without tools equals the list of its messages.

    Args:
        messages: each with a "role" and a "content" string, and other fields that chat templates read.
        where: file and line that it was read from, for error messages; not part of its value.
        tools: JSON schemas of functions; None if there are none.
    """

    def __init__(
        self, messages: Iterable[dict[str, Any]] = (), where: str = "", tools: list[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(messages)
        self.where = where
        self.tools = tools or None

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.tools == tools_of(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return super().__repr__() + (f" with the tools {self.tools!r}" if self.tools else "")

    __hash__ = None


def tools_of(prompt: object) -> list[dict] | None:
    """Returns the tools of a prompt; None for a plain list of messages."""
    return getattr(prompt, "tools", None)


def columns_of(prompt: Messages) -> dict[str, Any]:
    """Returns a prompt as columns of a record: "prompt" and, if there are any, "tools"."""
    tools = tools_of(prompt)
    return {"prompt": prompt, "tools": tools} if tools else {"prompt": prompt}


# ---------------------------------------------------------------------------------------------------------------------
# Reading a conversation from a record
# ---------------------------------------------------------------------------------------------------------------------


def read_conversation(record: Mapping[str, Any], column: str, where: str) -> Prompt:
    """Returns the prompt of a record, with the tools of its column "tools".

    Final assistant messages are dropped. A null entry of a message, a tool call or a tool counts as absent. A null
    inside the arguments of a call or the schema of a tool stays, since it has a meaning there, as in
    ``"default": null`` (but ``sources.records`` removes nulls from tables). Further rules are left to the chat
    template.

    Raises:
        UserError: if it is not a conversation of text; the message begins with ``where``.
    """
    value = record[column]
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list):
        raise UserError(f'{where}: "{column}" must be a string or a list of messages')
    if not messages:
        raise UserError(f'{where}: "{column}" has no message')
    check_names(record, column, where)
    for message in messages:
        if not isinstance(message, dict) or message.get("role") is None:
            raise UserError(f'{where}: each message needs a "role" and a "content" string')
        if message["role"] not in ROLES:
            raise UserError(f"{where}: the role {message['role']!r} is not one of {_roles_for(message['role'])}")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{where}: the conversation has only turns of the assistant, which the policy is to write")
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where}: the conversation has no turn of the user")
    return Prompt([_message(message, where) for message in messages], where, _tools(record.get("tools"), where))


def _roles_for(role: object) -> str:
    """Returns the known roles, and the one that this role should be renamed to, if there is one."""
    name = str(role).strip().lower()
    known = name if name in ROLES else OTHER_ROLES.get(name)
    return ", ".join(ROLES) + (f": rename it to {known!r}" if known else "")


def check_names(record: Mapping[str, Any], column: str, where: str) -> None:
    """Refuses a column in ShareGPT's format.

    Raises:
        UserError: says how to convert it.
    """
    value = record.get(column)
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and {"from", "value"} <= first.keys() and first.get("role") is None:
        raise UserError(
            f'{where}: "{column}" is in ShareGPT\'s format: its messages have "from" and "value", where "role" and '
            '"content" are needed. Convert it once, with the package datasets: names = {"human": "user", "gpt": '
            '"assistant", "function_call": "assistant", "function": "tool", "observation": "tool", '
            '"function_response": "tool"}; data.map(lambda row: {"prompt": [{"role": names.get(turn["from"], '
            'turn["from"]), "content": '
            f'turn["value"]}} for turn in row["{column}"]]}}).to_json("prompts.jsonl")'
        )


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a message in the form of ``Prompt``."""
    role, made = message["role"], {"role": message["role"]}
    if message.get("function_call"):
        raise UserError(
            f'{where}: a message has a "function_call", the older form of a tool call: write it as "tool_calls": '
            '[{"type": "function", "function": {"name": …, "arguments": …}}]'
        )
    calls = _json_list(message.get("tool_calls"), f'{where}: "tool_calls"') if role == "assistant" else None
    reasoned = role == "assistant" and any(message.get(name) for name in REASONING_FIELDS)
    may_be_empty = calls or reasoned or role == "tool"  # a tool may return nothing
    content = message.get("content")
    made["content"] = "" if content is None and may_be_empty else _text(content, where)
    if not made["content"].strip() and not may_be_empty:
        raise UserError(f"{where}: a message is empty")
    for name in TEXT_FIELDS:
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise UserError(f'{where}: the "{name}" of a message must be a string')
            made[name] = message[name]
    for call in calls or ():
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f'{where}: a tool call needs a "function" with a "name" and "arguments"')
    if calls:
        made["tool_calls"] = calls
    _check_characters(made, where)
    return made


def _text(content: object, where: str) -> str:
    """Returns the text of a message's content: a string, or parts, joined without a separator."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f'{where}: each message needs a "role" and a "content" string, or a list of text parts')
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
            text = part.get("text")
            if not isinstance(text, str):
                raise UserError(f'{where}: a part of the type "{part.get("type") or "text"}" needs a "text" string')
            part = text
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise UserError(f"{where}: a message has a part of the type {str(kind)[:60]!r}: only text is read")
        texts.append(part)
    return "".join(texts)


def _tools(value: object, where: str) -> list[dict] | None:
    tools = _json_list(value, f'{where}: "tools"')
    if tools:
        _check_characters(tools, where)
    return tools


def _json_list(value: object, what: str) -> list[dict] | None:
    """Returns a list of objects, where the list and each object may be JSON text; None if it is empty."""
    value = _parsed(value, what)
    if value is None or value == []:
        return None
    if isinstance(value, list):
        value = [_parsed(item, what) for item in value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{what} must be a list of JSON objects, as OpenAI's API has them, or that list as JSON text")
    return [_entry(item, what) for item in value]


def _entry(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Returns a tool call or a tool without null entries in it or in its "function"."""
    _check_json(value, what)
    kept = {key: item for key, item in value.items() if item is not None}
    if isinstance(kept.get("function"), dict):
        kept["function"] = {key: item for key, item in kept["function"].items() if item is not None}
    return kept


def _parsed(value: object, what: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is text that is not JSON ({error})") from None


def _check_json(value: object, what: str, depth: int = 0) -> None:
    """Refuses values that are nested too deeply, or that a table can hold but JSON cannot."""
    if depth > DEEPEST:
        raise UserError(f"{what} is nested deeper than {DEEPEST} levels")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_json(item, what, depth + 1)
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        raise UserError(f"{what} holds a {type(value).__name__}, which JSON cannot hold")


def _check_characters(value: object, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: a message holds half of a surrogate pair, which is not a character") from None


# ---------------------------------------------------------------------------------------------------------------------
# As text, for oracles and error messages
# ---------------------------------------------------------------------------------------------------------------------


def message_text(message: Mapping[str, Any]) -> str:
    """Returns a message's content, then its tool calls as JSON on a line each. Its reasoning is left out."""
    functions = (_call(call, as_text=False)["function"] for call in message.get("tool_calls") or ())
    calls = [f"Tool call: {json.dumps(function, ensure_ascii=False)}" for function in functions]
    content = message.get("content") or ""
    return "\n".join([content, *calls] if content else calls)


def in_words(prompt: Messages) -> Iterator[tuple[str, str]]:
    """Yields (role, text) of every turn. Tools are a turn with the role "tools" after an initial system message.

    >>> list(in_words([{"role": "user", "content": "Hi"}, {"role": "tool", "name": "clock", "content": "12:00"}]))
    [('user', 'Hi'), ('tool', 'clock: 12:00')]
    """
    tools = tools_of(prompt)
    for index, message in enumerate(prompt):
        instructs = index == 0 and message["role"] in ("system", "developer")
        if tools and not instructs:
            yield "tools", json.dumps(tools, ensure_ascii=False)
            tools = None
        named = f"{message['name']}: " if message["role"] == "tool" and message.get("name") else ""
        yield message["role"], named + message_text(message)


def plain_turns(prompt: Messages, roles: Mapping[str, str]) -> Messages:
    """Returns a conversation as plain messages for a model that knows fewer roles.

    Consecutive turns of one role are joined.

    Args:
        roles: the role to use for each role that the model does not know.
    """
    made: Messages = []
    for role, text in in_words(prompt):
        if role in ("tool", "tools"):
            text = f"{role.capitalize()}: {text}"
        role = roles.get(role, role)
        if made and made[-1]["role"] == role:
            made[-1]["content"] += f"\n\n{text}"
        else:
            made.append({"role": role, "content": text})
    return made


def characters(prompt: Messages) -> int:
    """Returns about how many characters a conversation and its tools have, with all but the content as JSON."""
    size = sum(len(message.get("content") or "") for message in prompt)
    rest: list = [{**message, "content": ""} for message in prompt if len(message) > 2] + (tools_of(prompt) or [])
    return size + (len(json.dumps(rest, ensure_ascii=False)) if rest else 0)


# ---------------------------------------------------------------------------------------------------------------------
# For chat templates
# ---------------------------------------------------------------------------------------------------------------------


def has_tool_turns(prompt: Messages) -> bool:
    """Whether there are tool calls or tool results, which some chat templates do not write."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in prompt)


def template_forms(prompt: Messages) -> Iterator[tuple[Messages, Messages, list[str]]]:
    """Yields the forms in which chat templates expect tool calls, the most common first.

    Arguments are objects (as transformers documents) or JSON text (as in OpenAI's API, for templates that append them);
    the content beside a call is "" or null (which some templates test for). The last form, for templates without tool
    calls, has them as JSON in the content.

    Yields:
        the messages; the same messages with marks in the arguments and results of tools; the marks. If a rendering of
        the marked messages lacks a mark, the template leaves out a part of the messages.
    """
    for content, as_text in itertools.product(("", None), (False, True)):
        messages, marked, marks = [], [], []
        for index, message in enumerate(prompt):
            mark = f"mark{index}x"
            messages.append(dict(message))
            marked.append(dict(message))
            if message["role"] == "tool":
                marks += [f"{mark}first", f"{mark}last"]
                marked[-1]["content"] = f"{mark}first{message.get('content') or ''}{mark}last"
            if calls := message.get("tool_calls"):
                messages[-1]["tool_calls"] = [_call(call, as_text) for call in calls]
                marked[-1]["tool_calls"] = []
                for number, call in enumerate(calls):
                    marks.append(f"{mark}{number}y")
                    function = dict(_call(call, as_text=False)["function"])
                    arguments = function.get("arguments")
                    given = arguments if isinstance(arguments, dict) else {}
                    function["arguments"] = {**given, "marked": marks[-1]}  # last, so that all arguments come before it
                    marked[-1]["tool_calls"].append(_call({**call, "function": function}, as_text))
                for one in (messages[-1], marked[-1]):
                    one["content"] = one["content"] or content
        yield messages, marked, marks
    written = [_with_calls_as_text(message) for message in messages]
    yield written, [_with_calls_as_text(message) for message in marked], marks


def _call(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    """Returns a tool call with a "function" whose arguments are JSON text or, otherwise, an object."""
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if as_text and isinstance(arguments, dict):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None  # a model may have written something else
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _with_calls_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message with its tool calls in its content."""
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": message_text(message)}


def template_tools(prompt: Messages) -> Sequence[dict] | None:
    """Returns the tools as templates read them: a bare function becomes {"type": "function", "function": …}."""
    tools = tools_of(prompt)
    if not tools:
        return None
    return [one if "function" in one or "name" not in one else {"type": "function", "function": one} for one in tools]
