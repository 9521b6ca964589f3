"""How long to wait before a request is tried again."""

from __future__ import annotations

import math
import random
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

FIRST_WAIT = 0.5  # seconds; the wait doubles with every try
LONGEST_WAIT = 60.0  # seconds
LONGEST_REQUESTED_WAIT = 120.0  # seconds of a server's Retry-After header that are respected


def longest_wait(tries: int) -> float:
    """Returns the longest wait after this many tries, in seconds: min(``LONGEST_WAIT``, ``FIRST_WAIT`` · 2^tries)."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2**tries)


def wait_before_retry(tries: int, error: BaseException | None) -> float:
    """Draws the wait before the next try, in seconds.

    It is uniform between half of ``longest_wait`` and all of it, so that requests which failed together do not come
    back together, and not shorter than the failed reply's Retry-After header asks for.
    """
    drawn = random.uniform(0.5, 1) * longest_wait(tries)
    response = getattr(error, "response", None)
    requested = response.headers.get("retry-after", "") if response is not None else ""
    return max(drawn, min(parse_retry_after(requested), LONGEST_REQUESTED_WAIT))


def parse_retry_after(header: str) -> float:
    """Returns the wait that a Retry-After header, a number or a date, asks for, in seconds; 0 for other text."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
            seconds = (date.replace(tzinfo=date.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError, IndexError, OverflowError):  # raised for text that is not a date
            return 0.0
    return seconds if math.isfinite(seconds) else 0.0
