"""What each algorithm asks of a game: whom it compares, what each fit is measured from, and where its weights start."""

from __future__ import annotations

from itertools import islice

import pytest

from onpo_fast import algorithms
from onpo_fast.algorithms import ALGORITHMS, ALIASES, refreshing


class Recorder:
    """A game whose policies are names, and which writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fits = 0

    def compare(self, policy: str, opponent: str | None = None) -> str:
        self.asked.append(f"compare {policy}" + (f" with {opponent}" if opponent else ""))
        return f"D({policy})"

    def fit(
        self, anchor: str, compared: str, *, warm_start: str | None = None, into: str = "policy", steps: int = 1
    ) -> str:
        start = "" if warm_start is None else f" from {warm_start}"
        self.asked.append(f"fit {compared} against {anchor}{start}" + (f", {steps} steps" if steps > 1 else ""))
        self.fits += 1
        return f"{'aux' if into == 'auxiliary' else 'π'}{self.fits}"

    def mixture(self, initial: str, policy: str) -> str:
        return f"mix({initial}, {policy})"


@pytest.mark.parametrize(
    ("name", "asked"),  # in two iterations
    [
        (
            "onpo",
            [
                "compare π0",
                "fit D(π0) against π0",
                "fit D(π0) against aux1",
                "compare π2",
                "fit D(π2) against aux1",
                "fit D(π2) against aux3",
            ],
        ),
        (
            "onpo_direct",
            [
                "compare π0",
                "fit D(π0) against π0",
                "fit D(π0) against π0 from aux1, 2 steps",
                "compare π2",
                "fit D(π2) against aux1",
                "fit D(π2) against aux1 from aux3, 2 steps",
            ],
        ),
        (
            "onpo_from_policy",
            [
                "compare π0",
                "fit D(π0) against π0 from π0",
                "fit D(π0) against aux1 from π0",
                "compare π2",
                "fit D(π2) against aux1 from π2",
                "fit D(π2) against aux3 from π2",
            ],
        ),
        (
            "onpo_direct_from_policy",
            [
                "compare π0",
                "fit D(π0) against π0 from π0",
                "fit D(π0) against π0 from π0, 2 steps",
                "compare π2",
                "fit D(π2) against aux1 from π2",
                "fit D(π2) against aux1 from π2, 2 steps",
            ],
        ),
        ("omd", ["compare π0", "fit D(π0) against π0", "compare π1", "fit D(π1) against π1"]),
        (
            "omd_two_fits",
            [
                "compare π0",
                "fit D(π0) against π0",
                "fit D(π0) against aux1",
                "compare π2",
                "fit D(π2) against π2",
                "fit D(π2) against aux3",
            ],
        ),
        (
            "inpo",
            [
                "compare π0",
                "fit D(π0) against mix(π0, π0) from π0",
                "compare π1",
                "fit D(π1) against mix(π0, π1) from π1",
            ],
        ),
        ("ipo", ["compare π0", "fit D(π0) against π0 from π0", "compare π1", "fit D(π1) against π0 from π1"]),
        ("dpo", ["compare π0", "fit D(π0) against π0", "compare π1", "fit D(π1) against π1"]),
        ("sppo", ["compare π0", "fit D(π0) against π0", "compare π1", "fit D(π1) against π1"]),
        (
            "nash_md",
            [
                "compare mix(π0, π0)",
                "fit D(mix(π0, π0)) against mix(π0, π0) from π0",
                "compare mix(π0, π1)",
                "fit D(mix(π0, π1)) against mix(π0, π1) from π1",
            ],
        ),
        (
            "egpo",
            [
                "compare π0",
                "fit D(π0) against mix(π0, π0) from π0",
                "compare π0 with aux1",
                "fit D(π0) against mix(π0, π0) from π0",
                "compare π2",
                "fit D(π2) against mix(π0, π2) from π2",
                "compare π2 with aux3",
                "fit D(π2) against mix(π0, π2) from π2",
            ],
        ),
    ],
)
def test_what_is_compared_and_fitted(name: str, asked: list[str]) -> None:
    """π′_{t+1} is fitted against π′_t and π_{t+1} against π′_{t+1}: what makes the update optimistic."""
    game = Recorder()
    policies = list(islice(algorithms.named(name).play(game, "π0"), 3))
    assert policies[0] == "π0"
    assert all(policy.startswith("π") for policy in policies)
    assert game.asked == asked


def test_algorithms_are_known_by_their_short_names() -> None:
    for short, name in ALIASES.items():
        assert algorithms.named(short) is ALGORITHMS[name]
    with pytest.raises(ValueError, match="onpo_direct"):
        algorithms.named("onp")


def test_a_reference_that_is_refreshed_is_the_policy_of_then() -> None:
    """COMAL: after every two updates the pull is towards the policy that was reached."""
    game = Recorder()
    policies = list(islice(refreshing(ALGORITHMS["inpo"].play, 2)(game, "π0"), 6))
    assert policies == ["π0", "π1", "π2", "π3", "π4", "π5"]
    pulled = [asked.split("against ")[1].split(" from")[0] for asked in game.asked if asked.startswith("fit")]
    assert pulled == ["mix(π0, π0)", "mix(π0, π1)", "mix(π2, π2)", "mix(π2, π3)", "mix(π4, π4)"]
