"""Algorithm 1 (arXiv 2502.16852) and the methods it is compared with, each in the few lines that it is.

An algorithm plays a *game*: a language model (``language_game.LanguageGame``), a small transformer whose responses are
all scored (``games.neural_game``) or a matrix (``games.matrix_games``). It is an iterator of policies, π_1, π_2, …, and
asks three things of the game:

- ``compare(policy, opponent=None)``: responses of the policy, compared with each other or with an opponent's;
- ``fit(anchor, compared, …)``: the policy of least loss on these comparisons, with margins measured from the anchor;
- ``mixture(initial, policy)``: π_1^s · π^(1−s), normalised, an anchor that pulls towards π_1 with the weight s.

Where the loss is squared and both responses of a pair are independent draws from π_t, the minimiser over all policies
is a step of mirror descent, anchor·exp(η r_t) normalised, with r_t(y) = P(y ≻ π_t): a least-squares fit of differences
sees of the target η(P(y ≻ y′) − ½) only its mean over y′, which is η(r_t(y) − ½) (arXiv 2502.16852, section 4).
The formulas below are these minimisers.

To add an algorithm: write its generator, and name it in ``ALGORITHMS`` with what it asks of a game.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .objectives import Dpo, Inpo, Ipo, Objective, Omd, Onpo, Sppo

GamePolicy = Any  # in the form that the game chooses: a folder with weights, a model, or a row of log-probs
GameAnchor = Any  # a policy or a mixture of two
GameComparisons = Any  # what ``compare`` returns and ``fit`` takes


class Game(Protocol):
    """What an algorithm asks of a game."""

    def compare(self, policy: GamePolicy, opponent: GamePolicy | None = None) -> GameComparisons:
        """Responses of ``policy``, compared with each other, or with the opponent's if there is one."""

    def fit(
        self,
        anchor: GameAnchor,
        compared: GameComparisons,
        *,
        warm_start: GamePolicy | None = None,
        into: str = "policy",
        steps: int = 1,
    ) -> GamePolicy:
        """The policy of least loss, with margins measured from ``anchor``.

        Args:
            warm_start: the policy whose weights training starts from; default: the anchor's.
            into: what the result is called: "policy" for the next π, "auxiliary" for what comes before it.
            steps: of mirror descent in one fit: the target of a sure pair is ``steps`` times as large.
        """

    def mixture(self, initial: GamePolicy, policy: GamePolicy) -> GameAnchor:
        """π_1^s · π^(1−s), normalised; s is the game's own."""


Play = Callable[[Game, GamePolicy], Iterator[GamePolicy]]


