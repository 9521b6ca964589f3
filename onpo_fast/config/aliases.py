"""Other names of options and values: those of earlier versions, and those of TRL that mean the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..algorithms import ALIASES
from ..errors import UserError

EARLIER_NAMES = {"judge_max_nonsense": "judge_max_invalid_rate"}
TRL_NAMES = {  # of TrainingArguments and of TRL's trainers; only where the meaning is the same
    "model_name_or_path": "model",
    "dataset_name": "prompts",
    "output_dir": "out",
    "max_completion_length": "max_new_tokens",
    "num_generations": "responses_per_prompt",
    "num_generations_eval": "eval_samples",
    "attn_implementation": "attention",
    "lora_r": "lora_rank",
}
OTHER_NAMES = {**EARLIER_NAMES, **TRL_NAMES, "algorithm": "objective"}
OTHER_VALUES = {"objective": ALIASES, "labels": {"bits": "sampled"}}

# TRL's names without an option that means the same, and what to use instead
_BATCHES = "--tokens_per_microbatch sets the memory of a step, --batch_pairs its batch"
_EPOCHS = "--iterations sets the policy updates, --epochs_auxiliary and --epochs_policy the passes over their pairs"
_LENGTHS = "prompts are never cut off: --max_new_tokens limits responses, --skip_bad_prompts skips long prompts"
_ORACLES = "--oracle reward-model --oracle_model MODEL asks a reward model (docs/oracles.md has other oracles)"
_EVALUATION = "held-out prompts are evaluated at the end of a run: see --eval_samples and --eval_prompts"
_CHECKPOINTS = "--checkpoint_steps and --checkpoint_minutes save the state of a fit"
_METRICS = "every optimizer step is recorded in metrics.jsonl: see --report_to"
_ADAMW = "--optimizer chooses AdamW with plain or quantised moments: see also --learning_rate and --weight_decay"
_PRECISION = "--weights sets the precision of the weights, --dtype that of the computation"
_ADAPTERS = "--lora_rank trains LoRA adapters; see also --lora_alpha and --lora_targets"
_NOT_QUANTISED = "weights are not quantised; --lora_rank trains LoRA adapters over a frozen model"
_SEVERAL_GPUS = "start under torchrun to use several GPUs (docs/distributed.md)"
_UPLOAD = "--push_to_hub ORG/NAME uploads the last policy to this repository"
INSTEAD = {
    "per_device_train_batch_size": _BATCHES,
    "gradient_accumulation_steps": _BATCHES,
    "per_device_batch_size": _BATCHES,
    "per_device_eval_batch_size": "--sampling_batch_size sets the responses generated at the same time",
    "generation_batch_size": "--sampling_batch_size sets the responses generated at the same time",
    "num_train_epochs": _EPOCHS,
    "max_steps": _EPOCHS,
    "num_iterations": _EPOCHS,
    "lr": "--learning_rate sets the peak learning rate",
    "warmup_steps": "--warmup_ratio sets the share of a fit's steps with a rising learning rate",
    "lr_scheduler_type": "the learning rate follows a cosine after --warmup_ratio",
    "max_length": _LENGTHS,
    "max_prompt_length": _LENGTHS,
    "torch_dtype": _PRECISION,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "use_liger_kernel": "--liger on",
    "use_cpu": "--device cpu",
    "reward_model_path": _ORACLES,
    "reward_funcs": _ORACLES,
    "judge": "--oracle judge --judge_url URL --judge_model MODEL asks a chat model",
    "loss_type": "--objective sets the algorithm and its loss",
    "ref_model_sync_steps": "--refresh_reference counts iterations",
    "sync_ref_model": "--refresh_reference counts iterations",
    "dataset_config": "--prompts takes org/name:split",
    "dataset_train_split": "--prompts takes org/name:split",
    "dataset_test_split": "--eval_prompts takes org/name:split",
    "eval_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "save_strategy": _CHECKPOINTS,
    "save_steps": _CHECKPOINTS,
    "save_total_limit": _CHECKPOINTS,
    "resume_from_checkpoint": "--resume --out DIR continues a run",
    "logging_steps": _METRICS,
    "logging_strategy": _METRICS,
    "logging_dir": "TensorBoard's files are in the folder tensorboard of the run directory: see --out",
    "hub_model_id": _UPLOAD,
    "hub_token": f"{_UPLOAD}; the token comes from HF_TOKEN or `hf auth login`",
    "model_revision": "download the revision, and give its directory as --model",
    "run_name": "the environment variable WANDB_NAME sets the name of a run in Weights & Biases",
    "optim": _ADAMW,
    "adam_beta1": _ADAMW,
    "adam_beta2": _ADAMW,
    "adam_epsilon": _ADAMW,
    "use_peft": _ADAPTERS,
    "lora_target_modules": "--lora_targets names the layers, with commas between them",
    "lora_dropout": "adapters have no dropout: the log-probs of a policy are not random",
    "load_in_4bit": _NOT_QUANTISED,
    "load_in_8bit": _NOT_QUANTISED,
    "use_vllm": "--sampler vllm samples with vLLM (docs/sampling.md)",
    "deepspeed": _SEVERAL_GPUS,
    "fsdp": _SEVERAL_GPUS,
}

INSTEAD_OF_ALL = {"ddp_": _SEVERAL_GPUS, "fsdp_": _SEVERAL_GPUS}  # by the beginning of a name

# Options of earlier versions that chose a variant of ONPO, and had no effect on other algorithms; the default first
VARIANTS = {"second_fit": Literal["chained", "direct"], "fit_start": Literal["anchor", "policy"]}
_ONPO = {
    "onpo": {"second_fit": "chained", "fit_start": "anchor"},
    "onpo_direct": {"second_fit": "direct", "fit_start": "anchor"},
    "onpo_from_policy": {"second_fit": "chained", "fit_start": "policy"},
    "onpo_direct_from_policy": {"second_fit": "direct", "fit_start": "policy"},
}


class CanonicalFlags(NamedTuple):
    """A command line with the names that options have now."""

    flags: list[str]
    written: dict[str, str]  # option → its name in the command line, where that is another


def canonical_name(name: str) -> str:
    """Returns the name of the option that has this name or this other name."""
    return OTHER_NAMES.get(name, name)


def instead_of(name: str) -> str:
    """Returns what to use instead of an option of TRL that has no counterpart; "" for any other name."""
    return INSTEAD.get(name) or next((hint for start, hint in INSTEAD_OF_ALL.items() if name.startswith(start)), "")


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Replaces dashes by underscores in the names of flags: --learning-rate becomes --learning_rate."""
    return [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), one) for one in argv]


