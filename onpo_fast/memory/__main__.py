"""Print the memory that a training step will take, by part, for a model, a GPU and a number of them.

    python -m onpo_fast.memory --model llama3-8b --gpus 1 --memory 80
    python -m onpo_fast.memory --config configs/paper-llama3.yaml --gpus 8 --memory 40

All options of training are accepted. No weights are read: a configuration is enough, and the shapes llama3-8b and
mistral-7b need no file.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import Config
from ..config.combined import DEFAULTS_BY_DEVICE
from ..config.command_line import parse_with_sources
from ..device_memory import device_bytes, resident_bytes
from ..errors import CommandParser, UserError, command, program
from ..models.precision import SMALL_LEARNING_RATE
from ..run.tracking import console
from .counting import CannotCount
from .plan import (
    ACTIVATIONS,
    ALLOCATOR,
    GATHERED,
    GRADIENTS,
    HEAD,
    LOSS,
    PROCESS,
    STATES,
    WEIGHTS,
    Plan,
    Planner,
    Settings,
)
from .shapes import SHAPES, builder, cache_bytes_per_token, read_config
from .watch import advice, longest_group

GIB = 2**30
HEADINGS = {GRADIENTS: "grads", ACTIVATIONS: "activ.", HEAD: "head grad", GATHERED: "gathered"}
COLUMNS = (WEIGHTS, GRADIENTS, STATES, GATHERED, ACTIVATIONS, LOSS, HEAD, PROCESS, ALLOCATOR)


def settings_of(config: Config, gpu: bool, ranks: int = 1) -> Settings:
    """Returns the settings of a run with these options, ``--weights auto`` resolved by the learning rate alone."""
    weights = config.weights
    if weights == "auto":
        small = gpu and config.dtype != "float32" and config.learning_rate < SMALL_LEARNING_RATE
        weights = "bf16-sr" if small else "fp32"
    half = config.dtype == "bfloat16" or weights == "bf16-sr" or (gpu and config.dtype == "auto")
    return Settings(
        weights,
        config.optimizer,
        config.gradient_checkpointing,
        config.lora_rank,
        config.lora_targets,
        ranks,
        torch.bfloat16 if half else torch.float32,
        config.anchor == "live",
        config.loss_mode,
    )


def sampling_bytes(config: Config, settings: Settings, weights: int, cache: int | None, prompt_tokens: int) -> int:
    """Returns the bytes of a batch of responses at their longest: the whole model and the KV cache."""
    cast = weights // 2 if settings.weights == "fp32" and settings.compute_dtype != torch.float32 else 0
    return weights + cast + config.sampling_batch_size * (prompt_tokens + config.max_new_tokens) * (cache or 0)


def variants(settings: Settings) -> list[Settings]:
    """Returns the settings, and others to compare them with."""
    half = replace(settings, weights="bf16-sr", compute_dtype=torch.bfloat16)
    full = replace(settings, weights="fp32")
    rows = [settings, *(replace(one, optimizer="adamw", lora_rank=None) for one in (full, half))]
    quantised = [full] if settings.ranks > 1 else [full, half]
    rows += [replace(one, optimizer="adamw-8bit", lora_rank=None) for one in quantised]
    rows.append(replace(half, optimizer="adamw", lora_rank=settings.lora_rank or 16))
    return list(dict.fromkeys(rows))


def table(plans: list[Plan], sampling: list[int], usable: int) -> list[str]:
    """Returns the lines of a table of plans, in GiB."""
    parts = [part for part in COLUMNS if any(plan.at_peak.get(part) for plan in plans)]
    rows = [["", *(HEADINGS.get(part, part) for part in parts), "step", "sampling", "fits"]]
    for plan, sampled in zip(plans, sampling):
        sizes = [plan.at_peak.get(part, 0) for part in parts] + [plan.total, sampled]
        verdict = "yes" if max(plan.total, sampled) <= usable else "no"
        rows.append([_name(plan.settings), *(f"{size / GIB:.1f}" for size in sizes), verdict])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def _name(settings: Settings) -> str:
    return f"{settings.weights} {settings.optimizer}{f' LoRA {settings.lora_rank}' if settings.lora_rank else ''}"


@command
def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog=program("memory"),
        description=" ".join(__doc__.split("\n\n")[0].split())
        + f" --model may be {' or '.join(SHAPES)}, shapes that need no file. All options of training are accepted too.",
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs, or 0 for a CPU. Default: 1.")
    parser.add_argument("--memory", type=float, metavar="GIB", help="Memory of each in GiB. Default: 80; a CPU's own.")
    parser.add_argument(
        "--prompt_tokens", type=int, default=512, metavar="N", help="Tokens of the longest prompt. Default: 512."
    )
    own, rest = parser.parse_known_args(argv)
    for name, least in (("gpus", 0), ("memory", 1), ("prompt_tokens", 1)):
        if (value := getattr(own, name)) is not None and not value >= least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    parsed = parse_with_sources(rest)
    config = parsed.config
    if own.gpus and "sampling_batch_size" not in parsed.sources:
        config.sampling_batch_size = DEFAULTS_BY_DEVICE["sampling_batch_size"][0]
    report(config, own.gpus, own.memory, own.prompt_tokens, "tokens_per_microbatch" in parsed.sources)


def report(config: Config, gpus: int, memory: float | None, prompt_tokens: int, tokens_given: bool) -> None:
    """Prints the table, and what would fit if the settings do not."""
    model_config = read_config(config.model, config.trust_remote_code)
    device = torch.device("cuda" if gpus else "cpu")
    size = round(memory * GIB) if memory else 80 * GIB if gpus else device_bytes(device)
    planner = Planner(
        builder(model_config, config.model),
        masked=gpus == 0,
        device=device,
        backend="triton" if gpus and config.loss_backend == "auto" else {"auto": "torch"}.get(config.loss_backend),
        memory=size,
        baseline={} if gpus else {PROCESS: resident_bytes() or 0},
    )
    settings, group = (
        settings_of(config, gpus > 0, max(gpus, 1)),
        longest_group(config, prompt_tokens, config.max_new_tokens),
    )
    try:
        best = planner.largest(settings, group, config.tokens_per_microbatch) if tokens_given else None
        best = best or planner.choose_tokens(settings, group) or planner.largest(settings, group, 1)
        plans = [planner.largest(one, group, best.tokens) for one in variants(settings)]
    except CannotCount as error:
        raise UserError(f"the memory of {config.model} cannot be counted ({error})") from error
    cache = cache_bytes_per_token(model_config, settings.compute_dtype)
    whole = [plan.settings.shards * plan.at_peak[WEIGHTS] for plan in plans]
    sampled = [sampling_bytes(config, plan.settings, one, cache, prompt_tokens) for plan, one in zip(plans, whole)]
    where = f"{gpus} × {size / GIB:.0f} GiB" if gpus else f"a CPU with {size / GIB:.0f} GiB"
    how = "with" if settings.gradient_checkpointing else "without"
    console.print(f"{config.model} on {where}, {best.tokens} tokens a micro-batch, {how} gradient checkpointing; GiB")
    console.print(*table(plans, sampled, planner.usable), sep="\n")
    console.print(
        f"sampling: {config.sampling_batch_size} responses of {config.max_new_tokens} tokens at once. fits: at most "
        f"{planner.usable / GIB:.1f} GiB" + (", which leaves room for CUDA and fragmentation" if gpus else "")
    )
    if not planner.fits(plans[0]):
        console.print(advice(planner, plans[0], group))


if __name__ == "__main__":
    main()
