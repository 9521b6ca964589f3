"""Programs in place of a Python with vLLM, which speak as ``sampling/vllm/engine.py`` does, with or without faults."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from . import small_runs
from .tiny_models import make_tokenizer, randomise

# the engine that every fault starts from: tokens are hashes of the seed, and every third response ends by itself
ENGINE = """
import json, os, random, socket, sys, time

with_parent = socket.socket(fileno=int(sys.argv[-1]))
lines = with_parent.makefile("r")


def send(**message):
    with_parent.sendall(json.dumps(message).encode() + b"\\n")


def respond(prompt, seed):
    draw, most, eos = random.Random(seed), settings["sampling"]["max_tokens"], settings["sampling"]["stop_token_ids"][0]
    tokens = [3 + draw.randrange(256) for _ in range(draw.randint(1, most) if seed % 3 == 0 else most)]
    if seed % 3 == 0:
        tokens[-1] = eos
    return {"tokens": tokens, "logps": [-5.5] * len(tokens), "reason": "stop" if seed % 3 == 0 else "length"}


settings = json.loads(next(lines))
print("loading", settings["arguments"]["model"], flush=True)
at_start()
send(ready="0", max_model_len=512)
part = 0
for line in lines:
    requests = json.loads(line)["requests"]
    for index in reversed(range(len(requests))):
        response = respond(*requests[index])
        change(part, index, response)
        send(index=index, **response)
    part += 1
"""
NOTHING = "pass"


def write_engine(path: Path, change: str = NOTHING, at_start: str = NOTHING) -> str:
    """Writes a program for --vllm_python and returns its path.

    Args:
        change: statements before a response is sent; they know the ``part``, the ``index`` and the ``response``, a
            dict that they may change.
        at_start: statements before the engine is ready.
    """
    lines = [f"#!{sys.executable}"]
    for name, body in (("change(part, index, response)", change), ("at_start()", at_start)):
        lines += [f"def {name}:", *(f"    {line}" for line in body.splitlines())]
    path.write_text("\n".join(lines) + "\n" + ENGINE)
    path.chmod(0o755)
    return str(path)


# samples from the policy of ``make_uniform``
PACKAGE = """
import math, os, random, subprocess, time

__version__ = "0"


class SamplingParams:
    def __init__(self, **fields):
        self.__dict__ |= fields


class LLM:
    def __init__(self, **arguments):
        self.llm_engine, self.waiting, self.count = self, [], 0
        self.model_config = type("", (), {"max_model_len": 512})
        at_start()

    def enqueue(self, prompts, params, lora_request, use_tqdm):
        for prompt, one in zip(prompts, params):
            self.waiting.append((str(self.count), prompt["prompt_token_ids"], one))
            self.count += 1

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        number, prompt, one = self.waiting.pop()
        at_step(int(number))
        draw = random.Random(one.seed)
        tokens = [draw.randrange(272) for _ in range(one.max_tokens)]
        end = next((i for i, token in enumerate(tokens) if token in one.stop_token_ids), None)
        tokens, reason = (tokens, "length") if end is None else (tokens[: end + 1], "stop")
        likely = [{token: type("", (), {"logprob": -math.log(272)})} for token in tokens]
        response = type("", (), {"token_ids": tuple(tokens), "logprobs": likely, "finish_reason": reason})
        return [type("", (), {"request_id": number, "prompt_token_ids": prompt, "outputs": [response]})]
"""


def write_vllm(folder: Path, at_start: str = NOTHING, at_step: str = NOTHING) -> str:
    """Writes a package in place of vLLM, and a Python that has it, for --vllm_python; returns the path of that.

    Args:
        at_start: statements before the engine is ready.
        at_step: statements before a response is sampled; they know its ``number``.
    """
    (folder / "vllm" / "lora").mkdir(parents=True)
    functions = ""
    for name, body in (("at_start()", at_start), ("at_step(number)", at_step)):
        functions += "\n".join([f"def {name}:", *(f"    {line}" for line in body.splitlines())]) + "\n"
    (folder / "vllm" / "__init__.py").write_text(functions + PACKAGE)
    (folder / "vllm" / "lora" / "request.py").write_text("LoRARequest = tuple\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def make_uniform(model: Path) -> None:
    """Gives a model of ``make_model`` nearly the same probability for all of its 272 tokens."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e-5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of an environment with vLLM: $ONPO_VLLM_PYTHON, or that of ``make vllm-env``."""
    default = Path(__file__).parents[2] / ".vllm" / "bin" / "python"
    python = os.environ.get("ONPO_VLLM_PYTHON", str(default))
    if not os.path.exists(python):
        pytest.skip(f"no environment with vLLM: make vllm-env makes {default}, or set ONPO_VLLM_PYTHON")
    return python


# with parts of eight sampling batches, so that small runs have several
COMMAND = """
import sys
from onpo_fast.run.resumable import ResumableStage
from onpo_fast.train import main
ResumableStage.SAMPLING_BATCHES = 8
main(sys.argv[1:])
"""


def start_run(work: Path, python: str, *options: str) -> subprocess.Popen:
    """Starts a small run in the folder "run", after ``small_runs.prepare``; ``options`` are its others."""
    flags = [f"--{name}={value}" for name, value in small_runs.SMALL.items()]
    files = ["--model", str(work / "model"), "--prompts", str(work / "prompts.jsonl"), "--out", str(work / "run")]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *flags, *files, "--sampler", "vllm", "--vllm_python", python, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def parts(run: Path) -> dict[str, bytes]:
    """The recorded parts of the responses, by name."""
    return {path.name: path.read_bytes() for path in (run / "iteration_01" / "responses.jsonl.parts").glob("*.jsonl")}


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def make_model(directory: Path, tied: bool) -> None:
    """Writes a Llama with heads of a size that vLLM has on a CPU."""
    make_tokenizer().save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    randomise(model)
    with torch.no_grad():
        model.model.norm.weight *= 0.5  # less sure of a token, so that responses end now and then
    model.save_pretrained(directory)
