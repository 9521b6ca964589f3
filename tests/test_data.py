"""Prompts in, pairs out."""

from __future__ import annotations

import json

import datasets
import pytest

from onpo_fast import data
from onpo_fast.checkpoint import read_jsonl
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError


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
        ('{"prompt": []}', "line 2: .* must be a string or a list"),
        ('{"prompt": "  "}', "line 2: a message is empty"),
        (r'{"prompt": "\ud83d"}', "line 2: a message holds half of a surrogate pair"),
        ('{"prompt": [{"role": "user"}]}', 'line 2: each message needs a "role" and a "content"'),
        ('{"prompt": [{"role": "robot", "content": "x"}]}', "line 2: the role 'robot'"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "line 2: after an optional system"),
        ('{"prompt": [{"role": "system", "content": "x"}]}', "line 2: after an optional system"),
    ],
)
def test_bad_lines_are_named(write_lines, line: str, message: str) -> None:
    path = write_lines("p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(UserError, match=message):
        data.read_prompts(path)


def test_files_without_prompts(tmp_path, write_lines) -> None:
    with pytest.raises(UserError, match="cannot read"):
        data.read_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="has no prompts"):
        data.read_prompts(write_lines("empty.jsonl"))


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
