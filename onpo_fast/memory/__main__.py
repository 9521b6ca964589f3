"""Print the memory that a training step will take, by part, for a model, a GPU and a number of them.

    python -m onpo_fast.memory --model llama3-8b --gpus 1 --memory 80
    python -m onpo_fast.memory --config configs/paper-llama3.yaml --gpus 8 --memory 40

All options of training are accepted. No weights are read: a configuration is enough, and the shapes llama3-8b and
mistral-7b need no file.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..arguments import CommandParser, program
from ..config import Config, FitConfig, ModelConfig
from ..config.combined import DEFAULTS_BY_DEVICE
from ..config.command_line import parse_with_sources
from ..console import console
from ..device_memory import device_bytes, resident_bytes
from ..errors import UserError, command
from ..models.checkpoint import base_of
from ..models.optimizers import check_optimizer
from ..models.precision import choose_weights
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
    allowed,
)
from .shapes import SHAPES, builder, cache_bytes_per_token, read_config
from .watch import advice, longest_group

GIB = 2**30
HEADINGS = {GRADIENTS: "grads", ACTIVATIONS: "activ.", HEAD: "head grad", GATHERED: "gathered"}
COLUMNS = (WEIGHTS, GRADIENTS, STATES, GATHERED, ACTIVATIONS, LOSS, HEAD, PROCESS, ALLOCATOR)


SAMPLING = "no (sampling)"
# the most of an option: beyond them sizes overflow, or a plan takes minutes
MOST = {"gpus": 10**5, "memory": 10**6, "prompt_tokens": 10**6}


def settings_of_options(config: Config, weights: str, gpu: bool, ranks: int = 1) -> Settings:
    """Returns the settings of a run with these options and weights, which are no longer "auto"."""
    half = config.dtype == "bfloat16" or weights == "bf16-sr" or (gpu and config.dtype == "auto")
    return Settings(
        weights=weights,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        lora_rank=config.lora_rank,
        ranks=ranks,
        compute_dtype=torch.bfloat16 if half else torch.float32,
        live_anchor=config.anchor == "live",
        loss_mode=config.loss_mode,
        lora_targets=config.lora_targets,
    )


def resolve_weights(config: Config, planner: Planner, gpus: int) -> str:
    """Returns --weights of training with these options, "auto" resolved as on GPUs of the planner's memory."""
    if config.weights != "auto":
        return config.weights
    if not gpus:
        return "fp32"
    sections = config.section(ModelConfig), config.section(FitConfig)
    return choose_weights(*sections, planner.count_parameters, gpus, planner.memory)[0]


