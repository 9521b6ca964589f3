"""What is measured: a batch of response pairs, policy and reference heads, one forward and backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ETA = 1.0


@dataclass(frozen=True)
class Shape:
    """Pairs of two responses of equal length through a head."""

    name: str
    pairs: int
    tokens: int  # of one response
    features: int  # H
    vocabulary: int  # V

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.tokens

    @property
    def gemm_flops(self) -> int:
        """Of one product through the head: 2·N·H·V. Policy 3 (logits, dX, dW) and reference 1 is the floor."""
        return 2 * self.rows * self.features * self.vocabulary


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2-4x2x256", pairs=4, tokens=256, features=576, vocabulary=49152),
        Shape("smollm2-1x2x1024", pairs=1, tokens=1024, features=576, vocabulary=49152),
    )
}


@dataclass
class Problem:
    """Seeded inputs. Hidden states have the scale of a final norm's output; logits then spread as a model's do."""

    shape: Shape
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    ref_hidden: Tensor  # (N, H)
    ref_weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    cu_seqlens: Tensor  # (S+1,) int32

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int, scale: float) -> Tensor:
            return (torch.randn(rows, shape.features, generator=generator) * scale).to(dtype)

        n, v = shape.rows, shape.vocabulary
        scale = 2 / shape.features**0.5  # logits of standard deviation 2
        hidden, weight = normal(n, 1), normal(v, scale)
        # the reference is near the policy, as an anchor is: otherwise the margins are noise of a thousand nats
        ref_hidden, ref_weight = hidden + normal(n, 0.02), weight + normal(v, 0.02 * scale)
        targets = torch.randint(v, (n,), generator=generator)
        cu_seqlens = torch.arange(0, n + 1, shape.tokens, dtype=torch.int32)
        return cls(shape, hidden, weight, ref_hidden, ref_weight, targets, cu_seqlens)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states and head that ask for gradients, sharing the problem's memory."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


def squared_margin_loss(token_logps: Tensor, ref_token_logps: Tensor, shape: Shape) -> Tensor:
    """ONPO's loss from per-token log-probs, for the peers that stop there."""
    ratio = (token_logps - ref_token_logps).view(-1, shape.tokens).sum(1)
    return (ratio[0::2] - ratio[1::2] - ETA / 2).square().mean()
