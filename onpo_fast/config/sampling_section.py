"""Options of sampling: how responses are drawn, and which program draws them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ..errors import UserError
from ..servers.endpoint import check_url
from .values import check_at_least, check_key_name, check_object, check_positive, check_share, check_values

VLLM_TEMPERATURES = (0.01, 2.0)  # that vLLM takes as they are
OPTIONS_OF_SAMPLERS = {  # that are given for one value of --sampler alone
    "local": ("cuda_graphs",),
    "vllm": ("vllm_python", "vllm_options"),
    "server": (
        "sampler_url",
        "sampler_model",
        "sampler_reload",
        "sampler_key_variable",
        "sampler_concurrency",
        "sampler_timeout",
        "sampler_retries",
    ),
}
_ONE_GPU = "there is one engine on each GPU of the run"
_CHECKED = "the responses must be samples of the policy itself"
SET_BY_THE_RUN = {  # arguments of vLLM's engine that a run sets, and why
    "model": "it is the policy",
    "tokenizer": "prompts are tokens",
    "skip_tokenizer_init": "prompts are tokens",
    "dtype": "it is that of --dtype",
    "seed": "every response has its own, from --seed",
    "trust_remote_code": "it is --trust_remote_code",
    "hf_token": "the model is a directory, and keys are never saved",
    "enable_lora": "it follows --lora_rank",
    "max_lora_rank": "it follows --lora_rank",
    "generation_config": _CHECKED,
    "override_generation_config": _CHECKED,
    "logits_processors": _CHECKED,
    "logprobs_mode": "log-probs are those at temperature 1",
    "tensor_parallel_size": _ONE_GPU,
    "pipeline_parallel_size": _ONE_GPU,
    "data_parallel_size": _ONE_GPU,
}


@dataclass
class SamplingConfig:
    """How responses are sampled from the policy."""

    max_new_tokens: int = 32
    """Maximum length of a response in tokens. Raise it until few responses are cut off (the workflow that the paper
    follows: 2048)."""
    temperature: float = 1.0
    """Sampling temperature. Keep it at 1: the theory assumes responses drawn from the policy itself."""
    top_p: float = 1.0
    """Nucleus sampling: only the likeliest tokens with this total probability are sampled, in (0, 1]. Keep it at 1
    (off): the theory assumes responses drawn from the policy itself."""
    sampling_batch_size: int | None = None
    """Responses generated at the same time. Lower it when sampling runs out of memory; random numbers do not depend on
    it. vLLM: max_num_seqs; a server: see --sampler_concurrency. Default: 256 on a GPU, 32 on a CPU."""

    sampler: Literal["local", "vllm", "server"] = "local"
    """Program that samples. "local": this one. "vllm": vLLM, started anew in each stage, one engine on each GPU of the
    run (--vllm_python). "server": an OpenAI-compatible server with completions, such as vLLM or SGLang (--sampler_url).
    Responses of the last two are checked against the policy (docs/sampling.md)."""
    cuda_graphs: bool = False
    """Replay each step of --sampler local as a CUDA graph, for GPUs that wait for the host to launch kernels. Graphs
    are checked when they are captured. This has not been run on a GPU yet."""
    vllm_python: str | None = None
    """Python interpreter of an environment with vLLM, which --sampler vllm starts. Default: the one of this program."""
    vllm_options: dict | None = None
    """Arguments of vLLM's engine with --sampler vllm, a JSON object such as '{"gpu_memory_utilization": 0.8}'."""
    sampler_url: str | None = None
    """Base URL of the server that samples, such as http://localhost:8000/v1."""
    sampler_model: str | None = None
    """Name of the model that the server samples from. Default: the only one that it lists."""
    sampler_reload: str | None = None
    """How the server loads new weights; required with --sampler server. "vllm": vLLM reads them from the policy's
    directory in place (not for models whose LM head is tied to the embedding), or loads the adapter. Otherwise a shell
    command that returns once the server has loaded the directory in the environment variable ONPO_POLICY."""
    sampler_key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key of the server that samples, if it needs one. Keys are
    never saved. A variable other than the default must be set; if a file names it, it must end in _API_KEY or
    _TOKEN."""
    sampler_concurrency: int = 64
    """Maximum number of requests to the server that samples at the same time; a request is for one response."""
    sampler_timeout: float = 600.0
    """Time limit of one request to the server that samples, in seconds."""
    sampler_retries: int = 15
    """Retries of a failed request to the server that samples before the run stops. The wait before a retry doubles up
    to a minute."""

    def __post_init__(self) -> None:
        check_key_name(self, "sampler_key_variable")
        check_values(self, SamplingConfig)
        check_at_least(self, 1, "max_new_tokens", "sampling_batch_size", "sampler_concurrency")
        check_at_least(self, 0, "sampler_retries")
        check_positive(self, "temperature", "sampler_timeout")
        check_share(self, "top_p")
        check_object(self, "vllm_options")
        self._check_program()

    @property
    def responses_at_a_time(self) -> int:
        """Responses that are sampled at the same time, of which the parts of a stage have a multiple."""
        return self.sampler_concurrency if self.sampler == "server" else self.sampling_batch_size

    def _check_program(self) -> None:
        """Checks that the options of a program are given for it alone, and that a server has its address."""
        for name, default in options_of_other_samplers(self.sampler).items():
            if getattr(self, name) != default:
                owner = next(owner for owner, names in OPTIONS_OF_SAMPLERS.items() if name in names)
                raise UserError(f"--{name} needs --sampler {owner}")
        if self.sampler != "local" and not VLLM_TEMPERATURES[0] <= self.temperature <= VLLM_TEMPERATURES[1]:
            raise UserError(
                f"--temperature must be from {VLLM_TEMPERATURES[0]} to {VLLM_TEMPERATURES[1]} with --sampler "
                f"{self.sampler}, not {self.temperature}: vLLM takes no other, and replaces smaller ones"
            )
        if taken := [name for name in self.vllm_options or {} if name in SET_BY_THE_RUN]:
            raise UserError(f"--vllm_options must leave {taken[0]} alone: {SET_BY_THE_RUN[taken[0]]}")
        if self.sampler == "server":
            for name, example in (("sampler_url", " URL"), ("sampler_reload", ' vllm or "COMMAND"')):
                if getattr(self, name) is None:
                    raise UserError(f"--sampler server needs --{name}{example}")
            self.sampler_url = check_url(self.sampler_url, "sampler")


def options_of_other_samplers(sampler: str) -> dict[str, object]:
    """Returns the options that are given for other values of --sampler alone, with their defaults."""
    defaults = {field.name: field.default for field in fields(SamplingConfig)}
    others = (names for owner, names in OPTIONS_OF_SAMPLERS.items() if owner != sampler)
    return {name: defaults[name] for names in others for name in names}
