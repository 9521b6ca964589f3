"""A transformer as a game that ``onpo_fast.algorithms`` can play: all responses are scored after every fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, permutations, product

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ..batches import plan_steps
from ..config import FitConfig
from ..data import Group, Pair, Response
from ..device import device_of
from ..fit import fit
from ..models.policy import Policy, score
from ..objectives import Dpo, Objective, Sppo
from ..pairing import drop_identical, pair
from .matrix_games import ExactGame, Rewards, log_normalised
from .neural_options import EXPECTED, NeuralGame
from .solution import rewards

PACKED = 64  # responses scored in one row, whose attention is quadratic in its length


@dataclass(frozen=True)
class ScoredPolicy:
    """A policy with the log-probs of all responses."""

    logps: np.ndarray  # (C, n) float64, nats; those of a mixture are not normalised, as margins do not depend on it
    weights: dict[str, Tensor] | None  # None: a mixture, which no model represents

    @property
    def probabilities(self) -> np.ndarray:
        """π(y|x), (C, n)."""
        return np.exp(log_normalised(self.logps) if self.weights is None else self.logps)


@dataclass(frozen=True)
class Compared:
    """The comparisons of responses of one policy."""

    pairs: list[Pair]
    steps: int  # the target is this many times that of the labels
    expectation: Rewards  # what the closed forms are made of


class TransformerGame:
    """``algorithms.Game`` with a transformer as its policy, through the stages of a training run.

    Args:
        game: the options, with ``eta`` and ``tau``.
        P: preferences between all responses, (C, n, n).
        on_fit: called after every fit.

    Attributes:
        fitted: log-probs of every policy that was fitted, (C, n) each, by what it was fitted into.
        distances: total variation between each of them and the exact minimiser of its loss from the same anchor, (C,)
            each. Empty for DPO, whose loss has no minimum where a response beats all others with probability 1.
        mass_error: the largest |Σ_y π(y|x) − 1| of all scores.
    """

    def __init__(self, game: NeuralGame, P: np.ndarray, on_fit: Callable[[], None] = lambda: None) -> None:
        self.options, self.P, self.on_fit = game, P, on_fit
        self.device = device_of(game.device)
        self.objective = game.make_objective()
        self.closed_form = closed_form_game(game, P)
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
        # two different tokens: if all were the same, attention could not distinguish positions
        self.contexts = [list(tokens) for tokens in islice(permutations(alphabet, 2), game.contexts)]
        # SPPO's margin is a response's own log-ratio: it is paired with an empty response, whose log-prob is 0
        unpaired = [Response("", [], "length", math.nan)] if isinstance(self.objective, Sppo) else []
        self.groups = [Group([], context, self.responses + unpaired) for context in self.contexts]
        self.model = self._random_model()
        self.comparisons = 0
        self.mass_error = 0.0
        self.fitted: dict[str, list[np.ndarray]] = {"policy": [], "auxiliary": []}
        self.distances: dict[str, list[np.ndarray]] = {"policy": [], "auxiliary": []}

    def initial(self) -> ScoredPolicy:
        """Return π_1: the model as it is before any fit."""
        return self._scored()

    def compare(self, policy: ScoredPolicy, opponent: ScoredPolicy | None = None) -> Compared:
        """Return pairs of the policy's responses. A pair that is drawn several times is one pair with a weight.

        Against an opponent's response y″ the label is ½ + (P(y ≻ y″) − P(y′ ≻ y″))/2, a probability, whose target is
        half the difference of two rewards: hence two steps (EGPO's loss).
        """
        self.comparisons += 1
        p, other = policy.probabilities, None if opponent is None else opponent.probabilities
        reward = rewards(self.P, p if other is None else other)
        if self.options.pairing == EXPECTED:
            pairs = [one for c in range(len(p)) for one in self._expected(c, p[c], reward[c], other is not None)]
        else:
            pairs = self._drawn(p, other)
        expectation = Rewards(reward, log_normalised(policy.logps))
        return Compared(pairs, 1 if other is None else 2, expectation)

    def fit(
        self,
        anchor: ScoredPolicy,
        compared: Compared,
        *,
        warm_start: ScoredPolicy | None = None,
        into: str = "policy",
        steps: int = 1,
    ) -> ScoredPolicy:
        """Train the model on the pairs, from the weights of ``warm_start`` or of the anchor."""
        self.model.model.load_state_dict((warm_start or anchor).weights)
        self.train(anchor.logps, compared.pairs, self.objective.with_steps(steps * compared.steps))
        fitted = self._scored()
        self.fitted[into].append(fitted.logps)
        if self.closed_form is not None:
            exact = self.closed_form.fit(anchor.logps, compared.expectation, steps=steps)
            self.distances[into].append(np.abs(np.exp(fitted.logps) - np.exp(exact)).sum(-1) / 2)
        self.on_fit()
        return fitted

    def mixture(self, initial: ScoredPolicy, policy: ScoredPolicy) -> ScoredPolicy:
        """Return π_1^s · π^(1−s), which has log-probs but no weights."""
        share = self.options.initial_share
        return ScoredPolicy(share * initial.logps + (1 - share) * policy.logps, None)

    def train(self, anchor: np.ndarray, pairs: list[Pair], objective: Objective) -> None:
        """Fit the model to the pairs, with margins measured from the anchor's log-probs, (C, n).

        Without a pair (all draws were the same response) the model stays as it is.
        """
        cached = [torch.from_numpy(np.append(row, 0.0)) for row in anchor]  # 0: an empty response's
        batches = plan_steps(
            pairs, self.options.fit_steps, len(pairs), [self.options.seed, 3]
        )  # all pairs in every step
        fit(self.model, self.groups, batches, cached, objective, self.config, lambda metrics: None)

    def score(self) -> np.ndarray:
        """Return the model's log-probs of all responses, (C, n), normalised in float64."""
        n = len(self.responses)
        groups = [
            Group([], context, self.responses[first : first + PACKED])
            for context in self.contexts
            for first in range(0, n, PACKED)
        ]
        logps = torch.cat(score(self.model, groups, self.config.tokens_per_microbatch)).numpy().reshape(-1, n)
        mass = logsumexp(logps, axis=-1, keepdims=True)
        self.mass_error = max(self.mass_error, float(np.abs(np.expm1(mass)).max()))
        return logps - mass

    def _scored(self) -> ScoredPolicy:
        weights = {name: tensor.clone() for name, tensor in self.model.model.state_dict().items()}
        return ScoredPolicy(self.score(), weights)

    def _expected(self, context: int, p: np.ndarray, reward: np.ndarray, against_other: bool) -> Iterator[Pair]:
        """Yield every pair of two responses, weighted by its probability as two independent draws from π_t."""
        if isinstance(self.objective, Sppo):
            for i, weight in enumerate(p.tolist()):
                yield Pair(context, i, len(p), float(reward[i]), weight)
            return
        P = 0.5 + (reward[:, None] - reward[None, :]) / 2 if against_other else self.P[context]
        for i, j in np.argwhere(np.triu(P >= 0.5, 1) | np.tril(P > 0.5, -1)).tolist():  # the likelier winner first
            yield Pair(context, i, j, float(P[i, j]), float(2 * p[i] * p[j]))

    def _drawn(self, p: np.ndarray, other: np.ndarray | None) -> list[Pair]:
        """Return pairs of drawn responses, with the number of times each was drawn as its weight."""
        game, t = self.options, self.comparisons
        rng = np.random.default_rng([game.seed, 1, t])
        counts: Counter[tuple[int, int, int, float]] = Counter()
        for c, (P, probabilities) in enumerate(zip(self.P, p)):
            drawn = rng.choice(len(P), (game.groups, game.responses), p=probabilities)
            if other is None:
                labels, preferences = game.labels, (P[np.ix_(members, members)] for members in drawn)
            else:
                labels = "soft"  # the outcomes are drawn here
                preferences = self._against_one(P, drawn, rng.choice(len(P), len(drawn), p=other[c]), rng)
            for q in pair(preferences, game.pairing, labels, [game.seed, 2, t, c]):
                winner, loser = int(drawn[q.group, q.winner]), int(drawn[q.group, q.loser])
                if isinstance(self.objective, Sppo):  # each by itself: the mean of its labels is its win rate
                    counts.update([(c, winner, len(P), q.preference), (c, loser, len(P), 1 - q.preference)])
                else:
                    counts[c, winner, loser, q.preference] += 1
        return drop_identical((Pair(*comparison, weight) for comparison, weight in counts.items()), self.groups)

    def _against_one(
        self, P: np.ndarray, drawn: np.ndarray, opponents: np.ndarray, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """Yield ½ + (P(y ≻ y″) − P(y′ ≻ y″))/2 of each group (K, K), where y″ is the opponent's one response to it."""
        for members, opponent in zip(drawn, opponents):
            wins = P[members, opponent]
            if self.options.labels != "soft":
                wins = (rng.random(len(wins)) < wins).astype(np.float64)
            yield 0.5 + (wins[:, None] - wins[None, :]) / 2

    def _random_model(self) -> Policy:
        """Return a transformer with random weights, which the seed determines."""
        game = self.options
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
        with torch.no_grad():  # hidden states have the norm √width after the last layer norm
            model.lm_head.weight *= game.logit_std
        return Policy(model.to(self.device), None, self.device, torch.float32, "shared")


def closed_form_game(game: NeuralGame, P: np.ndarray) -> ExactGame | None:
    """Return the matrix game between responses whose fits are the exact minimisers of the neural game's losses.

    The target of a pair is s·(P(y ≻ y′) − ½), where s is η for ONPO and OMD, 1/η for INPO and 1/τ for IPO. None for
    DPO, whose target for a certain winner is infinite.
    """
    objective = game.make_objective()
    if isinstance(objective, Dpo):
        return None
    step = 2 * float(objective.target(torch.ones((), dtype=torch.float64)))
    return ExactGame(P, objective, step, game.tau)
