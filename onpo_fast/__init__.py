"""Aligning language models to general preferences by self-play: ONPO (arXiv 2502.16852), fast.

>>> from onpo_fast import fused_linear_pair_loss, linear_logprobs, objectives
"""

import os
import sys

# ``python -m onpo_fast.COMMAND`` puts the current folder first on the path. It may be anybody's run directory: its
# numpy.py is not to be imported (docs/trust.md). As python -P does, the folder is taken off the path. While Python
# imports this package for -m, argv[0] is "-m"; orig_argv has the command's name before the same other arguments.
_is_command = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].partition(".")[0].endswith(__name__)
if (
    _is_command
    and not getattr(sys.flags, "safe_path", False)  # which Python 3.10 does not know
    and sys.path[0] == os.path.abspath(os.curdir)
):
    del sys.path[0]
# Nor is its matplotlibrc to be read, which matplotlib looks for in the current folder when it is imported.
if _is_command and os.path.lexists("matplotlibrc"):
    _here = os.open(".", os.O_RDONLY)
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    try:
        import matplotlib  # noqa: F401
    finally:
        os.fchdir(_here)
        os.close(_here)

from . import objectives  # noqa: E402
from .loss import PairLossOutput, fused_linear_pair_loss, linear_logprobs  # noqa: E402

__version__ = "0.1.0"
__all__ = ["PairLossOutput", "fused_linear_pair_loss", "linear_logprobs", "objectives"]
