"""A reward model: one score a response, and Bradley-Terry on top, P(i ≻ j) = σ(r_i − r_j).

Preferences from scores are transitive: whoever beats the winner beats the loser too. No cycle can come out, so a run
under this oracle aligns to a reward, and the Nash policy is the one that maximises it. One score is the cheapest
question: K a prompt, not K(K − 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ..config import ModelConfig, OracleConfig
from ..conversations import Messages, plain_turns
from ..errors import UserError
from ..models.loading import tensor_names
from .interface import Asked, Progress, Steps, both_orders, spread, where, without_repeats
from .models import OTHER_MODELS, VALUE_HEAD, ModelOracle

OTHER_ROLES = {"developer": "system", "tools": "user", "tool": "user"}  # what a reward model may not know


class RewardModel(ModelOracle):
    """σ(r_i − r_j) of a sequence-classification model with one label, the reward r."""

    kind = "reward-model"
    auto_class = AutoModelForSequenceClassification
    configurations = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    wanted = "a sequence-classification model with one label"

    def __init__(self, source: str | None, config: OracleConfig, policy: ModelConfig) -> None:
        super().__init__(source, config, policy)
        self._check_template()

    def many(self, groups: Sequence[Asked], progress: Progress = lambda n: None) -> list[np.ndarray]:
        different = [without_repeats(texts) for _, texts in groups]
        for g, (prompt, _) in enumerate(groups):  # what is too long is so before hours of work
            self.tokens(prompt, max(different[g][0], key=len, default=""), where(g, prompt))
        rewards = [np.zeros(len(texts)) for texts, _ in different]
        steps = Steps(progress, len(groups), sum(map(len, rewards)))

        def questions() -> Iterator[tuple[tuple[int, int], list[int]]]:
            for g, (prompt, _) in enumerate(groups):
                for i, text in enumerate(different[g][0]):
                    yield (g, i), self.tokens(prompt, text, where(g, prompt))

        for (g, i), value in self.in_batches(questions(), self.scores):
            rewards[g][i] = value
            steps()
        steps.finish()
        return [spread(bradley_terry(r), indices) for r, (_, indices) in zip(rewards, different)]

    def tokens(self, prompt: Messages, text: str, where: str = "the prompt") -> list[int]:
        """The conversation with the response, through the model's chat template; tools and their turns as text.

        Raises:
            UserError: if it is longer than --oracle_max_tokens.
        """
        messages = [*plain_turns(prompt, OTHER_ROLES), {"role": "assistant", "content": text}]
        return self.encode(self.render(messages, generate=False), where)

    def scores(self, rows: list[list[int]]) -> Tensor:
        """(len(rows),) rewards, each what the model says of the row alone.

        Most models find a row's last token as the last one that is not their padding. One that names no padding takes
        the last of all: for it, padding is what occurs in no row, never a token that may end one.
        """
        model = self.loaded()
        pad = self.own_padding
        if pad is None:
            used = set().union(*rows)
            pad = next(token for token in itertools.count() if token not in used)
            model.config.get_text_config().pad_token_id = pad
        return model(**self.padded(rows, "right", pad)).logits[:, 0].float()

    def check_config(self, config: PretrainedConfig) -> None:
        super().check_config(config)
        if Path(self.source).is_dir():  # one that is still on the hub is looked at when it is loaded
            self.check_value_head(tensor_names(self.source))
        if config.num_labels == 1:
            return
        for name in config.architectures or []:
            if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
                raise UserError(
                    f"{self.source} is no reward-model: its config.json names {name}, a language model, and a "
                    f"reward-model is {self.wanted}. One that says A or B is a --oracle pair-model; {OTHER_MODELS}"
                )
        raise UserError(
            f"{self.source} is no reward-model: its config.json has {config.num_labels} labels, and a reward is one "
            f"number; {OTHER_MODELS}"
        )

    def check_value_head(self, weights: Iterable[str]) -> None:
        if head := next(filter(VALUE_HEAD.search, weights), None):
            raise UserError(
                f"{self.source} is no reward-model: it has a value head ({head}), not a sequence-classification score. "
                f"Save it as AutoModelForSequenceClassification with one label; {OTHER_MODELS}"
            )

    def check_loaded(self, model: PreTrainedModel, report: dict) -> None:
        super().check_loaded(model, report)
        named = model.config.get_text_config().pad_token_id
        known = named is not None and 0 <= named < model.get_input_embeddings().num_embeddings
        self.own_padding: int | None = named if known else None

    def _check_template(self) -> None:
        """The response must be in what the model reads, or all responses have the same score."""
        question = {"role": "user", "content": "Which one?"}
        first, second = (
            self.render([question, {"role": "assistant", "content": text}], generate=False) for text in ("This", "That")
        )
        if first == second:
            raise UserError(
                f"{self.source} cannot be a reward-model: its chat template leaves out what the assistant says"
            )


def bradley_terry(rewards: np.ndarray) -> np.ndarray:
    """(K,) -> (K, K): σ(r_i − r_j)."""
    with np.errstate(invalid="ignore"):  # infinities and NaN are reported as what they make
        difference = np.clip(rewards[:, None] - rewards[None, :], -500, 500)
    return both_orders(1 / (1 + np.exp(-difference)))
