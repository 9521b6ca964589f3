"""A chat server whose verdicts depend on the question alone, in another process: a judge for tests of whole runs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def judge_server() -> Iterator[str]:
    """Runs a chat server in another process and yields its URL. Answers take 50 ms and depend on the question alone."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = self.rfile.read(int(self.headers["content-length"]))
            time.sleep(0.05)
            share = hashlib.sha256(json.dumps(json.loads(question)["messages"]).encode()).digest()[0]
            message = {"role": "assistant", "content": "AB"[share % 2]}
            reply = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "hash",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, address: object) -> None:
            pass  # the client was killed

    server = Server(("127.0.0.1", 0), Handler)
    child = os.fork()
    if not child:
        server.serve_forever()
    server.server_close()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
