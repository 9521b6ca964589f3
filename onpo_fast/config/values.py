"""Checks of the values of options. Each raises ``UserError`` that names the option."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields

from ..errors import UserError

LARGEST_INTEGER = 2**63  # exclusive: torch and numpy count in int64
VARIABLE_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")


def check_values(options: object, section: type) -> None:
    """Checks what every option of a section must satisfy: not empty, no NUL character, integers below 2**63.

    Raises:
        UserError: names the option.
    """
    for field in fields(section):
        name, value = field.name, getattr(options, field.name)
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"--{name} holds a NUL character, which no file name can have")
        # a shell passes "" for a variable that is not set
        if value == "" or (value is None and field.default is not None):
            raise UserError(f"--{name} must not be empty")
        if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
            raise UserError(f"--{name} must be smaller than 2**63")


def check_at_least(options: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:  # also refuses NaN
            wanted = "not be negative" if least == 0 else f"be at least {least}"
            raise UserError(f"--{name} must {wanted}, not {value}")


def check_at_most(options: object, most: int, *names: str) -> None:
    for name in names:
        if getattr(options, name) > most:
            raise UserError(f"--{name} must be at most {most}, not {getattr(options, name)}")


def check_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} must be positive and finite, not {value}")


def check_share(options: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(options, name) <= 1:
            raise UserError(f"--{name} must be in (0, 1], not {getattr(options, name)}")


def check_key_name(options: object, name: str) -> None:
    """Checks that an option is the name of an environment variable. The value is not repeated: it may be the key."""
    if not VARIABLE_NAME.fullmatch(getattr(options, name) or ""):
        raise UserError(
            f"--{name} must be the NAME of an environment variable, such as OPENAI_API_KEY (the value is not repeated "
            "here: it may be the key)"
        )


def check_object(options: object, *names: str) -> None:
    """Checks that options can be written as JSON objects."""
    for name in names:
        try:
            json.dumps(getattr(options, name))
        except (TypeError, ValueError, RecursionError) as error:  # YAML has dates, and values that contain themselves
            raise UserError(f"--{name} must be a JSON object ({error})") from None
