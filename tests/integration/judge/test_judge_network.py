"""Where requests go: redirects, proxies, headers; keys are never shown."""

from __future__ import annotations

import json
import os
import socket

import pytest
from support.judging import groups, raises, shorter
from support.servers import (
    Error,
    serving,
)

from onpo_fast import oracles
from onpo_fast.errors import UserError
from onpo_fast.servers import RequestRefused, ServerError, ServerUnavailable, endpoint
from onpo_fast.servers.failures import NO_ADDRESS


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_redirects_are_refused(judge, monkeypatch, status: int) -> None:
    """Nothing goes to the other server, though it would say A."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(lambda body: "A") as other:
        headers = {"Location": f"{other.url}/chat/completions?key=sk-secret"}
        with serving(lambda body: Error(status, headers=headers)) as server:
            with raises(RequestRefused, f"{status}, a redirect to http://127.0.0.1:{other.port}: ") as error:
                oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")
            assert len(server.bodies) == 1
        assert not other.bodies
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        (None, NO_ADDRESS),
        ("http://[x", NO_ADDRESS),
        ("/v2/chat/completions", "a redirect to http://127.0.0.1"),
        ("//judge.example/v1", "a redirect to http://judge.example:"),
        ("ftp://judge.example/v1", "a redirect to ftp://judge.example:"),
    ],
)
def test_redirects_to_anywhere(judge, location: str | None, words: str) -> None:
    headers = {} if location is None else {"Location": location}
    with serving(lambda body: Error(307, headers=headers)) as server, raises(RequestRefused, f"307, {words}"):
        oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")


def test_a_redirect_on_the_same_host_names_the_path(judge) -> None:
    """Which is what to mend; without the query, which may hold secrets."""
    headers = {"Location": "/api/v1/chat/completions?key=secret"}
    with (
        serving(lambda body: Error(301, headers=headers)) as server,
        raises(RequestRefused, "/api/v1/chat/completions: ") as error,
    ):
        oracles.judge(judge(server, judge_concurrency=1), groups("a", "b"), "judge")
    assert f"http://127.0.0.1:{server.port}/api" in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"HTTP_PROXY": "PROXY"}, "HTTP_PROXY"),
        ({"http_proxy": "PROXY"}, "http_proxy"),
        ({"All_Proxy": "PROXY"}, "All_Proxy"),
        ({"HTTPS_PROXY": "PROXY", "ALL_PROXY": "PROXY"}, "ALL_PROXY"),
        ({"HTTPS_PROXY": "PROXY"}, None),
        ({"HTTP_PROXY": "PROXY", "NO_PROXY": "127.0.0.1"}, None),
        ({"HTTP_PROXY": "PROXY", "no_proxy": "*"}, None),
        ({}, None),
    ],
)
def test_a_proxy_is_named_where_it_is_why(judge, monkeypatch, environment: dict, named: str | None) -> None:
    """By its variable, without its password."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        for name, value in environment.items():
            monkeypatch.setenv(name, value.replace("PROXY", f"http://me:secret@{address}"))
        with raises(ServerUnavailable, "1 tries", "Connection error") as error:
            oracles.judge(judge(f"http://{address}/v1", judge_retries=0), groups("a", "b"), "judge")
    said = str(error.value)
    assert f"the proxy in ${named}" in said if named else "the proxy in" not in said
    assert "secret" not in said


@pytest.mark.parametrize("proxy", ["nonsense://me:secret@x:1", "http://me:secret@x:port", "socks9://x"])
def test_a_proxy_that_is_none(judge, monkeypatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with raises(UserError, "$ALL_PROXY") as error:
        oracles.judge(judge("http://judge.example/v1"), groups("a", "b"), "judge")
    assert "secret" not in str(error.value)


def test_what_is_for_openai_goes_to_no_other_server(judge, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Custom: custom-secret\nAuthorization: Bearer other-secret")
    with serving(shorter) as server:
        oracles.judge(judge(server), groups("a", "b"), "judge")
        for headers in server.headers:
            assert headers["authorization"] == "Bearer sk-mine"
            assert "secret" not in str(headers)
    openai = pytest.importorskip("openai")
    for url in ("http://127.0.0.1/v1", "https://api.openai.com.evil.example/v1", "https://openai.com/v1"):
        assert isinstance(endpoint.authorization_headers(url, "k", openai.Omit())["OpenAI-Project"], openai.Omit)
    assert endpoint.authorization_headers("https://api.openai.com/v1", "k", openai.Omit()) == {}


def test_the_key_is_not_in_messages(judge, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-tell")
    for status in (401, 500):
        answer = Error(status, "Incorrect key: sk-do-not-tell")
        with serving(lambda body, answer=answer: answer) as server, raises(ServerError) as error:
            oracles.judge(judge(server, judge_retries=0), groups("a", "b"), "judge")
        assert "sk-do-not-tell" not in str(error.value)
        assert "Incorrect key: [key]" in str(error.value)


@pytest.mark.parametrize("escaped", [json.dumps, repr, lambda key: json.dumps(key).replace("/", r"\/")])
def test_nor_is_it_where_the_server_escapes_it(judge, monkeypatch, escaped) -> None:
    key = """sk-"do'not\\tell/it"""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving(lambda body: Error(401, content=f"Incorrect key: {escaped(key)}".encode())) as server:
        with pytest.raises(UserError, match=r"Incorrect key: .\[key\]. ") as error:
            oracles.judge(judge(server), groups("a", "b"), "judge")
        assert "tell" not in str(error.value)
        server.reply = lambda body: (escaped(key) * 100).encode()  # and where it is cut
        with pytest.raises(UserError, match=r"completion: .\[key\]") as error:
            oracles.judge(judge(server, judge_retries=0), groups("a", "b"), "judge")
        assert "tell" not in str(error.value)
