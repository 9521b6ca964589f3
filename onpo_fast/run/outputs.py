"""The names of a run's outputs in its directory, and where its policies are."""

from __future__ import annotations

from pathlib import Path

from ..data import of_iterations
from ..errors import UserError
from ..journal import Journal
from ..models.resident import Source

INITIAL = "initial"  # folder of π_1, where it had to be converted
HELD_OUT = "heldout.jsonl"  # the held-out prompts, which do not change with their source
EVALUATION, RESPONSES = "evaluation.json", "evaluation_responses.jsonl"


def iteration_folder(t: int) -> str:
    """The folder of iteration t, counted from 1."""
    return f"iteration_{t:02d}"


def initial_policy(directory: Path, model: str, journal: Journal) -> Source:
    """Where π_1 is: in the run if it was converted and the journal says so, else at ``model``.

    Raises:
        UserError: if the one in the run is damaged.
    """
    return directory / INITIAL if is_whole(directory, INITIAL, journal) else model


def finished_policies(directory: Path, journal: Journal) -> dict[str, Path]:
    """π_2, π_3, … of a run, by name: those that its journal has. Other folders may be anybody's.

    Raises:
        UserError: if one is damaged.
    """
    found = of_iterations(directory, "policy")
    return {f"π_{t + 1}": path for t, path in found.items() if is_whole(directory, name_of(directory, path), journal)}


def is_whole(directory: Path, name: str, journal: Journal) -> bool:
    """Whether the journal has an output.

    Raises:
        UserError: if it has, and the output on disk is another.
    """
    if journal.damaged(name):
        raise UserError(f"{directory / name} is not what it was: train --resume makes it again")
    return journal.note(name) is not None


def name_of(directory: Path, source: Source) -> str:
    """The name of a policy's folder in the run directory, as the journal has it; else its source."""
    path = Path(source)
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else str(source)
