"""The output of a long stage, made in parts, so that a killed run loses one part at most."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import UserError
from ..files import is_amount
from .journal import Journal, not_made

Item, Result = TypeVar("Item"), TypeVar("Result")


class Parts:
    """The output of a long stage, part by part: a kill costs the part that was being made.

    What is in a part does not depend on where a run was killed, so that the whole has the same bits.

    Args:
        journal: keeps their checksums; a damaged one is made again.
        name: of the whole, in the run directory.
        made_by: what the results go by beside the items. It may change with --force: a whole is of one kind.
    """

    BATCHES = 8  # of sampling in a part
    GROUPS = 512  # in a part: a model that is loaded for each part is to be little beside the work with it

    def __init__(self, journal: Journal, name: str, made_by: object = None) -> None:
        self.journal, self.name, self.made_by = journal, f"{name}.parts", made_by
        self.began = time.perf_counter()  # the part that is being made

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return self.journal.directory / self.name

    @classmethod
    def sampling_size(cls, batch_size: int, responses: int) -> int:
        """The prompts in a part that is sampled: ``responses`` to each, ``batch_size`` responses at a time."""
        return max(1, cls.BATCHES * batch_size // responses)

    @classmethod
    def judging_size(cls, groups: int) -> int:
        """The groups in a part that is judged. Parts are of one size: shares are counted in each."""
        count = max(1, -(-groups // cls.GROUPS))
        return max(1, -(-groups // count))

    def make(
        self,
        items: Sequence[Item],
        size: int,
        results: Callable[[Sequence[Item], int], list[Result]],
        write: Callable[[Path, Iterable[Result]], None],
        read: Callable[[Path, Sequence[Item]], Iterable[Result]],
        known: Callable[[int], None],
        spent: Callable[[], dict[str, int]] = dict,
    ) -> tuple[list[Result], dict[str, float]]:
        """All results in order, and what they took, also in processes before this one: "seconds", and what was spent.

        ``results`` is given ``size`` items at a time, and the index of the first; ``read`` is given the items that a
        file must be of; ``known`` is told how many items were done before; ``spent`` is asked after each part.

        Raises:
            UserError: by ``read``, or if the journal's note on a part is none; names the part.
        """
        whole: list[Result] = []
        totals: Counter[str] = Counter()
        for first in range(0, len(items), size):
            name = f"{self.name}/{first:08d}.jsonl"
            part = items[first : first + size]
            made_from = hashlib.sha256(repr((self.made_by, part)).encode()).hexdigest()
            note = self.journal.note(name)
            if note is None or note.get("from") != made_from:
                self.began = time.perf_counter()
                write(self.journal.directory / name, results(part, first))
                note = {"from": made_from, "spent": {"seconds": time.perf_counter() - self.began, **spent()}}
                self.journal.record(name, note)
            else:
                if not _is_spent(note.get("spent")):
                    raise UserError(not_made(self.journal, name))
                known(len(part))
            whole += read(self.journal.directory / name, part)
            totals.update(note["spent"])
        return whole, dict(totals)

    def clear(self) -> None:
        """When the whole is there."""
        self.journal.forget_folder(self.name)


RESERVED = {"time", "stage", "iteration", "part", "self"}  # names that a record of metrics.jsonl has for itself


def _is_spent(spent: object) -> bool:
    """Whether it is what a part took: "seconds", and counts."""
    if not isinstance(spent, dict) or not all(map(is_amount, spent.values())):
        return False
    return spent.get("seconds", 0) > 0 and not spent.keys() & RESERVED
