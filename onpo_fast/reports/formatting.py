"""Text and numbers in the form that a page shows: shortened, grouped, rounded."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

MAX_CHARACTERS = 2000  # of one text
MAX_OPTIONS = 200  # rows of a table of the configuration or the environment


def shorten(text: str, file: str) -> str:
    """Cut a long text and add how much is missing and which file has it."""
    missing = len(text) - MAX_CHARACTERS
    return text if missing <= 0 else f"{text[:MAX_CHARACTERS]}… ({missing:,} more characters: see {file})"


def table_rows(values: dict[str, Any], file: str, depth: int = 3) -> dict[str, Any]:
    """The rows of a table: values as short texts, and mappings as nested tables down to ``depth``.

    Args:
        values: any mapping that was read from YAML or JSON.
        file: where the whole mapping is, named where something is left out.
        depth: levels of nested tables; deeper mappings become JSON text.
    """
    rows: dict[str, Any] = {}
    for name, value in list(values.items())[:MAX_OPTIONS]:
        if isinstance(value, dict) and depth > 1:
            rows[shorten(str(name), file)] = table_rows(value, file, depth - 1)
        else:
            rows[shorten(str(name), file)] = shorten(value if isinstance(value, str) else json_text(value), file)
    if len(values) > MAX_OPTIONS:
        rows["…"] = f"({len(values) - MAX_OPTIONS:,} more: see {file})"
    return rows


def json_text(value: Any) -> str:
    """A value as JSON, or a note for one that JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # YAML allows a date as a key and numbers of thousands of digits
        return "(a value that cannot be shown)"


def policy_symbol(name: str) -> str:
    """A policy's name with a subscript.

    >>> policy_symbol("π_12")
    'π₁₂'
    """
    return name.replace("_", "").translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def percent(share: float) -> str:
    """
    >>> percent(0.6831)
    '68.3 %'
    """
    return f"{100 * share:.1f} %"


def grouped(number: float | None) -> str:
    """A whole number with thousands separators, or a dash for None.

    >>> grouped(1234567)
    '1,234,567'
    """
    return "–" if number is None else f"{number:,.0f}"


def duration(seconds: float) -> str:
    """
    >>> duration(75), duration(2.5)
    ('1 min 15 s', '2.5 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def date(time: float) -> str:
    """Seconds since 1970 as a date and a time in UTC."""
    try:
        return f"{datetime.fromtimestamp(time, timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, TypeError, ValueError):
        return "at an unknown time"
