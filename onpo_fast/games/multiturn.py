"""Several turns: ONPO in the contextual MDP of the paper's appendix B, in games small enough to be exact.

At each of H turns one of A actions is chosen; a state is the history of the actions so far, a final state all H of
them, and the oracle compares final states alone. The game is a preference matrix P over the A^H final states in
lexicographic order (``preferences.check``), (n, n) or a batch (B, n, n): one game a context. A ``Policy`` is a list
with an array a turn, (A^h, A) or (B, A^h, A) for h = 0 … H − 1: the probabilities of the actions at every history.
float64 throughout. With one turn this is the game of ``algorithms``.

The update is ONPO's or OMD's at every state, with Q_t(s, y) = E_{π_t}[P(s_{H+1} ≻ π_t) | s, y] for r_t(y). This is
enough (derived here): with r_t = P d_t, where d_t is π_t's distribution over final states, the difference of values

    ⟨d_μ − d_t, r_t⟩ = Σ_h E_{s ~ d_μ} ⟨μ(·|s) − π_t(·|s), Q_t(s, ·)⟩

weighs the states by μ, whatever t: the game's regret is a sum of the states' own with weights that stay the same.

The policy whose regret that bounds plays one of π_1 … π_T, drawn once a game: its distribution over final states is
the mean of d_1 … d_T. Averaging π_t state by state would be another policy, whose distribution is a product of means
and not the mean of products. A history is remembered entirely, so the mixture is a policy too: ``behaviour`` of it.
Likewise every distribution over final states is some policy's, so the best response to a policy is the final state
that beats it most often, and the duality gap is exact: ``duality_gap(P, distribution(policy))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..objectives import OBJECTIVES, Objective, Onpo
from .arguments import count, positive
from .fits import log_normalised
from .preferences import TOLERANCE, check
from .solution import gap_of_rewards, rewards

Policy = list[np.ndarray]

ALGORITHMS = ("onpo", "omd")
TARGETS = ("exact", "sampled", "branches")
LABELS = ("soft", "bits")


@dataclass(frozen=True)
class MultiTurnTrace:
    """A run of T policies, π_1 … π_T. For one game the results have no batch axis."""

    average_gap: np.ndarray  # (T,) or (B, T): entry t − 1 is the duality gap of the mixture of π_1 … π_t
    last_gap: np.ndarray  # (T,) or (B, T): entry t − 1 is the duality gap of π_t; the first is the initial policy's
    policy: Policy  # π_T
    average_policy: Policy  # ends in every final state as often as the mixture of π_1 … π_T


def run(
    P: np.ndarray,
    turns: int,
    algorithm: str,
    eta: float,
    T: int,
    init: Policy | None = None,
    *,
    target: str = "exact",
    samples: int = 1000,
    labels: str = "soft",
    seed: int = 0,
) -> MultiTurnTrace:
    """T policies of self-play: π_1 and T − 1 updates.

    Args:
        P: (n, n) or (B, n, n), n = A^turns: the preferences between final states.
        turns: H.
        algorithm: "onpo": π′_{t+1} ∝ π′_t·exp(ηQ_t), π_{t+1} ∝ π′_{t+1}·exp(ηQ_t) at every state; "omd":
            π_{t+1} ∝ π_t·exp(ηQ_t).
        eta: η, the step size.
        T: the number of policies.
        init: π_1; uniform if None. An action of probability 0 stays at 0.
        target: what the step is fitted to. "exact": Q_t, by enumeration; "sampled": the unbiased target, see
            ``sampled_steps``; "branches": ``branch_values``, what comparing the two branches with each other comes to.
        samples: pairs at every state and iteration, of target "sampled".
        labels: of target "sampled".
        seed: of target "sampled".

    Raises:
        ValueError: if an argument is none of these.
    """
    games, actions = _games(P, turns)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"there is no algorithm {algorithm!r} for several turns; there are {', '.join(ALGORITHMS)}")
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}; there are {', '.join(TARGETS)}")
    objective = OBJECTIVES[algorithm](positive("eta", eta))
    count("T", T)
    start = _policy(init, turns, actions, len(games))
    rng = np.random.default_rng(seed)

    with np.errstate(divide="ignore"):  # log 0 = −∞, and remains
        anchor = ahead = [np.log(turn) for turn in start]  # log-probs of π′_t and of π_t
    total = np.zeros(games.shape[:2])
    average_gap, last_gap = np.empty((2, len(games), T))
    for t in range(T):
        policy = [np.exp(turn) for turn in ahead]
        final = distribution(policy)
        reward = rewards(games, final)
        total += final
        last_gap[:, t] = gap_of_rewards(reward)
        average_gap[:, t] = gap_of_rewards(rewards(games, total / (t + 1)))

        if target == "exact":
            steps = [objective.eta * Q for Q in action_values(reward, policy)]
        elif target == "branches":
            steps = [objective.eta * Q for Q in branch_values(games, policy)]
        else:
            steps = sampled_steps(games, policy, objective, samples, labels, rng)
        anchor = _moved(anchor, steps)
        # the second fit of an iteration is to the same pairs, so it is the same step again, from π′_{t+1}
        ahead = _moved(anchor, steps) if objective.optimistic else anchor

    average = behaviour(total / T, turns)
    if np.ndim(P) == 2:
        average_gap, last_gap = average_gap[0], last_gap[0]
        policy, average = [turn[0] for turn in policy], [turn[0] for turn in average]
    return MultiTurnTrace(average_gap, last_gap, policy, average)


def uniform(turns: int, actions: int) -> Policy:
    return [np.full((actions**h, actions), 1 / actions) for h in range(turns)]


def outcomes(policy: Policy) -> list[np.ndarray]:
    """P(f | s) for the final states f that a state s can still reach, after 0 … H turns: (…, A^h, A^(H−h)) each."""
    last = policy[-1]
    below = [np.ones((*last.shape[:-2], last.shape[-2] * last.shape[-1], 1))]
    for turn in reversed(policy):
        branches = below[-1].reshape(*turn.shape, -1)
        below.append((turn[..., None] * branches).reshape(*turn.shape[:-1], -1))
    return below[::-1]


def distribution(policy: Policy) -> np.ndarray:
    """d_π, over final states: (…, A^H)."""
    return outcomes(policy)[0][..., 0, :]


def behaviour(final: np.ndarray, turns: int) -> Policy:
    """The policy with this distribution over final states, (…, A^turns); uniform at states that it never reaches."""
    actions = _actions(final.shape[-1], turns)
    policy = []
    for h in reversed(range(turns)):
        final = final.reshape(*final.shape[:-1], actions**h, actions)
        reached = final.sum(-1, keepdims=True)
        policy.append(np.divide(final, reached, out=np.full(final.shape, 1 / actions), where=reached > 0))
        final = reached[..., 0]
    return policy[::-1]


def action_values(reward: np.ndarray, policy: Policy) -> list[np.ndarray]:
    """Q(s, y) = E_π[reward(f) | s, y], from the last turn backwards.

    Args:
        reward: (…, A^H), of the final states; ONPO's is P d_π.

    Returns:
        As a policy: (…, A^h, A) a turn.
    """
    values = []
    for turn in reversed(policy):
        Q = reward.reshape(turn.shape)
        values.append(Q)
        reward = (turn * Q).sum(-1)
    return values[::-1]


def branch_values(P: np.ndarray, policy: Policy) -> list[np.ndarray]:
    """E[P(f ≻ f′)] for f reached from (s, y) and f′ from s, both by π: ``action_values``' shapes.

    What Q becomes when the two actions of a pair are judged by P(f ≻ f′) instead of against an opponent from the first
    state: a local game's, whose opponent is always in s too. At the first turn the two agree. Self-play with these
    comes to the Nash policy of every state's own game, from the last turn backwards, which is seldom the game's.
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
    P: np.ndarray, policy: Policy, objective: Objective, samples: int, labels: str, rng: np.random.Generator
) -> list[np.ndarray]:
    """The step log π_{t+1} − log anchor of every state, fitted to sampled comparisons: ``action_values``' shapes.

    A sample at state s: two actions y, y′ ~ π(·|s), rolled out with π to final states f and f′, and an opponent o ~ π
    from the first state. Its target is the objective's, of ½ + P(f ≻ o) − P(f′ ≻ o): unbiased for η(Q(s, y) − Q(s, y′))
    since E[P(f ≻ o) | s, y] = Q(s, y) for an o independent of f (derived here). It is no probability, but the target is
    affine in it.

    Every state gets the same number of samples; a trainer would meet it as often as π does.

    Args:
        P: (n, n) or (B, n, n).
        samples: pairs a state.
        labels: "soft": as above; "bits": 1{f ≻ o} − 1{f′ ≻ o}, drawn independently.
    """
    count("samples", samples)
    if labels not in LABELS:
        raise ValueError(f"labels must be {' or '.join(LABELS)}, not {labels!r}")
    steps = []
    below = outcomes(policy)
    for turn, here in zip(policy, below):
        # a sample is a triple (f, f′, o): all of them are drawn at once, as how often each triple comes
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
    """The least squares of Σ pairs(y, y′)·(g(y) − g(y′) − target(preference(y, y′)))² over g: (…, A), nats.

    With W = pairs + pairsᵀ the normal equations are (diag(W1) − W) g = b, the graph Laplacian of what was compared,
    b(y) what y's targets sum to, as first less as second. It determines g up to a constant for each set of actions
    connected by comparisons; of the solutions this is the shortest: a mean of 0 in each set, and 0 for an action that
    was never compared. Before normalising, that one stays at the anchor.

    Args:
        pairs: (…, A, A): how often y came first and y′ second.
        preference: (…, A, A): the mean of their labels. Repeated rows of a least-squares problem are their mean, with
            their number as weight.
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
    policy: Policy | None = None,
    *,
    labels: str = "soft",
    seed: int = 0,
) -> np.ndarray:
    """How far the sampled Q is from the exact one: (len(samples),) or (B, len(samples)), in units of probability.

    The root mean square over states and actions, each state's Q less its mean over actions (differences are all that a
    fit can know). Falls as 1/√samples once every action has been compared.

    Args:
        samples: pairs a state, one result each.
        policy: whose Q; uniform if None.
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
    """Summed over the (f, f′, o) that begin with the same (y, y′): (…, A, A)."""
    leaves = values.shape[-2] // shape[-1]
    return values.reshape(*shape, leaves, shape[-1], leaves, values.shape[-1]).sum((-4, -2, -1))


