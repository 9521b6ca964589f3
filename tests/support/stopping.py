"""Hooks of pytest: SIGTERM ends the tests as Ctrl-C does, also after a test that trained in this process.

``onpo_fast.signals.listen`` makes SIGINT and SIGTERM ask a run to stop, and its handlers outlive the run. After
each test the handlers from before it are put back; a signal that a run took for itself is then sent to pytest.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from onpo_fast import signals


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    """Fixtures end the processes that they started; a second signal ends pytest at once."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Around the fixtures of a module too, which may train."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    result = yield
    for number, handler in before.items():
        signal.signal(number, handler)
    asked_by, signals._asked_by = signals._asked_by, None
    if asked_by is not None:
        signal.raise_signal(asked_by)
    return result
