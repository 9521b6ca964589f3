"""Selection in the neural game, where the exact step is known: a transformer whose 64 responses are all scored."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch

from onpo_fast.algorithms import named
from onpo_fast.data import Group, Pair
from onpo_fast.games.neural import NeuralGame
from onpo_fast.games.neural_game import TransformerGame
from onpo_fast.games.neural_options import resolve, response_preferences
from onpo_fast.models.policy import features
from onpo_fast.selection import SELECTIONS, Predictor, candidates, select

from .results import ALL, Result

GROUPS, RESPONSES, CONTEXTS = 8, 8, 4  # 4 prompts × 8 groups × 28 pairs = 896 candidates an iteration
ITERATIONS = 3  # the predictor of "variance" learns from the first ones


class SelectedGame(TransformerGame):
    """A ``TransformerGame`` whose oracle gives one verdict for each selected pair of drawn responses."""

    def __init__(self, game: NeuralGame, P: np.ndarray, selection: str, draws: int) -> None:
        super().__init__(game, P)
        self.selection, self.draws, self.labels = selection, draws, 0
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []  # differences of features, and verdicts

    def _drawn(self, p: np.ndarray, other: np.ndarray | None) -> list[Pair]:
        rng = np.random.default_rng([self.options.seed, 1, self.comparisons])
        drawn = [
            (c, rng.choice(len(row), self.options.responses, p=row))
            for c, row in enumerate(p)
            for _ in range(self.options.groups)
        ]
        groups = [Group([], self.contexts[c], [self.responses[i] for i in members]) for c, members in drawn]
        pairs = candidates(groups)
        hidden = torch.stack(features(self.model, self.groups, self.config.tokens_per_microbatch)).numpy()  # π_t's
        x = np.array([hidden[drawn[g][0], drawn[g][1][i]] - hidden[drawn[g][0], drawn[g][1][j]] for g, i, j in pairs])
        counts, importance = np.ones(len(pairs), int), np.ones(len(pairs))
        if self.selection != ALL:
            predictor = Predictor(x.shape[1])
            if self.seen:
                predictor.fit(*(np.concatenate(column) for column in zip(*self.seen)))
            found = select(SELECTIONS[self.selection](x, predictor(x)), pairs, self.draws, rng)
            chosen = [pairs.index(pair) for pair in found.pairs]
            pairs, x, counts, importance = found.pairs, x[chosen], found.counts, found.importance
        asked, verdicts = [], []
        for (g, i, j), count, weight in zip(pairs, counts, importance):
            c, members = drawn[g]
            wins = rng.random() < self.P[c, members[i], members[j]]
            first, second = (members[i], members[j]) if wins else (members[j], members[i])
            asked.append(Pair(c, int(first), int(second), 1.0, float(count), float(weight)))
            verdicts.append(float(wins))
        self.labels += len(asked)
        self.seen.append((x, np.array(verdicts)))
        return asked


def run(seed: int, selection: str, draws: int) -> Result:
    """Plays mirror descent for ``ITERATIONS`` and measures the last step; ``draws`` are those of an iteration."""
    options = NeuralGame(
        game="random",
        actions=64,
        contexts=CONTEXTS,
        objective="omd",
        iterations=ITERATIONS,
        pairing="all_pairs",
        groups=GROUPS,
        responses=RESPONSES,
        labels="sampled",
        seed=seed,
    )
    options, matrices, classes = resolve(options, None)
    game = SelectedGame(options, response_preferences(matrices, classes), selection, draws)
    for _ in islice(named(options.objective).play(game, game.initial()), ITERATIONS + 1):
        pass
    return Result(seed, selection, draws, game.labels, float(game.distances["policy"][-1].mean()))
