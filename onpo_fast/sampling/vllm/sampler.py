"""Sampling with vLLM in a process of its own, one for each stage, which may be in another environment."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...config import SamplingConfig
from ...console import Progress
from ...data import Group, Messages, Response
from ...device_memory import release_freed
from ...errors import UserError
from ...models.checkpoint import directory_of
from ...models.resident import ResidentPolicy, Source
from ..gathering import Gathering
from ..interface import OnGroup
from ..returned import ResponseReader, request_seeds
from .process import VllmProcess

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's values of max_lora_rank
CPU_CACHE_BYTES = 2 * 2**30  # of vLLM's KV cache on a CPU, where it would take nearly all memory


class VllmSampler:
    """Samples with vLLM. The engine starts with the first call and ends with ``close``.

    Before it starts, the policy is dropped from memory. Tokens depend on the seed, prompt and response, as those of
    the other samplers do; rounding, which depends on vLLM's batches, may change log-probs a little.

    Args:
        policies: has the policy, whose files vLLM reads.
        source: where the policy is.
        config: ``vllm_python`` and ``vllm_options``, and how responses are sampled.
        directory: of the run, for vLLM's log; None: it is not kept.
    """

    def __init__(
        self, policies: ResidentPolicy, source: Source, config: SamplingConfig, directory: Path | None = None
    ) -> None:
        policy = policies(source)
        self.policies, self.source, self.config, self.directory = policies, source, config, directory
        self.renderer, self.device, self.dtype = policy.renderer, policy.device, policy.compute_dtype
        self.read = ResponseReader(policy.tokenizer, policy.eos_tokens, policy.token_bound)
        self.process: VllmProcess | None = None
        self.most_tokens = 0  # of a prompt and its response, once the engine has started

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress = lambda n: None,
        first: int = 0,
        on_group: OnGroup = lambda index, group: None,
    ) -> list[Group]:
        """Samples responses; see ``Sampler``.

        Raises:
            UserError: if vLLM cannot be started, ends, or returns anything but what it was asked for; or if a prompt
                and a response exceed what the model or vLLM can take.
            Stopped: after a signal.
        """
        rendered = [self.renderer.render(prompt, self.config.max_new_tokens) for prompt in prompts]
        self._start()
        self._check_lengths(rendered)
        gathering = Gathering(prompts, rendered, responses_per_prompt, progress, first, on_group)
        places = gathering.places()
        seeds = request_seeds([[*seed, first + p, k] for p, k in places])
        self.process.send({"requests": [[rendered[p], one] for (p, _), one in zip(places, seeds)]})
        for index, response in self._responses(len(places)):
            gathering.add(places[index], response)
        return gathering.groups()

    def _responses(self, count: int) -> Iterator[tuple[int, Response]]:
        """Yields as many responses as were asked for, as they end, each with the index of its request.

        Raises:
            UserError: if one of them is not what was asked for.
        """
        missing = set(range(count))
        while missing:
            message = self.process.receive()
            if "alive" in message:
                continue
            index = message.get("index")
            if type(index) is not int or index not in missing:
                raise UserError(f"vLLM returned a response that it was not asked for ({index!r})")
            missing.remove(index)
            reason, most = message.get("reason"), self.config.max_new_tokens
            try:
                if reason not in ("stop", "length"):
                    raise ValueError(f"it ended for the reason {reason!r}")
                response = self.read(message.get("tokens"), message.get("logps"), reason == "stop", most)
            except ValueError as error:
                raise UserError(f"vLLM returned a response that cannot be used: {error}") from None
            yield index, response

    def _start(self) -> None:
        """Starts the engine, unless it runs, in the memory that the policy had."""
        if self.process is not None:
            return
        arguments, adapter = self._arguments()
        self.policies.drop()
        release_freed()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        rank = dist.get_rank() if dist.is_initialized() else 0
        log = self.directory and self.directory / (f"vllm_{rank}.log" if rank else "vllm.log")
        self.process = VllmProcess(self.config.vllm_python or sys.executable, self.device, log)
        config = self.config
        ready = self.process.start(
            {
                "arguments": arguments,
                "adapter": adapter,
                "sampling": {
                    "temperature": config.temperature,
                    "top_p": config.top_p,
                    "max_tokens": config.max_new_tokens,
                    "stop_token_ids": self.read.eos_tokens,
                    "ignore_eos": True,  # the model's own: those of the policy end a response
                    "detokenize": False,
                    "logprobs": 0,  # of the sampled token
                },
            }
        )
        most = ready.get("max_model_len")
        if type(most) is not int:
            raise UserError(f"vLLM's process is ready without its max_model_len ({most!r})")
        self.most_tokens = most

    def _arguments(self) -> tuple[dict[str, Any], str | None]:
        """Returns the arguments of vLLM's engine and the directory of the adapter, if the policy has one."""
        model = self.policies.config
        arguments: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the model's, which may truncate what is sampled
            "logprobs_mode": "raw_logprobs",  # at temperature 1, over all tokens
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": 0,
            "trust_remote_code": model.trust_remote_code,
            # -1: the model's, or as much as there is memory for. Beyond LongRoPE's boundary vLLM rotates all by others
            "max_model_len": self.renderer.rotary_boundary or -1,
            "max_num_seqs": self.config.sampling_batch_size,
            "enable_prefix_caching": True,
        }
        if self.device.type == "cpu":
            arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
            # a prompt that is computed in two parts rewinds its request's generator, which those of a CPU cannot
            arguments["enable_chunked_prefill"] = "max_num_batched_tokens" in (self.config.vllm_options or {})
        source, adapter = self.source, None
        if model.lora_rank is not None and source != self.policies.initial:
            source, adapter = self.policies.initial, str(Path(source).resolve())
            rank = next((one for one in LORA_RANKS if one >= model.lora_rank), model.lora_rank)
            arguments |= {"enable_lora": True, "max_lora_rank": rank}
        return {**arguments, **(self.config.vllm_options or {}), "model": directory_of(str(source))}, adapter

    def _check_lengths(self, rendered: Sequence[Sequence[int]]) -> None:
        """Raises ``UserError`` if a prompt and its response have more tokens than vLLM can hold."""
        longest = max(map(len, rendered), default=0)
        if longest + self.config.max_new_tokens > self.most_tokens:
            raise UserError(
                f"vLLM takes {self.most_tokens} tokens of a prompt and its response, and a prompt has {longest} tokens "
                f"with --max_new_tokens {self.config.max_new_tokens}: a longer max_model_len in --vllm_options, "
                "or more memory for its cache (gpu_memory_utilization, on a CPU kv_cache_memory_bytes), may help"
            )

    def close(self) -> None:
        """Ends the engine. It may be called twice."""
        if self.process is not None:
            self.process.close()
            self.process = None
