"""Prompts in, pairs out."""

from __future__ import annotations

import codecs
import gzip
import json
import logging
import sys

import datasets
import pytest
import tqdm

from onpo_fast import data, sources
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
        with pytest.raises(
            UserError, match=f"cannot read .*{name}: it is no text in UTF-8; a file is JSON lines, .json"
        ):
            data.read_prompts(tmp_path / name)


def test_a_prompt_that_a_model_refuses_is_named_by_its_line(policy, write_lines) -> None:
    path = write_lines("p.jsonl", {"prompt": "one"}, {"prompt": "long " * 9000})
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: the prompt that ends 'long .* exceeds the model's context"):
        policy.usable(data.read_prompts(path), 2, None)


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
