"""The interface of oracles. ``judge`` asks an oracle and checks its answers, ``cyclic_triples`` counts cycles."""

from __future__ import annotations

import copy
import inspect
import itertools
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..console import Progress
from ..conversations import message_text
from ..data import Group, Messages
from ..errors import UserError
from ..signals import Stopped

Oracle = Callable[[Messages, list[str]], np.ndarray]
PromptAndResponses = tuple[Messages, list[str]]  # a prompt with its K responses
IndexPairs = Sequence[tuple[int, int]]  # of two different responses of a group

ASYNC = "it is async; an oracle must return the matrix itself, so call asyncio.run in it"
COMPLEMENT_TOLERANCE = 1e-3  # largest error of P + Pᵀ = 1; sigmoids in half precision meet it


class BatchOracle:
    """An oracle that is asked about many groups at once, because it batches them or waits for a server.

    A subclass defines ``many``, or, if it is paid by the pair, ``compare``. It may load a model when it is first asked
    and drop it in ``release``, which ``judge`` calls when all groups are judged.
    """

    holds_model = False  # whether it needs memory on the device; the policy is moved out of the way then
    keeps_files = False  # whether it writes into the run directory when it is asked
    # whether it waits for a server or computes on another device than the policy's: it is asked in a thread then, while
    # the policy samples
    computes_elsewhere = False

    def many(self, groups: Sequence[PromptAndResponses], progress: Progress = lambda n: None) -> list[np.ndarray]:
        """Judges groups.

        Args:
            groups: prompts, each with its K responses.
            progress: to be called with the number of groups that are newly done.

        Returns:
            For each group its (K, K) matrix of P(response i ≻ response j).
        """
        if not compares_pairs(self):
            raise NotImplementedError(f"{type(self).__name__} defines neither many nor compare")
        return self.compare(groups, None, progress)

    def compare(
        self,
        groups: Sequence[PromptAndResponses],
        pairs: Sequence[IndexPairs] | None,
        progress: Progress = lambda n: None,
    ) -> list[np.ndarray]:
        """Judges some pairs of each group.

        Args:
            groups, progress: as for ``many``.
            pairs: for each group, which of its responses to compare; None: all.

        Returns:
            For each group its (K, K) matrix. Of a pair (i, j) the entry [i, j] is read, P(i ≻ j), and no others.
        """
        return self.many(groups, progress)

    def __call__(self, prompt: Messages, responses: list[str]) -> np.ndarray:
        return self.many([(prompt, responses)])[0]

    def release(self) -> None:
        """Frees memory and closes connections. The oracle can be asked again afterwards."""

    def take_counters(self) -> dict[str, int]:
        """Returns counters since the last call, by name, for metrics.jsonl, and resets them."""
        return {}


def judge(
    oracle: Oracle,
    groups: Sequence[Group],
    name: str,
    progress: Progress = lambda n: None,
    first: int = 0,
    pairs: Sequence[IndexPairs] | None = None,
) -> list[np.ndarray]:
    """Asks an oracle for the preference matrix of every group.

    An oracle with a method ``many`` is asked about all groups at once, any other about one after the other.

    Args:
        oracle: the oracle; it is released at the end.
        groups: prompts with their responses.
        name: the value of --oracle, for messages.
        progress: called with the number of groups that are newly done.
        first: the number of groups before these, for messages.
        pairs: for each group the responses to compare; default all. An oracle with a method ``compare`` is asked about
            no others.

    Returns:
        For each group a (K, K) float64 matrix with P + Pᵀ = 1 and ½ on the diagonal. Where pairs are given, the
        entries of others mean nothing.

    Raises:
        UserError: if the oracle fails or returns something other than preferences; the message names the oracle and
            the group.
    """
    questions = [(group.prompt, [response.text for response in group.responses]) for group in groups]
    return judge_texts(oracle, questions, f"--oracle {name}", progress, first, pairs)


