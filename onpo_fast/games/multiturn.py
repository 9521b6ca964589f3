"""Several turns: the contextual MDP of arXiv 2502.16852, appendix B, in games small enough to be exact.

At each of H turns one of A actions is chosen. A state is the history of the actions so far, a final state all H of
them, and the oracle compares final states only. The game is a preference matrix P over the A^H final states in
lexicographic order (``preferences.check``), (n, n), or a batch (B, n, n): one game a context. A ``PolicyByTurn`` is a
list with an array a turn, (A^h, A) or (B, A^h, A) for h = 0 … H − 1: the probabilities of the actions after every
history. float64 throughout. With one turn this is the game of ``matrix``.

The algorithms are those of ``onpo_fast.algorithms``. Their step is taken at every state, with
Q_t(s, y) = E_{π_t}[P(s_{H+1} ≻ π_t) | s, y] in place of r_t(y). This is sufficient (derived here): with r_t = P d_t,
where d_t is π_t's distribution over final states, the difference of values

    ⟨d_μ − d_t, r_t⟩ = Σ_h E_{s ~ d_μ} ⟨μ(·|s) − π_t(·|s), Q_t(s, ·)⟩

weighs the states by μ for every t: the game's regret is a sum of the states' regrets with weights that do not change.

That regret bounds the gap of the policy that plays one of π_1 … π_T, drawn once a game. Its distribution over final
states is the mean of d_1 … d_T. Averaging π_t state by state gives another policy, whose distribution is a product of
means and not the mean of products. As a state is the full history, the mixture is a policy too: its ``behaviour``.
Likewise every distribution over final states is that of some policy, so the best response to a policy is the final
state that beats it most often, and the duality gap is exact: ``duality_gap(P, distribution(policy))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from ..algorithms import named
from ..objectives import Objective, Onpo
from .arguments import positive, whole_number
from .matrix_games import check_labels, log_normalised
from .preferences import SUM_TOLERANCE, check
from .solution import gap_of_rewards, rewards

PolicyByTurn = list[np.ndarray]

MULTITURN_ALGORITHMS = ("onpo", "omd")  # names in ``algorithms.ALGORITHMS``
TARGETS = ("exact", "sampled", "branches")


@dataclass(frozen=True)
class MultiTurnTrace:
    """A run of T policies, π_1 … π_T. For one game the results have no batch axis."""

    average_gap: np.ndarray  # (T,) or (B, T): entry t − 1 is the duality gap of the mixture of π_1 … π_t
    last_gap: np.ndarray  # (T,) or (B, T): entry t − 1 is the duality gap of π_t; the first is the initial policy's
    policy: PolicyByTurn  # π_T
    average_policy: PolicyByTurn  # the policy whose distribution over final states is that of the mixture of π_1 … π_T


def run(
    P: np.ndarray,
    turns: int,
    algorithm: str,
    eta: float,
    T: int,
    init: PolicyByTurn | None = None,
    *,
    target: str = "exact",
    samples: int = 1000,
    labels: str = "soft",
    seed: int = 0,
) -> MultiTurnTrace:
    """Play T policies of self-play: π_1 and T − 1 updates.

    Args:
        P: preferences between final states, (n, n) or (B, n, n) with n = A^turns.
        turns: H.
        algorithm: "onpo": π′_{t+1} ∝ π′_t·exp(ηQ_t), π_{t+1} ∝ π′_{t+1}·exp(ηQ_t) at every state; "omd":
            π_{t+1} ∝ π_t·exp(ηQ_t).
        eta: η, the step size.
        T: number of policies.
        init: π_1; uniform if None. An action of probability 0 keeps it.
        target: what a step is fitted to. "exact": Q_t, by enumeration; "sampled": the unbiased target of
            ``sampled_steps``; "branches": ``branch_values``, the expectation of comparing the two branches with each
            other, which is biased.
        samples: pairs a state and iteration, for target "sampled".
        labels: "soft" or "sampled", for target "sampled"; see ``sampled_steps``.
        seed: seed of the samples.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    games, actions = _games(P, turns)
    if algorithm not in MULTITURN_ALGORITHMS:
        raise ValueError(
            f"there is no algorithm {algorithm!r} for several turns; there are {', '.join(MULTITURN_ALGORITHMS)}"
        )
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}; there are {', '.join(TARGETS)}")
    chosen = named(algorithm)
    objective = chosen.objective(positive("eta", eta))
    whole_number("T", T)
    game = _MultiTurnGame(games, objective, target, samples, labels, seed)
    total = np.zeros(games.shape[:2])
    average_gap, last_gap = np.empty((2, len(games), T))
    with np.errstate(divide="ignore"):
        initial = [np.log(turn) for turn in _policy(init, turns, actions, len(games))]
    for t, log_policy in enumerate(islice(chosen.play(game, initial), T)):
        policy, final, reward = game.measure(log_policy)
        total += final
        last_gap[:, t] = gap_of_rewards(reward)
        average_gap[:, t] = gap_of_rewards(rewards(games, total / (t + 1)))

    average = behaviour(total / T, turns)
    if np.ndim(P) == 2:
        average_gap, last_gap = average_gap[0], last_gap[0]
        policy, average = [turn[0] for turn in policy], [turn[0] for turn in average]
    return MultiTurnTrace(average_gap, last_gap, policy, average)


