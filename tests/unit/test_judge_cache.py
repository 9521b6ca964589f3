"""The cache of the judge's answers: keys, rows and claims."""

from __future__ import annotations

import sqlite3

from onpo_fast import oracles
from onpo_fast.config import JudgeConfig
from onpo_fast.oracles.judge_cache import Answer, JudgeCache, answer_key
from onpo_fast.oracles.verdicts import PARSER_VERSION
from onpo_fast.servers.logprobs import without_logprobs

KEYS = {  # as of commit dd93538: with log-probs, and without
    True: "7076084e8ed7e856e901adad26d13e95f6f60c355dfc5168b4e98cd3d4f8624e",
    False: "dab0e009a4e4f65af0064d120d2143774bf6b874a208b237ad6ef0835c6ee12c",
}
CHECKSUM = "637cf2a06d81d971be0548362bc113be8815bd8f0204703ddcd1312f965280b7"  # of the row in the test below


def test_the_answers_of_an_old_run_are_found(tmp_path) -> None:
    """Keys, rows and checksums are those that earlier versions wrote."""
    config = JudgeConfig(judge_url="http://localhost:8000/v1/", judge_model="m")
    judge = oracles.load("judge", judge=config, directory=tmp_path)
    question = judge.question([{"role": "user", "content": "Name a colour."}], "Blue.", "Red.")
    body, url = judge.request(question), judge.client.endpoint.url
    assert answer_key(url, body, PARSER_VERSION) == KEYS[True]
    assert answer_key(url, without_logprobs(body), PARSER_VERSION) == KEYS[False]
    with sqlite3.connect(tmp_path / "judge.sqlite") as file:
        file.execute(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, preference REAL, text TEXT NOT NULL, "
            "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, checksum TEXT NOT NULL)"
        )
        file.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", (KEYS[True], 0.75, "A", 100, 1, CHECKSUM))
    cache = JudgeCache(tmp_path / "judge.sqlite")
    assert cache.get(KEYS[True]) == Answer(0.75, "A", 100, 1)
    assert cache.get(KEYS[False]) is None
    cache.close()


def test_a_clock_that_was_put_back_leaves_no_claim_for_ever(tmp_path) -> None:
    first, second = JudgeCache(tmp_path / "judge.sqlite"), JudgeCache(tmp_path / "judge.sqlite")
    assert first.claim(["key", "another"])
    assert not second.claim(["key"])
    assert not second.claim(["key", "third"])
    assert not first.claim(["third"])
    first.connection.execute("UPDATE claims SET expires = expires + 1e6")
    assert second.claim(["key"])
    first.close()
    second.close()