def judge_texts(
    oracle: Oracle,
    questions: Sequence[PromptAndResponses],
    title: str,
    progress: Progress = lambda n: None,
    first: int = 0,
    pairs: Sequence[IndexPairs] | None = None,
) -> list[np.ndarray]:
    """Does what ``judge`` does, for prompts with the texts of their responses; messages begin with ``title``."""
    try:
        if pairs is not None and compares_pairs(oracle):
            return _judge_together(
                lambda asked, done: oracle.compare(asked, pairs, done), questions, title, progress, first, pairs
            )
        if many := getattr(oracle, "many", None):
            return _judge_together(many, questions, title, progress, first)
        matrices = []
        for index, (prompt, texts) in enumerate(questions, first):
            here = f"{title}, {describe_prompt(index, prompt)}"
            matrices.append(checked(call_oracle(here, oracle, *copy_question(prompt, texts)), len(texts), here))
            progress(1)
        return matrices
    finally:
        if release := getattr(oracle, "release", None):
            release()


def _judge_together(
    many: Callable[..., object],
    questions: Sequence[PromptAndResponses],
    title: str,
    progress: Progress,
    first: int,
    pairs: Sequence[IndexPairs] | None = None,
) -> list[np.ndarray]:
    offset = f" (counted from prompt {first})" if first else ""  # its messages number the groups that it was given
    answers = call_oracle(title + offset, many, [copy_question(*one) for one in questions], progress)
    answers = call_oracle(title + offset, list, answers)
    if len(answers) != len(questions):
        raise UserError(f"{title}: it gave {len(answers)} matrices for {len(questions)} prompts")
    return [
        checked(answer, len(texts), f"{title}, {describe_prompt(index, prompt)}", of_pairs)
        for index, (answer, (prompt, texts), of_pairs) in enumerate(
            zip(answers, questions, pairs or [None] * len(questions)), first
        )
    ]


def copy_question(prompt: Messages, texts: list[str]) -> PromptAndResponses:
    """Copies a question for the oracle, which may change its arguments."""
    return copy.deepcopy(prompt), copy.deepcopy(list(texts))  # of conversations, with their messages


def describe_prompt(index: int, prompt: Messages) -> str:
    """Names a prompt in messages: its number and how its last message begins."""
    return f"prompt {index} ({message_text(prompt[-1])[:40]!r})"


def call_oracle(title: str, function: Callable[..., object], *arguments: object) -> object:
    """Calls a user's function; whatever it raises becomes a ``UserError`` that begins with ``title``."""
    try:
        answer = function(*arguments)
    except UserError as error:
        raise UserError(f"{title}, {error}") from error
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{title}: it raised {type(error).__name__}: {error}{_line_of(error, function)}") from error
    if inspect.iscoroutine(answer):
        answer.close()  # or Python would warn that it was never awaited
        raise UserError(f"{title}: {ASYNC}")
    return answer


def _line_of(error: BaseException, function: Callable[..., object]) -> str:
    """Returns " (FILE, line N)", the last line of the file of the user's function that the error came through."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == code.co_filename]
    return f" ({Path(code.co_filename).name}, line {lines[-1]})" if lines else ""


def checked(answer: object, responses: int, where: str, pairs: IndexPairs | None = None) -> np.ndarray:
    """Checks an oracle's answer and returns it as a preference matrix.

    Args:
        answer: an array, a tensor or nested lists. The diagonal is not read: a response ties with itself.
        responses: K.
        where: the oracle and the group, for messages.
        pairs: those whose entries [i, j] are read, and no others; None: all are.

    Returns:
        (K, K) float64 with P + Pᵀ = 1 to the last bit and ½ on the diagonal.

    Raises:
        UserError: if it is not a K×K matrix of probabilities with P + Pᵀ = 1 within ``COMPLEMENT_TOLERANCE``.
    """
    try:
        is_tensor = isinstance(answer, torch.Tensor)
        if answer.is_complex() if is_tensor else np.iscomplexobj(answer):
            raise TypeError("it is complex")
        if is_tensor:
            answer = answer.detach().double().cpu().to_dense().numpy()
        matrix = np.array(answer, dtype=np.float64)
    except ValueError as error:
        reason = "its rows have different lengths" if "inhomogeneous" in str(error) else error
        raise UserError(f"{where}: not a matrix of numbers ({reason})") from None
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{where}: not a matrix of numbers ({error})") from None
    if matrix.shape != (responses, responses):
        raise UserError(f"{where}: expected a {responses}×{responses} matrix, got shape {matrix.shape}")
    if pairs is not None:
        answered, matrix = matrix, np.full_like(matrix, 0.5)
        for i, j in pairs:
            matrix[i, j], matrix[j, i] = answered[i, j], 1 - answered[i, j]
    np.fill_diagonal(matrix, 0.5)
    bad = ~((matrix >= 0) & (matrix <= 1))  # also true for NaN
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise UserError(f"{where}: P({i} ≻ {j}) is {matrix[i, j]}, not a probability")
    excess = np.abs(matrix + matrix.T - 1)
    if excess.max(initial=0) > COMPLEMENT_TOLERANCE:
        i, j = np.unravel_index(excess.argmax(), excess.shape)
        raise UserError(f"{where}: P({i} ≻ {j}) + P({j} ≻ {i}) is {matrix[i, j] + matrix[j, i]:.6g}, not 1")
    return average_orders(matrix)


def average_orders(shown_first: np.ndarray) -> np.ndarray:
    """Averages the two orders of every pair.

    Args:
        shown_first: (K, K) P(i ≻ j) where i was shown first.

    Returns:
        (K, K) P(i ≻ j) with P + Pᵀ = 1 to the last bit.
    """
    mean = np.triu((shown_first + 1 - shown_first.T) / 2, 1)
    return mean + np.tril(1 - mean.T, -1) + np.eye(len(shown_first)) / 2


def drop_duplicates(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Returns the different texts in order, and the index of each text among them.

    Equal texts tie and need not be compared.
    """
    places: dict[str, int] = {}
    indices = [places.setdefault(text, len(places)) for text in texts]
    return list(places), indices


