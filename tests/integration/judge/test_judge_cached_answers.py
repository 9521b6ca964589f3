"""The cache of answers, also when several runs share it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import struct
import threading
import time

import numpy as np
from support.judging import SHORTER, groups, raises, shorter
from support.servers import (
    Error,
    completion,
    serving,
)

from onpo_fast import oracles
from onpo_fast.config import Config
from onpo_fast.errors import UserError
from onpo_fast.oracles import chat_judge, judge_cache
from onpo_fast.servers import RequestRefused


def test_answers_are_kept_by_everything_that_shaped_them(judge, tmp_path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(chat_judge.PROMPT + " ", encoding="utf-8")
    cache = str(tmp_path / "shared.sqlite")
    changes = ({}, {"judge_max_tokens": 7}, {"judge_prompt": str(prompt)}, {"judge_request": {"seed": 1}})
    with serving(shorter) as server:
        for requests, change in enumerate(changes, 1):
            for _ in range(2):
                oracles.judge(judge(server, None, judge_cache=cache, **change), groups("a", "b"), "judge")
                assert len(server.bodies) == 2 * requests
        config = Config(judge_url=server.url + "/", judge_cache=cache)
        oracles.judge(oracles.load("judge=m", judge=config), groups("a", "b"), "judge")  # the same model and server
        assert len(server.bodies) == 8
        oracles.judge(oracles.load("judge=n", judge=config), groups("a", "b"), "judge")
        assert len(server.bodies) == 10
        with serving(shorter) as other:
            oracles.judge(judge(other, judge_cache=cache), groups("a", "b"), "judge")
            assert len(other.bodies) == 2


def test_two_judges_share_a_file(judge, tmp_path) -> None:
    cache = str(tmp_path / "judge.sqlite")
    with serving(shorter) as server:
        runs = [judge(server, tmp_path / str(run), judge_cache=cache) for run in range(3)]
        threads = [
            threading.Thread(target=oracles.judge, args=(run, groups("a", "bcd", count=10), "judge")) for run in runs
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = len(server.bodies)
        oracles.judge(judge(server), groups("a", "bcd", count=10), "judge")
        assert len(server.bodies) == before
    assert sqlite3.connect(tmp_path / "judge.sqlite").execute("SELECT count(*) FROM answers").fetchone() == (20,)


def in_processes(work: list, seconds: float = 60) -> list:
    """What each function returns, in a process of its own, all at a time."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(index: int) -> None:
        results.put((index, work[index]()))

    processes = [context.Process(target=run, args=(index,)) for index in range(len(work))]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=seconds) for _ in processes)
    for process in processes:
        process.join(seconds)
    return [found[index] for index in range(len(work))]


def test_runs_that_share_a_cache_ask_each_question_once(judge, tmp_path) -> None:
    """Three processes at a time: what another asks is waited for, and counts as cached."""

    def reply(body: dict) -> str:
        time.sleep(0.03)
        return shorter(body)

    def run(index: int) -> tuple[list, dict]:
        oracle = judge(server, tmp_path / str(index), judge_cache=str(tmp_path / "shared.sqlite"), judge_concurrency=4)
        return oracles.judge(oracle, groups("a", "bcd", count=8), "judge"), oracle.take_counters()

    with serving(reply) as server:
        runs = in_processes([lambda index=index: run(index) for index in range(3)])
        questions = [body["messages"][0]["content"] for body in server.bodies]
    assert len(questions) == len(set(questions)) == 16
    for matrices, counters in runs:
        for matrix in matrices:
            np.testing.assert_array_equal(matrix, SHORTER)
        assert counters["answered"] + counters["cached"] == 16
    assert sum(counters["requests"] for _, counters in runs) == 16
    assert sum(counters["answered"] for _, counters in runs) == 16
    claims = sqlite3.connect(tmp_path / "shared.sqlite").execute("SELECT count(*) FROM claims").fetchone()
    assert claims == (0,)


