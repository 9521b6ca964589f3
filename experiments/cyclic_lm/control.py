"""The control: the classes of the oracle "openings" in an order instead of a cycle."""

from onpo_fast.oracles.classes import OPENINGS, transitive_preference

ordered = transitive_preference(OPENINGS.names, OPENINGS.classify)
