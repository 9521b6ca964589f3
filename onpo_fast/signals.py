"""SIGINT and SIGTERM: the first asks a run to stop where nothing is lost, the second stops it at once."""

from __future__ import annotations

import signal
from types import FrameType

_asked_by: int | None = None


class Stopped(Exception):
    """A run has stopped because a signal asked for it. ``exit_status`` is the shell's: 128 and the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


def listen() -> None:
    """Handles both signals from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked_by
    if _asked_by is not None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _asked_by = number


def asked() -> int:
    """The number of the signal that has asked the run to stop; 0 if none has."""
    return _asked_by or 0


def stop_if_asked() -> None:
    """Raises ``Stopped`` if a signal has asked the run to stop. Called where all results are on disk."""
    if _asked_by is not None:
        raise Stopped(_asked_by)
