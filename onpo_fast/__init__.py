"""Aligning language models to general preferences by self-play: ONPO (arXiv 2502.16852), fast.

>>> from onpo_fast import fused_linear_pair_loss, linear_logprobs, objectives
"""

import os
import sys

# ``python -m onpo_fast.COMMAND`` puts the current folder first on the path. It may be anybody's run directory: its
# numpy.py is not to be imported (docs/trust.md). As python -P does, the folder is taken off the path. While Python
# imports this package for -m, argv[0] is "-m"; orig_argv has the command's name before the same other arguments.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].partition(".")[0].endswith(__name__)
    and not getattr(sys.flags, "safe_path", False)  # which Python 3.10 does not know
    and sys.path[0] == os.path.abspath(os.curdir)
):
    del sys.path[0]

from . import objectives
from .loss import PairLossOutput, fused_linear_pair_loss, linear_logprobs

__version__ = "0.1.0"
__all__ = ["PairLossOutput", "fused_linear_pair_loss", "linear_logprobs", "objectives"]