def onpo(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """π′_{t+1} ∝ π′_t·exp(η r_t), π_{t+1} ∝ π′_{t+1}·exp(η r_t). arXiv 2502.16852, Algorithm 1."""
    policy = auxiliary = initial  # π_1 = π′_1
    while True:
        yield policy
        compared = game.compare(policy)  # y_1 … y_K ~ π_t, P(y_i ≻ y_j), D_t
        auxiliary = game.fit(auxiliary, compared, into="auxiliary")  # π′_{t+1}
        policy = game.fit(auxiliary, compared)  # π_{t+1}


def onpo_direct(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """``onpo`` with the second fit measured from π′_t, at twice the step, which saves scoring π′_{t+1}.

    It goes on from π′_{t+1}. The minimiser over all policies is the same: two steps from π′_t.
    """
    policy = auxiliary = initial
    while True:
        yield policy
        compared = game.compare(policy)
        anchor = auxiliary
        auxiliary = game.fit(anchor, compared, into="auxiliary")
        policy = game.fit(anchor, compared, warm_start=auxiliary, steps=2)


def onpo_from_policy(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """``onpo`` with both fits started from the weights of π_t, not from their anchors'."""
    policy = auxiliary = initial
    while True:
        yield policy
        compared = game.compare(policy)
        auxiliary = game.fit(auxiliary, compared, warm_start=policy, into="auxiliary")
        policy = game.fit(auxiliary, compared, warm_start=policy)


def onpo_direct_from_policy(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """``onpo_direct`` with both fits started from the weights of π_t."""
    policy = auxiliary = initial
    while True:
        yield policy
        compared = game.compare(policy)
        anchor = auxiliary
        auxiliary = game.fit(anchor, compared, warm_start=policy, into="auxiliary")
        policy = game.fit(anchor, compared, warm_start=policy, steps=2)


def mirror_descent(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """π_{t+1} ∝ π_t·exp(η r_t). arXiv 2502.16852, section 3.

    With SPPO's objective it is argmin_π E_{y∼π_t} (log π(y)/π_t(y) − η(r_t(y) − ½))² (arXiv 2405.00675), whose ½ stands
    for the logarithm of the normaliser. With DPO's it is iterative DPO: a step of mirror descent on the Bradley-Terry
    scores that fit P best, whatever P is (arXiv 2305.18290, equation 7, against π_t).
    """
    policy = initial
    while True:
        yield policy
        policy = game.fit(policy, game.compare(policy))


def two_fits(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """Mirror descent with two fits to the same comparisons, the second measured from the result of the first.

    The control for ONPO: as many optimizer steps on as much data, and no optimism.
    """
    policy = initial
    while True:
        yield policy
        compared = game.compare(policy)
        halfway = game.fit(policy, compared, into="auxiliary")
        policy = game.fit(halfway, compared)


def regularised(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """π_{t+1} ∝ m_t·exp(η r_t), with the mixture m_t ∝ π_1^s·π_t^(1−s). arXiv 2407.00617 (INPO)."""
    policy = initial
    while True:
        yield policy
        compared = game.compare(policy)
        policy = game.fit(game.mixture(initial, policy), compared, warm_start=policy)


def from_initial(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """π_{t+1} ∝ π_1·exp(η r_t): each step is IPO's minimum on pairs from π_t. arXiv 2403.08635 (online IPO)."""
    policy = initial
    while True:
        yield policy
        policy = game.fit(initial, game.compare(policy), warm_start=policy)


def nash_md(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """m_t ∝ π_1^s·π_t^(1−s), π_{t+1} ∝ m_t·exp(η P m_t): played against the mixture. arXiv 2312.00886 (Nash-MD)."""
    policy = initial
    while True:
        yield policy
        mixed = game.mixture(initial, policy)
        policy = game.fit(mixed, game.compare(mixed), warm_start=policy)


def egpo(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
    """π_{t+½} ∝ m_t·exp(η P π_t), π_{t+1} ∝ m_t·exp(η P π_{t+½}), m_t as in Nash-MD. arXiv 2503.08942 (EGPO)."""
    policy = initial
    while True:
        yield policy
        mixed = game.mixture(initial, policy)
        halfway = game.fit(mixed, game.compare(policy), warm_start=policy, into="auxiliary")
        policy = game.fit(mixed, game.compare(policy, opponent=halfway), warm_start=policy)


def refreshing(play: Play, every: int) -> Play:
    """The algorithm that starts anew from its own policy, as π_1, after ``every`` updates. arXiv 2410.23223 (COMAL)."""

    def refreshed(game: Game, initial: GamePolicy) -> Iterator[GamePolicy]:
        while True:
            policies = play(game, initial)
            for _ in range(every):
                yield next(policies)
            initial = next(policies)

    return refreshed


@dataclass(frozen=True)
class Algorithm:
    """An algorithm by its name: what it plays, the loss of its fits, and what it asks of a game.

    Attributes:
        about: one line for --help.
        fits: number of fits in an iteration.
        anchor: what margins are measured from: policies of earlier fits, π_1, or ``Game.mixture``.
        compares: whose responses are compared: a policy's with each other, those of ``Game.mixture`` with each other,
            or in one of the comparisons also a policy's with an opponent's.
    """

    play: Play
    objective: type[Objective]
    about: str
    fits: int = 1
    anchor: Literal["policy", "initial", "mixture"] = "policy"
    compares: Literal["policy", "mixture", "opponent"] = "policy"

    @property
    def mixes(self) -> bool:
        """Whether an anchor mixes π_1 with the current policy, so that there is a weight τ."""
        return self.anchor == "mixture"

    @property
    def takes_turns(self) -> bool:
        """Whether it can learn from conversations of several turns.

        Its fits must have the target of ``multi_turn.tree.labels``, whose squared loss sees the mean alone, and its
        comparisons be those of one policy with itself.
        """
        return self.objective in (Onpo, Omd, Inpo, Ipo) and self.compares == "policy"


ALGORITHMS: dict[str, Algorithm] = {
    "onpo": Algorithm(onpo, Onpo, "optimistic mirror descent (arXiv 2502.16852, Algorithm 1)", fits=2),
    "onpo_direct": Algorithm(onpo_direct, Onpo, "onpo, the second fit measured from π′_t at twice the step", fits=2),
    "onpo_from_policy": Algorithm(onpo_from_policy, Onpo, "onpo, both fits started from the weights of π_t", fits=2),
    "onpo_direct_from_policy": Algorithm(
        onpo_direct_from_policy, Onpo, "onpo_direct, both fits started from the weights of π_t", fits=2
    ),
    "omd": Algorithm(mirror_descent, Omd, "mirror descent, one fit an iteration"),
    "omd_two_fits": Algorithm(two_fits, Omd, "mirror descent with two fits, as many optimizer steps as onpo", fits=2),
    "inpo": Algorithm(regularised, Inpo, "mirror descent with a pull towards π_1 (arXiv 2407.00617)", anchor="mixture"),
    "online_ipo": Algorithm(
        from_initial, Ipo, "IPO on fresh pairs, measured from π_1 (arXiv 2403.08635)", anchor="initial"
    ),
    "iterative_dpo": Algorithm(mirror_descent, Dpo, "DPO on fresh pairs, measured from π_t (arXiv 2305.18290)"),
    "sppo": Algorithm(mirror_descent, Sppo, "each response against its win rate (arXiv 2405.00675)"),
    "nash_md": Algorithm(
        nash_md,
        Omd,
        "mirror descent against a mixture with π_1 (arXiv 2312.00886)",
        anchor="mixture",
        compares="mixture",
    ),
    "egpo": Algorithm(
        egpo,
        Omd,
        "extragradient steps towards the regularised game (arXiv 2503.08942)",
        fits=2,
        anchor="mixture",
        compares="opponent",
    ),
}
ALIASES = {"ipo": "online_ipo", "dpo": "iterative_dpo"}


def named(name: str) -> Algorithm:
    """The algorithm of this name, or of its short name.

    Raises:
        ValueError: if there is none; lists those that there are.
    """
    known = ALIASES.get(name, name)
    if known not in ALGORITHMS:
        raise ValueError(f"there is no algorithm {name!r}; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[known]
