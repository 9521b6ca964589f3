"""Measures one way to sample; ``python -m bench sampling`` compares them.

    python -m bench.samplers ARGUMENTS

ARGUMENTS is a JSON object with the fields of ``Case``. The last line of the output is the result as JSON.

All sample K responses to the same prompts from the same weights at temperature 1, each response until its end.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from onpo_fast.config import Config, SamplingConfig
from onpo_fast.data import Messages, read_prompts
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, pad_token
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.sampling import TransformersSampler, make_sampler, open_sampler
from onpo_fast.sampling.vllm.sampler import CPU_CACHE_BYTES

from .kernels import surroundings
from .memory import Gauge
from .runner import ROOT
from .timing import Spread

START_SECONDS = 600.0  # that a server may take to load the model
STOP_SECONDS = 60.0  # that it may take to end
Lengths = list[int]  # of responses, in tokens


@dataclass(frozen=True)
class Case:
    """One way to sample, and what is sampled."""

    sampler: str  # a key of SAMPLERS, or "vllm offline"
    model: str  # a directory
    prompts: str  # a file of JSON lines
    device: str
    count: int  # prompts
    responses: int  # to each
    max_new_tokens: int
    batch_size: int
    times: int  # repetitions, each with another seed
    vllm_python: str | None = None

    def config(self, **options: Any) -> SamplingConfig:
        """Options of a sampler."""
        return SamplingConfig(max_new_tokens=self.max_new_tokens, sampling_batch_size=self.batch_size, **options)

    def messages(self) -> list[Messages]:
        """The prompts."""
        return read_prompts(Path(self.prompts))[: self.count]


Sample = Callable[[int], Lengths]  # samples with a seed


@contextmanager
def _generate(case: Case) -> Iterator[Sample]:
    """transformers' ``generate`` with its own sampling: batches padded on the left, the longest prompts last."""
    policy = _policy(case)
    prompts = sorted(_rendered(policy, case), key=len)
    rows = [tokens for tokens in prompts for _ in range(case.responses)]
    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=policy.eos_tokens,
        pad_token_id=(pad := pad_token(policy.model, policy.tokenizer)),
        top_k=0,
    )

    @torch.no_grad()
    def sample(seed: int) -> Lengths:
        torch.manual_seed(seed)
        lengths: Lengths = []
        with policy.autocast():  # weights are converted once
            for start in range(0, len(rows), case.batch_size):
                batch = rows[start : start + case.batch_size]
                width = max(map(len, batch))
                ids = torch.tensor([[pad] * (width - len(r)) + r for r in batch], device=policy.device)
                mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in batch], device=policy.device)
                found = policy.model.generate(ids, attention_mask=mask, generation_config=settings)
                lengths += [_length(tokens, policy.eos_tokens) for tokens in found[:, width:].tolist()]
        return lengths

    with policy.generating():  # flex_attention would compile for every length
        yield sample


@contextmanager
def _batches(case: Case) -> Iterator[Sample]:
    """This package's sampler for models that its own decode loop does not take: seeded draws over ``generate``."""
    sampler = TransformersSampler(_policy(case), case.config())
    yield _with(sampler, case)


@contextmanager
def _local(case: Case) -> Iterator[Sample]:
    """This package's decode loop."""
    yield _with(make_sampler(_policy(case), case.config()), case)


@contextmanager
def _graphs(case: Case) -> Iterator[Sample]:
    """The decode loop with CUDA graphs."""
    yield _with(make_sampler(_policy(case), case.config(cuda_graphs=True)), case)


@contextmanager
def _vllm(case: Case) -> Iterator[Sample]:
    """``--sampler vllm``: the start of an engine is part of each repetition, as it is of each stage of a run."""

    def sample(seed: int) -> Lengths:
        options = case.config(sampler="vllm", vllm_python=case.vllm_python)
        sampler = open_sampler(ResidentPolicy(Config(model=case.model, device=case.device)), case.model, options)
        try:
            return _with(sampler, case)(seed)
        finally:
            sampler.close()

    yield sample


@contextmanager
def _server(case: Case) -> Iterator[Sample]:
    """``--sampler server`` with a vLLM server on this machine, which has the weights already."""
    with _serving(case) as url:
        # "true" is the command that does nothing: the server was started on these weights
        program = {"sampler": "server", "sampler_url": url, "sampler_reload": "true"}
        options = case.config(**program, sampler_concurrency=case.batch_size)
        sampler = open_sampler(ResidentPolicy(Config(model=case.model, device=case.device)), case.model, options)
        try:
            yield _with(sampler, case)
        finally:
            sampler.close()


