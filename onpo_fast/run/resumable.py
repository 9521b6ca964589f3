"""A long stage of a run in parts, so that a run that is killed loses one part at most."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ..distributed import World
from ..errors import UserError
from ..files import is_amount
from ..journal import Journal, JournalElsewhere, not_made

Item, Result = TypeVar("Item"), TypeVar("Result")
OnPart = Callable[[int, list], None]

RESERVED = {"time", "stage", "iteration", "part", "self"}  # fields of every record in metrics.jsonl


class ResumableStage:
    """Computes the results of a long stage part by part and records each part in the journal.

    What a part holds does not depend on where a run was killed, so the whole has the same bits.

    Args:
        journal: records each part with its checksum. A damaged part is computed again.
        name: path of the whole in the run directory; the parts are in the folder ``name.parts``.
        config_key: what the results depend on beside the items. A part made under another key is computed again.
        world: the ranks of the run. All of them make a part together; rank 0 writes and records it.
    """

    SAMPLING_BATCHES = 32  # batches in a part that is sampled
    GROUPS = 512  # groups in a part that is judged: a judge model may be loaded once for each part
    PARTS_BESIDE = 8  # parts, at least, of what is judged while it is sampled
    GROUPS_BESIDE = 10  # groups in such a part, at least, so that invalid answers are no share of a few

    def __init__(
        self,
        journal: Journal | JournalElsewhere,
        name: str,
        config_key: object = None,
        world: World | None = None,
    ) -> None:
        self.journal, self.name, self.config_key = journal, f"{name}.parts", config_key
        self.world = world or World()
        self.began = time.perf_counter()  # when the current part was started

    @property
    def folder(self) -> Path:
        """The folder of the parts."""
        return self.journal.directory / self.name

    @classmethod
    def sampling_size(cls, batch_size: int, responses: int) -> int:
        """Prompts in a part that is sampled, with ``responses`` to each, ``batch_size`` responses at a time."""
        return max(1, cls.SAMPLING_BATCHES * batch_size // responses)

    @classmethod
    def judging_size(cls, groups: int, beside: bool = False) -> int:
        """Groups in a part that is judged. Parts have one size, since invalid answers are counted in each.

        Args:
            groups: number of all groups.
            beside: whether the oracle can judge while groups are sampled: in more parts, so that it begins early.
        """
        count = max(1, -(-groups // cls.GROUPS))
        if beside:
            count = max(count, min(cls.PARTS_BESIDE, groups // cls.GROUPS_BESIDE))
        return max(1, -(-groups // count))

    def make(
        self,
        items: Sequence[Item],
        size: int,
        compute: Callable[[Sequence[Item], int], list[Result]],
        read: Callable[[Path, Sequence[Item]], Iterable[Result]],
        write: Callable[[Path, Iterable[Result]], None],
        on_known: Callable[[int], None],
        take_counters: Callable[[], dict[str, int]] = dict,
        on_part: OnPart = lambda first, results: None,
    ) -> tuple[list[Result], dict[str, float]]:
        """Returns all results in order, and their cost: "seconds" and the counters, summed over all processes.

        Args:
            items: what the stage works on.
            size: items in a part.
            compute: given the items of a part and the index of the first; returns their results on rank 0.
            read: given the file of a part and the items that it must be of.
            write: given the file of a part and its results.
            on_known: told the number of items whose results existed already.
            take_counters: asked after each part what it cost, by name.
            on_part: given the index of the first item of a part and its results, once they are on disk.

        Raises:
            UserError: from ``read``, or if the journal's note on a part is damaged; names the part.
        """
        results: list[Result] = []
        totals: Counter[str] = Counter()
        for first in range(0, len(items), size):
            part = items[first : first + size]
            spent = self.world.from_main(self.known, first, part)
            if spent is not None:
                on_known(len(part))
            else:
                self.began = time.perf_counter()
                computed = compute(part, first)
                spent = self.world.from_main(self._record_computed, first, part, computed, write, take_counters)
            found = list(read(self.journal.directory / self._name_of(first), part))
            on_part(first, found)
            results += found
            totals.update(spent)
        return results, dict(totals)

    def known(self, first: int, part: Sequence[Item]) -> dict[str, float] | None:
        """What a part has cost, if its results exist; else None.

        Args:
            first: index of the first item of the part.
            part: its items.

        Raises:
            UserError: if the journal's note on it is damaged.
        """
        name = self._name_of(first)
        note = self.journal.note(name)
        if note is None or note.get("from") != self._input_hash(part):
            return None
        if not _is_cost(note.get("spent")):
            raise UserError(not_made(self.journal, name))
        return note["spent"]

    def record(
        self,
        first: int,
        part: Sequence[Item],
        results: Sequence[Result],
        write: Callable[[Path, Iterable[Result]], None],
        spent: Callable[[], dict[str, float]],
    ) -> dict[str, float]:
        """Writes and records the results of a part; returns their cost, which ``spent`` tells once they are written."""
        name = self._name_of(first)
        write(self.journal.directory / name, results)
        cost = spent()
        self.journal.record(name, {"from": self._input_hash(part), "spent": cost})
        return cost

    def _record_computed(
        self,
        first: int,
        part: Sequence[Item],
        results: list[Result],
        write: Callable[[Path, Iterable[Result]], None],
        take_counters: Callable[[], dict[str, int]],
    ) -> dict[str, float]:
        return self.record(
            first, part, results, write, lambda: {"seconds": time.perf_counter() - self.began, **take_counters()}
        )

    def _name_of(self, first: int) -> str:
        return f"{self.name}/{first:08d}.jsonl"

    def _input_hash(self, part: Sequence[Item]) -> str:
        return hashlib.sha256(repr((self.config_key, part)).encode()).hexdigest()

    def clear(self) -> None:
        """Removes the parts, once the whole is on disk."""
        self.journal.forget_folder(self.name)


def _is_cost(cost: object) -> bool:
    """Whether a journal's note holds the cost of a part: "seconds" above 0, and counters."""
    if not isinstance(cost, dict) or not all(map(is_amount, cost.values())):
        return False
    return cost.get("seconds", 0) > 0 and not cost.keys() & RESERVED
