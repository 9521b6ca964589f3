"""Local servers that speak like OpenAI's: a scripted one with faults, and one around a real model with log-probs."""

from __future__ import annotations

import gzip
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Error:
    """A reply with a status of failure."""

    status: int
    message: str = "scripted"
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None  # in place of OpenAI's JSON with the message


class Server:
    """Answers each chat request with what ``reply(body)`` returns.

    That is a text; a dict, sent as the JSON of the whole reply; bytes, sent as they are; an ``Error``; or a function of
    the handler, which does what it likes. ``routes`` answers requests whose path ends with a name.
    """

    def __init__(
        self, reply: Callable[[dict], object], routes: dict[str, Callable[[dict], object]] | None = None
    ) -> None:
        self.reply, self.routes = reply, routes or {}
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            path = handler.path.partition("?")[0]
            route = next((reply for name, reply in self.routes.items() if path.endswith(name)), self.reply)
            answer = route(body)
        finally:
            with self.lock:
                self.busy -= 1
        if callable(answer):
            answer(handler)
        elif isinstance(answer, Error):
            content = answer.content
            if content is None:
                content = json.dumps({"error": {"message": answer.message}}).encode()
            _send(handler, answer.status, content, answer.headers)
        elif isinstance(answer, bytes):
            _send(handler, 200, answer, {})
        else:
            _send(handler, 200, json.dumps(completion(answer) if isinstance(answer, str) else answer).encode(), {})


def completion(text: str | None, top: list[tuple[str, float]] | None = None) -> dict:
    """A chat completion of one token with these likely tokens, or of a text without log-probs."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if top is not None:
        likely = [{"token": token, "logprob": p, "bytes": None} for token, p in top]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "bytes": None, "top_logprobs": likely}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def completion_of(
    tokens: list[tuple[str, list[tuple[str, float]]]], content: str | None = None, ending: str = "stop"
) -> dict:
    """A chat completion of these tokens, each with its likely tokens and their probabilities. Its text is theirs, or
    ``content``."""
    reply = completion("".join(token for token, _ in tokens) if content is None else content)
    reply["choices"][0]["finish_reason"] = ending
    reply["choices"][0]["logprobs"] = {
        "content": [
            {
                "token": token,
                "logprob": 0.0,
                "bytes": None,
                "top_logprobs": [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in likely],
            }
            for token, likely in tokens
        ]
    }
    return reply


def message(**fields: object) -> dict:
    """A chat completion whose message has these fields."""
    reply = completion(None)
    reply["choices"][0]["message"] = {"role": "assistant", **fields}
    return reply


def _send(handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


@contextmanager
def serving(
    reply: Callable[[dict], object], routes: dict[str, Callable[[dict], object]] | None = None, port: int = 0
) -> Iterator[Server]:
    server = Server(reply, routes)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.handle(self)

        def do_GET(self) -> None:  # for /models; no judge sends one, unless it follows a redirect
            self.headers["content-length"] = "2"
            self.rfile = io.BytesIO(b"{}")
            server.handle(self)

        def log_message(self, *arguments: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, address: object) -> None:
            pass  # clients that hang up are part of the test

    http = Quiet(("127.0.0.1", port), Handler)
    server.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


# Faults ---------------------------------------------------------------------------------------------------------------


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends before a word is said."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends in the middle of the reply."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, for ever: no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def flood(handler: BaseHTTPRequestHandler) -> None:
    """Blanks before the JSON, 64 MiB of them."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    for _ in range(64):
        handler.wfile.write(b" " * 2**20)


def bomb(handler: BaseHTTPRequestHandler) -> None:
    """The same blanks, in 64 KiB of gzip."""
    _send(handler, 200, BOMB, {"Content-Encoding": "gzip"})


BOMB = gzip.compress(b" " * 2**26, 1)
