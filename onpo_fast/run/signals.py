"""SIGINT and SIGTERM ask a run to stop where nothing is lost; a second one stops it at once."""

from __future__ import annotations

import signal
from types import FrameType

_asked_by: int | None = None


class Stopped(Exception):
    """The run was asked to stop, and has."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


def listen() -> None:
    """From now on the two signals only ask."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked_by
    if _asked_by is not None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _asked_by = number


def asked() -> bool:
    return _asked_by is not None


def stop_if_asked() -> None:
    """Raises ``Stopped`` if a signal has asked for it. Called where all that is done is on disk, or can be redone."""
    if _asked_by is not None:
        raise Stopped(_asked_by)
