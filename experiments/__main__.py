"""python -m experiments NAME [--help]

cyclic-lm   play a cyclic preference between openings of stories with a language model; measure its exact duality gap
selection   fit steps to the labels of selected pairs; measure their error
"""

from __future__ import annotations

from onpo_fast.errors import UserError, command, nearest

from .cyclic_lm import command_line as cyclic_lm
from .selection import command_line as selection

EXPERIMENTS = {"cyclic-lm": cyclic_lm.run, "selection": selection.run}


@command
def main(argv: list[str]) -> None:
    """Runs the experiment that the first argument names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] in EXPERIMENTS:
        EXPERIMENTS[argv[0]](argv[1:])
    else:
        raise UserError(f"there is no experiment {argv[0]}{nearest(argv[0], EXPERIMENTS) or ' (see --help)'}")


if __name__ == "__main__":
    main()
