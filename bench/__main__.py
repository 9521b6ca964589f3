"""python -m bench COMMAND [--help]

kernels     measure time, memory and error of the loss and of its peers; write results, tables and plots
compile     compile every Triton kernel for several GPU architectures and report registers, stack and shared memory
checks      check the loss for races and unwritten outputs: repeated runs must give the same bits
sweep       measure variants of the kernels and compare their times with predictions
survey      report the machine: versions, correctness of mixed-precision products, bandwidth and TFLOP/s
plots       draw the plots of a results file
summary     print a results file of `make gpu-check` as tables
crash_test  kill and resume runs, damage their files, and compare the final bits with an undisturbed run
families    compare tiny models of every family with plain transformers; write docs/models.md
precision   measure which share of a fit at a small learning rate each precision keeps
sampling    measure ways to sample against transformers' generate and vLLM: tokens/s, memory
training    measure fits against TRL's trainer, fits of a Llama-3-8B, or a run: pairs/s, tokens/s, memory
inputs      save the real model's hidden states and head to a file, for machines without the model
"""

from __future__ import annotations

import argparse
from importlib import import_module

from onpo_fast.arguments import CommandParser
from onpo_fast.errors import UserError, command

# Each is a module of this package with ``arguments(parser)`` and ``main(options)``.
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
    "precision",
    "sampling",
    "training",
    "inputs",
)


@command
def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if argv else 2)
    if argv[0] not in COMMANDS:
        raise UserError(f"there is no command {argv[0]}; there are {', '.join(COMMANDS)}")
    module = import_module(f"bench.{argv[0]}")  # imported here because some commands need packages that others do not
    parser = CommandParser(
        prog=f"python -m bench {argv[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(parser)
    raise SystemExit(module.main(parser.parse_args(argv[1:])))


if __name__ == "__main__":
    main()