class _MultiTurnGame:
    """What ONPO and mirror descent ask of a game (``algorithms.Game`` without an opponent and without mixtures).

    A policy is a list of log-probs, (B, A^h, A) a turn.
    """

    def __init__(self, P: np.ndarray, objective: Objective, target: str, samples: int, labels: str, seed: int) -> None:
        self.P, self.objective, self.target, self.samples, self.labels = P, objective, target, samples, labels
        self.rng = np.random.default_rng(seed)
        self._last: tuple[PolicyByTurn | None, tuple] = None, ()

    def measure(self, log_policy: PolicyByTurn) -> tuple[PolicyByTurn, np.ndarray, np.ndarray]:
        """Return the probabilities, the distribution over final states (B, n), and the rewards of these (B, n).

        The last result is kept: the trace and the algorithm both ask for that of π_t.
        """
        if self._last[0] is not log_policy:
            policy = [np.exp(turn) for turn in log_policy]
            final = distribution(policy)
            self._last = log_policy, (policy, final, rewards(self.P, final))
        return self._last[1]

    def compare(self, log_policy: PolicyByTurn) -> list[np.ndarray]:
        """Return the step of every state, (B, A^h, A) a turn, nats."""
        policy, _, reward = self.measure(log_policy)
        if self.target == "exact":
            return [self.objective.eta * Q for Q in action_values(reward, policy)]
        if self.target == "branches":
            return [self.objective.eta * Q for Q in branch_values(self.P, policy)]
        return sampled_steps(self.P, policy, self.objective, self.samples, self.labels, self.rng)

    def fit(
        self,
        anchor: PolicyByTurn,
        compared: list[np.ndarray],
        *,
        warm_start: PolicyByTurn | None = None,
        into: str = "policy",
        steps: int = 1,
    ) -> PolicyByTurn:
        """Return anchor·exp(steps·step), normalised at every state."""
        return [log_normalised(turn + steps * step) for turn, step in zip(anchor, compared)]


def uniform(turns: int, actions: int) -> PolicyByTurn:
    """Return the uniform policy, (A^h, A) a turn."""
    return [np.full((actions**h, actions), 1 / actions) for h in range(turns)]


def outcomes(policy: PolicyByTurn) -> list[np.ndarray]:
    """Return P(f | s) for states s after 0 … H turns and the final states f they can reach: (…, A^h, A^(H−h)) each."""
    last = policy[-1]
    below = [np.ones((*last.shape[:-2], last.shape[-2] * last.shape[-1], 1))]
    for turn in reversed(policy):
        branches = below[-1].reshape(*turn.shape, -1)
        below.append((turn[..., None] * branches).reshape(*turn.shape[:-1], -1))
    return below[::-1]


def distribution(policy: PolicyByTurn) -> np.ndarray:
    """Return d_π, the distribution over final states, (…, A^H)."""
    return outcomes(policy)[0][..., 0, :]


def behaviour(final: np.ndarray, turns: int) -> PolicyByTurn:
    """Return the policy with this distribution over final states, (…, A^turns); uniform at states of probability 0."""
    actions = _actions(final.shape[-1], turns)
    policy = []
    for h in reversed(range(turns)):
        final = final.reshape(*final.shape[:-1], actions**h, actions)
        reached = final.sum(-1, keepdims=True)
        policy.append(np.divide(final, reached, out=np.full(final.shape, 1 / actions), where=reached > 0))
        final = reached[..., 0]
    return policy[::-1]


