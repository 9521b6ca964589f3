"""The neural game: a real, tiny transformer that plays a preference game through the training stack of this package.

Contexts are prompts, and the responses of a context are all sequences of ``length`` tokens over a small alphabet. The
vocabulary is the alphabet and nothing ends a sequence, so that π(·|x) over these n = alphabet^length responses sums to
1 and every expectation is a finite sum. The algorithm, packing, scoring, pairing, objectives, the fused loss and the
fits are those of a run on a language model. Only sampling is replaced, by draws from the scored probabilities.

Two quantities that are estimates elsewhere are therefore exact here, up to the model's float32: the duality gap of a
policy, and its distance from the exact minimiser of the loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice

import numpy as np
import torch

from ..algorithms import named
from .neural_game import TransformerGame, closed_form_game
from .neural_options import GIVEN, NeuralGame, natural_step, resolve, response_preferences
from .solution import duality_gap

__all__ = ["GIVEN", "NeuralGame", "NeuralTrace", "natural_step", "play"]


@dataclass(frozen=True)
class NeuralTrace:
    """The policies of a run and their exact measures. Arrays are float64; log-probs are in nats."""

    game: NeuralGame  # with the eta and tau that were used
    matrices: np.ndarray  # (C, m, m): P(class i ≻ class j) in every context
    classes: np.ndarray  # (C, n) int64: classes of the responses, in lexicographic order of their tokens
    logps: np.ndarray  # (T+1, C, n): log-probs of π_1 … π_{T+1}, normalised in float64
    logps_auxiliary: np.ndarray | None  # (T+1, C, n): those of π′_1 … π′_{T+1}; None if there is one fit an iteration
    distance: np.ndarray | None  # (T, C): total variation between π_{t+1} and the minimiser from the same anchor
    distance_auxiliary: np.ndarray | None  # (T, C): the same for π′_{t+1}. Both are None for DPO
    mass_error: float  # the largest |Σ_y π(y|x) − 1| as scored
    seconds: float

    @property
    def preferences(self) -> np.ndarray:
        """P(y ≻ y′) in every context, (C, n, n)."""
        return response_preferences(self.matrices, self.classes)

    @property
    def policies(self) -> np.ndarray:
        """π_1 … π_{T+1}, (T+1, C, n)."""
        return np.exp(self.logps)

    @property
    def gap(self) -> np.ndarray:
        """Duality gap of every policy, (T+1, C)."""
        return duality_gap(self.preferences, self.policies)

    @property
    def average_gap(self) -> np.ndarray:
        """Duality gap of the mean of π_1 … π_t, (T+1, C)."""
        count = np.arange(1, len(self.logps) + 1)[:, None, None]
        return duality_gap(self.preferences, self.policies.cumsum(0) / count)

    @property
    def ideal_gap(self) -> np.ndarray | None:
        """Duality gaps of a run whose fits are exact, from the same π_1, (T+1, C). None for DPO."""
        game = closed_form_game(self.game, self.preferences)
        if game is None:
            return None
        policies = named(self.game.objective).play(game, self.logps[0])
        return duality_gap(self.preferences, np.exp([*islice(policies, len(self.logps))]))

    def as_dict(self) -> dict:
        """Return everything as JSON types, measures included."""
        names = [field.name for field in fields(self) if field.name != "game"]
        names += ["gap", "average_gap", "ideal_gap"]
        values = {name: getattr(self, name) for name in names}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        return {"game": asdict(self.game), **plain}


def play(
    game: NeuralGame,
    preferences: np.ndarray | None = None,
    on_progress: Callable[[int, int], None] = lambda done, fits: None,
) -> NeuralTrace:
    """Play a random transformer against itself: a run of the trainer, in memory.

    The same options give the same bits on the same machine.

    Args:
        preferences: P(i ≻ j), (m, m) or (C, m, m), in place of ``game.game``. With as many actions as there are
            responses, the actions are the responses in lexicographic order; with fewer, they are classes among which
            the responses are divided.
        on_progress: called after every fit with the number of fits done and in all.

    Raises:
        ValueError: if the array is not a preference matrix or does not fit the options, the named game has another
            number of actions, or τ is too large.
        UserError: if the device is missing, or a fit has no finite loss.
    """
    start = time.perf_counter()
    game, matrices, classes = resolve(game, preferences)
    algorithm = named(game.objective)
    total, done = algorithm.fits * game.iterations, 0

    def on_fit() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    with _one_thread(game.device):
        transformer = TransformerGame(game, response_preferences(matrices, classes), on_fit)
        initial = transformer.initial()
        policies = [policy.logps for policy in islice(algorithm.play(transformer, initial), game.iterations + 1)]

    auxiliary, distances = transformer.fitted["auxiliary"], transformer.distances
    return NeuralTrace(
        game,
        matrices,
        classes,
        np.stack(policies),
        np.stack([initial.logps, *auxiliary]) if auxiliary else None,
        np.stack(distances["policy"]) if distances["policy"] else None,
        np.stack(distances["auxiliary"]) if distances["auxiliary"] else None,
        transformer.mass_error,
        time.perf_counter() - start,
    )


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Use one thread on a CPU: at this size threads wait for each other, and one keeps the order of sums."""
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
