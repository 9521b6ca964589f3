"""Prompts in, pairs out."""

from __future__ import annotations

import codecs
import copy
import gzip
import hashlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import tqdm

from onpo_fast import data, oracles, sources
from onpo_fast.config import Config
from onpo_fast.conversations import plain_turns
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.files import read_jsonl
from onpo_fast.oracles import pair_model, reward_model


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_strings_and_conversations(write_lines) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        user("Hi"),
        {"role": "assistant", "content": "Hello"},
        user("?"),
    ]
    path = write_lines("p.jsonl", {"prompt": "Grüße, 世界"}, "", {"prompt": conversation, "id": 3})
    assert data.read_prompts(path) == [[user("Grüße, 世界")], conversation]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "line 2: not JSON"),
        ('["x"]', 'line 2: expected an object with a "prompt"'),
        ('{"text": "x"}', 'line 2: expected an object with a "prompt"'),
        ('{"prompt": 3}', "line 2: .* must be a string or a list"),
        ('{"prompt": []}', "line 2: .* has no message"),
        ('{"prompt": "  "}', "line 2: a message is empty"),
        (r'{"prompt": "\ud83d"}', "line 2: a message holds half of a surrogate pair"),
        ('{"prompt": [{"role": "user"}]}', 'line 2: each message needs a "role" and a "content"'),
        ('{"prompt": [{"role": "robot", "content": "x"}]}', "line 2: the role 'robot'"),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}]}',
            "line 2: the conversation has only turns of the assistant",
        ),
        ('{"prompt": [{"role": "system", "content": "x"}]}', "line 2: the conversation has no turn of the user"),
        ('{"prompt": [{"role": ["user"], "content": "x"}]}', r"line 2: the role \['user'\]"),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
            "line 2: a message has a part of the type 'image_url': only text is read",
        ),
        ('{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}', 'line 2: a part of the type "text" needs'),
        ('{"prompt": [{"role": "user", "content": []}]}', "line 2: a message is empty"),
        ('{"prompt": [{"role": "user", "content": "x", "name": 3}]}', 'line 2: the "name" of a message must be a str'),
        (
            '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}, '
            '{"role": "user", "content": "y"}]}',
            'line 2: each message needs a "role" and a "content" string',
        ),
        (
            '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": "3"}]}, '
            '{"role": "tool", "content": "y"}]}',
            'line 2: a tool call needs a "function" with a "name"',
        ),
        ('{"prompt": "x", "tools": ["clock"]}', 'line 2: "tools" is text that is not JSON'),
        ('{"prompt": "x", "tools": {"name": "clock"}}', 'line 2: "tools" must be a list of JSON objects'),
        (
            '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "function_call": '
            '{"name": "f", "arguments": "{}"}}, {"role": "user", "content": "y"}]}',
            'line 2: a message has a "function_call", the older form of a tool call: write it as "tool_calls": ',
        ),
        (r'{"prompt": "x", "tools": [{"name": "\ud83d"}]}', "line 2: a message holds half of a surrogate pair"),
        ('{"prompt": "x", "tools": [{"a": ' + '{"a": ' * 60 + "1" + "}" * 61 + "]}", 'line 2: "tools" is nested'),
    ],
)
def test_bad_lines_are_named(write_lines, line: str, message: str) -> None:
    path = write_lines("p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(UserError, match=message):
        data.read_prompts(path)


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("human", "user"),
        ("User", "user"),
        ("SYSTEM ", "system"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("function", "tool"),
        ("observation", "tool"),
        ("Human", "user"),
        ("ipython", "tool"),
        ("robot", None),
    ],
)
def test_roles_of_other_formats_are_told_their_names_here(write_lines, role: str, known: str | None) -> None:
    path = write_lines("p.jsonl", {"prompt": [user("Hi"), {"role": role, "content": "x"}]})
    with pytest.raises(UserError, match=f"line 1: the role '{role}' is not one of system, developer, ") as refused:
        data.read_prompts(path)
    assert str(refused.value).endswith(f": rename it to '{known}'" if known else "tool")


def test_parts_that_are_text(write_lines) -> None:
    parts = [
        {"type": "input_text", "text": "a"},
        {"type": "output_text", "text": "b", "annotations": []},
        {"text": "c"},
        {"type": None, "text": "d"},
        {"type": "text", "text": "e", "image_url": None},
        "f",
    ]
    assert data.read_prompts(write_lines("p.jsonl", {"prompt": [user(parts)]})) == [[user("abcdef")]]
    with pytest.raises(UserError, match='a part of the type "input_text" needs a "text" string'):
        data.read_prompts(write_lines("q.jsonl", {"prompt": [user([{"type": "input_text"}])]}))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "tool_plan"])
