"""Environments: what answers the policy between two of its turns."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..conversations import Messages, Prompt, read_conversation, tools_of
from ..errors import UserError
from ..files import checksum
from ..user_functions import import_function
from . import partners

# given a conversation that ends with the policy's turn and a seed, returns the next message: its text, a dictionary
# with "role" (user or tool) and "content", or None, which ends the conversation
Environment = Callable[[Messages, int], "dict | str | None"]

EMBEDDED: dict[str, Environment] = {"partner": partners.partner, "word-game": partners.word_game}
ROLES = ("user", "tool")
PROBE = "Yes, I think so."  # a turn of the policy


@dataclass(frozen=True)
class CheckedEnvironment:
    """An environment whose answers are checked.

    Attributes:
        name: the value of --environment, for messages.
        timeout: seconds that it may take for an answer.
    """

    name: str
    answer: Environment
    timeout: float

    def __call__(self, messages: Prompt, seed: int) -> dict | None:
        """Returns the next message of a conversation that ends with the policy's turn; None ends it.

        Raises:
            UserError: if it raises, takes longer than ``timeout`` or returns no message.
        """
        here = f"--environment {self.name}"
        answer = self._call(here, copy.deepcopy(list(messages)), seed)
        if answer is None:
            return None
        message = {"role": "user", "content": answer} if isinstance(answer, str) else answer
        if not isinstance(message, dict) or not _is_role(message.get("role")):
            raise UserError(
                f"{here}: it returned {_shown(answer)}; expected a text, a message "
                '{"role": "user", "content": …} or None'
            )
        first = {"role": "user", "content": "-"}  # a conversation begins with the user
        return read_conversation({"prompt": [first, message], "tools": tools_of(messages)}, "prompt", here)[-1]

    def probe(self, prompt: Messages) -> None:
        """Asks it once, to find one that does not work before anything is sampled.

        Raises:
            UserError: as a call.
        """
        try:
            self(Prompt([*prompt, {"role": "assistant", "content": PROBE}], "", tools_of(prompt)), 0)
        except UserError as error:
            raise UserError(f"{error}; it was tried before anything is sampled") from error

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """Checksums of the Python files that a user's function needs, by name."""
        from ..run.fingerprint import function_fingerprint  # here, because it imports transformers, which takes seconds

        return {} if self.name in EMBEDDED else function_fingerprint(self.name, self.answer, checksum)

    def _call(self, here: str, messages: Messages, seed: int) -> object:
        """Calls the user's function in a thread, so that one that never ends can be left."""
        found: list[tuple[object, BaseException | None]] = []

        def call() -> None:
            try:
                found.append((self.answer(messages, seed), None))
            except BaseException as error:  # a user's function may raise anything
                found.append((None, error))

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not found:
            raise UserError(f"{here}: no answer in {self.timeout:g} s (--environment_timeout)")
        answer, error = found[0]
        if error is not None:
            raise UserError(f"{here}: it raised {type(error).__name__}: {error}") from error
        if inspect.iscoroutine(answer):
            answer.close()  # or Python would warn that it was never awaited
            raise UserError(f"{here}: it is async; an environment must return the message itself")
        return answer


def _is_role(value: object) -> bool:
    return isinstance(value, str) and value in ROLES


def _shown(answer: object) -> str:
    """What a function returned, for a message: its beginning and its type."""
    kind = type(answer).__name__
    try:
        return f"{str(answer)[:60]!r} ({kind})"
    except Exception:  # of the user's own type
        return f"an object of the type {kind}"


def load(name: str, timeout: float) -> CheckedEnvironment:
    """Returns the embedded environment of this name, or the function of "module:function".

    Raises:
        UserError: if there is none.
    """
    if name in EMBEDDED:
        return CheckedEnvironment(name, EMBEDDED[name], timeout)
    return CheckedEnvironment(name, import_function("environment", name, EMBEDDED), timeout)
