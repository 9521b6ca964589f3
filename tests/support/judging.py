"""Questions to a judge, scripted answers, and the errors that they cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from onpo_fast.data import Group, Response
from onpo_fast.errors import UserError

TEXTS = ["Blue.", "I like red most of all, and you?", "Red.", "Blue."]
SHORTER = np.array([[0.5, 1], [0, 0.5]])  # preferences of `shorter` between "a" and "bcd"


def groups(*texts: str, count: int = 1) -> list[Group]:
    """``count`` groups whose prompts differ."""
    responses = [Response(text, [1], "eos", -1.0) for text in texts]
    return [Group([{"role": "user", "content": f"Question {i}?"}], [1], responses) for i in range(count)]


def asked(body: dict) -> tuple[str, str]:
    """The two responses that a request shows."""
    _, _, rest = body["messages"][0]["content"].partition("[Response A]\n")
    first, _, rest = rest.partition("\n\n[Response B]\n")
    return first, rest.partition("\n\n[Question]")[0]


def shorter(body: dict) -> str:
    """The answer of a judge that prefers the shorter response."""
    first, second = asked(body)
    return "A" if len(first) < len(second) else "B"


@contextmanager
def raises(kind: type[UserError], *named: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expects a ``UserError`` of a type, or raised from an error of it, whose message contains all of ``named``."""
    with pytest.raises(UserError) as error:
        yield error
    causes: list[BaseException | None] = [error.value]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__)
    assert any(isinstance(cause, kind) for cause in causes), causes
    for words in named:
        assert words in str(error.value)