@pytest.mark.parametrize("content", [None, "", []])
def test_a_turn_may_be_reasoning_alone(write_lines, field: str, content: object) -> None:
    thought = {"role": "assistant", "content": content, field: "Hm."}
    (prompt,) = data.read_prompts(write_lines("p.jsonl", {"prompt": [user("Hi"), thought, user("And?")]}))
    assert prompt[1] == {"role": "assistant", "content": "", field: "Hm."}
    with pytest.raises(UserError, match=r"a message is empty|each message needs"):
        data.read_prompts(write_lines("q.jsonl", {"prompt": [user("Hi"), {**thought, field: None}, user("And?")]}))


def test_a_line_that_is_not_text_is_one_bad_line(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    digits = b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}\n"  # more than Python makes a number of
    path.write_bytes(
        codecs.BOM_UTF8 + b'{"prompt": "one"}\n{"prompt": "caf\xe9"}\n' + digits + b'{"prompt": "two"}\r\n'
    )
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: not UTF-8 \(invalid continuation byte\)"):
        data.read_prompts(path)
    skipped = data.Skipped()
    assert data.read_prompts(path, skipped=skipped) == [[user("one")], [user("two")]]
    assert (skipped.count, "line 2: not UTF-8" in str(skipped)) == (2, True)
    path.write_bytes(b'{"prompt": "one"}\n' + digits)
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: not JSON \(Exceeds the limit \(4300"):
        data.read_prompts(path)
    whole = tmp_path / "p.json"
    whole.write_bytes(b'[{"prompt": "one"},\n{"prompt": "caf\xe9"}]')
    with pytest.raises(UserError, match=r"p\.json, line 2: not UTF-8"):
        data.read_prompts(whole)
    whole.write_bytes(b"[" + digits + b"]")
    with pytest.raises(UserError, match=r"p\.json: not JSON \(Exceeds the limit"):
        data.read_prompts(whole)


def test_files_that_are_no_text_are_told_what_is_read(tmp_path) -> None:
    text = json.dumps({"prompt": "x"}) + "\n"
    datasets.Dataset.from_list([{"prompt": "x"}]).to_parquet(tmp_path / "p.pq")
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "p.jsonl").write_bytes(text.encode("utf-16"))
    for name in ("p.pq", "p.jsonl.gz", "p.jsonl"):
        with pytest.raises(UserError, match=f"cannot read .*{name}: it is not UTF-8 text; give JSON lines, .json"):
            data.read_prompts(tmp_path / name)


def test_a_prompt_that_a_model_refuses_is_named_by_its_line(policy, write_lines) -> None:
    path = write_lines("p.jsonl", {"prompt": "one"}, {"prompt": "long " * 9000})
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: the prompt that ends 'long .* exceeds the model's context"):
        policy.renderer.usable(data.read_prompts(path), 2, None)


CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"zone": {"type": "string"}}}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
WITH_TOOLS = [
    {"role": "developer", "content": "Be brief."},
    user("Late?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL], "reasoning_content": "I need the time."},
    {"role": "tool", "content": "23:59", "tool_call_id": "call00001", "name": "clock"},
    {"role": "tool", "content": [{"type": "text", "text": "00:"}, "00"], "tool_call_id": "call00001"},
    {"role": "assistant", "content": "A bit."},
    user("Sure?"),
    user("Look again."),
]


def test_conversations_with_tools(write_lines) -> None:
    ends = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    path = write_lines(
        "p.jsonl",
        {"prompt": WITH_TOOLS, "tools": [CLOCK]},
        {"prompt": [*WITH_TOOLS, ends], "tools": json.dumps([CLOCK])},
        {"prompt": [*WITH_TOOLS, ends, {"role": "tool", "content": None}, ends], "tools": [json.dumps(CLOCK)]},
        {"prompt": WITH_TOOLS, "tools": []},
        {"prompt": WITH_TOOLS},
    )
    one, two, three, four, five = data.read_prompts(path)
    kept = list(WITH_TOOLS)
    kept[2] = {**kept[2], "content": ""}
    kept[4] = {**kept[4], "content": "00:00"}
    assert (list(one), one.tools) == (kept, [CLOCK])
    assert one == two
    assert list(three[-2:]) == [{**ends, "content": ""}, {"role": "tool", "content": ""}]
    assert three.tools == [CLOCK]
    assert one != four
    assert four == five == kept
    train, held_out = data.split_prompts(str(path), None, 0.3, 0)
    assert len(train + held_out) == 3  # the same messages with other tools are another prompt
    assert data.prompts_digest([one], []) != data.prompts_digest([four], [])
    as_lists = json.dumps([[list(four)], [list(five)]]).encode()
    assert data.prompts_digest([four], [five]) == hashlib.sha256(as_lists).hexdigest()


def test_tools_are_kept_in_the_files_of_a_run(tmp_path, write_lines) -> None:
    (prompt,) = data.read_prompts(write_lines("p.jsonl", {"prompt": WITH_TOOLS, "tools": [CLOCK]}))
    data.write_prompts(tmp_path / "h.jsonl", [prompt, [user("plain")]])
    assert data.read_prompts(tmp_path / "h.jsonl") == [prompt, [user("plain")]]
    assert list(read_jsonl(tmp_path / "h.jsonl"))[1] == {"prompt": [user("plain")]}
    groups = [Group(prompt, [1], [Response("a", [2], "eos", -1.0), Response("b", [3], "eos", -2.0)])]
    data.write_groups(tmp_path / "r.jsonl", groups)
    assert list(data.read_groups(tmp_path / "r.jsonl")) == groups
    assert repr(list(data.read_groups(tmp_path / "r.jsonl"))) == repr(groups)  # what parts of a stage go by
    data.write_pairs(tmp_path / "pairs.jsonl", [Pair(0, 0, 1, 1.0)], groups)
    assert next(read_jsonl(tmp_path / "pairs.jsonl"))["tools"] == [CLOCK]
    assert repr(data.Prompt([user("x")])) == repr([user("x")])
    assert copy.deepcopy(prompt) == prompt


def test_what_tables_fill_in_is_dropped(tmp_path, write_lines) -> None:
    """A table gives every message all keys of all messages, and null where it has none."""
    rows = [{"prompt": WITH_TOOLS[:4], "tools": [CLOCK]}, {"prompt": [user("Hi")], "tools": None}]
    expected = data.read_prompts(write_lines("p.jsonl", *rows))
    names = {name for message in WITH_TOOLS for name in message}
    filled = [{**row, "prompt": [{**dict.fromkeys(names), **one} for one in row["prompt"]]} for row in rows]
    other = {"prompt": filled[1]["prompt"], "tools": [{**CLOCK, "strict": True}]}
    table = datasets.Dataset.from_list([*filled, other])
    assert table[0]["prompt"][1]["tool_calls"] is None
    table.to_parquet(tmp_path / "p.parquet")
    for source in (write_lines("filled.jsonl", *filled, other), tmp_path / "p.parquet"):
        assert data.read_prompts(source)[:2] == expected, source


NULLS = {"zone": None, "at": {"hour": None, "days": [None, 1]}}
PARAMETERS = {"properties": {"zone": {"default": None}}}
OPTIONAL = {"type": "function", "function": {"name": "clock", "parameters": PARAMETERS}}


def test_nulls_inside_arguments_and_schemas_stay(write_lines, rendered) -> None:
    """They mean something in JSON, so that a call is the same as an object and as text."""
    calls = [{**CALL, "function": {"name": "clock", "arguments": given}} for given in (NULLS, json.dumps(NULLS))]
    lines = [
        {
            "prompt": [user("Late?"), {"role": "assistant", "content": None, "tool_calls": [call]}, WITH_TOOLS[3]],
            "tools": tools,
        }
        for call, tools in zip(calls, ([OPTIONAL], json.dumps([OPTIONAL])))
    ]
    as_object, as_text = data.read_prompts(write_lines("p.jsonl", *lines))
    assert as_object[1]["tool_calls"] == [calls[0]]
    assert as_object.tools == as_text.tools == [OPTIONAL]
    assert rendered(QWEN, as_object) == rendered(QWEN, as_text)
    assert f"<call>clock {json.dumps(NULLS)}</call>" in rendered(QWEN, as_text)
    assert '"zone": {"default": null}' in rendered(QWEN, as_object)
    own = {**CALL, "index": None, "function": {**CALL["function"], "strict": None}}  # but not those of the call itself
    lines[0]["prompt"][1]["tool_calls"] = [own]
    lines[0]["tools"] = [{**CLOCK, "strict": None, "function": {**CLOCK["function"], "description": None}}]
    (prompt,) = data.read_prompts(write_lines("q.jsonl", lines[0]))
    assert (prompt[1]["tool_calls"], prompt.tools) == ([CALL], [CLOCK])


def test_nulls_that_a_table_fills_in_are_dropped_at_every_depth(tmp_path, write_lines) -> None:
    """A table gives each nested object the keys of all: what is null there may never have been."""
    asked = {"type": "function", "function": {"name": "look", "parameters": {"place": {"type": "string"}}}}
    looks = {"id": "call00002", "type": "function", "function": {"name": "look", "arguments": {"place": "here"}}}
    rows = [
        {
            "prompt": [user("Where?"), {"role": "assistant", "content": None, "tool_calls": [call]}, WITH_TOOLS[3]],
            "tools": [tool],
        }
        for call, tool in ((CALL, CLOCK), (looks, asked))
    ]
    expected = data.read_prompts(write_lines("p.jsonl", *rows))
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist()[0]["tools"][0]["function"]["parameters"]["place"] is None
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for source in ("p.parquet", "saved"):
        assert data.read_prompts(tmp_path / source) == expected


def test_sharegpts_names(tmp_path, write_lines) -> None:
    """They are refused with how to convert them, which works; the column's name does not matter."""
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": "look()"},
        {"from": "observation", "value": "a cat"},
        {"from": "gpt", "value": "A cat."},
        {"from": "function", "value": "a dog"},
        {"from": "tool", "value": "a cow"},
        {"from": "function_response", "value": "a bee"},
        {"from": "gpt", "value": "Yes?"},
    ]
    path = write_lines("p.jsonl", {"id": 1, "conversations": turns})
    for column in ("prompt", "conversations"):
        with pytest.raises(UserError, match=r'line 1: "conversations" is in ShareGPT\'s format') as refused:
            data.read_prompts(path, column)
    assert "\n" not in str(refused.value)
    code = str(refused.value).partition("package datasets: ")[2].replace('"prompts.jsonl"', "out")
    table = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path))["train"]
    exec(code, {"data": table, "out": tmp_path / "prompts.jsonl"})
    (prompt,) = data.read_prompts(tmp_path / "prompts.jsonl")
    assert [one["role"] for one in prompt] == ["user", "assistant", "tool", "assistant", "tool", "tool", "tool"]
    assert [one["content"] for one in prompt] == [one["value"] for one in turns[:-1]]
    path = write_lines("q.jsonl", {"conversations": TURNS})
    assert data.read_prompts(path, "conversations") == [TURNS[:3]]