@contextmanager
def _serving(case: Case) -> Iterator[str]:
    """Starts a vLLM server on a free port; yields its base URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = "vllm.entrypoints.openai.api_server"
    command = [case.vllm_python or sys.executable, "-m", module, "--model", case.model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", _dtype(case)]
    if case.device == "cpu":
        command += ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]
    environment = _environment()
    server = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("the vLLM server did not start") from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


SAMPLERS = {
    "transformers generate": _generate,
    "batches of generate": _batches,
    "local": _local,
    "local graphs": _graphs,
    "vllm": _vllm,
    "server": _server,
}


def measure(case: Case) -> dict[str, Any]:
    """Seconds, tokens/s, lengths of responses and peak memory above that before the model was loaded.

    The memory of ``--sampler vllm`` and of a server is that of other processes: "vllm offline" has vLLM's.
    """
    where = torch.device(case.device)
    gauge = Gauge(where)
    before = gauge.held()
    laps, rates, lengths = [], [], []
    with SAMPLERS[case.sampler](case) as sample:
        gauge.reset()
        for seed in range(case.times):
            start = time.perf_counter()
            found = sample(seed)
            laps.append(time.perf_counter() - start)
            rates.append(sum(found) / laps[-1])
            lengths += found
        peak = gauge.peak() - before
    here = case.sampler not in ("vllm", "server")  # where the model is in this process
    return {"environment": surroundings(where)} | _result(laps, rates, lengths, case, peak if here else None)


def measure_vllm_offline(case: Case) -> dict[str, Any]:
    """vLLM's own throughput, in its own environment; the start of the engine is not part of the seconds."""
    policy = _policy(case)
    job = {
        "model": case.model,
        "dtype": _dtype(case),
        "prompts": _rendered(policy, case),
        "n": case.responses,
        "max_tokens": case.max_new_tokens,
        "stop_token_ids": policy.eos_tokens,
        "times": case.times,
        "cache_bytes": CPU_CACHE_BYTES if case.device == "cpu" else None,
    }
    environment = _environment()
    with tempfile.TemporaryDirectory() as work:
        result = Path(work) / "result.json"
        # -I keeps this folder, which has a kernels.py, out of the path of its imports
        script = [case.vllm_python or sys.executable, "-I", str(ROOT / "bench" / "vllm_offline.py"), str(result)]
        subprocess.run(script, input=json.dumps(job), env=environment, stdout=sys.stderr, text=True, check=True)
        found = json.loads(result.read_text(encoding="utf-8"))
    laps = [run["seconds"] for run in found["runs"]]
    rates = [run["tokens"] / run["seconds"] for run in found["runs"]]
    lengths = [length for run in found["runs"] for length in run["lengths"]]
    more = {"vllm": found["version"], "start_seconds": found["start_seconds"]}
    return _result(laps, rates, lengths, case, found["peak_bytes"]) | more


def _result(
    laps: list[float], rates: list[float], lengths: Lengths, case: Case, peak_bytes: int | None
) -> dict[str, Any]:
    return {
        "status": "measured",
        "seconds": Spread.of(laps)._asdict(),
        "tokens_per_second": Spread.of(rates)._asdict(),
        "tokens_mean": sum(lengths) / len(lengths),
        "cut_off": sum(length >= case.max_new_tokens for length in lengths) / len(lengths),
        "peak_bytes": peak_bytes,
    }


def _policy(case: Case) -> Policy:
    return load(case.model, Config(model=case.model, device=case.device))


def _rendered(policy: Policy, case: Case) -> list[list[int]]:
    return [policy.renderer.render(prompt, case.max_new_tokens) for prompt in case.messages()]


def _with(sampler: Any, case: Case) -> Sample:
    """Samples with a sampler of this package."""

    def sample(seed: int) -> Lengths:
        groups = sampler(case.messages(), case.responses, [0, seed], lambda n: None)
        return [len(response.tokens) for group in groups for response in group.responses]

    return sample


def _length(tokens: list[int], eos: list[int]) -> int:
    return next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))


def _environment() -> dict[str, str]:
    """Returns the environment of vLLM's processes: engines that are not processes of their own, all cores."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **kept, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _dtype(case: Case) -> str:
    return "float32" if case.device == "cpu" else "bfloat16"


if __name__ == "__main__":
    chosen = Case(**json.loads(sys.argv[1]))
    print("\n" + json.dumps((measure_vllm_offline if chosen.sampler == "vllm offline" else measure)(chosen)))