def expand_duplicates(matrix: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    """Turns a matrix over the different texts into one over all texts, the inverse of ``drop_duplicates``.

    Equal texts tie: P is ½.
    """
    return matrix[np.ix_(indices, indices)]


def questions_of(pairs: IndexPairs | None, texts: Sequence[str], indices: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Yields what to ask of a group, each pair in both orders, as indices of different texts; equal texts tie.

    Args:
        pairs: pairs of its responses; None: all.
        texts, indices: the result of ``drop_duplicates``.
    """
    if pairs is None:
        return itertools.permutations(range(len(texts)), 2)
    asked = {(indices[i], indices[j]) for i, j in pairs if indices[i] != indices[j]}
    return sorted(asked | {(j, i) for i, j in asked})


class GroupProgress:
    """Reports progress in groups while the work is counted in smaller steps.

    Args:
        progress: called with the number of groups that are newly done.
        groups: the number of groups.
        steps: the number of steps in all.
    """

    def __init__(self, progress: Progress, groups: int, steps: int) -> None:
        self.progress, self.groups, self.steps = progress, groups, steps
        self.done = self.reported = 0

    def __call__(self, steps: int = 1) -> None:
        """Counts steps; a group counts as done when its share of the steps is."""
        self.done += steps
        self._report(self.groups * self.done // self.steps)

    def finish(self) -> None:
        """Reports all groups as done."""
        self._report(self.groups)

    def _report(self, groups: int) -> None:
        if groups > self.reported:
            self.progress(groups - self.reported)
            self.reported = groups


def holds_model(oracle: Oracle) -> bool:
    """Returns whether the oracle loads a model on the policy's device."""
    return bool(getattr(oracle, "holds_model", False))


def keeps_files(oracle: Oracle) -> bool:
    """Returns whether the oracle writes into the run directory when it is asked."""
    return bool(getattr(oracle, "keeps_files", False))


def compares_pairs(oracle: Oracle) -> bool:
    """Returns whether the oracle can be asked about some pairs of a group alone: it has a ``compare`` of its own."""
    compare = getattr(oracle, "compare", None)
    return callable(compare) and getattr(compare, "__func__", None) is not BatchOracle.compare


def take_counters(oracle: Oracle) -> dict[str, int]:
    """Returns the oracle's counters since the last call; {} for an oracle that does not count."""
    take = getattr(oracle, "take_counters", None)
    return take() if take else {}


def cyclic_triples(matrices: Sequence[np.ndarray]) -> tuple[int, int]:
    """Counts the triples of responses that are cyclic, i ≻ j ≻ k ≻ i, and all triples."""
    cyclic = total = 0
    for matrix in matrices:
        for i, j, k in itertools.combinations(range(len(matrix)), 3):
            total += 1
            beats = (matrix[i, j] > 0.5, matrix[j, k] > 0.5, matrix[k, i] > 0.5)
            loses = (matrix[i, j] < 0.5, matrix[j, k] < 0.5, matrix[k, i] < 0.5)
            cyclic += all(beats) or all(loses)
    return cyclic, total