def test_oracles_read_tools_and_their_turns_as_text(tmp_path) -> None:
    prompt = data.read_conversation({"prompt": WITH_TOOLS[:5], "tools": [CLOCK]}, "prompt", "here")
    called = 'Tool call: {"name": "clock", "arguments": {"zone": "CET"}}'
    listed = json.dumps([CLOCK])
    judge = oracles.load("judge", judge=Config(judge_url="http://localhost:1/v1", judge_model="m"), directory=tmp_path)
    assert (
        f"Developer: Be brief.\n\nTools: {listed}\n\nUser: Late?\n\nAssistant: {called}\n{called}\n\n"
        "Tool: clock: 23:59\n\nTool: 00:00\n\n[Response A]\nYes"
    ) in judge.question(prompt, "Yes", "No")
    assert pair_model.context(prompt) == (
        f"\n\n\n<turn> user\n Be brief.\n\nTools: {listed}\n\nLate?\n\n<turn> assistant\n {called}\n{called}"
        "\n\n<turn> user\n Tool: clock: 23:59\n\nTool: 00:00\n\n\n"
    )
    turns = plain_turns(prompt, reward_model.ROLE_SUBSTITUTES)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    seen = []

    def taste(prompt, texts):
        prompt[2]["tool_calls"][0]["id"] = "mine"  # an oracle may write into what it is given
        seen.append(prompt)
        return [[0.5, 1], [0, 0.5]]

    group = Group(prompt, [], [Response("now", [], "eos", 0.0), Response("00:00", [], "eos", 0.0)])
    for null in (prompt, [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]):
        for name, oracle in (("population", oracles.load("population")), ("taste", taste)):
            if name == "population" or null is prompt:
                oracles.judge(oracle, [replace(group, prompt=null)], name)
    assert seen[0].tools == [CLOCK]
    assert prompt[2]["tool_calls"][0]["id"] == "call00001"


