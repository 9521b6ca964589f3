"""What happens when a batch does not fit the memory: it is computed again in smaller parts, with the same result.

On several ranks nothing is repeated, because all of them must take part in the same number of reductions.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed

from .console import say, say_once
from .errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
MARKS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
)
ADVICE = "--gradient_checkpointing, --weights bf16-sr, --optimizer adamw-8bit or shorter responses (--max_new_tokens)"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception says that the device, or the system, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)


def in_halves(
    compute: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], what: str, option: str
) -> list[Result]:
    """Returns ``compute(items)``; where that runs out of memory, the results of both halves, each computed like this.

    Args:
        compute: returns a result for each item.
        what: what is computed, for the message.
        option: flag that limits the number of items.

    Raises:
        UserError: if a single item does not fit, or there are several ranks.
    """
    try:
        return compute(items)
    except Exception as error:
        _check_can_halve(error, len(items), what, option)
    # outside of the except block, whose traceback holds the tensors
    free()
    say_once((what, option), f"out of memory: {what} again in two halves; {_how(option)}")
    half = len(items) // 2
    return in_halves(compute, items[:half], what, option) + in_halves(compute, items[half:], what, option)


def _check_can_halve(error: Exception, count: int, what: str, option: str) -> None:
    """Raises an error that is not of the memory, and a ``UserError`` if there is nothing to halve."""
    if not is_out_of_memory(error):
        raise error
    if count <= 1 or _several_ranks():
        raise UserError(f"out of memory: {what}; {_how(option)}") from error


def _how(option: str) -> str:
    return f"a smaller {option} avoids that"


@contextmanager
def naming_settings(what: str) -> Iterator[None]:
    """Turns an error of no memory into a ``UserError``, where nothing can be repeated."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {what}; use {ADVICE}") from error


def free() -> None:
    """Frees what nothing refers to, also in the GPU's cache, whose pieces may be too small for what comes."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _several_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


class TokenBudget:
    """The most packed tokens of a micro-batch in a fit, which falls where one does not fit the memory.

    Attributes:
        tokens: the present value, at most that of --tokens_per_microbatch.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.running = 0, 0  # tokens and groups of the micro-batch that is computed

    def retry(self, compute: Callable[[], Result], undo: Callable[[], object] = lambda: None) -> Result:
        """Returns what ``compute`` does; where it runs out of memory, again with half the tokens of its micro-batch.

        Args:
            compute: uses micro-batches of at most ``tokens``, and sets ``running`` before each.
            undo: removes what a failed attempt has left, as a part of the gradients.

        Raises:
            UserError: if a micro-batch of a single group does not fit, or there are several ranks.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._check_can_shrink(error)
            undo()  # outside of the except block, whose traceback holds the tensors
            free()
            self.tokens = max(1, self.running[0] // 2)
            say(
                f"out of memory: a micro-batch of {self.running[0]} tokens is computed again, in micro-batches of at "
                f"most {self.tokens}; --tokens_per_microbatch {self.tokens} avoids that"
            )

    def _check_can_shrink(self, error: Exception) -> None:
        tokens, groups = self.running
        if groups == 1:
            raise UserError(
                f"out of memory: the {tokens} tokens of one prompt and its responses do not fit; use {ADVICE}"
            ) from error
        if _several_ranks():
            raise UserError(
                f"out of memory: a micro-batch of {tokens} tokens; lower --tokens_per_microbatch (on several ranks it "
                f"cannot be repeated), or use {ADVICE}"
            ) from error
