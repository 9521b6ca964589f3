"""The function that long work reports its progress to."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int], None]  # called with the number of items (responses, groups, …) that are newly done