# ---------------------------------------------------------------------------------------------------------------------
# Through chat templates
# ---------------------------------------------------------------------------------------------------------------------

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
END = "{% endfor %}<|im_start|>assistant\n"
QWEN = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}[{{ m.content }}]{% for c in m.tool_calls %}<call>"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}{% elif m.role in "
    "('system', 'user', 'assistant', 'tool') %}" + TURN + "{% endif %}" + END
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}{% endfor %}{% else %}"
    + TURN
    + "{% endif %}"
    + END
)
CHATML = "{% for m in messages %}" + TURN + END
STRICT = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + TURN + END
CUT = QWEN.replace("{{ m.content }}", "{{ m.content[:20] }}")
USER_ONLY = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}" + TURN + "{% endif %}" + END


@pytest.fixture
def rendered(policy):
    """Renders a prompt through a chat template, as text."""

    def render(template: str, prompt: list[dict], **variables) -> str:
        tokenizer = copy.deepcopy(policy.tokenizer)
        tokenizer.chat_template = template
        other = replace(policy, tokenizer=tokenizer, template_variables=variables)
        return tokenizer.decode(other.renderer.render(prompt))

    return render


def transformers_drops_nulls(tokenizer) -> bool:
    """Whether a template never sees a null, as in later versions."""
    template = "{{ messages[0].content is none }}"
    return tokenizer.apply_chat_template([{"content": None}], chat_template=template, tokenize=False) == "False"


