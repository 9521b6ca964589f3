"""Aligning language models to general preferences by self-play: ONPO (arXiv 2502.16852), fast.

>>> from onpo_fast import fused_linear_pair_loss, linear_logprobs, objectives
"""

import os
import sys

# ``python -m onpo_fast.COMMAND`` puts the current folder first on the path. The folder may be a stranger's run, whose
# numpy.py must not be imported (docs/trust.md), so it is taken off the path, as ``python -P`` does. While Python
# imports this package for -m, argv[0] is "-m", and orig_argv has the module's name before the same other arguments.
# The console script ``onpo-fast`` has its own folder on the path.
_is_module = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].partition(".")[0].endswith(__name__)
_is_script = os.path.splitext(os.path.basename("".join(sys.argv[:1])))[0] == "onpo-fast"
if (
    _is_module
    and not getattr(sys.flags, "safe_path", False)  # new in Python 3.11
    and sys.path[0] == os.path.abspath(os.curdir)
):
    del sys.path[0]
# Ctrl-C while a command imports its modules ends it as it would another program; ``errors.command`` takes over.
if _is_module or _is_script:
    import signal  # not before the path is safe

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
# matplotlib reads a matplotlibrc in the current folder when it is imported: it is imported from another folder.
if (_is_module or _is_script) and os.path.lexists("matplotlibrc"):
    _here = os.open(".", os.O_RDONLY)
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    try:
        import matplotlib  # noqa: F401
    finally:
        os.fchdir(_here)
        os.close(_here)
# OpenMP threads that wait for each other spin for a while (libgomp, which torch's CPU wheels use: 300,000 turns) before
# they sleep. Beside another busy process that is most of the time of a run. 10,000 turns cost nothing on an idle
# machine, and change no result. It must be said before torch is imported.
if (_is_module or _is_script) and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# transformers imports torchao where it is installed, which warns of its extensions for other devices, and of its own
# use of torch. Nothing here needs those.
if _is_module or _is_script:
    import logging  # not before the path is safe

    for _name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(_name).setLevel(logging.ERROR)

from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:
    from . import objectives
    from .loss import PairLossOutput, fused_linear_pair_loss, linear_logprobs

__version__ = "0.1.0"
__all__ = ["PairLossOutput", "fused_linear_pair_loss", "linear_logprobs", "objectives"]


def __getattr__(name: str) -> object:
    """Imports the loss, and with it torch, when it is first asked for: a command's help does not wait for them."""
    from importlib import import_module

    if name == "objectives":
        return import_module(".objectives", __name__)
    if name in __all__:
        return getattr(import_module(".loss", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