def _moved(log_policy: Policy, steps: list[np.ndarray]) -> Policy:
    return [log_normalised(turn + step) for turn, step in zip(log_policy, steps)]


def _games(P: np.ndarray, turns: int) -> tuple[np.ndarray, int]:
    """(B, n, n), and the number of actions."""
    P = check(P)
    return P.reshape(-1, *P.shape[-2:]), _actions(P.shape[-1], turns)


def _actions(final_states: int, turns: int) -> int:
    count("turns", turns)
    actions = round(final_states ** (1 / turns))
    if actions**turns != final_states:
        raise ValueError(
            f"A actions at each of {turns} turns make A^{turns} final states; {final_states} is no such number"
        )
    return actions


def _policy(policy: Policy | None, turns: int, actions: int, games: int) -> Policy:
    """(B, A^h, A) float64 a turn; uniform if None."""
    if policy is None:
        policy = uniform(turns, actions)
    if not isinstance(policy, (list, tuple)) or len(policy) != turns:
        raise ValueError(f"a policy is a list of {turns} arrays here, one a turn")
    checked = []
    for h, turn in enumerate(policy):
        turn = np.asarray(turn, dtype=np.float64)
        shape = (actions**h, actions)
        batch = (games, *shape)
        if turn.shape not in (shape, batch):
            raise ValueError(f"turn {h} of the policy must be of shape {shape} or {batch}, not {turn.shape}")
        if not ((turn >= 0).all() and (np.abs(turn.sum(-1) - 1) <= TOLERANCE).all()):
            raise ValueError(f"turn {h} of the policy must hold distributions: not negative, of sum 1 at every history")
        checked.append(np.broadcast_to(turn, batch))
    return checked