def prompt_with(arguments: object, content: object = None) -> data.Prompt:
    call = {"id": "call00001", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    messages = [user("Late?"), {"role": "assistant", "content": content, "tool_calls": [call]}, WITH_TOOLS[3]]
    return data.read_conversation({"prompt": messages, "tools": [CLOCK["function"]]}, "prompt", "here")


@pytest.mark.parametrize("arguments", [{"zone": "CET"}, '{"zone": "CET"}'])
def test_tool_calls_reach_every_template(rendered, policy, arguments: object) -> None:
    """As objects where a template writes JSON, as text where it appends them; in the content where it knows none."""
    prompt = prompt_with(arguments)
    text = rendered(QWEN, prompt)
    assert text.startswith('clock {"type": "function", "function": {"name": "clock"')
    assert '[]<call>clock {"zone": "CET"}</call>' in text
    assert "<|im_start|>tool\n23:59<|im_end|>" in text
    if not transformers_drops_nulls(policy.tokenizer):
        assert '<call>clock {"zone": "CET"}</call>' in rendered(DEEPSEEK, prompt)
    assert '<|im_start|>assistant\nTool call: {"name": "clock", "arguments": {"zone": "CET"}}<|im_end|>' in rendered(
        CHATML, prompt
    )
    assert "Wait." in rendered(QWEN, prompt_with(arguments, "Wait."))
    with pytest.raises(UserError, match="here: the model's chat template refuses the prompt that ends '23:59': no too"):
        rendered(STRICT, prompt)
    for template in (USER_ONLY, CUT, CHATML.replace("m.content", "m.content[:20]")):
        with pytest.raises(UserError, match="here: the model's chat template leaves out what tools are told or say in"):
            rendered(template, prompt)


def test_tool_turns_are_written_whole_or_not_at_all(rendered) -> None:
    """A template that cuts what a tool says, or what it is told, leaves something out."""
    prompt = prompt_with({"zone": "CET"})
    prompt[2]["content"] = "It is a minute to midnight in Vienna, and dark."
    assert prompt[2]["content"] in rendered(QWEN, prompt)
    for template in (CUT, CUT.replace("[:20]", "[4:]")):
        with pytest.raises(UserError, match="the model's chat template leaves out what tools are told or say in the"):
            rendered(template, prompt)
    cuts_calls = QWEN.replace("| tojson }}</call>", "| tojson | truncate(30) }}</call>")
    # the calls are then put into the text
    assert 'Tool call: {"name": "clock", "arguments": {"zone": "CET"}}<|im_end|>' in rendered(cuts_calls, prompt)
    assert "Be brief." in rendered(CUT, [{"role": "system", "content": "Be brief."}, user("Hi")])


def test_a_developer_is_the_system_where_the_template_knows_none(rendered) -> None:
    prompt = [{"role": "developer", "content": "Be brief."}, user("Hi")]
    assert "<|im_start|>system\nBe brief." in rendered(QWEN, prompt)
    assert "<|im_start|>developer\nBe brief." in rendered(CHATML + "{# developer #}", prompt)


def test_variables_of_the_template(rendered) -> None:
    template = CHATML + "{% if thinking %}<think>{% endif %}"
    assert not rendered(template, [user("Hi")]).endswith("<think>")
    assert rendered(template, [user("Hi")], thinking=True).endswith("<think>")


def test_what_a_user_should_know_of_a_template(policy) -> None:
    tokenizer = copy.deepcopy(policy.tokenizer)
    other = replace(policy, tokenizer=tokenizer)
    prompts = [data.Prompt([user("Hi")]), prompt_with({})]
    for template, expected in [
        (QWEN, []),
        (CHATML, ["leaves out the tools", "writes no tool calls"]),
        (QWEN + "{{ strftime_now('%d %b %Y') }}", ["writes today's date"]),
        (
            QWEN + "{% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%d') }}{% endif %}",
            ["writes today's date"],
        ),
    ]:
        tokenizer.chat_template = template
        notices = other.renderer.template_notices(prompts)
        assert [part in notice for part, notice in zip(expected, notices, strict=True)] == [True] * len(expected)
    other.template_variables = {"date_string": "01 Jan 2026"}
    assert other.renderer.template_notices(prompts) == []


def test_a_template_that_wants_tools_has_no_notice(policy) -> None:
    """Nothing is asked of it without the tools that a prompt comes with."""
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = (
        "{% if not tools %}{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ raise_exception('tool turn without tools') }}{% endif %}{% endfor %}{% endif %}" + QWEN
    )
    other = replace(policy, tokenizer=tokenizer)
    prompts = other.renderer.usable([prompt_with({})], 2, None)
    assert other.renderer.template_notices(prompts) == []


def test_pipes_and_devices_are_no_files(tmp_path, monkeypatch) -> None:
    """They can be read once, or have no end; a run that goes on reads its prompts again."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jsonl")
        names = ("pipe.jsonl", "socket.jsonl", "link.jsonl", "/dev/zero", "/dev/null", "/dev/stdin", "-", "/dev/fd/0")
        for name in names:
            with pytest.raises(UserError, match=f"cannot read {name}: it cannot be read a second time; save"):
                data.read_prompts(name)


@pytest.mark.parametrize("name", ["x" * 5000, "/tmp/" + "x" * 300 + ".jsonl", "org/" + "x" * 5000 + ":test"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UserError, match=f"cannot read {name}: "):
        data.read_prompts(name)


def test_libraries_are_quiet(caplog, capsys) -> None:
    with sources.quiet():
        logging.getLogger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
        list(tqdm.tqdm(range(3)))
    assert (caplog.records, capsys.readouterr().err) == ([], "")
    logging.getLogger("another").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]


def test_files_without_prompts(tmp_path, write_lines) -> None:
    with pytest.raises(UserError, match="cannot read"):
        data.read_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="has no prompts"):
        data.read_prompts(write_lines("empty.jsonl"))


TURNS = [user("Hi"), {"role": "assistant", "content": "Hello"}, user("Who?"), {"role": "assistant", "content": "Me."}]


def test_a_last_turn_of_the_assistant_is_dropped(write_lines) -> None:
    path = write_lines("p.jsonl", {"messages": TURNS}, {"messages": TURNS[:3]}, {"messages": "Hi"})
    assert data.read_prompts(path, "messages") == [TURNS[:3], TURNS[:3], [user("Hi")]]


def test_one_set_of_prompts_from_every_kind_of_source(tmp_path, write_lines) -> None:
    """The same prompts, held out alike: neither depends on where they were."""
    rows = [{"id": i, "messages": [user(f"prompt {i}"), TURNS[1]]} for i in range(10)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "p.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([3])).save_to_disk(tmp_path / "splits")
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    sources = [str(tmp_path / name) for name in ("p.json", "p.parquet", "saved", "splits", "splits:train")]
    expected = data.split_prompts(str(write_lines("p.jsonl", *rows)), None, 0.2, 0, "messages")
    for source in sources:
        assert data.split_prompts(source, None, 0.2, 0, "messages") == expected, source
    train, held_out = data.split_prompts(sources[0], str(tmp_path / "splits:test"), 0.2, 0, "messages")
    assert (len(train), held_out) == (9, [[user("prompt 3")]])
    for source, column, message in [
        ("splits:tests", "messages", "has no split 'tests': it has train, test; did you mean test"),
        ("saved:test", "messages", "has no splits: leave out ':test'"),
        ("saved", "text", 'saved, row 1: expected an object with a "text" .it has id, messages; see --prompt_column'),
        ("p.parquet", "id", 'p.parquet, row 1: "id" must be a string or a list of messages'),
    ]:
        with pytest.raises(UserError, match=message):
            data.read_prompts(tmp_path / source, column)


def test_without_the_extra(tmp_path, monkeypatch) -> None:
    datasets.Dataset.from_list([{"prompt": "x"}]).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)  # import finds nothing
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'onpo_fast\[data\]'"):
        data.read_prompts(tmp_path / "saved")


def test_bad_prompts_are_counted_when_asked_for(write_lines) -> None:
    path = write_lines("p.jsonl", {"prompt": "one"}, "{", {"text": "x"}, {"prompt": "two"}, {"prompt": [user("")]})
    skipped = data.Skipped()
    assert data.read_prompts(path, skipped=skipped) == [[user("one")], [user("two")]]
    assert skipped.count == 3
    assert "line 2: not JSON" in str(skipped)


def test_prompts_that_a_model_cannot_take_are_gone_before_some_are_held_out(write_lines) -> None:
    path = write_lines("p.jsonl", *({"prompt": f"prompt {i}"} for i in range(11)))
    for seed in range(5):
        train, held_out = data.split_prompts(path, None, 0.2, seed, usable=lambda prompts: prompts[:10])
        assert (len(train), len(held_out)) == (8, 2)


def test_the_bundled_prompts() -> None:
    train, held_out = data.split_prompts(None, None, 0.2, seed=0)
    assert len(train) >= 256
    assert len(held_out) >= 64
    texts = [prompt[0]["content"] for prompt in train + held_out]
    assert len({text.lower() for text in texts}) == len(texts)


def test_a_share_is_held_out(write_lines) -> None:
    path = write_lines("p.jsonl", *({"prompt": f"prompt {i}"} for i in range(16)))
    train, held_out = data.split_prompts(path, None, 0.2, seed=0)
    assert (len(train), len(held_out)) == (13, 3)
    assert sorted(str(p) for p in train + held_out) == sorted(str([user(f"prompt {i}")]) for i in range(16))
    assert data.split_prompts(path, None, 0.2, seed=0) == (train, held_out)
    assert data.split_prompts(path, None, 0.2, seed=1) != (train, held_out)
    with pytest.raises(UserError, match="leaves none to train on"):
        data.split_prompts(write_lines("one.jsonl", {"prompt": "x"}), None, 0.2, seed=0)


def test_repeats_and_overlap_count_once(write_lines) -> None:
    path = write_lines("p.jsonl", *({"prompt": "same"} for _ in range(10)), *({"prompt": str(i)} for i in range(6)))
    train, held_out = data.split_prompts(path, None, 0.3, seed=0)
    assert (len(train), len(held_out)) == (5, 2)
    assert not [prompt for prompt in train if prompt in held_out]
    some = write_lines("some.jsonl", {"prompt": "same"}, {"prompt": "new"})
    train, held_out = data.split_prompts(path, some, 0.3, seed=0)
    assert (len(train), len(held_out)) == (6, 2)
    with pytest.raises(UserError, match="is held out by --eval_prompts"):
        data.split_prompts(some, some, 0.3, seed=0)


def test_different_prompts_each_iteration() -> None:
    prompts = [[user(str(i))] for i in range(13)]
    parts = [data.prompts_of_iteration(prompts, t, 3, 4) for t in (1, 2, 3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert len({prompt[0]["content"] for part in parts for prompt in part}) == 12
    assert [len(data.prompts_of_iteration(prompts, t, 3, 100)) for t in (1, 2, 3)] == [4, 4, 4]
    assert data.prompts_of_iteration(prompts[:2], 3, 3, 5) == prompts[:1]  # round again


def test_files_of_an_iteration(tmp_path) -> None:
    responses = [Response("a\u2028b", [5, 2], "eos", -1.5), Response("", [], "length", 0.0)]
    groups = [Group([user("q")], [1, 2], responses)]
    data.write_groups(tmp_path / "r.jsonl", groups)
    assert list(data.read_groups(tmp_path / "r.jsonl")) == groups
    assert next(read_jsonl(tmp_path / "r.jsonl"))["responses"] == ["a\u2028b", ""]
    data.write_pairs(tmp_path / "p.jsonl", [Pair(0, 1, 0, 0.75)], groups)
    record = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8"))
    assert record["prompt"] == [user("q")]
    assert record["chosen"] == [{"role": "assistant", "content": ""}]
    assert record["rejected"][0]["content"].startswith("a")
    assert record["preference"] == 0.75
    (row,) = datasets.load_dataset("json", data_files=str(tmp_path / "p.jsonl"), cache_dir=str(tmp_path))["train"]
    assert row["prompt"] == [user("q")]
    assert row["chosen"][0]["role"] == "assistant"


COUNTED = ("groups", "preferences", "scores")


def written(tmp_path: Path) -> tuple[list[Group], dict[str, Path]]:
    """Two groups, one of three responses and one of two, and their files as a run has them."""
    groups = [
        Group([user(f"q{number}")], [1, 2], [Response("a", [3, 4], "eos", -1.0)] * responses)
        for number, responses in enumerate((3, 2))
    ]
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("groups", "preferences", "scores", "pairs")}
    data.write_groups(paths["groups"], groups)
    data.write_preferences(paths["preferences"], [np.full((len(g.responses),) * 2, 0.5) for g in groups])
    data.write_scores(paths["scores"], [torch.zeros(len(g.responses), dtype=torch.float64) for g in groups])
    data.write_pairs(paths["pairs"], [Pair(0, 2, 1, 0.75), Pair(1, 1, 0, 0.5), Pair(1, 0, None, 0.25)], groups)
    return groups, paths


def read_all(groups: list[Group], paths: dict[str, Path]) -> None:
    prompts = [group.prompt for group in groups]
    assert data.read_groups(paths["groups"], prompts, vocabulary=5) == groups
    assert len(data.read_preferences(paths["preferences"], groups)) == 2
    assert len(data.read_scores(paths["scores"], groups)) == 2
    assert data.read_pairs(paths["pairs"], groups) == [Pair(0, 2, 1, 0.75), Pair(1, 1, 0, 0.5), Pair(1, 0, None, 0.25)]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *((name, lambda lines: lines[:1], r"has 1 lines where there are 2 \w+") for name in COUNTED),
        *((name, lambda lines: [*lines, lines[1]], "has more than 2 lines where there are 2") for name in COUNTED),
        *((name, lambda lines: [], "has (0 lines where|no lines)") for name in (*COUNTED, "pairs")),
        *(
            (name, lambda lines: lines[::-1], "line 1: it has 2 responses where the group has 3")
            for name in ("preferences", "scores")
        ),
        ("groups", lambda lines: lines[::-1], "line 1: it belongs to another prompt"),
        ("groups", lambda lines: [lines[0], lines[1].replace("[3, 4]", "[3, 5]")], "line 2: it has a token beyond the"),
        ("groups", lambda lines: [lines[0], lines[1].replace("[3, 4]", "[3, -1]")], "line 2: it has a token beyond"),
        ("groups", lambda lines: [lines[0], lines[1].replace("[1, 2]", "[]")], "line 2: its prompt has no tokens"),
        ("pairs", lambda lines: [lines[0], lines[1].replace('"group": 1', '"group": 99')], "line 2: it names group 99"),
        ("pairs", lambda lines: [lines[0].replace('"winner": 2', '"winner": 3')], "line 1: it compares a response tha"),
        ("pairs", lambda lines: [lines[0].replace('"winner": 2', '"winner": 1')], "line 1: it compares a response wit"),
        ("pairs", lambda lines: [lines[2].replace('"winner": 0', '"winner": 2')], "line 1: it compares a response tha"),
        ("pairs", lambda lines: [lines[2].replace('"loser": null', '"loser": "no"')], "line 1: it lacks"),
    ],
)
def test_files_of_an_iteration_that_do_not_fit_each_other(tmp_path, name: str, change: Callable, message: str) -> None:
    groups, paths = written(tmp_path)
    read_all(groups, paths)
    lines = paths[name].read_text(encoding="utf-8").splitlines()
    changed = change(lines)
    assert changed != lines
    paths[name].write_text("".join(line + "\n" for line in changed), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}\.jsonl(, | ){message}.*remove the file, and --resume makes it"):
        read_all(groups, paths)


def test_every_prompt_has_as_many_responses_as_were_sampled(tmp_path) -> None:
    _, paths = written(tmp_path)
    with pytest.raises(UserError, match="line 2: it has 2 responses where 3 were sampled"):
        data.read_groups(paths["groups"], responses=3)