def action_values(reward: np.ndarray, policy: PolicyByTurn) -> list[np.ndarray]:
    """Return Q(s, y) = E_π[reward(f) | s, y], computed from the last turn backwards.

    Args:
        reward: reward of the final states, (…, A^H); for ONPO it is P d_π.

    Returns:
        A list with an array (…, A^h, A) a turn, like a policy.
    """
    values = []
    for turn in reversed(policy):
        Q = reward.reshape(turn.shape)
        values.append(Q)
        reward = (turn * Q).sum(-1)
    return values[::-1]


def branch_values(P: np.ndarray, policy: PolicyByTurn) -> list[np.ndarray]:
    """Return E[P(f ≻ f′)] for f reached from (s, y) and f′ from s, both by π, in the shapes of ``action_values``.

    This is what Q becomes if the two actions of a pair are compared by P(f ≻ f′) instead of against an opponent that
    starts in the first state. It is the value of a local game, whose opponent is in s too. At the first turn the two
    agree. Self-play with these values converges to the Nash policy of every state's local game, from the last turn
    backwards, which is in general not the Nash policy of the game.
    """
    values = []
    below = outcomes(policy)
    for turn, here, after in zip(policy, below, below[1:]):
        states, leaves = here.shape[-2:]
        blocks = P.reshape(*P.shape[:-2], states, leaves, states, leaves)
        reward = rewards(np.einsum("...sfsg->...sfg", blocks), here)  # P(f ≻ π | s)
        values.append((after * reward.reshape(after.shape)).sum(-1).reshape(turn.shape))
    return values