def test_a_claim_is_renewed_while_the_judge_thinks(judge, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(judge_cache, "CLAIM_SECONDS", 0.4)

    def reply(body: dict) -> str:
        time.sleep(1.2)
        return shorter(body)

    with serving(reply) as server:
        cache = str(tmp_path / "shared.sqlite")
        runs = [judge(server, tmp_path / str(run), judge_cache=cache, judge_concurrency=2) for run in range(2)]
        threads = [threading.Thread(target=oracles.judge, args=(run, groups("a", "bcd"), "judge")) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.bodies) == 2
    spent = [run.take_counters() for run in runs]
    assert sum(one["answered"] for one in spent) == sum(one["cached"] for one in spent) == 2


def test_the_claims_of_a_killed_run_end(judge, monkeypatch) -> None:
    monkeypatch.setattr(judge_cache, "CLAIM_SECONDS", 1.0)
    asked_first = threading.Event()

    def reply(body: dict) -> object:
        asked_first.set()
        return lambda handler: time.sleep(5)

    with serving(reply) as server:
        killed = multiprocessing.get_context("fork").Process(
            target=lambda: oracles.judge(judge(server, judge_concurrency=1), groups("a", "bcd"), "judge")
        )
        killed.start()
        assert asked_first.wait(30)
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        server.reply = shorter
        oracle = judge(server)
        (matrix,) = oracles.judge(oracle, groups("a", "bcd"), "judge")
        assert len(server.bodies) == 3
    np.testing.assert_array_equal(matrix, SHORTER)
    assert oracle.take_counters()["answered"] == 2


def test_a_question_that_another_run_could_not_ask_is_left_to_this_one(judge, tmp_path) -> None:
    """Its server refused it."""
    seen: list[dict] = []
    errors: list[Exception] = []

    def reply(body: dict) -> object:
        seen.append(body)
        if len(seen) > 1:
            return shorter(body)
        time.sleep(0.3)
        return Error(400)

    def run(index: int) -> list[np.ndarray] | None:
        oracle = judge(server, tmp_path / str(index), judge_cache=str(tmp_path / "shared.sqlite"), judge_concurrency=1)
        try:
            return oracles.judge(oracle, groups("a", "bcd"), "judge")
        except UserError as error:
            errors.append(error)

    with serving(reply) as server:
        first = threading.Thread(target=run, args=(0,))
        first.start()
        while not seen:
            time.sleep(0.01)
        np.testing.assert_array_equal(run(1)[0], SHORTER)
        first.join()
        assert len(server.bodies) == 3
    (error,) = errors
    assert isinstance(error.__cause__, RequestRefused)


def test_a_file_that_is_no_cache(judge, tmp_path) -> None:
    (tmp_path / "judge.sqlite").write_text("This is a letter. " * 100)
    with raises(UserError, str(tmp_path / "judge.sqlite"), "move or delete"):
        oracles.judge(judge("http://127.0.0.1:9/v1"), groups("a", "b"), "judge")


def test_answers_that_are_not_what_they_were_are_asked_again(judge, tmp_path) -> None:
    """One bit of a preference, and of the text."""
    path = tmp_path / "judge.sqlite"
    with serving(lambda body: completion("A", [("A", np.log(0.6)), ("B", np.log(0.3))])) as server:
        oracles.judge(judge(server), groups("a", "b"), "judge")
        whole = path.read_bytes()
        (p,) = {row[0] for row in sqlite3.connect(path).execute("SELECT preference FROM answers")}
        at = whole.index(struct.pack(">d", p))
        for place, bit in ((at + 1, 0x08), (at + 8, 0x80), (at + 8, 0x02)):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            before = len(server.bodies)
            oracles.judge(judge(server), groups("a", "b"), "judge")
            assert len(server.bodies) == before + 1
            oracles.judge(judge(server), groups("a", "b"), "judge")
            assert len(server.bodies) == before + 1


def test_a_cache_with_broken_pages(judge, tmp_path) -> None:
    path = tmp_path / "judge.sqlite"
    with serving(shorter) as server:
        oracles.judge(judge(server), groups("a", "bcd", count=30), "judge")
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        with raises(UserError, str(path), "malformed", "move or delete"):
            oracles.judge(judge(server), groups("a", "bcd", count=30), "judge")
        path.unlink()
        np.testing.assert_array_equal(oracles.judge(judge(server), groups("a", "bcd"), "judge")[0], SHORTER)
