"""Functions of the user's, named on the command line as "module:function"."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable

from .errors import UserError


def import_function(option: str, name: str, known: Iterable[str]) -> Callable[..., object]:
    """Imports the function of "module:function"; modules in the working directory are found.

    Args:
        option: the option whose value it is, for messages.
        known: the option's other values, for messages.

    Raises:
        UserError: if there is none; names the option and its value.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f'--{option} {name}: expected {", ".join(known)} or "module:function"')
    if "" not in sys.path:
        sys.path.insert(0, "")  # finds modules in the working directory
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # importing the user's module may raise anything
        raise UserError(f"--{option} {name}: cannot import it ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise UserError(f"--{option} {name}: {function_name} is not a function")
    return function
