"""Write the report of a run: one HTML file that opens anywhere, without a network.

    python -m onpo_fast.report DIR                        # DIR/report.html
    python -m onpo_fast.report DIR --picture plots.png    # also its main plots as a picture

The page answers, in this order: did it work, is it healthy, where did the time go, what does the policy say now, how
was the run started. A run may be unfinished: what is not recorded yet is named. The same files give the same bytes.

A run may come from a stranger: nothing in it is executed or sent, damaged lines are skipped and counted, and text of a
model is escaped. The page is a few MB at most; it says what it leaves out, which is in the run's files.
"""

from __future__ import annotations

from pathlib import Path

from .arguments import CommandParser, program
from .errors import command, one_line
from .reports.reading import is_evaluation
from .reports.run_report import write_picture, write_report

__all__ = ["is_evaluation", "main", "write_picture", "write_report"]


@command
def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog=program("report"), description="Write the report of a run, DIR/report.html, from its files."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="run directory, of a finished or unfinished run")
    parser.add_argument(
        "--picture", metavar="FILE", type=Path, help="also draw the main plots into this .png or .svg file"
    )
    options = parser.parse_args(argv)
    print(one_line(str(write_report(options.directory))))
    if options.picture:
        print(one_line(str(write_picture(options.directory, options.picture))))


if __name__ == "__main__":
    main()
