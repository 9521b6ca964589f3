"""The games lab: preference games whose Nash policy is known, and algorithms that approach it.

    python -m onpo_fast.games matrix|neural|multiturn

>>> from onpo_fast.games import duality_gap, nash, run
>>> from onpo_fast.games.preferences import three_cycle
>>> trace = run(three_cycle(0.9, 0.6, 0.7), "onpo", eta=0.5, T=1000)
>>> bool(trace.average_gap[-1] < 0.002)
True
"""

from ..algorithms import ALGORITHMS
from .matrix import GameTrace, run
from .preferences import GAMES
from .solution import best_response, duality_gap, nash, regularised_gap

__all__ = ["ALGORITHMS", "GAMES", "GameTrace", "best_response", "duality_gap", "nash", "regularised_gap", "run"]