def sampling_weights(plan: Plan) -> int:
    """Returns the bytes of the whole model while it samples, and of its copy in the precision of the computation."""
    weights = plan.settings.shards * plan.at_peak[WEIGHTS]
    casts = plan.settings.weights == "fp32" and plan.settings.compute_dtype != torch.float32
    return weights + (weights // 2 if casts else 0)


def variants(settings: Settings) -> list[Settings]:
    """Returns the settings, and others to compare them with."""
    half = replace(settings, weights="bf16-sr", compute_dtype=torch.bfloat16)
    full = replace(settings, weights="fp32")
    rows = [settings, *(replace(one, optimizer="adamw", lora_rank=None) for one in (full, half))]
    quantised = [full] if settings.ranks > 1 else [full, half]
    rows += [replace(one, optimizer="adamw-8bit", lora_rank=None) for one in quantised]
    rows.append(replace(half, optimizer="adamw", lora_rank=settings.lora_rank or 16))
    return list(dict.fromkeys(rows))


def verdict(planner: Planner, plan: Plan, sampled: int) -> str:
    """Returns whether a plan and so many bytes of sampling fit, and what alone does not."""
    fits = [plan.total <= planner.usable, planner.loads(plan), sampled <= planner.usable]
    if all(fits):
        return "yes"
    return {(True, False, True): "no (loading)", (True, True, False): SAMPLING}.get(tuple(fits), "no")


def table(planner: Planner, plans: list[Plan], sampling: list[int]) -> list[str]:
    """Returns the lines of a table of plans and bytes of sampling, in GiB."""
    parts = [part for part in COLUMNS if any(plan.at_peak.get(part) for plan in plans)]
    rows = [["", *(HEADINGS.get(part, part) for part in parts), "step", "sampling", "fits"]]
    for plan, sampled in zip(plans, sampling):
        sizes = [plan.at_peak.get(part, 0) for part in parts] + [plan.total, sampled]
        rows.append([_name(plan.settings), *(f"{size / GIB:.1f}" for size in sizes), verdict(planner, plan, sampled)])
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
        if value is not None and value > MOST[name]:
            raise UserError(f"--{name} must be at most {MOST[name]}, not {value}")
    parsed = parse_with_sources(rest)
    config = parsed.config
    for name, (on_gpu, on_cpu) in DEFAULTS_BY_DEVICE.items():  # of the device that is asked about
        if name not in parsed.sources:
            setattr(config, name, on_gpu if own.gpus else on_cpu)
    if config.tokens_per_microbatch is not None and "tokens_per_microbatch" not in parsed.sources:
        config.tokens_per_microbatch = max(config.tokens_per_microbatch, config.max_new_tokens)
    report(config, own.gpus, own.memory, own.prompt_tokens)


def report(config: Config, gpus: int, memory: float | None, prompt_tokens: int) -> None:
    """Prints the table, and what would fit if the settings do not.

    Raises:
        UserError: if training refuses the settings on any device, or the memory of the model cannot be counted.
    """
    base = base_of(config.model)
    model_config = read_config(base, config.trust_remote_code)
    device = torch.device("cuda" if gpus else "cpu")
    size = round(memory * GIB) if memory else 80 * GIB if gpus else device_bytes(device)
    planner = Planner(
        builder(model_config, base),
        masked=gpus == 0,
        device=device,
        backend="triton" if gpus and config.loss_backend == "auto" else {"auto": "torch"}.get(config.loss_backend),
        memory=size,
        baseline={} if gpus else {PROCESS: resident_bytes() or 0},
    )
    group, tokens = longest_group(config, prompt_tokens, config.max_new_tokens), config.tokens_per_microbatch
    try:
        settings = settings_of_options(config, resolve_weights(config, planner, gpus), gpus > 0, max(gpus, 1))
        if allowed(settings) != settings:
            check_optimizer(settings.weights, settings.optimizer, settings.shards)
        best = planner.largest(settings, group, tokens) if tokens else planner.choose_tokens(settings, group)
        best = best or planner.largest(settings, group, 1)
        plans = [planner.largest(one, group, best.tokens) for one in variants(settings)]
    except CannotCount as error:
        raise UserError(f"the memory of {config.model} cannot be counted ({error})") from error
    cache = cache_bytes_per_token(model_config, settings.compute_dtype)
    response = (prompt_tokens + config.max_new_tokens) * (cache or 0)
    sampled = [sampling_weights(plan) + config.sampling_batch_size * response for plan in plans]
    where = f"{gpus} × {size / GIB:.0f} GiB" if gpus else f"a CPU with {size / GIB:.0f} GiB"
    how = "with" if settings.gradient_checkpointing else "without"
    console.print(f"{config.model} on {where}, {best.tokens} tokens a micro-batch, {how} gradient checkpointing; GiB")
    console.print(*table(planner, plans, sampled), sep="\n")
    console.print("the first row has these options; parts of a step are those when it takes the most")
    console.print(
        f"sampling: {config.sampling_batch_size} responses of {config.max_new_tokens} tokens at once. fits: at most "
        f"{planner.usable / GIB:.1f} GiB" + (", which leaves room for CUDA and fragmentation" if gpus else "")
    )
    console.print(
        f"loading and checks take {plans[0].loading / GIB:.1f} GiB"
        + (", on each GPU" if gpus > 1 else "")
        + ": then the whole model is float32"
    )
    for plan, size in zip(plans, sampled):
        if verdict(planner, plan, size) == SAMPLING:
            batch = (planner.usable - sampling_weights(plan)) // max(response, 1)  # 0 if unknown
            how = f"with --sampling_batch_size {batch}"
            if batch < 1:
                how = "with no --sampling_batch_size: each device has the whole model then"
            console.print(f"{_name(plan.settings)}: sampling fits {how}")
    if not planner.loads(plans[0]):
        console.print("no settings change what loading takes: take a smaller model or a larger device")
    elif plans[0].total > planner.usable:
        console.print(advice(planner, plans[0], group))


if __name__ == "__main__":
    main()
