"""The LM head: from a hidden state to logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

BITS = math.log2(math.e)  # in a nat: logits in bits are what exp2 takes


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
        """(inner, outer), float32 numbers: a logit in bits is outer·(h·w + b), or with a softcap
        outer·(1 − 2/(2^(inner·(h·w + b)) + 1)), which is the tanh.

        The rounding of ``outer`` is part of the model that the kernels compute: it multiplies the logits of target and
        vocabulary alike, so that a log-prob changes by at most 2⁻²⁴ of a difference of logits, not of a logit. (Where
        the kernels correct for a ``launch.lost_share``, the two are not rounded alike: then it is 2⁻²⁴ of a logit.) A
        scale of 0 is taken as the least number above, which makes a bias of −∞ a probability of 0 and not NaN.
        """
        if self.softcap is None:
            inner, outer = 0.0, self.logit_scale / self.temperature
        else:
            inner, outer = 2 * self.logit_scale / self.softcap, self.softcap / self.temperature
        least = float(np.finfo(np.float32).tiny)
        return float(np.float32(inner * BITS)), float(np.float32(outer * BITS)) or least

    def logits(self, hidden: Tensor) -> Tensor:
        """All the logits: (N, H) -> (N, V), in the dtype of the operands. Differentiable."""
        logits = hidden @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits / self.temperature
