"""What an oracle is, and how many groups are put to one: ``judge`` asks and checks, ``cyclic_triples`` counts."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..conversations import message_text
from ..data import Group, Messages
from ..errors import UserError
from ..run.signals import Stopped

Oracle = Callable[[Messages, list[str]], np.ndarray]
Asked = tuple[Messages, list[str]]  # a prompt with its K responses
Progress = Callable[[int], None]  # is told how many groups are done

ASYNC = "it is async; an oracle returns the matrix itself, so call asyncio.run in it"
TOLERANCE = 1e-3  # of P + Pᵀ = 1: what half-precision sigmoids keep


class BatchOracle:
    """An oracle that is better asked about many groups at once: because it batches, or waits for a server.

    ``many`` is what a subclass writes. The rest it may: a model is loaded when it is first asked and dropped in
    ``release``, which ``judge`` calls when all is judged.
    """

    holds_model = False  # whether it takes memory on the device: the policy makes room then
    keeps_files = False  # whether it writes into the run directory when it is asked

    def many(self, groups: Sequence[Asked], progress: Progress = lambda n: None) -> list[np.ndarray]:
        """A K×K matrix of P(response i ≻ response j) a group; tells ``progress`` as groups are done."""
        raise NotImplementedError

    def __call__(self, prompt: Messages, responses: list[str]) -> np.ndarray:
        return self.many([(prompt, responses)])[0]

    def release(self) -> None:
        """Gives back memory and connections. The oracle can be asked again."""

    def take_counters(self) -> dict[str, int]:
        """What was spent since the last call, by name, for metrics.jsonl."""
        return {}


def judge(
    oracle: Oracle, groups: Sequence[Group], name: str, progress: Progress = lambda n: None, first: int = 0
) -> list[np.ndarray]:
    """The preference matrix of every group: (K, K) float64 with P + Pᵀ = 1 and ½ on the diagonal.

    An oracle with a ``many`` is asked about all groups at once, another about one after the other. ``first`` is the
    number of groups before these, for messages.

    Raises:
        UserError: if the oracle fails or says what no preference can be; the message names the oracle and the group.
    """
    asked = [(group.prompt, [response.text for response in group.responses]) for group in groups]
    return judge_texts(oracle, asked, f"--oracle {name}", progress, first)


def judge_texts(
    oracle: Oracle, asked: Sequence[Asked], title: str, progress: Progress = lambda n: None, first: int = 0
) -> list[np.ndarray]:
    """``judge`` for prompts with texts; ``title`` is how messages name the oracle."""
    try:
        if many := getattr(oracle, "many", None):
            place = f" (counted from prompt {first})" if first else ""  # it numbers what it is given
            answers = _guarded(title + place, lambda: many([_copied(*one) for one in asked], progress))
            answers = _guarded(title + place, lambda: list(answers))
            if len(answers) != len(asked):
                raise UserError(f"{title}: it gave {len(answers)} matrices for {len(asked)} prompts")
            return [
                checked(answer, len(texts), f"{title}, {where(index, prompt)}")
                for index, (answer, (prompt, texts)) in enumerate(zip(answers, asked), first)
            ]
        matrices = []
        for index, (prompt, texts) in enumerate(asked, first):
            here = f"{title}, {where(index, prompt)}"
            matrices.append(checked(_guarded(here, lambda: oracle(*_copied(prompt, texts))), len(texts), here))  # noqa: B023
            progress(1)
        return matrices
    finally:
        if release := getattr(oracle, "release", None):
            release()


def _copied(prompt: Messages, texts: list[str]) -> Asked:
    """An oracle may write into what it is given."""
    return copy.deepcopy(prompt), list(texts)


def where(index: int, prompt: Messages) -> str:
    """How messages name a group."""
    return f"prompt {index} ({message_text(prompt[-1])[:40]!r})"


def _guarded(title: str, ask: Callable[[], object]) -> object:
    try:
        answer = ask()
    except UserError as error:
        raise UserError(f"{title}, {error}") from error
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # the function is the user's
        raise UserError(f"{title}: it raised {type(error).__name__}: {error}") from error
    if inspect.iscoroutine(answer):
        answer.close()  # else Python adds that nobody awaited it
        raise UserError(f"{title}: {ASYNC}")
    return answer


def checked(answer: object, responses: int, where: str) -> np.ndarray:
    """The answer as a preference matrix. Its diagonal is not read: a response ties with itself."""
    try:
        tensor = isinstance(answer, torch.Tensor)
        if answer.is_complex() if tensor else np.iscomplexobj(answer):
            raise TypeError("it is complex")
        if tensor:
            answer = answer.detach().double().cpu().to_dense().numpy()
        matrix = np.array(answer, dtype=np.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a matrix of numbers ({error})") from None
    if matrix.shape != (responses, responses):
        raise UserError(f"{where}: expected a {responses}×{responses} matrix, got shape {matrix.shape}")
    np.fill_diagonal(matrix, 0.5)
    bad = ~((matrix >= 0) & (matrix <= 1))  # NaN is bad too
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise UserError(f"{where}: P({i} ≻ {j}) is {matrix[i, j]}, not a probability")
    excess = np.abs(matrix + matrix.T - 1)
    if excess.max(initial=0) > TOLERANCE:
        i, j = np.unravel_index(excess.argmax(), excess.shape)
        raise UserError(f"{where}: P({i} ≻ {j}) + P({j} ≻ {i}) is {matrix[i, j] + matrix[j, i]:.6g}, not 1")
    return both_orders(matrix)


def both_orders(shown: np.ndarray) -> np.ndarray:
    """(K, K) P(i ≻ j) with i shown first -> (K, K), the mean over both orders; P + Pᵀ is 1 to the last bit."""
    mean = np.triu((shown + 1 - shown.T) / 2, 1)
    return mean + np.tril(1 - mean.T, -1) + np.eye(len(shown)) / 2


def without_repeats(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different texts, and where each text is among them: equal texts tie, and nobody need be asked."""
    places: dict[str, int] = {}
    indices = [places.setdefault(text, len(places)) for text in texts]
    return list(places), indices


