"""Inputs of the benchmark: preference groups for the heads of policy and reference, in the shapes of real models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from onpo_fast import linear_logprobs
from onpo_fast.objectives import Dpo, Objective, Onpo

from .inputs import text_inputs

ONPO = Onpo(eta=1.0)
DPO = Dpo(beta=0.1)  # for the peer that has no ONPO loss

MODELS = {  # H and V of the LM head
    "smollm2": (576, 49152),  # SmolLM2-135M
    "llama3-8b": (4096, 128256),
    "qwen2.5-7b": (3584, 152064),
    "qwen3-8b": (4096, 151936),
    "gemma3-4b": (2560, 262208),
}


@dataclass(frozen=True)
class Shape:
    """Size of a problem: groups of responses of equal length, and the head. All pairs of a group are in the loss."""

    model: str
    groups: int
    responses: int  # per group
    tokens: int  # per response
    features: int  # H
    vocabulary: int  # V
    text: bool = False  # whether hidden states and head are those of the real model on real text, or random

    @classmethod
    def of(cls, model: str, groups: int, responses: int, tokens: int, text: bool = False) -> Shape:
        return cls(model, groups, responses, tokens, *MODELS[model], text)

    @property
    def name(self) -> str:
        return f"{self.model}{'-text' * self.text}-{self.groups}x{self.responses}x{self.tokens}"

    @property
    def rows(self) -> int:
        """N, the number of response tokens."""
        return self.groups * self.responses * self.tokens

    @property
    def gemm_flops(self) -> int:
        """FLOP of one product through the head, 2·N·H·V."""
        return 2 * self.rows * self.features * self.vocabulary

    def pairs(self) -> Tensor:
        """All pairs of all groups, (P, 2) int64; the earlier response is the winner."""
        within = list(combinations(range(self.responses), 2))
        return torch.tensor(
            [(g + w, g + x) for g in range(0, self.groups * self.responses, self.responses) for w, x in within]
        )


TARGET = Shape.of("qwen3-8b", 4, 2, 1024)  # the shape that the targets are about
SMALL_HEAD = Shape.of("smollm2", 4, 2, 1024)  # with short sums and few tiles, most of the time is the epilogue
TINY = Shape("tiny", 2, 2, 40, features=64, vocabulary=520)

# In order of importance, in case the time is too short for all.
GPU_SHAPES = (
    TARGET,
    Shape.of("smollm2", 4, 2, 1024, text=True),
    Shape.of("llama3-8b", 4, 2, 1024),
    Shape.of("llama3-8b", 1, 8, 1024),
    Shape.of("gemma3-4b", 4, 2, 1024),
    Shape.of("qwen2.5-7b", 4, 2, 1024),
    Shape.of("llama3-8b", 2, 2, 512),
    Shape.of("llama3-8b", 4, 2, 4096),
    Shape.of("llama3-8b", 4, 2, 8192),
    Shape.of("llama3-8b", 4, 2, 2048),
    SMALL_HEAD,
)
CPU_SHAPES = (
    Shape.of("smollm2", 4, 2, 256, text=True),
    Shape.of("smollm2", 1, 2, 1024),
    Shape.of("smollm2", 1, 8, 256),
    Shape.of("smollm2", 2, 2, 256),
    Shape.of("smollm2", 4, 2, 512),
)
SHAPES = {shape.name: shape for shape in (*GPU_SHAPES, *CPU_SHAPES, TINY)}


@dataclass
class Problem:
    """Seeded inputs. The reference is close to the policy, as in training; otherwise margins would be 1000 nats."""

    shape: Shape
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    ref_hidden: Tensor  # (N, H)
    ref_weight: Tensor  # (V, H)
    targets: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (S+1,) int32, on the CPU
    pairs: Tensor  # (P, 2) int64, on the CPU

    @classmethod
    def make(
        cls,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
        inputs: Path | None = None,
    ) -> Problem:
        """Draws inputs in float32 and rounds them to ``dtype``. ``inputs`` is a file with those of the text shapes.

        Raises:
            Unavailable: if the shape needs the real model, and it cannot be loaded.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, scale: float) -> Tensor:
            return torch.randn(rows, shape.features, generator=generator, device=device) * scale

        if shape.text:
            hidden, weight, targets = text_inputs(shape.rows, shape.tokens, device, inputs)
        else:
            # Hidden states have the scale of a final norm's output; logits have standard deviation 2, as in a model.
            hidden, weight = normal(shape.rows, 1), normal(shape.vocabulary, 2 / shape.features**0.5)
            targets = torch.randint(shape.vocabulary, (shape.rows,), generator=generator, device=device)
        ref_hidden = (hidden + normal(shape.rows, 0.02 * float(hidden.std()))).to(dtype)
        hidden = hidden.to(dtype)
        ref_weight = (weight + normal(shape.vocabulary, 0.02 * float(weight.std()))).to(dtype)
        weight = weight.to(dtype)
        cu_seqlens = torch.arange(0, shape.rows + 1, shape.tokens, dtype=torch.int32)
        return cls(shape, hidden, weight, ref_hidden, ref_weight, targets, cu_seqlens, shape.pairs())

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @cached_property
    def ref_logps(self) -> Tensor:
        """Summed log-probs under the anchor, (S,) float64, for tasks that cache them. Callers may assign exact ones."""
        with torch.no_grad():
            return self.sums(linear_logprobs(self.ref_hidden, self.ref_weight, self.targets, backend="torch"))

    @cached_property
    def device_pairs(self) -> Tensor:
        """Pairs on the device of the inputs, (P, 2) int64."""
        return self.pairs.to(self.device)

    def sums(self, token_logps: Tensor) -> Tensor:
        """Sums token log-probs over each response: (N,) -> (S,) float64, nats."""
        return token_logps.double().view(-1, self.shape.tokens).sum(1)

    def margins(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """Differences of log-ratios, winner minus loser: (S,), (S,) -> (P,), nats."""
        ratio = logps - ref_logps
        winner, loser = self.device_pairs.T
        return ratio[winner] - ratio[loser]

    def loss(self, logps: Tensor, ref_logps: Tensor, objective: Objective = ONPO) -> Tensor:
        """Mean loss over pairs, for peers that compute log-probs only: (S,), (S,) -> scalar."""
        margins = self.margins(logps, ref_logps)
        return objective.loss(margins, torch.ones_like(margins)).mean()
