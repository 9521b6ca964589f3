"""The outputs of a run, each computed once: an output that exists is read, and this is how ``--resume`` works."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import signals
from ..console import Progress, progress, say
from ..distributed import World
from ..errors import UnusableResults, UserError
from ..files import is_amount
from ..journal import Journal, JournalElsewhere, not_made
from .resumable import Item, OnPart, ResumableStage
from .tracking import Tracker

Result = TypeVar("Result")
Keep = Callable[[dict], bool]  # whether a record of metrics.jsonl, left by an earlier attempt, still holds
Counters = Callable[[], dict[str, int]]
Check = Callable[[list], dict[str, float]]  # of all results of a stage; returns fields of a record of metrics.jsonl


def was_stopped(record: dict) -> bool:
    """Whether a record is the cost of an attempt that failed: what was asked then has been paid for."""
    return bool(record.get("stopped"))


class StageCache:
    """Makes stages resumable: ``cached`` computes an output, writes it and records it, or reads it if it exists.

    With several ranks, all of them call the same methods in the same order. Rank 0 alone has the journal, writes the
    outputs and logs metrics; the others learn from it what is done, and read that.

    Args:
        journal: the run's journal, which knows the outputs by their checksums.
        tracker: takes the metrics of a stage; None for no metrics.
        config_key: what results depend on beside their inputs: parts made under another key are computed again.
        world: the ranks of the run.

    Attributes:
        iteration: the number of the iteration that metrics belong to; 0 for the evaluation.
        notes: the journal's notes on the outputs of this iteration, by name: "stage", "seconds" and more.
    """

    def __init__(
        self,
        journal: Journal | JournalElsewhere,
        tracker: Tracker | None,
        config_key: object,
        world: World | None = None,
    ) -> None:
        self.journal, self.tracker, self.config_key = journal, tracker, config_key
        self.world = world or World()
        self.iteration = 0
        self.notes: dict[str, dict] = {}

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.journal.directory

    def begin_iteration(self, iteration: int) -> None:
        """Metrics and notes belong to this iteration from now on."""
        self.iteration, self.notes = iteration, {}

    def log(self, stage: str, **values: Any) -> None:
        """Logs a record of the iteration, if there is a tracker."""
        if self.tracker is not None:
            self.tracker.log(stage, self.iteration, **values)

    def cached(
        self,
        name: str,
        compute: Callable[[], Result],
        read: Callable[[Path], Result],
        write: Callable[[Path, Result], None],
        *,
        stage: str,
        prepare: Callable[[], object] = lambda: None,
        metrics: Callable[[Result, float], dict[str, Any]] | None = None,
        note: Callable[[], dict[str, Any]] = dict,
        keep: Keep = lambda record: False,
    ) -> Result:
        """Returns the output of this name: read if it exists and is whole, else computed, written and recorded.

        Args:
            name: path of the output in the run directory.
            compute: makes it; with several ranks, whole on rank 0.
            read: reads it from its path.
            write: writes it to its path.
            stage: what the stage is called in the journal; its first word, in metrics.jsonl.
            prepare: called before the clock is started, only if there is something to compute.
            metrics: given the result and the seconds, the fields of a record of metrics.jsonl.
            note: what to record with the output, beside "stage" and "seconds", which it may replace.
            keep: which records that an earlier attempt left in metrics.jsonl still hold.
        """
        if self.is_done(name, keep):
            return read(self.directory / name)
        prepare()
        start = time.perf_counter()
        result = compute()

        def keep_result() -> dict[str, Any]:
            write(self.directory / name, result)
            noted = {"stage": stage, "seconds": time.perf_counter() - start, **note()}
            if metrics is not None and self.tracker is not None:
                self.log(stage.partition(" ")[0], **metrics(result, noted["seconds"]))
            self.journal.record(name, noted)
            return noted

        self.notes[name] = self.world.from_main(keep_result)
        return result if self.world.is_main else read(self.directory / name)

    def cached_in_parts(
        self,
        name: str,
        items: Sequence[Item],
        size: int,
        *,
        compute: Callable[[Sequence[Item], int, Progress], list[Result]],
        read: Callable[[Path], list[Result]],
        read_part: Callable[[Path, Sequence[Item]], list[Result]],
        write: Callable[[Path, Iterable[Result]], None],
        stage: str,
        title: str,
        metrics: Callable[[list[Result], dict[str, float]], dict[str, Any]],
        ticks: int = 1,
        prepare: Callable[[], object] = lambda: None,
        config_key: object = None,
        take_counters: Counters = dict,
        shared: bool = True,
        check: Check | None = None,
        on_part: OnPart = lambda first, results: None,
    ) -> list[Result]:
        """``cached`` for a long stage, which is computed in parts: a run that is killed loses one part at most.

        Args:
            read: reads the whole, as for ``cached``; ``write`` writes parts and the whole.
            items, size, read_part, take_counters: as for ``ResumableStage.make``.
            compute: given the items of a part, the index of the first, and what is to be told the ticks that are done.
            title, ticks: title of the progress bar, and how far an item moves it.
            metrics: given the results and their cost ("seconds" and the counters), the fields of a record.
            config_key: what results depend on beside the items and the run's own key.
            shared: whether each rank computes its share of a part, or rank 0 all of it.
            check, on_part: as for ``in_parts``.
        """
        cost: dict[str, float] = {}

        def make() -> list[Result]:
            with progress(title, len(items) * ticks) as done:
                results, spent = self.in_parts(
                    name,
                    items,
                    size,
                    compute=lambda part, first: compute(part, first, done),
                    read=read_part,
                    write=write,
                    on_known=lambda known: done(known * ticks),
                    stage=stage,
                    config_key=config_key,
                    take_counters=take_counters,
                    shared=shared,
                    check=check,
                    on_part=on_part,
                )
            cost.update(spent)
            return results

        results = self.cached(
            name,
            make,
            read,
            write,
            stage=stage,
            prepare=prepare,
            metrics=lambda results, _: metrics(results, cost),
            note=lambda: {"seconds": cost["seconds"]},
            keep=was_stopped,
        )
        self.world.from_main(self.resumable(name).clear)  # also what is left if the run was killed just before
        return results

    def in_parts(
        self,
        name: str,
        items: Sequence[Item],
        size: int,
        *,
        compute: Callable[[Sequence[Item], int], list[Result]],
        read: Callable[[Path, Sequence[Item]], list[Result]],
        write: Callable[[Path, Iterable[Result]], None],
        on_known: Callable[[int], None],
        stage: str,
        config_key: object = None,
        take_counters: Counters = dict,
        shared: bool = True,
        check: Check | None = None,
        on_part: OnPart = lambda first, results: None,
    ) -> tuple[list[Result], dict[str, float]]:
        """``ResumableStage.make`` over the ranks; if it fails, what the failed attempt has cost is logged first.

        A part has ``size`` items for each rank that computes a share of it.

        Args:
            check: called on rank 0 with all results, also if their parts existed already. What it returns is logged as
                the stage "check".
            on_part: called on each rank with the index of a part's first item and its results.

        Raises:
            UnusableResults: if the check raises it; the parts are discarded.
        """
        parts = self.resumable(name, config_key)

        def compute_part(part: Sequence[Item], first: int) -> list[Result]:
            if not shared:
                return compute(part, first) if self.world.is_main else []
            own = self.world.share(len(part))
            results = compute(part[own], first + own.start)
            if self.world.size > 1:
                on_known(len(part) - len(results))  # those of the other ranks, for the progress bar
            return [result for share in self.world.gather(results) for result in share]

        try:
            size *= self.world.size if shared else 1
            results, cost = parts.make(items, size, compute_part, read, write, on_known, take_counters, on_part)
        except Exception:
            if any((spent := take_counters()).values()):
                self.log(stage, seconds=time.perf_counter() - parts.began, stopped=True, **spent)
            raise
        if check is not None:
            self.world.from_main(self._check, check, results, parts)
        return results, cost

    def _check(self, check: Check, results: list, parts: ResumableStage) -> None:
        try:
            self.log("check", **check(results))
        except UnusableResults as error:
            parts.clear()
            raise UnusableResults(f"{error}. What was sampled is discarded: --resume samples it anew") from error

    def resumable(self, name: str, config_key: object = None) -> ResumableStage:
        """The parts of an output; ``config_key`` is what they depend on beside the run's own key."""
        key = self.config_key if config_key is None else (self.config_key, config_key)
        return ResumableStage(self.journal, name, key, self.world)

    def is_done(self, name: str, keep: Keep = lambda record: False) -> bool:
        """Whether an output exists and is whole. If not, records of earlier attempts are dropped, but for ``keep``.

        Raises:
            UserError: if the journal's note on it is damaged.
            Stopped: if a signal has asked the run to stop.
        """
        signals.stop_if_asked()
        note = self.world.from_main(self._note, name, keep)
        if note is None:
            return False
        self.notes[name] = note
        return True

    def _note(self, name: str, keep: Keep) -> dict | None:
        note = self.journal.note(name)
        if note is None:
            if self.journal.damaged(name):
                say(f"{name} is not what it was: it is made again")
            if self.tracker is not None:
                self.tracker.begin(name, keep)
        elif not _is_note(note):
            raise UserError(not_made(self.journal, name))
        return note

    def mark_done(self, name: str, note: dict[str, Any], file: bool = True) -> None:
        """Records an output; ``file`` says whether there is a file or folder of its name."""
        self.world.from_main(lambda: self.journal.record(name, note, file))
        self.notes[name] = note


def _is_note(note: dict) -> bool:
    """Whether the journal's note on an output holds what a run writes: "stage" with "seconds", a finite "loss"."""
    if "stage" in note and not (isinstance(note["stage"], str) and is_amount(note.get("seconds"))):
        return False
    return note.get("loss") is None or (isinstance(note["loss"], float) and math.isfinite(note["loss"]))
