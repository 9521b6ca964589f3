"""A reward model: one score per response, turned into preferences by Bradley-Terry, P(i ≻ j) = σ(r_i − r_j).

Preferences from scores are transitive, so a run with this oracle maximises a reward, and the Nash policy is the one
that maximises it. It is the cheapest of the models: K questions per prompt, not K(K − 1).
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
from ..models.checkpoint import tensor_names
from .interface import (
    GroupProgress,
    Progress,
    PromptAndResponses,
    average_orders,
    describe_prompt,
    drop_duplicates,
    expand_duplicates,
)
from .model_oracle import OTHER_MODELS, VALUE_HEAD, ModelOracle

ROLE_SUBSTITUTES = {
    "developer": "system",
    "tools": "user",
    "tool": "user",
}  # for roles that a reward model may not know


class RewardModel(ModelOracle):
    """The oracle "reward-model": σ(r_i − r_j) of a sequence-classification model with one label, the reward r."""

    kind = "reward-model"
    auto_class = AutoModelForSequenceClassification
    configurations = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    description = "a sequence-classification model with one label"

    def __init__(self, source: str | None, config: OracleConfig, policy: ModelConfig) -> None:
        super().__init__(source, config, policy)
        self._check_template()

    def many(self, groups: Sequence[PromptAndResponses], progress: Progress = lambda n: None) -> list[np.ndarray]:
        unique = [drop_duplicates(texts) for _, texts in groups]
        for g, (prompt, _) in enumerate(groups):  # finds questions that are too long before hours of work
            self.tokens(prompt, max(unique[g][0], key=len, default=""), describe_prompt(g, prompt))
        rewards = [np.zeros(len(texts)) for texts, _ in unique]
        count = GroupProgress(progress, len(groups), sum(map(len, rewards)))

        def questions() -> Iterator[tuple[tuple[int, int], list[int]]]:
            for g, (prompt, _) in enumerate(groups):
                for i, text in enumerate(unique[g][0]):
                    yield (g, i), self.tokens(prompt, text, describe_prompt(g, prompt))

        for (g, i), value in self.ask_in_batches(questions(), self.scores):
            rewards[g][i] = value
            count()
        count.finish()
        return [expand_duplicates(preferences_of_rewards(r), indices) for r, (_, indices) in zip(rewards, unique)]

    def tokens(self, prompt: Messages, text: str, where: str = "the prompt") -> list[int]:
        """Encodes the conversation with the response by the model's chat template. Tools and their turns become text.

        Raises:
            UserError: if it is longer than --oracle_max_tokens.
        """
        messages = [*plain_turns(prompt, ROLE_SUBSTITUTES), {"role": "assistant", "content": text}]
        return self.encode(self.render(messages, generate=False), where)

    def scores(self, rows: list[list[int]]) -> Tensor:
        """Returns the reward of each row as the model gives it to the row alone: (len(rows),) float32.

        Most models score the last token that is not their padding. A model without a padding token is given one that
        occurs in no row, since it would otherwise score the last token of the padded row.
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
        if Path(self.source).is_dir():  # the files of a model on the hub are checked when it is loaded
            self.check_value_head(tensor_names(self.source))
        if config.num_labels == 1:
            return
        for name in config.architectures or []:
            if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
                raise UserError(
                    f"{self.source} is not a reward-model: its config.json names {name}, a language model, and a "
                    f"reward-model is {self.description}. For a model that answers A or B use --oracle pair-model; "
                    f"{OTHER_MODELS}"
                )
        raise UserError(
            f"{self.source} is not a reward-model: its config.json has {config.num_labels} labels, and a reward-model "
            f"has one; {OTHER_MODELS}"
        )

    def check_value_head(self, weights: Iterable[str]) -> None:
        if head := next(filter(VALUE_HEAD.search, weights), None):
            raise UserError(
                f"{self.source} is not a reward-model: it has a value head ({head}), not a sequence-classification "
                f"score. Save it as AutoModelForSequenceClassification with one label; {OTHER_MODELS}"
            )

    def check_loaded(self, model: PreTrainedModel, report: dict) -> None:
        super().check_loaded(model, report)
        named = model.config.get_text_config().pad_token_id
        known = named is not None and 0 <= named < model.get_input_embeddings().num_embeddings
        self.own_padding: int | None = named if known else None

    def _check_template(self) -> None:
        """Checks that the chat template shows the response to the model; else all responses have the same score.

        Raises:
            UserError: if it does not.
        """
        question = {"role": "user", "content": "Which one?"}
        first, second = (
            self.render([question, {"role": "assistant", "content": text}], generate=False) for text in ("This", "That")
        )
        if first == second:
            raise UserError(
                f"{self.source} cannot be a reward-model: its chat template leaves out the assistant's message"
            )


def preferences_of_rewards(rewards: np.ndarray) -> np.ndarray:
    """Turns rewards (K,) into preferences (K, K): σ(r_i − r_j)."""
    with np.errstate(invalid="ignore"):  # from infinite rewards, which are reported by their NaN
        difference = np.clip(rewards[:, None] - rewards[None, :], -500, 500)
    return average_orders(1 / (1 + np.exp(-difference)))