def canonical_flags(argv: Sequence[str]) -> CanonicalFlags:
    """Replaces other names of options, and other names of their values, in a command line.

    Raises:
        UserError: for an option of TRL without one here that means the same, which says what to use; and for two names
            of one option with different values.
    """
    flags: list[str] = []
    given: dict[str, tuple[str, str]] = {}  # option → its name in the command line, and its value
    written: dict[str, str] = {}
    option = ""  # whose value comes next
    for argument, following in zip(argv, [*argv[1:], ""]):
        if not argument.startswith("--"):
            flags.append(OTHER_VALUES.get(option, {}).get(argument, argument))
            option = ""
            continue
        typed, equals, value = argument[2:].partition("=")
        typed, dot, key = typed.partition(".")  # --judge_request.key
        if hint := instead_of(typed):
            raise UserError(f"there is no option --{typed}: {hint}")
        name = canonical_name(typed)
        value = OTHER_VALUES.get(name, {}).get(value, value)
        flags.append(f"--{name}{dot}{key}{equals}{value}")
        option = "" if equals else name
        now = value if equals else OTHER_VALUES.get(name, {}).get(following, following)
        other, before = given.get(name, (typed, now))
        if other != typed and before != now:
            raise UserError(f"--{other} and --{typed} are names of one option, here {before!r} and {now!r}: give one")
        given[name] = (typed, now)
        if typed != name:
            written[name] = typed
    return CanonicalFlags(flags, written)


def canonical_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces other names of options and of their values; ``VARIANTS`` stay."""
    renamed = {canonical_name(name): value for name, value in options.items()}
    for name, other_values in OTHER_VALUES.items():
        if isinstance(renamed.get(name), str):
            renamed[name] = other_values.get(renamed[name], renamed[name])
    return renamed


def fold_variants(options: Mapping[str, Any], layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the options without ``VARIANTS``, and with the objective that they stand for.

    Args:
        layers: where the objective and the variants were given, such as files and then flags; a later layer overrides
            an earlier one. A variant changes objectives of ONPO alone. The objective ``onpo`` leaves variants as they
            are, as in earlier versions; the name of a variant overrides those of earlier layers.
    """
    objective, variants = options.get("objective", "onpo"), {}
    for layer in layers:
        if (given := layer.get("objective")) is not None:
            objective = given
            if objective in _ONPO and objective != "onpo":
                variants = {}
        variants |= {name: layer[name] for name in VARIANTS if layer.get(name) is not None}
    folded = {name: value for name, value in options.items() if name not in VARIANTS}
    if variants and objective in _ONPO:
        wanted = _ONPO[objective] | variants
        objective = next(name for name, variant in _ONPO.items() if variant == wanted)
    if "objective" in options or objective != "onpo":
        folded["objective"] = objective
    return folded


def names_in_words(names: Iterable[str]) -> str:
    """Returns "--other for --option, …" for a help text."""
    return ", ".join(f"--{name} for --{OTHER_NAMES[name]}" for name in names)
