"""A server that samples from a real small model, as vLLM's ``/v1/completions`` does, with faults on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from support.servers import Error, Server, serving

from onpo_fast.config import Config
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy


@dataclass
class SamplingServer:
    """What the server has, and how it misbehaves.

    Attributes:
        policy: the model that it samples from.
        asked: the requests for completions that it has answered.
        before: called with the number of a request, from 0, and its body; what it returns is answered instead.
        change: called with a reply before it is sent.
        refused: fields that it refuses with a 400.
        text_only: whether it takes prompts as text only.
        models: what /models lists.
        calls: vLLM's calls, by name, with their bodies.
    """

    policy: Policy
    asked: list[dict] = field(default_factory=list)
    before: Callable[[int, dict], object] = lambda number, body: None
    change: Callable[[dict], object] = lambda reply: reply
    refused: tuple[str, ...] = ()
    text_only: bool = False
    models: list[dict] = field(default_factory=lambda: [{"id": "m", "owned_by": "vllm", "max_model_len": 512}])
    calls: list[tuple[str, dict]] = field(default_factory=list)
    number: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the answered requests that are no probes, which have fewer tokens."""
        most = max(body["max_tokens"] for body in self.asked)
        return [body["seed"] for body in self.asked if body["max_tokens"] == most]

    def load(self, directory: Path) -> None:
        """Takes the weights of a directory."""
        self.policy = load(directory, Config())

    def completions(self, body: dict) -> object:
        with self.lock:
            number, self.number = self.number, self.number + 1
        if (instead := self.before(number, body)) is not None:
            return instead
        for name in self.refused:
            if name in body:
                return Error(400, f"[{{'type': 'extra_forbidden', 'loc': ('body', '{name}')}}]")
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.policy.tokenizer.encode(prompt, add_special_tokens=False)
        elif self.text_only:
            return Error(400, "prompt: Input should be a valid string")
        with self.lock:
            reply = self.reply(prompt, body)
            self.asked.append(body)
        return self.change(reply)

    @torch.no_grad()
    def reply(self, prompt: list[int], body: dict) -> dict:
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        tokens, logps = [], []
        while len(tokens) < body["max_tokens"] and not set(tokens[-1:]) & set(body.get("stop_token_ids", [2])):
            logits = self.policy.model(torch.tensor([prompt + tokens])).logits[0, -1].double()
            tokens.append(int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=generator)))
            logps.append(float(logits.log_softmax(-1)[tokens[-1]]))
        ended = tokens[-1] in body.get("stop_token_ids", [2])
        words = [self.policy.tokenizer.decode([token]) for token in tokens]
        choice = {
            "index": 0,
            "text": self.policy.tokenizer.decode(tokens[:-1] if ended else tokens),
            "finish_reason": "stop" if ended else "length",
            "logprobs": {"tokens": words, "token_logprobs": logps, "top_logprobs": None, "text_offset": None},
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        return {"id": "x", "object": "text_completion", "choices": [choice], "usage": usage}

    def call(self, name: str) -> Callable[[dict], object]:
        """The answer to one of vLLM's own calls."""

        def answer(body: dict) -> object:
            self.calls.append((name, body))
            if name == "collective_rpc":
                self.load(Path(body["kwargs"]["weights_path"]))
                return {"results": [None]}
            if name == "load_lora_adapter":
                self.models.append({"id": body["lora_name"], "parent": "m"})
                return b"Success"
            return {"success": len([one for one, _ in self.calls if one == name]) > 1}  # the first time, it is in use

        return answer

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[Server]:
        names = ("collective_rpc", "reset_prefix_cache", "load_lora_adapter")
        routes = {
            "/completions": self.completions,
            "/models": lambda body: {"object": "list", "data": self.models},
            **{f"/{name}": self.call(name) for name in names},
        }
        with serving(lambda body: Error(404, "no such path"), routes, port) as server:
            yield server