def spread(matrix: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    """The matrix over different texts as one over all of them; equal ones meet at the diagonal's ½."""
    return matrix[np.ix_(indices, indices)]


class Steps:
    """Tells progress in groups while the work is counted in something finer."""

    def __init__(self, progress: Progress, groups: int, steps: int) -> None:
        self.progress, self.groups, self.steps = progress, groups, steps
        self.done = self.told = 0

    def __call__(self, steps: int = 1) -> None:
        self.done += steps
        self._tell(self.groups * self.done // self.steps)

    def finish(self) -> None:
        self._tell(self.groups)

    def _tell(self, groups: int) -> None:
        if groups > self.told:
            self.progress(groups - self.told)
            self.told = groups


def holds_model(oracle: Oracle) -> bool:
    """Whether the oracle loads a model where the policy is."""
    return bool(getattr(oracle, "holds_model", False))


def keeps_files(oracle: Oracle) -> bool:
    """Whether the oracle writes into the run directory when it is asked."""
    return bool(getattr(oracle, "keeps_files", False))


def take_counters(oracle: Oracle) -> dict[str, int]:
    """What the oracle spent since it was last asked this; nothing for one that does not count."""
    take = getattr(oracle, "take_counters", None)
    return take() if take else {}


def cyclic_triples(matrices: Sequence[np.ndarray]) -> tuple[int, int]:
    """(cyclic, all) triples of responses in which each beats one of the others: i ≻ j ≻ k ≻ i."""
    cyclic = total = 0
    for matrix in matrices:
        for i, j, k in itertools.combinations(range(len(matrix)), 3):
            total += 1
            beats = (matrix[i, j] > 0.5, matrix[j, k] > 0.5, matrix[k, i] > 0.5)
            loses = (matrix[i, j] < 0.5, matrix[j, k] < 0.5, matrix[k, i] < 0.5)
            cyclic += all(beats) or all(loses)
    return cyclic, total
