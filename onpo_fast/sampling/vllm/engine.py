"""Samples with vLLM for ``VllmSampler``, which starts this file by its path in an environment with vLLM.

    PYTHON engine.py FD

It imports vLLM and the standard library only. ``FD`` is a socket that carries a JSON object a line. To this program:

    {"arguments": {of vllm.LLM}, "sampling": {arguments of SamplingParams}, "adapter": a directory, or null}
    {"requests": [[tokens of a prompt, seed], …]}    again and again

and back:

    {"ready": vLLM's version, "max_model_len": tokens of a prompt and its response}
    {"index": of a request, "tokens": […], "logps": […], "reason": "stop" or "length"}    in the order they end
    {"alive": true}    now and then while responses are sampled
    {"error": one line, "kind": "import", "start" or "sample"}    the last line

vLLM prints to stdout and stderr, which the parent reads as a log. Where the socket ends, because the parent has closed
it or was killed, this process ends with its process group, whatever it is doing.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ALIVE_SECONDS = 5  # between two messages that tokens are being sampled
MOST_CHARACTERS = 4000  # of an error


class Parent:
    """The parent's end of the socket. A thread reads it, so that its end is noticed while vLLM works."""

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.folder = tempfile.mkdtemp(prefix="onpo_vllm_")
        os.environ["TMPDIR"] = tempfile.tempdir = self.folder  # vLLM leaves files there when it is killed
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            with self.socket.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    self.received.put(json.loads(line))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.killpg(os.getpgrp(), signal.SIGKILL)  # this process too, and workers of vLLM

    def send(self, **message: Any) -> None:
        """Sends a message; it waits while the parent is busy."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")


class Engine:
    """vLLM, with a policy loaded.

    Args:
        arguments: of ``vllm.LLM``.
        sampling: arguments of ``SamplingParams``.
        adapter: the directory of LoRA weights over the model; None for the model itself.
    """

    def __init__(self, arguments: dict[str, Any], sampling: dict[str, Any], adapter: str | None) -> None:
        import vllm
        from vllm.lora.request import LoRARequest

        self.llm, self.sampling, self.version = vllm.LLM(**arguments), sampling, vllm.__version__
        self.adapter = None if adapter is None else LoRARequest("policy", 1, adapter)
        self.enqueued = 0  # requests so far: vLLM numbers them from 0

    def sample(self, requests: list[tuple[list[int], int]], send: Callable[..., None]) -> None:
        """Samples one response for each request and sends it as it ends."""
        from vllm import SamplingParams

        first, self.enqueued = self.enqueued, self.enqueued + len(requests)
        self.llm.enqueue(
            [{"prompt_token_ids": tokens} for tokens, _ in requests],
            [SamplingParams(**self.sampling, seed=seed) for _, seed in requests],
            lora_request=self.adapter,
            use_tqdm=False,
        )
        engine, told = self.llm.llm_engine, time.monotonic()
        while engine.has_unfinished_requests():
            for output in engine.step():
                index, response = int(output.request_id) - first, output.outputs[0]
                if output.prompt_token_ids != requests[index][0]:
                    raise ValueError(f"the response {output.request_id} is to another prompt than was asked")
                tokens = list(response.token_ids)
                logps = [likely[token].logprob for token, likely in zip(tokens, response.logprobs)]
                send(index=index, tokens=tokens, logps=logps, reason=response.finish_reason)
            if time.monotonic() - told > ALIVE_SECONDS:
                send(alive=True)
                told = time.monotonic()


@contextmanager
def naming(kind: str, send: Callable[..., None]) -> Iterator[None]:
    """Tells the parent of an error, which ends this process, and when it came."""
    try:
        yield
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        send(error=text[:MOST_CHARACTERS], kind=kind)
        raise


def main(descriptor: int) -> None:
    parent = Parent(descriptor)
    settings = parent.received.get()
    with naming("import", parent.send):
        import vllm  # noqa: F401
    with naming("start", parent.send):
        engine = Engine(**settings)
    parent.send(ready=engine.version, max_model_len=engine.llm.model_config.max_model_len)
    with naming("sample", parent.send):
        while True:
            engine.sample(parent.received.get()["requests"], parent.send)


if __name__ == "__main__":
    main(int(sys.argv[1]))
