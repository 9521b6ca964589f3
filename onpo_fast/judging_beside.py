"""Judging beside sampling: what has been sampled is judged in a thread while the rest is sampled.

For oracles that wait for a server or compute on another device (``oracles.computes_elsewhere``). The thread only asks
the oracle. Parts are recorded by the main thread, as those that are judged after sampling, and have the same bits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from . import oracles, signals
from .console import progress
from .data import Group, write_preferences
from .run.resumable import ResumableStage
from .servers import workers

POLL_SECONDS = 0.1  # between two looks for a signal while the main thread waits
# how long an oracle is waited for when its answers are no longer wanted: longer than one of a server takes to stop
SHUTDOWN_SECONDS = workers.SHUTDOWN_SECONDS + 1


class Abandoned(Exception):
    """The answers of the oracle are no longer wanted. Raised in its thread."""


@dataclass(frozen=True)
class _Part:
    """Groups to judge."""

    first: int  # index of the first of them
    groups: Sequence[Group]


@dataclass(frozen=True)
class _Judged:
    """A part with its preferences."""

    part: _Part
    preferences: list[np.ndarray]
    counters: dict[str, int]  # of the oracle
    began: float  # time.perf_counter()
    ended: float


class JudgingBeside:
    """Judges the groups of a stage while they are sampled. Leaving the ``with`` block ends its thread.

    All methods are called in the main thread.

    Args:
        stage: records the parts of the judging stage.
        count: number of groups that will be sampled.
        oracle, oracle_name: as for ``oracles.judge``.
        title: title of the progress bar.
        log: logs what an attempt that failed has cost.
    """

    def __init__(
        self,
        stage: ResumableStage,
        count: int,
        oracle: oracles.Oracle,
        oracle_name: str,
        title: str,
        log: Callable[..., None],
    ) -> None:
        self.stage, self.count, self.oracle, self.oracle_name = stage, count, oracle, oracle_name
        self.title, self.log = title, log
        self.size = stage.judging_size(count, beside=True)
        self._groups: dict[int, Group] = {}
        self._begun: set[int] = set()  # the first index of each part that is complete
        self._unrecorded = 0  # parts that the thread has, or has judged
        self._waiting: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._judged: queue.SimpleQueue[_Judged | None] = queue.SimpleQueue()  # None: the thread has failed
        self._error: BaseException | None = None  # of the thread
        self._abandoned = False
        self._part_began = 0.0  # when the thread began its last part
        self._sampled_at: float | None = None  # when sampling had ended
        self._thread = threading.Thread(target=self._work, name="judge", daemon=True)
        self._bar = ExitStack()

    def __enter__(self) -> JudgingBeside:
        self._advance = self._bar.enter_context(progress(self.title, self.count, stoppable=False))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._abandoned = True
        self._waiting.put(None)
        self._thread.join(SHUTDOWN_SECONDS)
        self._bar.close()
        self._record_judged()
        if not self._thread.is_alive() and any((spent := oracles.take_counters(self.oracle)).values()):
            self.log("judge", seconds=time.perf_counter() - self._part_began, stopped=True, **spent)

    def add(self, index: int, group: Group) -> None:
        """Takes a group that was sampled. Once a part is complete, it is judged, unless that has been done before.

        Args:
            index: index of the group in the stage; a group that is there already is passed over.

        Raises:
            Exception: what the oracle has raised, so that sampling stops.
        """
        self._raise_error()
        self._groups.setdefault(index, group)
        first = index // self.size * self.size
        indices = range(first, min(first + self.size, self.count))
        if first in self._begun or not all(i in self._groups for i in indices):
            return
        self._begun.add(first)
        part = _Part(first, [self._groups[i] for i in indices])
        if self.stage.known(first, part.groups) is None:
            self._unrecorded += 1
            self._waiting.put(part)
        else:
            self._advance(len(part.groups))

    def add_part(self, first: int, groups: Sequence[Group]) -> None:
        """Takes the groups of a part of the sampling stage, and records what has been judged meanwhile.

        Raises:
            Exception: what the oracle has raised.
        """
        for index, group in enumerate(groups, first):
            self.add(index, group)
        self._record_judged()

    def finish(self) -> None:
        """Waits until every part that is complete is judged and recorded.

        Raises:
            Exception: what the oracle has raised.
            Stopped: if a signal has asked the run to stop.
        """
        self._sampled_at = time.perf_counter()
        while self._unrecorded:
            lives = self._thread.is_alive()  # before the look at what it has judged, which may be its last
            self._record_judged(POLL_SECONDS)
            self._raise_error()
            if self._unrecorded and not lives:
                raise RuntimeError(f"the thread that judges has ended, and {self._unrecorded} parts are not judged")
            signals.stop_if_asked()
        self._bar.close()

    def _record_judged(self, seconds: float = 0.0) -> None:
        """Records all parts that the thread has judged; waits for the first of them for so long."""
        while True:
            try:
                judged = self._judged.get(block=seconds > 0, timeout=seconds)
            except queue.Empty:
                return
            if judged is None:
                return
            self._record(judged)
            seconds = 0.0

    def _record(self, judged: _Judged) -> None:
        began = time.perf_counter()
        total = judged.ended - judged.began
        after = 0.0 if self._sampled_at is None else judged.ended - max(judged.began, self._sampled_at)
        waited = min(max(after, 0.0), total)

        def spent() -> dict[str, float]:
            seconds = waited + time.perf_counter() - began
            return {"seconds": seconds, "hidden_seconds": total - waited, **judged.counters}

        self.stage.record(judged.part.first, judged.part.groups, judged.preferences, write_preferences, spent)
        self._unrecorded -= 1

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # In the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (part := self._waiting.get()) is not None and not self._abandoned:
            self._part_began = began = time.perf_counter()
            try:
                found = oracles.judge(self.oracle, part.groups, self.oracle_name, self._count, part.first)
                counters = oracles.take_counters(self.oracle)
            except BaseException as error:  # raised again in the main thread, whatever it is
                self._error = error
                self._judged.put(None)
                return
            self._judged.put(_Judged(part, found, counters, began, time.perf_counter()))

    def _count(self, groups: int) -> None:
        if self._abandoned:
            raise Abandoned
        self._advance(groups)
