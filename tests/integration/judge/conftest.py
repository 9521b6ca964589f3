"""Fixtures of the judge's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.servers import Server

from onpo_fast import oracles
from onpo_fast.config import Config
from onpo_fast.oracles import chat_judge
from onpo_fast.servers import retries


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Makes a judge that asks a server, with waits of milliseconds."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 0.05)

    def make(server: Server | str, directory: Path | None = tmp_path, **options) -> chat_judge.ChatJudge:
        url = server if isinstance(server, str) else server.url
        return oracles.load("judge", judge=Config(judge_url=url, judge_model="m", **options), directory=directory)

    return make
