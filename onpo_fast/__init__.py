"""Aligning language models to general preferences by self-play: ONPO (arXiv 2502.16852), fast.

>>> from onpo_fast import fused_linear_pair_loss, linear_logprobs, objectives
"""

from . import objectives
from .loss import PairLossOutput, fused_linear_pair_loss, linear_logprobs

__version__ = "0.1.0"
__all__ = ["PairLossOutput", "fused_linear_pair_loss", "linear_logprobs", "objectives"]
