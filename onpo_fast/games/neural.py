"""The neural game: a real, tiny transformer that plays a preference game through the training stack of this package.

Contexts are prompts, and the responses of a context are all sequences of ``length`` tokens over a small alphabet. The
vocabulary is the alphabet and nothing ends a sequence, so that π(·|x) over these n = alphabet^length responses sums to
1 and every expectation is a finite sum. Policy, packing, scoring, pairing, objectives, the fused loss and the fits are
those of a run on a language model, unchanged; only sampling is replaced, by draws from the scored probabilities.

So two things that are estimates elsewhere are exact here, up to the model's float32: the duality gap of a policy, and
its distance from the closed form that the objective's argmin stands for.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice, permutations, product

import numpy as np
import torch
from scipy.special import logsumexp
from transformers import LlamaConfig, LlamaForCausalLM

from ..config import FitConfig
from ..data import Group, Pair, Response
from ..fit import fit, plan
from ..loss import BACKENDS
from ..models.device import device_of
from ..models.policy import Policy, score
from ..objectives import OBJECTIVES, Objective
from ..pairing import PAIRINGS, distinct, pair
from .preferences import GAMES, check
from .solution import duality_gap, nash, rewards

GIVEN = "given"
EXPECTED = "expected"
MOST_RESPONSES = 512  # every one is scored after every fit
PACKED = 64  # responses scored in one row, whose attention is quadratic


@dataclass(frozen=True)
class NeuralGame:
    """What is played, by which model, and how it learns: every option of ``play``."""

    # The game

    game: str = "rock_paper_scissors"
    """Between classes of responses: a name in ``preferences.GAMES``, drawn anew for every context. "given": the array
    that ``play`` is handed."""
    actions: int = 3
    """m, the classes. Each context deals its responses out to them at random, as evenly as can be."""
    contexts: int = 2
    """C, the prompts."""
    alphabet: int = 8
    """Tokens of the vocabulary."""
    length: int = 2
    """Tokens of a response: there are n = alphabet^length of them. With "expected" pairs a step costs by n²: ten
    milliseconds for 64, most of a second for 512."""

    # The model

    width: int = 64
    """Hidden size of the transformer."""
    layers: int = 1
    """Its layers."""
    spread: float = 1.0
    """Standard deviation of a token's logits under π_1, nats: how far from uniform the start is."""

    # The objective

    objective: str = "onpo"
    """A name in ``OBJECTIVES``: "onpo", or a baseline in the same loop."""
    eta: float | None = None
    """Step size of ONPO and OMD; INPO's is the inverse. Default: ``natural_step`` of the game, or its inverse."""
    tau: float | None = None
    """Pull of INPO (at most η) and IPO towards π_1. Default: η/10 for INPO, the inverse of the natural step for IPO."""
    beta: float = 1.0
    """DPO's inverse temperature."""

    # The data of an iteration

    iterations: int = 20
    """Policy updates."""
    pairing: str = "expected"
    """"expected": all pairs of responses, weighted by how likely two independent draws from π_t are they, so that what
    keeps a fit from the closed form is the fit. Or a name in ``PAIRINGS``, of draws: "iid" and "all_pairs" come to the
    same on average, the others to something else."""
    groups: int = 384
    """Groups of responses drawn from π_t, to every context, for a pairing that takes draws."""
    responses: int = 16
    """K, the responses of a group."""
    labels: str = "soft"
    """"soft": P(winner ≻ loser); "bits": a draw from it."""

    # Fits

    fit_steps: int = 100
    """Optimizer steps of one fit, each on all pairs of the iteration: with more of them it is nearer to its argmin."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule."""
    warmup_ratio: float = 0.1
    """Share of a fit's steps with a rising learning rate."""
    max_grad_norm: float = 100.0
    """Gradients are clipped to this norm."""

    # The machine

    seed: int = 0
    """Of everything random. The game and π_1 depend on it, and not on the objective."""
    device: str = "cpu"
    """Of the model. On a CPU one thread is used: more only wait for each other at this size."""
    loss_backend: str = "auto"
    """Of ``fused_linear_pair_loss``: "auto", "triton", "torch" or "reference"."""

    def __post_init__(self) -> None:
        for name, known in (
            ("game", [*GAMES, GIVEN]),
            ("objective", OBJECTIVES),
            ("pairing", [EXPECTED, *PAIRINGS]),
            ("labels", ("soft", "bits")),
            ("loss_backend", BACKENDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name, least in (
            ("actions", 2),
            ("contexts", 1),
            ("alphabet", 2),
            ("length", 1),
            ("layers", 1),
            ("iterations", 1),
            ("groups", 1),
            ("responses", 2),
            ("fit_steps", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")
        if self.contexts > self.alphabet * (self.alphabet - 1):
            raise ValueError(
                f"contexts must be at most alphabet·(alphabet − 1), which is {self.alphabet * (self.alphabet - 1)}: a "
                f"context is two different tokens, not {self.contexts}"
            )
        if not isinstance(self.width, int) or self.width < 4 or self.width % 4:
            raise ValueError(f"width must be a multiple of 4 (two heads of even size), not {self.width!r}")
        for name in ("eta", "tau", "beta", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (value is None and name in ("eta", "tau")) and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive, finite number, not {value!r}")
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise ValueError(f"spread must be a finite number, at least 0, not {self.spread!r}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), not {self.warmup_ratio!r}")
        if self.length * math.log(self.alphabet) > math.log(MOST_RESPONSES) + 1e-9:
            raise ValueError(
                f"alphabet {self.alphabet} and length {self.length} make more than {MOST_RESPONSES} responses, each of "
                "which is scored after every fit: lower one of them"
            )
        if self.game != GIVEN and self.actions > self.alphabet**self.length:
            raise ValueError(f"{self.actions} actions are more than the {self.alphabet**self.length} responses")


@dataclass(frozen=True)
class NeuralTrace:
    """The policies of a run, and what can be said of them exactly. Arrays are float64; log-probs are in nats."""

    game: NeuralGame  # with the eta and tau that were used
    matrices: np.ndarray  # (C, m, m): P(class i ≻ class j) in every context
    classes: np.ndarray  # (C, n) int64: of the responses, in lexicographic order of their tokens
    logps: np.ndarray  # (T+1, C, n): of π_1 … π_{T+1}, scored, normalised in float64
    logps_auxiliary: np.ndarray | None  # (T+1, C, n): of π′_1 … π′_{T+1}, where the objective has them
    mass_error: float  # the largest |Σ_y π(y|x) − 1| as scored
    seconds: float

    @property
    def objective(self) -> Objective:
        return _objective(self.game)

    @property
    def preferences(self) -> np.ndarray:
        """(C, n, n): P(y ≻ y′) in every context."""
        return _responses(self.matrices, self.classes)

    @property
    def policies(self) -> np.ndarray:
        """(T+1, C, n): π_1 … π_{T+1}."""
        return np.exp(self.logps)

    @property
    def gap(self) -> np.ndarray:
        """(T+1, C): duality gap of every iterate."""
        return duality_gap(self.preferences, self.policies)

    @property
    def average_gap(self) -> np.ndarray:
        """(T+1, C): duality gap of the mean of π_1 … π_t."""
        count = np.arange(1, len(self.logps) + 1)[:, None, None]
        return duality_gap(self.preferences, self.policies.cumsum(0) / count)

    @property
    def ideal_gap(self) -> np.ndarray | None:
        """(T+1, C): duality gap of every iterate of the exact updates alone, from the same π_1. None for DPO."""
        logps = ideal(self.objective, self.preferences, self.logps[0], self.game.iterations)
        return None if logps is None else duality_gap(self.preferences, np.exp(logps))

    @property
    def distance(self) -> np.ndarray | None:
        """(T, C): total variation between π_{t+1} and the closed form that its fit stands for.

        The closed form starts from the model's own π_t, and π′_{t+1} where there is one: errors do not add up. None
        for DPO.
        """
        updated = self.logps[:-1] if self.logps_auxiliary is None else self.logps_auxiliary[1:]
        return self._off(updated, self.logps[1:])

    @property
    def distance_auxiliary(self) -> np.ndarray | None:
        """(T, C): the same for π′_{t+1}. None without one."""
        logps = self.logps_auxiliary
        return None if logps is None else self._off(logps[:-1], logps[1:])

    def _off(self, updated: np.ndarray, fitted: np.ndarray) -> np.ndarray | None:
        reward = rewards(self.preferences, self.policies[:-1])
        exact = closed_form(self.objective, self.logps[0], updated, reward)
        return None if exact is None else np.abs(np.exp(fitted) - np.exp(exact)).sum(-1) / 2

    def as_dict(self) -> dict:
        """All of it, measures included, as JSON has it."""
        names = [field.name for field in fields(self) if field.name != "game"]
        names += ["gap", "average_gap", "ideal_gap", "distance", "distance_auxiliary"]
        values = {name: getattr(self, name) for name in names}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        return {"game": asdict(self.game), **plain}


def play(
    game: NeuralGame,
    preferences: np.ndarray | None = None,
    on_progress: Callable[[int, int], None] = lambda done, fits: None,
) -> NeuralTrace:
    """Self-play of a random transformer: the loop of ``train``, in memory.

    The same options give the same bits on the same machine.

    Args:
        preferences: (m, m) or (C, m, m), P(i ≻ j), in place of ``game.game``. With as many actions as there are
            responses, they are the responses in lexicographic order; fewer are classes that responses are dealt to.
        on_progress: told the fits that are done, and of how many.

    Raises:
        ValueError: if the array is no preference matrix or does not fit, the game has another number of actions, or τ
            exceeds INPO's η.
        UserError: if the device is not there, or a fit comes to no finite loss.
    """
    start = time.perf_counter()
    game, matrices, classes = _settle(game, preferences)
    objective = _objective(game)
    with _one_thread(game.device):
        table = _Table(game, _responses(matrices, classes))
        policy, auxiliary = table.initial(), table.initial()  # π_1 = π′_1
        initial = table.score(policy)
        logps, logps_auxiliary = [initial], [initial]
        fits_each = 1 + objective.optimistic

        for t in range(1, game.iterations + 1):
            pairs = table.pairs(t, logps[-1])
            updated = logps[-1]
            if objective.optimistic:
                table.fit(auxiliary, anchor(objective, initial, logps_auxiliary[-1]), pairs)
                updated = table.score(auxiliary)  # π′_{t+1}
                logps_auxiliary.append(updated)
                policy.model.load_state_dict(auxiliary.model.state_dict())  # a fit starts from its anchor
                on_progress(2 * t - 1, 2 * game.iterations)
            table.fit(policy, anchor(objective, initial, updated), pairs)
            logps.append(table.score(policy))  # π_{t+1}
            on_progress(fits_each * t, fits_each * game.iterations)

    return NeuralTrace(
        game,
        matrices,
        classes,
        np.stack(logps),
        np.stack(logps_auxiliary) if objective.optimistic else None,
        table.mass_error,
        time.perf_counter() - start,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a fit stands for
# ---------------------------------------------------------------------------------------------------------------------


def anchor(objective: Objective, initial: np.ndarray, updated: np.ndarray) -> np.ndarray:
    """Log-probs that margins are measured from: of the policy that is updated, of π_1, or INPO's mixture of both."""
    share = objective.initial_share
    return share * initial + (1 - share) * updated


def closed_form(
    objective: Objective, initial: np.ndarray, updated: np.ndarray, reward: np.ndarray
) -> np.ndarray | None:
    """Log-probs of the minimiser over all policies, for pairs of independent draws from π_t.

    The target of a pair is s·(P(y ≻ y′) − ½), and s·(r(y) − r(y′)) is the difference of one function that is nearest to
    it in mean square: so π ∝ anchor·exp(s·r). s is η for ONPO and OMD, 1/η for INPO, 1/τ for IPO.

    Args:
        initial: (…, n), log-probs of π_1.
        updated: (…, n), of the policy that is updated: π_t, or of ONPO π′_t and then π′_{t+1}.
        reward: (…, n), r(y) = P(y ≻ π_t).

    Returns:
        (…, n); None for DPO, whose minimiser has no such form.
    """
    slope = 2 * float(objective.target(torch.ones((), dtype=torch.float64)))
    if not math.isfinite(slope):  # DPO: a sure pair has no finite margin
        return None
    logits = anchor(objective, initial, updated) + slope * reward
    return logits - logsumexp(logits, axis=-1, keepdims=True)


def ideal(objective: Objective, P: np.ndarray, initial: np.ndarray, iterations: int) -> np.ndarray | None:
    """(T+1, …, n): log-probs of the policies that exact minimisers give, from ``initial``; None for DPO."""
    logps, auxiliary = [initial], initial
    for _ in range(iterations):
        reward = rewards(P, np.exp(logps[-1]))
        updated = logps[-1]
        if objective.optimistic:
            updated = auxiliary = closed_form(objective, initial, auxiliary, reward)
        logps.append(closed_form(objective, initial, updated, reward))
        if logps[-1] is None:
            return None
    return np.stack(logps)


def natural_step(P: np.ndarray) -> float:
    """The step η at which ONPO closes in fastest on an interior Nash policy, at most 4.

    Near it, a mirror-descent step is log π − log Nash ↦ (1 + ηM)(log π − log Nash), where M = (P − ½)·diag(Nash) has
    eigenvalues ±iω. ONPO's factors are the roots of μ² − (1 + 2iηω)μ + iηω = 0; the larger is least at ηω = ½, where it
    is √½, and reaches 1 at ηω = √⅓. The largest ω of a batch decides. A pure Nash policy has none: then 4.

    Args:
        P: (n, n) or (B, n, n).
    """
    turning = np.abs(np.linalg.eigvals((P - 0.5) * nash(P)[..., None, :])).max()
    return float(0.5 / max(turning, 0.125))


# ---------------------------------------------------------------------------------------------------------------------
# The game, written out
# ---------------------------------------------------------------------------------------------------------------------


def _settle(game: NeuralGame, preferences: np.ndarray | None) -> tuple[NeuralGame, np.ndarray, np.ndarray]:
    """The options with the numbers that depend on the game; its matrices (C, m, m); the responses' classes (C, n)."""
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
    dealt = np.arange(n) % game.actions
    own = preferences is not None and game.actions == n
    classes = np.stack([dealt if own else rng.permutation(dealt) for _ in range(game.contexts)])
    if game.eta is None or game.tau is None:
        step, inverse = natural_step(matrices), game.objective == "inpo"
        eta = game.eta or (1 / step if inverse else step)
        game = replace(game, eta=eta, tau=game.tau or (eta / 10 if inverse else 1 / step))
    return game, matrices, classes


def _responses(matrices: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(C, n, n): of responses, what their classes prefer."""
    return np.stack([matrix[np.ix_(of, of)] for matrix, of in zip(matrices, classes)])


def _objective(game: NeuralGame) -> Objective:
    kind = OBJECTIVES[game.objective]
    return kind(**{field.name: getattr(game, field.name) for field in fields(kind)})


# ---------------------------------------------------------------------------------------------------------------------
# The stages of an iteration
# ---------------------------------------------------------------------------------------------------------------------


class _Table:
    """All responses to all contexts, and what the training stack says of them."""

    def __init__(self, game: NeuralGame, P: np.ndarray) -> None:
        self.game, self.P = game, P
        self.device = device_of(game.device)
        self.objective = _objective(game)
        self.config = FitConfig(
            learning_rate=game.learning_rate,
            warmup_ratio=game.warmup_ratio,
            max_grad_norm=game.max_grad_norm,
            loss_backend=game.loss_backend,
            tokens_per_microbatch=1 << 14,
        )
        alphabet = range(game.alphabet)
        self.responses = [
            Response(" ".join(map(str, tokens)), list(tokens), "length", math.nan)
            for tokens in product(alphabet, repeat=game.length)
        ]
        # two different tokens: where all are the same, attention has one value to take, and no position can be told
        self.contexts = [list(tokens) for tokens in islice(permutations(alphabet, 2), game.contexts)]
        self.groups = [self._group(c, range(len(self.responses))) for c in range(game.contexts)]
        self.mass_error = 0.0

    def initial(self) -> Policy:
        """π_1: random weights of the seed."""
        game = self.game
        architecture = LlamaConfig(
            vocab_size=game.alphabet,
            hidden_size=game.width,
            intermediate_size=2 * game.width,
            num_hidden_layers=game.layers,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=game.width**-0.5,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(game.seed)
            model = LlamaForCausalLM(architecture)
        with torch.no_grad():  # the last norm leaves hidden states of size √width
            model.lm_head.weight *= game.spread
        return Policy(model.to(self.device), None, self.device, torch.float32, "shared")

    def score(self, policy: Policy) -> np.ndarray:
        """(C, n): log-probs of every response."""
        n = len(self.responses)
        groups = [
            self._group(c, range(first, min(first + PACKED, n)))
            for c in range(self.game.contexts)
            for first in range(0, n, PACKED)
        ]
        logps = torch.cat(score(policy, groups, self.config.tokens_per_microbatch)).numpy().reshape(-1, n)
        mass = logsumexp(logps, axis=-1, keepdims=True)
        self.mass_error = max(self.mass_error, float(np.abs(np.expm1(mass)).max()))
        return logps - mass

    def pairs(self, t: int, logps: np.ndarray) -> list[Pair]:
        """What an iteration learns from: comparisons of responses drawn from π_t, the same ones as one with a weight.

        A response is then scored once, however often it was drawn.
        """
        game = self.game
        if game.pairing == EXPECTED:
            return [pair for c, p in enumerate(np.exp(logps)) for pair in self._expected(c, p)]
        rng = np.random.default_rng([game.seed, 1, t])
        counts: Counter[tuple[int, int, int, float]] = Counter()
        for c, (P, p) in enumerate(zip(self.P, np.exp(logps))):
            drawn = rng.choice(len(p), (game.groups, game.responses), p=p)
            preferences = (P[np.ix_(members, members)] for members in drawn)
            chosen = pair(preferences, game.pairing, game.labels, [game.seed, 2, t, c])
            counts.update(
                (c, int(drawn[q.group, q.winner]), int(drawn[q.group, q.loser]), q.preference) for q in chosen
            )
        return distinct((Pair(*comparison, weight) for comparison, weight in counts.items()), self.groups)

    def _expected(self, context: int, p: np.ndarray) -> Iterator[Pair]:
        """Every pair of two responses, by its probability as two independent draws from π_t."""
        P = self.P[context]
        for i, j in np.argwhere(np.triu(P >= 0.5, 1) | np.tril(P > 0.5, -1)).tolist():  # the likelier one first
            yield Pair(context, i, j, float(P[i, j]), float(2 * p[i] * p[j]))

    def fit(self, policy: Policy, anchor: np.ndarray, pairs: list[Pair]) -> None:
        """One argmin over an iteration's pairs, in place. ``anchor``: (C, n), log-probs."""
        cached = list(torch.from_numpy(anchor))
        # whole batches; without a pair, where all draws are the same response, the policy stays
        batches = plan(pairs, self.game.fit_steps, len(pairs), [self.game.seed, 3])
        fit(policy, self.groups, batches, cached, self.objective, self.config, lambda metrics: None)

    def _group(self, context: int, members: Iterable[int]) -> Group:
        return Group([], self.contexts[context], [self.responses[i] for i in members])


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """On a CPU, for as long as it lasts: at this size threads wait for each other, and sums keep their order."""
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
