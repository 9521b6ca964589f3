"""The LM head, which maps hidden states to logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

BITS = math.log2(math.e)  # bits in a nat; logits in bits are exponentiated by exp2


class Head(NamedTuple):
    """logit = softcap·tanh(logit_scale·(h·w + b)/softcap) / temperature; without a softcap there is no tanh.

    This is the order of transformers: Cohere and Granite scale their logits, Gemma caps them, and the sampler divides
    by its temperature last.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """The factors (inner, outer) of a logit in bits, rounded to float32.

        The logit is outer·(h·w + b), or with a softcap outer·(1 − 2/(2^(inner·(h·w + b)) + 1)), which is the tanh.

        Kernels use the rounded ``outer`` for the target and for the vocabulary alike, so that the rounding changes a
        log-prob by at most 2⁻²⁴ of a difference of logits, not of a logit. (With the correction by
        ``launch.lost_share`` the two are rounded differently, and it is 2⁻²⁴ of a logit.) A scale of 0 is replaced with
        the smallest positive number, so that a bias of −∞ gives a probability of 0 and not NaN.
        """
        if self.softcap is None:
            inner, outer = 0.0, self.logit_scale / self.temperature
        else:
            inner, outer = 2 * self.logit_scale / self.softcap, self.softcap / self.temperature
        least = float(np.finfo(np.float32).tiny)
        return float(np.float32(inner * BITS)), float(np.float32(outer * BITS)) or least

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute all logits: (N, H) -> (N, V), in the dtype of the operands. Differentiable."""
        logits = hidden @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits / self.temperature
