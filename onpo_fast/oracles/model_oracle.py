"""The base class of oracles that are Hugging Face models: loading, encoding and batching of questions.

Weights are read from safetensors only. Code that comes with a model runs only with --trust_remote_code.
"""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import ModelConfig, OracleConfig
from ..console import say, say_once
from ..device import device_of, same_device
from ..errors import UserError, one_line
from ..models.checkpoint import loading_errors, locate
from ..models.execution import without_cudnn_attention
from ..models.loading import check_shapes
from ..models.precision import weights_in
from ..run.fingerprint import model_fingerprint
from .interface import BatchOracle

WINDOW = 1024  # questions sorted by length at a time, which makes batches even and bounds the tokens held in memory
VALUE_HEAD = re.compile(r"(^|\.)(v_head|value_head|reward_head|regression_head)\.")  # of TRL, OpenRLHF and others
PADDED_TEXTS = ("Which of these is it?", "It is the second one, which is longer by about a dozen words, is it not?")
# How far answers in a batch may be from answers without padding, relative to the largest answer or 1
PADDING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06}
OTHER_MODELS = "for any other model write a function and use --oracle module:function"
Slot = TypeVar("Slot", bound=Hashable)


class ModelOracle(BatchOracle):
    """An oracle that is a Hugging Face model. The tokenizer is loaded at once, the weights when it is first asked.

    Args:
        source: a Hugging Face id or a directory.
        config: the options of oracles that are models.
        policy: the options of the policy, whose dtype is used, and whose device unless there is --oracle_device.

    Attributes:
        holds_model: whether it is on the policy's device. On another one it stays in memory between questions.

    Raises:
        UserError: if the model cannot be loaded, or its files show that it is of another kind.
    """

    kind: str  # the name in --oracle
    auto_class: Any  # the class of transformers that loads the model
    configurations: Container[type]  # configuration classes of the models that ``auto_class`` loads
    description: str  # what a model of this kind is, for messages

    def __init__(self, source: str | None, config: OracleConfig, policy: ModelConfig) -> None:
        if not source:
            raise UserError(f"--oracle {self.kind} needs --oracle_model, a Hugging Face id or a directory")
        self.source, self.config, self.policy = source, config, policy
        self.model: PreTrainedModel | None = None
        self.can_pad: bool | None = None  # whether padding leaves the answers unchanged; None if not yet tried
        self.device = device_of(config.oracle_device or policy.device, "oracle_device")
        self.holds_model = same_device(self.device, device_of(policy.device))
        self.computes_elsewhere = not self.holds_model
        locate(source)  # raises for a directory without a model, and for what cannot be an id
        with loading_errors("the model", source):
            model_config = AutoConfig.from_pretrained(source, trust_remote_code=policy.trust_remote_code)
        self.commit: str | None = getattr(model_config, "_commit_hash", None)
        self.check_config(model_config)
        with loading_errors("the tokenizer of", source):
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, trust_remote_code=policy.trust_remote_code
            )
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {source} has no chat template, which a {self.kind} needs: save the tokenizer with "
                f"one; {OTHER_MODELS}"
            )

    def fingerprint(self, checksum: Callable[[Path], str]) -> dict[str, str]:
        """Checksums of the model's files, by name (``model_fingerprint``)."""
        return model_fingerprint(self.source, self.commit, checksum)

    def loaded(self) -> PreTrainedModel:
        """Loads the model unless it is loaded, in the dtype of --dtype: "auto" is bfloat16 on a GPU, else float32.

        Raises:
            UserError: if it cannot be loaded, or its weights show that it is of another kind.
        """
        if self.model is None:
            chosen = {"auto": torch.bfloat16 if self.device.type == "cuda" else torch.float32}.get(self.policy.dtype)
            with loading_errors("the model", self.source):
                model, report = self.auto_class.from_pretrained(
                    self.source,
                    dtype=chosen or getattr(torch, self.policy.dtype),
                    use_safetensors=True,
                    trust_remote_code=self.policy.trust_remote_code,
                    ignore_mismatched_sizes=True,  # check_loaded names them
                    output_loading_info=True,
                )
            model.config.get_text_config().use_cache = False  # not an argument of the call: encoders have none
            self.check_loaded(model, report)
            without_cudnn_attention()
            self.model = model.eval().requires_grad_(False).to(self.device)
        return self.model

    def check_config(self, config: PretrainedConfig) -> None:
        """Checks by its config.json that the model is of this kind.

        Raises:
            UserError: if it is not.
        """
        if type(config) in self.configurations:
            return
        if self.auto_class.__name__ not in (getattr(config, "auto_map", None) or {}):
            raise UserError(
                f"{self.source} is not a {self.kind}: its config.json says {config.model_type}, and a {self.kind} is "
                f"{self.description}; {OTHER_MODELS}"
            )

    def check_loaded(self, model: PreTrainedModel, report: dict) -> None:
        """Checks by its weights that the model is of this kind.

        Args:
            model: the model.
            report: the loading report of transformers.

        Raises:
            UserError: if it is not.
        """
        self.check_value_head(report["unexpected_keys"])
        if missing := sorted(report["missing_keys"]):
            instead = sorted(report["unexpected_keys"])
            raise UserError(
                f"{self.source} is not a {self.kind}: it lacks the weights {', '.join(missing[:3])}"
                + (f", and has {', '.join(instead[:3])}" if instead else "")
                + f"; a {self.kind} is {self.description}"
            )
        check_shapes(report, self.source)

    def check_value_head(self, weights: Iterable[str]) -> None:
        """Checks that no weight belongs to a value head, which no class of transformers reads.

        Raises:
            UserError: if one does, in a subclass that scores responses.
        """

    def release(self) -> None:
        if self.model is not None and self.holds_model:
            self.model = self.can_pad = None
            gc.collect()  # modules refer to each other, and the policy needs the memory now

    def render(self, messages: list[dict[str, str]], generate: bool) -> str:
        """Renders a conversation with the model's chat template.

        Args:
            messages: the conversation.
            generate: whether to end with the header of the assistant's next message.

        Raises:
            UserError: if the template raises an error or renders no text.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
        except Exception as error:  # a template is a program and may raise anything
            has_system = any(message["role"] == "system" for message in messages)
            hint = (
                "; if it has no place for a system message, put that text into the user message" if has_system else ""
            )
            raise UserError(f"the chat template of {self.source} refuses the conversation: {error}{hint}") from None
        if not text.strip():
            raise UserError(f"the chat template of {self.source} renders the conversation as an empty text")
        return text

    def encode(self, text: str, where: str) -> list[int]:
        """Encodes a text without adding special tokens.

        Args:
            text: the rendered question.
            where: the group, for messages.

        Raises:
            UserError: if there are more than --oracle_max_tokens.
        """
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) > self.config.oracle_max_tokens:
            raise UserError(
                f"{where}: a question of {len(tokens)} tokens, more than --oracle_max_tokens "
                f"{self.config.oracle_max_tokens}: use shorter prompts or a lower --max_new_tokens, or raise the limit "
                "if the model was trained on such lengths"
            )
        return tokens

    def padded(self, rows: list[list[int]], side: str, pad: int = 0) -> dict[str, torch.Tensor]:
        """Pads rows of tokens to one length.

        Args:
            rows: token ids.
            side: where padding goes, "left" or "right".
            pad: the padding token.

        Returns:
            ``input_ids`` and ``attention_mask``, both (len(rows), longest) int64, on the model's device.

        Raises:
            UserError: if a token is outside the model's embedding.
        """
        embedded = self.loaded().get_input_embeddings().num_embeddings
        if (highest := max(map(max, rows))) >= embedded:
            raise UserError(
                f"the tokenizer of {self.source} does not fit its model: it produces the token {highest}, and the "
                f"embedding has {embedded} rows"
            )
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(len(row))
            ids[i, place] = torch.tensor(row)
            mask[i, place] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def ask_in_batches(
        self, questions: Iterable[tuple[Slot, list[int]]], ask: Callable[[list[list[int]]], torch.Tensor]
    ) -> Iterator[tuple[Slot, float]]:
        """Asks questions in batches of --oracle_batch_tokens, padding included.

        If padding changes the model's answers, which some implementations do not mask, it asks one question at a time.

        Args:
            questions: (slot, tokens) pairs.
            ask: maps a batch of token rows to a tensor (len(rows),).

        Yields:
            (slot, answer) pairs, in another order.
        """
        questions = iter(questions)
        while window := list(itertools.islice(questions, WINDOW)):
            window.sort(key=lambda question: -len(question[1]))  # longest first: memory runs out at once or never
            while window:
                count = max(1, self.config.oracle_batch_tokens // len(window[0][1])) if self._try_padding(ask) else 1
                batch, window = window[:count], window[count:]
                values = self._ask_batch(ask, [tokens for _, tokens in batch])
                yield from zip((slot for slot, _ in batch), values.double().cpu().tolist())

    def _try_padding(self, ask: Callable[[list[list[int]]], torch.Tensor]) -> bool:
        """Returns whether questions of different lengths have the same answers in a batch as alone; tries it once."""
        if self.can_pad is None:
            try:
                with weights_in(self.loaded(), torch.float32):
                    difference = self._difference_by_padding(ask)
                allowed = PADDING_TOLERANCE[torch.float32]
            except (UserError, RuntimeError, ValueError) as error:  # too little memory, or no kernels for float32
                if isinstance(error, UserError) and error.__cause__ is None:  # the answers are at fault
                    raise
                say(
                    f"the {self.kind} {self.source} cannot be asked in float32, so that its padding is checked in its "
                    f"own precision ({one_line(str(error), 200)})"
                )
                difference, allowed = self._difference_by_padding(ask), PADDING_TOLERANCE[torch.bfloat16]
            self.can_pad = difference <= allowed
            if not self.can_pad:
                say_once(
                    (self.kind, self.source),
                    f"the {self.kind} {self.source} ({self.loaded().config.model_type}) answers questions in a padded "
                    f"batch differently, by up to {difference:.2g}: it is asked one question at a time",
                )
        return self.can_pad

    def _difference_by_padding(self, ask: Callable[[list[list[int]]], torch.Tensor]) -> float:
        """Returns the largest difference between answers in a batch and alone, relative to the largest answer or 1."""
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in PADDED_TEXTS]
        alone = torch.cat([self._ask_batch(ask, [row]) for row in rows]).double()
        return float((self._ask_batch(ask, rows).double() - alone).abs().max() / alone.abs().max().clamp(min=1))

    def _ask_batch(self, ask: Callable[[list[list[int]]], torch.Tensor], rows: list[list[int]]) -> torch.Tensor:
        """Answers to one batch of questions: (len(rows),), all finite.

        Raises:
            UserError: if the model fails, or an answer is not finite.
        """
        self.loaded()  # outside of try: it raises clear errors itself
        try:
            current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
            with torch.no_grad(), current:
                values = ask(rows)
        except UserError:
            raise
        except Exception as error:  # with --trust_remote_code the model's class may raise anything
            raise UserError(
                f"{self.source} cannot be asked as a {self.kind} ({type(error).__name__}: {error})"
            ) from error
        if not values.isfinite().all():
            raise UserError(
                f"{self.source} answers {values[~values.isfinite()][0].item()} instead of a finite number: its weights "
                "are damaged, or the range of --dtype is too small for it"
            )
        return values
