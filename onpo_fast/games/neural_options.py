"""The options of a neural game: what is played, by which model, and how it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from ..algorithms import ALGORITHMS, ALIASES, named
from ..loss import BACKENDS
from ..objectives import Inpo, Objective
from ..pairing import PAIRINGS
from .matrix import check_mixture
from .matrix_games import check_labels
from .preferences import GAMES, check
from .solution import nash

GIVEN = "given"
EXPECTED = "expected"
MOST_RESPONSES = 512  # all of them are scored after every fit
INITIAL_SHARE = 0.1  # default weight of π_1 in a mixture

LEAST = {
    "actions": 2,
    "contexts": 1,
    "alphabet": 2,
    "length": 1,
    "layers": 1,
    "iterations": 1,
    "groups": 1,
    "responses": 2,
    "fit_steps": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class NeuralGame:
    """Every option of ``neural.play``.

    Raises:
        ValueError: if an option is invalid; the message names it.
    """

    # The game

    game: str = "rock_paper_scissors"
    """Preference game between classes of responses, a name that ``preferences.GAMES`` has: drawn anew for every
    context. Or "given" for an array that is passed to ``play``."""
    actions: int = 3
    """Number of classes, m. In each context the responses are divided among them at random, as evenly as possible."""
    contexts: int = 2
    """Number of prompts, C."""
    alphabet: int = 8
    """Tokens in the vocabulary."""
    length: int = 2
    """Tokens in a response: there are n = alphabet^length responses. With "expected" pairs the time of a step grows
    with n²: ten milliseconds for 64 responses, most of a second for 512."""

    # The model

    width: int = 64
    """Hidden size of the transformer."""
    layers: int = 1
    """Layers of the transformer."""
    logit_std: float = 1.0
    """Standard deviation of a token's logits under the initial policy, in nats."""

    # The algorithm

    objective: str = "onpo"
    """Algorithm, as the trainer's --objective."""
    eta: float | None = None
    """Step size of mirror descent; for INPO its inverse. Default: the step with which ONPO converges fastest
    (``natural_step``), or its inverse."""
    tau: float | None = None
    """Strength of the pull towards the initial policy. Default: it has a weight of 1/10 in INPO's, Nash-MD's and EGPO's
    mixtures; for IPO it is the inverse of the default step."""
    beta: float = 1.0
    """DPO's inverse temperature."""

    # The comparisons of an iteration

    iterations: int = 20
    """Policy updates."""
    pairing: str = "expected"
    """Pairs of an iteration. "expected": all pairs of responses, weighted by the probability that two independent draws
    from the policy are this pair, so that a fit has no sampling error. "iid", "all_pairs", "best_worst" or "knockout":
    pairs of drawn responses, as the trainer's --pairing; the first two agree with "expected" on average, the others do
    not."""
    groups: int = 384
    """Groups of responses drawn for every context, if pairs are drawn."""
    responses: int = 16
    """Responses in a group, K."""
    labels: str = "soft"
    """Labels of drawn pairs. "soft": P(winner ≻ loser); "sampled": a draw from it."""

    # Fits

    fit_steps: int = 100
    """Optimizer steps in a fit, each on all pairs of the iteration. More steps end nearer to the minimiser."""
    learning_rate: float = 3e-3
    """Peak learning rate of the cosine schedule."""
    warmup_ratio: float = 0.1
    """Share of a fit's steps with a rising learning rate."""
    max_grad_norm: float = 100.0
    """Gradients are clipped to this norm."""

    # The machine

    seed: int = 0
    """Seed of the game, the initial policy and all draws. The game and the initial policy are the same for every
    objective."""
    device: str = "cpu"
    """Device of the model. On a CPU one thread is used: at this size more of them are slower."""
    loss_backend: str = "auto"
    """Implementation of the loss: "auto", "triton", "torch" or "reference"."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        if self.contexts > self.alphabet * (self.alphabet - 1):
            raise ValueError(
                f"contexts must be at most alphabet·(alphabet − 1), which is {self.alphabet * (self.alphabet - 1)}: a "
                f"context is two different tokens, not {self.contexts}"
            )
        if self.length * math.log(self.alphabet) > math.log(MOST_RESPONSES) + 1e-9:
            raise ValueError(
                f"alphabet {self.alphabet} and length {self.length} make more than {MOST_RESPONSES} responses, each of "
                "which is scored after every fit: lower one of them"
            )
        if self.game != GIVEN and self.actions > self.alphabet**self.length:
            raise ValueError(f"{self.actions} actions are more than the {self.alphabet**self.length} responses")

    def _check_choices(self) -> None:
        for name, known in (
            ("game", [*GAMES, GIVEN]),
            ("objective", [*ALGORITHMS, *ALIASES]),
            ("pairing", [EXPECTED, *PAIRINGS]),
            ("loss_backend", BACKENDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        check_labels(self.labels)

    def _check_numbers(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")
        if not isinstance(self.width, int) or self.width < 4 or self.width % 4:
            raise ValueError(f"width must be a multiple of 4 (two heads of even size), not {self.width!r}")
        for name in ("eta", "tau", "beta", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (value is None and name in ("eta", "tau")) and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive, finite number, not {value!r}")
        if not (math.isfinite(self.logit_std) and self.logit_std >= 0):
            raise ValueError(f"logit_std must be a finite number, at least 0, not {self.logit_std!r}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), not {self.warmup_ratio!r}")

    def make_objective(self) -> Objective:
        """Return the loss of the fits. ``eta`` and ``tau`` must be set, as ``resolve`` does.

        Raises:
            ValueError: if INPO's τ exceeds its η.
        """
        kind = named(self.objective).objective
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    @property
    def initial_share(self) -> float:
        """The weight of π_1 in a mixture."""
        objective = self.make_objective()
        return objective.initial_share if isinstance(objective, Inpo) else self.eta * self.tau


def natural_step(P: np.ndarray) -> float:
    """Return the step η at which ONPO converges fastest near an interior Nash policy, at most 4.

    Near it, a mirror-descent step is log π − log Nash ↦ (1 + ηM)(log π − log Nash), where M = (P − ½)·diag(Nash) has
    eigenvalues ±iω. ONPO's factors are the roots of μ² − (1 + 2iηω)μ + iηω = 0. The larger root is least at ηω = ½,
    where it is √½, and reaches 1 at ηω = √⅓. The largest ω of a batch decides. A pure Nash policy has ω = 0: then 4.

    Args:
        P: preferences, (n, n) or (B, n, n).
    """
    turning = np.abs(np.linalg.eigvals((P - 0.5) * nash(P)[..., None, :])).max()
    return float(0.5 / max(turning, 0.125))


def resolve(game: NeuralGame, preferences: np.ndarray | None) -> tuple[NeuralGame, np.ndarray, np.ndarray]:
    """Draw the game and set the options that depend on it.

    Args:
        preferences: see ``neural.play``.

    Returns:
        The options with ``eta`` and ``tau``; the matrices between classes, (C, m, m); the classes of the responses,
        (C, n) int64.

    Raises:
        ValueError: if the preferences do not fit the options, or ``tau`` is too large.
    """
    n = game.alphabet**game.length
    rng = np.random.default_rng([game.seed, 0])
    if preferences is not None:
        P = check(preferences)
        matrices = np.repeat(P[None], game.contexts, axis=0) if P.ndim == 2 else P
        if len(matrices) != game.contexts:
            raise ValueError(f"there are {len(matrices)} preference matrices for {game.contexts} contexts")
        if matrices.shape[-1] > n:
            raise ValueError(f"a preference matrix has {matrices.shape[-1]} actions, more than the {n} responses")
        game = replace(game, game=GIVEN, actions=matrices.shape[-1])
    elif game.game == GIVEN:
        raise ValueError(f"game {GIVEN!r} needs preferences")
    else:
        matrices = GAMES[game.game](game.actions, game.contexts, rng)
    classes_in_order = np.arange(n) % game.actions
    one_each = preferences is not None and game.actions == n
    classes = np.stack([classes_in_order if one_each else rng.permutation(classes_in_order) for _ in matrices])
    game = _with_steps_of(game, matrices)
    if named(game.objective).objective is not Inpo:  # whose constructor checks it
        check_mixture(game.objective, game.eta, game.tau)
    return game, matrices, classes


def _with_steps_of(game: NeuralGame, matrices: np.ndarray) -> NeuralGame:
    """Return the options with ``eta`` and ``tau``, by default those that suit the matrices."""
    if game.eta is not None and game.tau is not None:
        return game
    algorithm, step = named(game.objective), natural_step(matrices)
    if algorithm.objective is Inpo:
        eta = game.eta or 1 / step
        tau = eta / 10
    else:
        eta = game.eta or step
        tau = INITIAL_SHARE / eta if algorithm.mixes else 1 / step
    return replace(game, eta=eta, tau=game.tau or tau)


def response_preferences(matrices: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return P(y ≻ y′) of the responses, (C, n, n), from the matrices of their classes, (C, m, m) and (C, n)."""
    return np.stack([matrix[np.ix_(of, of)] for matrix, of in zip(matrices, classes)])
