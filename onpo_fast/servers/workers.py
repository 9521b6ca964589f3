"""Several coroutines that take items from one iterator and stop together."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .. import signals

SHUTDOWN_SECONDS = 5.0  # after a signal, how long work that has begun may go on
POLL_SECONDS = 0.1  # between two looks for a signal

Item = TypeVar("Item")


class Halted(Exception):
    """Work was abandoned because an error or a signal stopped all workers."""


class Workers:
    """Runs a coroutine for each item of an iterator, a limited number at a time.

    The first error, or a signal to stop the run, stops all workers: no new item is taken, waits are ended, and work
    that has begun is finished. After a signal it is cancelled once ``SHUTDOWN_SECONDS`` are over.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.error: Exception | None = None  # the first
        self._halt = asyncio.Event()

    @property
    def halted(self) -> bool:
        return self._halt.is_set()

    def stop(self, error: Exception) -> None:
        """Stops all workers; ``run`` raises the first error that was given."""
        self.error = self.error or error
        self._halt.set()

    async def run(
        self,
        items: Iterator[Item],
        work: Callable[[Item], Awaitable[None]],
        background: Coroutine[Any, Any, None] | None = None,
    ) -> None:
        """Works on all items.

        Args:
            items: the iterator; it may raise.
            work: what is done for one item.
            background: a coroutine that runs beside the workers and is cancelled when they are done; default none.

        Raises:
            Exception: the first of ``items`` or ``work``, or that ``stop`` was called with.
            signals.Stopped: after a signal.
        """
        tasks = {asyncio.create_task(self._work_through(items, work)) for _ in range(self.count)}
        beside = [] if background is None else [asyncio.create_task(background)]
        deadline = math.inf
        try:
            while tasks:
                _, tasks = await asyncio.wait(tasks, timeout=POLL_SECONDS)
                self._stop_after_signal()
                now = asyncio.get_running_loop().time()
                deadline = min(deadline, now + SHUTDOWN_SECONDS) if signals.asked() else deadline
                if now > deadline:
                    break
        finally:
            for task in (*beside, *tasks):
                task.cancel()
            await asyncio.gather(*beside, *tasks, return_exceptions=True)
        if self.error is not None:
            raise self.error

    async def sleep(self, seconds: float) -> None:
        """Waits, unless the workers are stopped meanwhile.

        Raises:
            Halted: if they are.
        """
        try:
            await asyncio.wait_for(self._halt.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise Halted

    async def _work_through(self, items: Iterator[Item], work: Callable[[Item], Awaitable[None]]) -> None:
        while True:
            self._stop_after_signal()
            if self.halted:
                return
            try:
                try:
                    item = next(items)
                except StopIteration:
                    return
                await work(item)
            except Exception as error:
                self.stop(error)
                return

    def _stop_after_signal(self) -> None:
        try:
            signals.stop_if_asked()
        except signals.Stopped as stopped:
            self.stop(stopped)


def run_async(work: Coroutine[Any, Any, Item]) -> Item:
    """Runs a coroutine to its end, also where an event loop is already running, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
