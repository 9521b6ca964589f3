"""Best of Nash (arXiv 2609.08082): an answer of the starting model, chosen by the Nash policy over N of its answers.

Nothing is trained. For a prompt the oracle compares N responses of π_1 with each other, linear programming finds the
Nash policy of their N×N preference matrix, and the answer is drawn from it. The price, N(N − 1)/2 comparisons by the
oracle, is to be paid for every prompt that is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .data import Group
from .errors import UserError
from .games.solution import nash

PLAYED = 1e-9  # least weight that counts: smaller ones are rounding errors of linear programming


def check_samples(samples: int) -> int:
    """Return the number of responses that best of Nash chooses from.

    Raises:
        UserError: if it is below 2.
    """
    if samples < 2:
        raise UserError(f"--best_of_nash {samples}: give 2 or more, the number of responses to choose from")
    return samples


@dataclass(frozen=True)
class BestOfNash:
    """Best of Nash on some prompts, and what it wins against the policies of a run.

    Attributes:
        weights: for each prompt the probabilities of its N responses, (N,) float64.
        wins: win rate against each policy, (prompts, policies) float64: exact over the weights, a mean over the
            responses of the policy.
    """

    weights: list[np.ndarray]
    wins: np.ndarray

    @classmethod
    def choose(cls, matrices: Sequence[np.ndarray], samples: int, policies: int) -> BestOfNash:
        """Solve every prompt's game between its N responses.

        Args:
            matrices: for each prompt P(y_i ≻ y_j), square, float64: first the responses of the policies, policy by
                policy and as many of each, then the ``samples`` responses to choose from.
            samples: N.
            policies: number of policies.
        """
        weights = [nash(matrix[-samples:, -samples:]) for matrix in matrices]
        against = [weight @ matrix[-samples:, :-samples] for weight, matrix in zip(weights, matrices)]
        wins = np.stack([wins.reshape(policies, -1).mean(1) for wins in against])
        return cls(weights, wins)

    @property
    def played(self) -> float:
        """The mean number of responses to a prompt that have a positive weight."""
        return float(np.mean([(weight > PLAYED).sum() for weight in self.weights]))

    def answers(self, prompt: int, group: Group) -> list[dict[str, object]]:
        """Return the responses that may be the answer to a prompt, likeliest first, for the file of responses."""
        weight = self.weights[prompt]
        order = [k for k in np.argsort(-weight, kind="stable") if weight[k] > PLAYED]
        return [{"response": group.responses[k].text, "weight": float(weight[k])} for k in order]


def summary(result: dict) -> str:
    """One sentence on best of Nash against the last policy and the first; ``result`` is what evaluation.json holds."""
    chosen = result["best_of_nash"]
    rates = [
        f"in {rate:.1%} of comparisons with {name} ({result['confidence']:.0%} interval {low:.1%} to {high:.1%})"
        for name, rate, (low, high) in zip(result["policies"], chosen["win_rate"], chosen["interval"])
    ]
    return f"best of Nash over {chosen['samples']} responses of π_1 wins {rates[-1]}, and {rates[0]}"
