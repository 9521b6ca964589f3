"""A pairwise preference model, prompted as the paper's (RLHFlow/pair-preference-model-LLaMA3-8B).

The model reads the conversation and two responses in one user message and answers "A" or "B". P is the softmax, at
temperature 1, over the logits of these two tokens at the answer's position. Both orders are asked and averaged, so that
P(i ≻ j) + P(j ≻ i) = 1. Such preferences need not be transitive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from ..config import ModelConfig, OracleConfig
from ..conversations import Messages, plain_turns
from ..errors import UserError
from .interface import (
    GroupProgress,
    IndexPairs,
    Progress,
    PromptAndResponses,
    average_orders,
    describe_prompt,
    drop_duplicates,
    expand_duplicates,
    questions_of,
)
from .model_oracle import ModelOracle

QUESTION = "[CONTEXT] {context} [RESPONSE A] {response_A} [RESPONSE B] {response_B} \n"
ROLE_SUBSTITUTES = dict.fromkeys(("system", "developer", "tools", "tool"), "user")
PROBE_QUESTION = QUESTION.format(context="x", response_A="y", response_B="z")


def context(prompt: Messages) -> str:
    r"""Formats the conversation as the model was trained to read it.

    The model knows two roles. A system message is put before the first user message; the list of tools and their
    results become user messages.

    >>> context([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
    ...          {"role": "user", "content": "Bye"}])
    '\n\n\n<turn> user\n Hi\n\n<turn> assistant\n Yes?\n\n<turn> user\n Bye\n\n\n'
    """
    plain = plain_turns(prompt, ROLE_SUBSTITUTES)
    turns = (f"\n\n<turn> {message['role']}\n {message['content']}" for message in plain)
    return "\n" + "".join(turns) + "\n\n\n"


def question(prompt: Messages, first: str, second: str) -> str:
    """Returns the user message that asks whether the first response or the second is better."""
    return QUESTION.format(context=context(prompt), response_A=first, response_B=second)


class PairModel(ModelOracle):
    """The oracle "pair-model": a model that compares two responses. K responses take K(K − 1) questions."""

    kind = "pair-model"
    auto_class = AutoModelForCausalLM
    configurations = MODEL_FOR_CAUSAL_LM_MAPPING
    description = "a causal language model that reads two responses and says A or B (not an encoder, as PairRM)"

    def __init__(self, source: str | None, config: OracleConfig, policy: ModelConfig) -> None:
        super().__init__(source, config, policy)
        self.verdicts = [self._single_token(letter) for letter in "AB"]
        self.bos = self._own_bos()
        self._check_header()

    def compare(
        self,
        groups: Sequence[PromptAndResponses],
        pairs: Sequence[IndexPairs] | None,
        progress: Progress = lambda n: None,
    ) -> list[np.ndarray]:
        unique = [drop_duplicates(texts) for _, texts in groups]
        asked = [list(questions_of(own, *one)) for own, one in zip(pairs or [None] * len(groups), unique)]
        for g, (prompt, _) in enumerate(groups):  # finds most questions that are too long before hours of work
            texts = unique[g][0]
            if longest := max(asked[g], key=lambda pair: sum(len(texts[i]) for i in pair), default=None):
                self.tokens(prompt, *(texts[i] for i in longest), describe_prompt(g, prompt))
        shown_first = [np.full((len(texts), len(texts)), 0.5) for texts, _ in unique]
        count = GroupProgress(progress, len(groups), sum(map(len, asked)))

        def questions() -> Iterator[tuple[tuple[int, int, int], list[int]]]:
            for g, (prompt, _) in enumerate(groups):
                texts, here = unique[g][0], describe_prompt(g, prompt)
                for i, j in asked[g]:
                    yield (g, i, j), self.tokens(prompt, texts[i], texts[j], here)

        for (g, i, j), value in self.ask_in_batches(questions(), self.prefers_first):
            shown_first[g][i, j] = value
            count()
        count.finish()
        return [expand_duplicates(average_orders(matrix), indices) for matrix, (_, indices) in zip(shown_first, unique)]

    def tokens(self, prompt: Messages, first: str, second: str, where: str = "the prompt") -> list[int]:
        """Encodes a question with the model's chat template, without a beginning-of-sequence token.

        Raises:
            UserError: if it is longer than --oracle_max_tokens.
        """
        return self.encode(self._through_template(question(prompt, first, second)), where)

    def prefers_first(self, rows: list[list[int]]) -> Tensor:
        """Returns P(A) against P(B) as the next token after each row: (len(rows),) float32."""
        model = self.loaded()
        batch = self.padded(rows, "left")  # all rows end at the last position, the only one whose logits are computed
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions, logits_to_keep=1).logits[:, -1, self.verdicts]
        return logits.float().softmax(-1)[:, 0]

    def check_config(self, config: PretrainedConfig) -> None:
        super().check_config(config)
        named = [name for name in config.architectures or [] if name.endswith(("Classification", "ForMaskedLM"))]
        if named:
            hint = "; use --oracle reward-model" if named[0].endswith("SequenceClassification") else ""
            raise UserError(
                f"{self.source} is not a pair-model: its config.json names {named[0]}, and a pair-model is "
                f"{self.description}{hint}"
            )

    def _through_template(self, content: str) -> str:
        text = self.render([{"role": "user", "content": content}], generate=True)
        return text[len(self.bos) :] if text.startswith(self.bos) else text

    def _own_bos(self) -> str:
        """Returns the beginning-of-sequence token, which is removed; "" if it begins every turn, as in ChatML."""
        bos = self.tokenizer.bos_token or ""
        text = self.render([{"role": "user", "content": PROBE_QUESTION}], generate=True)
        return bos if text.startswith(bos) and text.count(bos) == 1 else ""

    def _single_token(self, letter: str) -> int:
        tokens = self.tokenizer.encode(letter, add_special_tokens=False)
        if len(tokens) != 1:
            raise UserError(f"{self.source} cannot be a pair-model: {letter!r} is {len(tokens)} tokens, not one")
        return tokens[0]

    def _check_header(self) -> None:
        """Checks that a rendered question ends where the answer begins, and that the answer is the token that is read.

        Raises:
            UserError: if the chat template does otherwise.
        """
        asked = self._through_template(PROBE_QUESTION)
        if PROBE_QUESTION.strip() not in asked:
            raise UserError(f"{self.source} cannot be a pair-model: its chat template leaves out the user's message")
        tokens = self.encode(asked, "the probe")
        for letter, verdict in zip("AB", self.verdicts):
            messages = [{"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": letter}]
            said = self.render(messages, generate=False).partition(asked)[2]
            read = self.tokenizer.encode(asked + letter, add_special_tokens=False)
            if not said.startswith(letter) or read != [*tokens, verdict]:
                raise UserError(
                    f"{self.source} cannot be a pair-model: with its chat template, a question does not end with the "
                    f"header that comes before the assistant's answer {letter}"
                )
