"""Selection on a language model, where the exact step is known: the recipe of ``cyclic_lm``, one iteration from π_1.

The oracle's preference is between classes of first words, so that a step of mirror descent moves the logarithm of the
share of class c by η(P π)_c, up to a constant. Shares on held-out prompts are those of the first token, which its
probabilities have without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from onpo_fast.batches import divided_alike, plan_steps
from onpo_fast.config import FitConfig, ModelConfig, SamplingConfig
from onpo_fast.data import Group, Messages, Pair, read_prompts
from onpo_fast.fit import fit
from onpo_fast.models.policy import Policy, features, score
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.objectives import Omd
from onpo_fast.oracles.classes import OPENINGS
from onpo_fast.sampling import open_sampler
from onpo_fast.selecting import FEATURES, differences
from onpo_fast.selection import SELECTIONS, Predictor, candidates, select

from ..cyclic_lm.recipe import OPTIONS, PROMPTS
from .results import ALL, Result

ETA = 3.0
CLASSES = len(OPENINGS.names)


class OneStep:
    """Responses of π_1 to the prompts of an iteration, with which every selection makes a step of its own.

    Args:
        seed: of the responses, the labels and the draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.policies = ResidentPolicy(ModelConfig(**_of(ModelConfig)))
        self.sampling = SamplingConfig(**_of(SamplingConfig))
        self.fitting = FitConfig(**_of(FitConfig) | {"batch_pairs": 1})  # a prompt a step, however many are drawn
        prompts = read_prompts(Path(PROMPTS["prompts"]))
        order = np.random.default_rng([seed, 0]).permutation(len(prompts))[: 2 * OPTIONS["prompts_per_iteration"]]
        chosen = [prompts[i] for i in order]
        half = len(chosen) // 2
        self.heldout = read_prompts(Path(PROMPTS["eval_prompts"]))
        self.earlier, self.groups = self._sample(chosen[:half], 1), self._sample(chosen[half:], 2)

    def run(self, selection: str, draws: int) -> Result:
        """Makes a step with one verdict for each selected pair and measures it."""
        rng = np.random.default_rng([self.seed, 3, draws, [ALL, *SELECTIONS].index(selection)])
        pairs = candidates(self.groups)
        counts, importance = [1] * len(pairs), [1.0] * len(pairs)
        if selection != ALL:
            x = differences(self.features[1], pairs)
            predictor = Predictor(FEATURES)
            earlier = candidates(self.earlier)
            asked = select(SELECTIONS["uniform"](np.zeros((len(earlier), 1)), None), earlier, draws, rng).pairs
            predictor.fit(differences(self.features[0], asked), self._verdicts(self.earlier, asked, rng))
            found = select(SELECTIONS[selection](x, predictor(x)), pairs, draws, rng)
            pairs, counts, importance = found.pairs, found.counts, found.importance
        wins = self._verdicts(self.groups, pairs, rng)
        labelled = [
            Pair(g, *((i, j) if won else (j, i)), 1.0, float(count), float(weight))
            for (g, i, j), won, count, weight in zip(pairs, wins, counts, importance)
        ]
        policy = self.policies(self.policies.initial)
        before = self._shares(policy)
        anchor = score(policy, self.groups, self.fitting.token_budget)
        policy = self.policies.take(self.policies.initial, f"{self.seed}")
        steps = divided_alike(plan_steps(labelled, 1, self.fitting.batch_pairs, [self.seed]))
        fit(policy, self.groups, steps, anchor, Omd(ETA), self.fitting, lambda metrics: None, seed=[self.seed])
        moved = np.log(self._shares(policy)) - np.log(before)
        exact = ETA * OPENINGS.matrix @ before
        error = (moved - moved.mean()) - (exact - exact.mean())
        return Result(self.seed, selection, draws, len(pairs), float(np.sqrt((error**2).mean())))

    @cached_property
    def features(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of the responses to the earlier prompts and to those of the step, projected as in a run."""
        policy = self.policies(self.policies.initial)
        found = [
            [one.numpy() for one in features(policy, groups, self.fitting.token_budget)]
            for groups in (self.earlier, self.groups)
        ]
        size = found[0][0].shape[1]
        projection = np.random.default_rng([self.seed, 4]).standard_normal((size, FEATURES)) / size**0.5
        return tuple([one @ projection for one in own] for own in found)

    def _sample(self, prompts: Sequence[Messages], stream: int) -> list[Group]:
        with closing(open_sampler(self.policies, self.policies.initial, self.sampling)) as sampler:
            return sampler(prompts, OPTIONS["responses_per_prompt"], [self.seed, stream], lambda n: None)

    def _verdicts(self, groups: Sequence[Group], pairs: Sequence, rng: np.random.Generator) -> np.ndarray:
        """One draw from the preference for each pair: 1 if the first wins."""
        P = [OPENINGS(group.prompt, [one.text for one in group.responses]) for group in groups]
        return np.array([float(rng.random() < P[g][i, j]) for g, i, j in pairs])

    def _shares(self, policy: Policy) -> np.ndarray:
        """The shares of the classes among first tokens that have one, (C,), the mean over held-out prompts."""
        policy.model.eval()
        with torch.no_grad():
            logits = [
                policy.model(input_ids=torch.tensor([policy.renderer.render(prompt)])).logits[0, -1]
                for prompt in self.heldout
            ]
        shares = torch.stack(logits).double().softmax(-1).mean(0).numpy() @ self._classes(policy)
        return shares / shares.sum()

    def _classes(self, policy: Policy) -> np.ndarray:
        """Which class a token begins, (V, C) of 0 and 1."""
        size = policy.model.config.vocab_size
        texts = [policy.renderer.tokenizer.decode([token]) for token in range(size)]
        return np.eye(CLASSES + 1)[OPENINGS.indices(self.heldout[0], texts)][:, :CLASSES]


def _of(section: type) -> dict[str, object]:
    """The recipe's options of a section."""
    return {name: value for name, value in OPTIONS.items() if name in section.__dataclass_fields__}
