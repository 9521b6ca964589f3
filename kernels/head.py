"""The LM head: from a hidden state to logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """logit = softcap·tanh(logit_scale·(h·w + b)/softcap) / temperature; without a softcap there is no tanh.

    The order is the one that transformers uses: Cohere and Granite scale, Gemma caps, the sampler divides by its
    temperature last.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """(inner, outer): logit = outer·tanh(inner·(h·w + b)), or without a softcap outer·(h·w + b)."""
        if self.softcap is None:
            return 1.0, self.logit_scale / self.temperature
        return self.logit_scale / self.softcap, self.softcap / self.temperature

    def logits(self, hidden: Tensor) -> Tensor:
        """All the logits: (N, H) -> (N, V), in the dtype of the operands. Differentiable."""
        logits = hidden @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits / self.temperature
