"""The stage that chooses which pairs of an iteration the oracle is asked about; ``selection`` has the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import streams
from .config import AlgorithmConfig, FitConfig, RunConfig
from .console import progress
from .data import Group, Misfit, read_items, read_preferences
from .files import write_jsonl
from .models.policy import features
from .models.resident import Source
from .opening import OpenRun
from .run.outputs import iteration_folder
from .selection import SELECTIONS, Predictor, Selected, candidates, select

FEATURES = 32  # of a response: its mean hidden state, projected at random


class PairSelector:
    """Draws the pairs of an iteration. Features and choices are files of the run, which later iterations learn from."""

    def __init__(self, run: OpenRun, algorithm: AlgorithmConfig, fitting: FitConfig, run_config: RunConfig) -> None:
        self.run, self.algorithm, self.fitting, self.run_config = run, algorithm, fitting, run_config

    def __call__(self, t: int, policy: Source, groups: Sequence[Group], suffix: str) -> Selected:
        """Returns the pairs to ask about, with their weights.

        Args:
            t: the iteration.
            policy: whose hidden states are the features of responses.
            suffix: of the iteration's files.
        """
        pairs, own = candidates(groups), None
        if self.algorithm.selection != "uniform":
            own = self._features(t, policy, groups, suffix)

        def compute() -> Selected:
            if not pairs:
                return Selected([], [], [])
            x = np.zeros((len(pairs), 1)) if own is None else differences(own, pairs)
            q = SELECTIONS[self.algorithm.selection](x, self._predict(t, x, suffix))
            rng = np.random.default_rng([self.run_config.seed, streams.SELECTION, t])
            return select(q, pairs, self.algorithm.select, rng)

        return self.run.cache.cached(
            f"{iteration_folder(t)}/selected{suffix}.jsonl",
            compute,
            lambda path: read_selected(path, groups),
            write_selected,
            stage="select",
            metrics=lambda found, seconds: {
                "seconds": seconds,
                "candidates": len(pairs),
                "draws": sum(found.counts),
                "pairs": len(found.pairs),
            },
        )

    def _features(self, t: int, policy: Source, groups: Sequence[Group], suffix: str) -> list[np.ndarray]:
        run = self.run

        def compute() -> list[np.ndarray]:
            with progress(f"iteration {t}: features", len(groups)) as done:
                found = features(run.policies(policy), groups, self.fitting.token_budget, done)
            size = found[0].shape[1]
            rng = np.random.default_rng([self.run_config.seed, streams.SELECTION])
            projection = rng.standard_normal((size, FEATURES)) / size**0.5
            return [one.numpy() @ projection for one in found]

        return run.cache.cached(
            f"{iteration_folder(t)}/features{suffix}.jsonl",
            compute,
            lambda path: read_features(path, groups),
            write_features,
            stage="select",
            prepare=lambda: run.policies(policy),
        )

    def _predict(self, t: int, x: np.ndarray, suffix: str) -> np.ndarray:
        """Predictions for pairs with these differences of features, from the labels of earlier iterations; else ½."""
        predictor = Predictor(x.shape[1])
        if self.algorithm.selection == "variance":
            earlier = [self._labels(s, suffix) for s in range(1, t)]
            if earlier:
                predictor.fit(*(np.concatenate(column) for column in zip(*earlier)))
        return predictor(x)

    def _labels(self, t: int, suffix: str) -> tuple[np.ndarray, np.ndarray]:
        """The differences of features and the labels of an earlier iteration."""
        folder = self.run.directory / iteration_folder(t)
        own, selected = (
            read_features(folder / f"features{suffix}.jsonl"),
            read_selected(folder / f"selected{suffix}.jsonl"),
        )
        preferences = read_preferences(folder / f"preferences{suffix}.jsonl")
        labels = np.array([preferences[g][i, j] for g, i, j in selected.pairs])
        return differences(own, selected.pairs), labels


def differences(own: Sequence[np.ndarray], pairs: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Returns the features of the first response minus those of the second, (n, d)."""
    return np.array([own[g][i] - own[g][j] for g, i, j in pairs])


def write_features(path: Path, own: Sequence[np.ndarray]) -> None:
    write_jsonl(path, ({"features": one.tolist()} for one in own))


def read_features(path: Path, groups: Sequence[Group] | None = None) -> list[np.ndarray]:
    """Reads what ``write_features`` wrote: (K, d) float64 a group.

    Raises:
        UserError: names the file, and the line that does not fit.
    """

    def make(record: dict, group: Group | None) -> np.ndarray:
        one = np.array(record["features"], dtype=np.float64)
        fits = one.shape[1:] == (FEATURES,) and np.isfinite(one).all()
        if not fits or (group is not None and len(one) != len(group.responses)):
            raise Misfit("it has no features of these responses")
        return one

    return read_items(path, make, groups, "groups")


def write_selected(path: Path, selected: Selected) -> None:
    rows = zip(selected.pairs, selected.counts, selected.importance)
    write_jsonl(path, ({"pair": list(pair), "draws": count, "importance": value} for pair, count, value in rows))


def read_selected(path: Path, groups: Sequence[Group] | None = None) -> Selected:
    """Reads what ``write_selected`` wrote.

    Raises:
        UserError: names the file, and the line that does not fit.
    """

    def make(record: dict, _: None) -> tuple[tuple[int, int, int], int, float]:
        (g, i, j), count, value = record["pair"], record["draws"], record["importance"]
        fits = all(type(one) is int for one in (g, i, j, count)) and isinstance(value, float)
        fits = fits and g >= 0 and 0 <= i < j and count > 0 and 0 < value < np.inf
        if not fits or (groups is not None and not (g < len(groups) and j < len(groups[g].responses))):
            raise Misfit("it is no pair of these responses")
        return (g, i, j), count, value

    return Selected(*map(list, zip(*read_items(path, make, None, "pairs"))))