def sampled_steps(
    P: np.ndarray, policy: PolicyByTurn, objective: Objective, samples: int, labels: str, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the step log π_{t+1} − log anchor of every state, fitted to sampled pairs: shapes of ``action_values``.

    A sample at state s is two actions y, y′ ~ π(·|s), rolled out with π to final states f and f′, and an opponent o ~ π
    from the first state. Its label is ½ + P(f ≻ o) − P(f′ ≻ o), and the objective's target for it is unbiased for
    η(Q(s, y) − Q(s, y′)), as E[P(f ≻ o) | s, y] = Q(s, y) for an o independent of f (derived here). The label is not a
    probability; the target is affine in it.

    Every state gets the same number of samples. A trainer would meet a state as often as π does.

    Args:
        P: preferences, (n, n) or (B, n, n).
        samples: pairs a state.
        labels: "soft": as above; "sampled": 1{f ≻ o} − 1{f′ ≻ o}, two independent draws.
    """
    whole_number("samples", samples)
    check_labels(labels)
    steps = []
    below = outcomes(policy)
    for turn, here in zip(policy, below):
        # a sample is a triple (f, f′, o); the number of times that each triple is drawn is multinomial
        triple = here[..., :, None, None] * here[..., None, :, None] * below[0][..., None, None, :]
        cells = triple.reshape(*here.shape[:-1], -1)
        counts = rng.multinomial(samples, cells / cells.sum(-1, keepdims=True)).reshape(triple.shape)
        wins = np.broadcast_to(P.reshape(*here.shape, 1, P.shape[-1]), triple.shape)  # P(f ≻ o)
        losses = wins.swapaxes(-3, -2)  # P(f′ ≻ o)
        if labels == "soft":
            difference = counts * (wins - losses)
        else:
            difference = rng.binomial(counts, wins) - rng.binomial(counts, losses)
        pairs = _by_action(counts, turn.shape)
        mean = _by_action(difference, turn.shape) / np.maximum(pairs, 1)
        steps.append(fit(pairs, 0.5 + mean, objective))
    return steps


def fit(pairs: np.ndarray, preference: np.ndarray, objective: Objective) -> np.ndarray:
    """Return argmin over g of Σ pairs(y, y′)·(g(y) − g(y′) − target(preference(y, y′)))², (…, A), nats.

    With W = pairs + pairsᵀ the normal equations are (diag(W1) − W) g = b: the graph Laplacian of the comparisons, and
    b(y) the sum of y's targets where it came first minus the sum where it came second. They determine g up to a
    constant for each set of actions connected by comparisons. This is the solution of least norm: its mean is 0 in each
    set, and it is 0 for an action that was never compared, which stays at the anchor before normalisation.

    Args:
        pairs: number of times that y came first and y′ second, (…, A, A).
        preference: mean of their labels, (…, A, A). In least squares, equal rows with different targets are the same
            as one row with the mean target and their number as weight.
    """
    target = pairs * objective.target(torch.from_numpy(preference)).numpy()
    weight = pairs + pairs.swapaxes(-1, -2)
    laplacian = weight.sum(-1)[..., None] * np.eye(weight.shape[-1]) - weight
    pull = target.sum(-1) - target.sum(-2)
    inverse = np.linalg.pinv(laplacian, rcond=1e-12, hermitian=True)  # rounding leaves 1e-15 of the zero eigenvalue
    return (inverse @ pull[..., None])[..., 0]


def sampling_error(
    P: np.ndarray,
    turns: int,
    samples: Sequence[int],
    policy: PolicyByTurn | None = None,
    *,
    labels: str = "soft",
    seed: int = 0,
) -> np.ndarray:
    """Return the error of the sampled Q, (len(samples),) or (B, len(samples)), in units of probability.

    It is the root mean square over states and actions of the difference from the exact Q, where each state's Q has its
    mean over actions subtracted, since a fit depends on differences only. It falls as 1/√samples once every action has
    been compared.

    Args:
        samples: numbers of pairs a state; one result for each.
        policy: the policy that is played; uniform if None.
    """
    games, actions = _games(P, turns)
    policy = _policy(policy, turns, actions, len(games))
    exact = [Q - Q.mean(-1, keepdims=True) for Q in action_values(rewards(games, distribution(policy)), policy)]
    rng = np.random.default_rng(seed)
    errors = []
    for number in samples:
        sampled = sampled_steps(games, policy, Onpo(eta=1.0), number, labels, rng)
        off = np.concatenate([s - Q for s, Q in zip(sampled, exact)], axis=1)
        errors.append(np.sqrt(np.square(off).mean((1, 2))))
    result = np.stack(errors, -1)
    return result[0] if np.ndim(P) == 2 else result


def _by_action(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the sums over all (f, f′, o) that begin with the same (y, y′), (…, A, A)."""
    leaves = values.shape[-2] // shape[-1]
    return values.reshape(*shape, leaves, shape[-1], leaves, values.shape[-1]).sum((-4, -2, -1))


def _games(P: np.ndarray, turns: int) -> tuple[np.ndarray, int]:
    """Return the games, (B, n, n), and the number of actions."""
    P = check(P)
    return P.reshape(-1, *P.shape[-2:]), _actions(P.shape[-1], turns)


def _actions(final_states: int, turns: int) -> int:
    """Return A. Raises ``ValueError`` if there is no such number."""
    whole_number("turns", turns)
    actions = round(final_states ** (1 / turns))
    if actions**turns != final_states:
        raise ValueError(
            f"{turns} turns of A actions have A^{turns} final states, and {final_states} is not such a number"
        )
    return actions


def _policy(policy: PolicyByTurn | None, turns: int, actions: int, games: int) -> PolicyByTurn:
    """Return the policy as (B, A^h, A) float64 a turn; uniform if None. Raises ``ValueError`` if it is not one."""
    if policy is None:
        policy = uniform(turns, actions)
    if not isinstance(policy, (list, tuple)) or len(policy) != turns:
        raise ValueError(f"the policy must be a list of {turns} arrays, one a turn")
    checked = []
    for h, turn in enumerate(policy):
        turn = np.asarray(turn, dtype=np.float64)
        shape = (actions**h, actions)
        batch = (games, *shape)
        if turn.shape not in (shape, batch):
            raise ValueError(f"turn {h} of the policy must be of shape {shape} or {batch}, not {turn.shape}")
        if not ((turn >= 0).all() and (np.abs(turn.sum(-1) - 1) <= SUM_TOLERANCE).all()):
            raise ValueError(f"turn {h} of the policy must hold distributions: not negative, of sum 1 at every history")
        checked.append(np.broadcast_to(turn, batch))
    return checked
