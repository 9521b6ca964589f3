"""Aligning language models to general preferences by self-play: ONPO (arXiv 2502.16852), fast.

>>> from onpo_fast import fused_linear_pair_loss, linear_logprobs, objectives
"""

import os
import sys

# ``python -m onpo_fast.COMMAND`` puts the current folder first on the path, as if its files were installed. It may be a
# run's folder, from anybody: its numpy.py is not to be imported (as with python -P; docs/trust.md). While Python imports
# this package for -m, argv[0] is "-m", and the command's name is that much before the end of the original line.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].partition(".")[0].endswith(__name__):
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.path.abspath(os.curdir)):  # not in 3.10
        del sys.path[0]

from . import objectives
from .loss import PairLossOutput, fused_linear_pair_loss, linear_logprobs

__version__ = "0.1.0"
__all__ = ["PairLossOutput", "fused_linear_pair_loss", "linear_logprobs", "objectives"]
