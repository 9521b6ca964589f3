"""Measures one fit of a large random model; ``python -m bench training`` runs it in a process of its own.

    python -m bench.fits ARGUMENTS

ARGUMENTS is a JSON object with the arguments of ``large``. The last line of the output is its result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from onpo_fast.batches import plan_steps
from onpo_fast.config import Config
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.fit import fit
from onpo_fast.loss import PairLossOutput, choose_backend
from onpo_fast.models import scoring
from onpo_fast.models.execution import apply_liger, checkpoint_layers, without_cudnn_attention
from onpo_fast.models.layouts import choose_layout
from onpo_fast.models.policy import Policy, score
from onpo_fast.objectives import Objective, Onpo
from onpo_fast.out_of_memory import is_out_of_memory

from .kernels import surroundings
from .memory import Gauge
from .peers import materialised
from .timing import Spread


@dataclass(frozen=True)
class Workload:
    """Configuration of a Llama, and the number of tokens of each prompt and response."""

    model: dict[str, int]
    prompt: int
    response: int

    @property
    def layers(self) -> int:
        return self.model["num_hidden_layers"]

    def config(self, layers: int) -> LlamaConfig:
        return LlamaConfig(**{"tie_word_embeddings": False, **self.model, "num_hidden_layers": layers})

    def parameters(self, layers: int) -> int:
        with torch.device("meta"):
            return LlamaForCausalLM(self.config(layers)).num_parameters()


WORKLOADS = {
    "llama3-8b": Workload(
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        prompt=64,
        response=1024,
    ),
    "llama3.2-1b": Workload(
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        prompt=64,
        response=1024,
    ),
    "tiny": Workload(
        {
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        prompt=8,
        response=16,
    ),
}

LOSSES = ("triton", "torch", "materialised")

# Bytes per parameter, as with --weights bf16-sr: 8B parameters fit in 80 GB.
PARAMETER_BYTES = {"weights": 2, "gradients": 2, "moments": 4}
USABLE = 0.97  # usable share of the free memory; fragmentation takes the rest


def large(loss: str, shape: str, pairs: int, steps: int, device: str, layers: int | None = None) -> dict[str, Any]:
    """Measures seconds and bytes of ``steps`` optimizer steps after a first one, with ``pairs`` pairs per micro-batch.

    ``layers`` is the model's number of layers; by default as many of the workload's as are expected to fit in memory.
    """
    where, form = torch.device(device), WORKLOADS[shape]
    if reason := _absent("torch" if loss == "materialised" else loss, where):
        return {"status": "absent", "reason": reason}
    layers = layers or _layers_that_fit(form, where)
    count = form.parameters(layers)
    row: dict[str, Any] = {
        "environment": surroundings(where),
        "layers": layers,
        "of_layers": form.layers,
        "parameters": count,
        "expected_bytes": {part: size * count for part, size in PARAMETER_BYTES.items()},
    }
    gauge = Gauge(where)
    before, marks = gauge.held(), Marks(gauge)
    try:
        policy = random_policy(form, layers, where)
        weights = gauge.held() - before
        laps, last = _measured_fit(policy, form, pairs, steps, loss, marks)
    except (torch.OutOfMemoryError, UserError) as error:
        if not is_out_of_memory(error.__cause__ or error):
            raise
        return row | {"status": "out of memory", "reason": f"{marks.phase}: {error}".split("\n")[0][:300]}
    held, peak, rest = marks.held, marks.peak, marks.held["rest"]
    return row | {
        "status": "measured",
        "attention": policy.model.config._attn_implementation,
        "layout": policy.layout,
        "seconds": Spread.of(laps)._asdict(),
        "pairs_per_second": pairs / Spread.of(laps).median,
        "loss_last": last,
        "bytes": {
            "weights": weights,
            "gradients": held["backward"] - rest,
            "moments": rest - before - weights,
            "kept by the forward pass": held["forward"] - rest,
            "loss": peak["loss"] - held["forward"],
            "in the optimizer's step": peak["optimizer"] - held["backward"],
        },
        "peak_bytes": {phase: peak[phase] - before for phase in Marks.PHASES},
    }


def _absent(backend: str, device: torch.device) -> str | None:
    try:
        choose_backend(backend, device, torch.bfloat16)
    except ValueError as error:
        return str(error)
    return None


def _layers_that_fit(shape: Workload, device: torch.device) -> int:
    if device.type != "cuda":
        return shape.layers
    size = sum(PARAMETER_BYTES.values())
    one = shape.parameters(2) - shape.parameters(1)
    room = USABLE * torch.cuda.mem_get_info(device)[0] / size - (shape.parameters(1) - one)
    return max(1, min(shape.layers, int(room // one)))


def random_policy(shape: Workload, layers: int, device: torch.device) -> Policy:
    """Makes a policy as ``loading.load`` does with --weights bf16-sr, but with random weights, on the device.

    It has no tokenizer, since the tokens are random.
    """
    set_seed(0)
    without_cudnn_attention()
    with device:
        model = AutoModelForCausalLM.from_config(shape.config(layers), dtype=torch.bfloat16)
    checkpoint_layers(model)
    apply_liger(model, device, "auto")
    policy = Policy(model, None, device, torch.bfloat16, "separate")
    choose_layout(policy, "auto", "the random model")
    return policy


def _measured_fit(
    policy: Policy, shape: Workload, pairs: int, steps: int, loss: str, marks: Marks
) -> tuple[list[float], float | None]:
    """Seconds of each step after the first, which compiles and allocates the moments; and the last normalised loss."""
    groups = _random_groups(shape, pairs)
    tokens = (
        2 * pairs * (shape.prompt + shape.response)
    )  # more than all rows together, so that there is one micro-batch
    config = Config(
        batch_pairs=pairs,
        tokens_per_microbatch=tokens,
        gradient_checkpointing=True,
        learning_rate=5e-7,  # the paper's
        loss_backend="torch" if loss == "materialised" else loss,
    )
    draw = torch.Generator().manual_seed(1)
    anchor = [own + torch.randn(2, generator=draw) for own in score(policy, groups, tokens)]
    batches = plan_steps([Pair(g, 0, 1, 1.0) for g in range(pairs)], steps + 1, pairs, [0])
    ends: list[float] = []
    losses: list[float | None] = []

    def on_step(metrics: dict[str, float | None]) -> None:
        if policy.device.type == "cuda":  # waits for the optimizer's step
            torch.cuda.synchronize(policy.device)
        ends.append(time.perf_counter())
        losses.append(metrics["loss_normalised"])
        marks.end("rest", first=len(ends) == 1)

    with marks.of(policy.model), replaced_loss(loss):
        fit(policy, groups, batches, anchor, Onpo(eta=config.eta), config, on_step)
    return [b - a for a, b in pairwise(ends)], losses[-1]


def _random_groups(shape: Workload, count: int) -> list[Group]:
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(shape.model["vocab_size"], (length,), generator=draw).tolist()

    return [
        Group([], tokens(shape.prompt), [Response("", tokens(shape.response), "length", 0.0) for _ in range(2)])
        for _ in range(count)
    ]


@contextmanager
def replaced_loss(loss: str) -> Iterator[None]:
    """Makes ``fit`` call ``materialised_pair_loss`` if ``loss`` is "materialised", and changes nothing else."""
    if loss != "materialised":
        yield
        return
    with patch.object(scoring, "fused_linear_pair_loss", materialised_pair_loss):
        yield


def materialised_pair_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,), on the CPU
    pairs: Tensor,  # (P, 2)
    *,
    objective: Objective,
    ref_logps: Tensor,  # (S,)
    preference: Tensor,  # (P,)
    **_: object,
) -> PairLossOutput:
    """The straightforward loss: logits in bf16, their log-softmax in float32, gradients by autograd."""
    logps = materialised(hidden, weight, targets).double()
    sums = torch.stack([part.sum() for part in logps.split(cu_seqlens.diff().tolist())])
    winner, loser = pairs.to(hidden.device).T
    ratio = sums - ref_logps
    margins = ratio[winner] - ratio[loser]
    loss = objective.loss(margins, preference).mean()
    return PairLossOutput(loss, sums.detach(), ref_logps, margins.detach())


class Marks:
    """Bytes of memory per phase of an optimizer step: held at its end, and the peak during it.

    Phases are observed through hooks of the model and the optimizer. "rest" is the time between two steps.
    """

    PHASES = ("forward", "loss", "backward", "optimizer")

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.phase = "start"  # the current phase
        self.held: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        def forward_ended(module: nn.Module, arguments: tuple, output: Any) -> None:
            if torch.is_grad_enabled():  # the fit also runs the model without gradients, to check it
                self.end("forward")
                output.last_hidden_state.register_hook(lambda gradient: self.end("loss"))

        handles = [
            model.base_model.register_forward_hook(forward_ended),
            register_optimizer_step_pre_hook(lambda *_: self.end("backward")),
            register_optimizer_step_post_hook(lambda *_: self.end("optimizer")),
        ]
        self.gauge.reset()
        self.phase = "forward"
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end(self, phase: str, first: bool = False) -> None:
        """Records the end of a phase. ``first`` discards what was recorded before, at the end of the first step."""
        if first:
            self.held.clear()
            self.peak.clear()
        self.held[phase] = max(self.held.get(phase, 0), self.gauge.held())
        self.peak[phase] = max(self.peak.get(phase, 0), self.gauge.peak())
        self.gauge.reset()
        around = (*self.PHASES, "rest")
        self.phase = around[(around.index(phase) + 1) % len(around)]


if __name__ == "__main__":
    print("\n" + json.dumps(large(**json.loads(sys.argv[1]))))
