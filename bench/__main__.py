"""python -m bench COMMAND [--help]

kernels     time, memory and error of the loss beside its peers: results, tables and plots
compile     registers, stack and shared memory of every Triton kernel, compiled for GPUs that need not be here
checks      the same bits from repeated runs, whatever lay in the memory before
sweep       variants of the kernels, each beside what was predicted for it
survey      the machine: versions, products with float32 results, bandwidth and TFLOP/s
plots       draws a results file again
summary     prints a results file of `make gpu-check` as tables
crash_test  runs killed and resumed, runs with damaged files: do they end with the same bits?
families    tiny models of every family, through all that a run does: docs/models.md
training    a run of the trainer and fits of a Llama-3-8B: tokens/s, pairs/s, memory by part
inputs      puts the real model's hidden states and head in a file, for machines without the model
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

# each a module with ``arguments(parser)`` and ``main(options)``
COMMANDS = (
    "kernels",
    "compile",
    "checks",
    "sweep",
    "survey",
    "plots",
    "summary",
    "crash_test",
    "families",
    "training",
    "inputs",
)


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: there is no command {argv[0]}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = import_module(f"bench.{argv[0]}")  # a command's packages are needed by nobody else
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {argv[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(parser)
    return module.main(parser.parse_args(argv[1:]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
