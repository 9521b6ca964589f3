"""What the oracles that are models share: loading, the guard against long questions, batches of tokens.

Weights are read from safetensors only, and a model's own code is not run unless asked for.
"""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import ModelConfig, OracleConfig
from ..errors import UserError
from ..models.device import device_of
from ..models.loading import check_shapes, loading_errors, locate, without_cudnn_attention
from ..run.fingerprint import model_fingerprint
from ..run.tracking import say_once
from .interface import BatchOracle

WINDOW = 1024  # questions sorted by length at a time: batches of equal lengths, while few tokens wait in memory
VALUE_HEAD = re.compile(r"(^|\.)(v_head|value_head|reward_head|regression_head)\.")  # of TRL, OpenRLHF and others
PADDED_TEXTS = ("Which of these is it?", "It is the second one, which is longer by about a dozen words, is it not?")
PADDING_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.06,
}  # that answers may differ by, relative to 1 or the largest
OTHER_MODELS = "other models can be asked in a function of your own, --oracle module:function"
Slot = TypeVar("Slot", bound=Hashable)


class ModelOracle(BatchOracle):
    """A Hugging Face model that judges. Its tokenizer is read at once, its weights when it is first asked."""

    holds_model = True
    kind: str  # as --oracle names it
    auto_class: Any  # the transformers class that loads it
    configurations: Container[type]  # of the models that it loads
    wanted: str  # what such a model is, in words

    def __init__(self, source: str | None, config: OracleConfig, policy: ModelConfig) -> None:
        if not source:
            raise UserError(f"--oracle {self.kind} needs --oracle_model, a Hugging Face id or a directory")
        self.source, self.config, self.policy = source, config, policy
        self.model: PreTrainedModel | None = None
        self.pads: bool | None = None  # whether questions of different lengths may be in one batch; None: not tried
        self.device = device_of(policy.device)
        locate(source)  # a directory that is there, with a model in it, or what may be a hub's id
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
                f"the tokenizer of {source} has no chat template, which is how a {self.kind} is asked: save it with "
                f"one; {OTHER_MODELS}"
            )

    def fingerprint(self, checksum: Callable[[Path], str]) -> dict[str, str]:
        """``model_fingerprint`` of the model."""
        return model_fingerprint(self.source, self.commit, checksum)

    def loaded(self) -> PreTrainedModel:
        """The model, in bfloat16 on a GPU and float32 elsewhere (--dtype)."""
        if self.model is None:
            chosen = {"auto": torch.bfloat16 if self.device.type == "cuda" else torch.float32}.get(self.policy.dtype)
            with loading_errors("the model", self.source):
                model, report = self.auto_class.from_pretrained(
                    self.source,
                    dtype=chosen or getattr(torch, self.policy.dtype),
                    use_safetensors=True,
                    trust_remote_code=self.policy.trust_remote_code,
                    ignore_mismatched_sizes=True,  # for check_loaded to name them
                    output_loading_info=True,
                )
            model.config.get_text_config().use_cache = False  # not an argument: encoders have none
            self.check_loaded(model, report)
            without_cudnn_attention()
            self.model = model.eval().requires_grad_(False).to(self.device)
        return self.model

    def check_config(self, config: PretrainedConfig) -> None:
        """Refuses a model that says itself that it is of another kind."""
        if type(config) in self.configurations:
            return
        if self.auto_class.__name__ not in (getattr(config, "auto_map", None) or {}):
            raise UserError(
                f"{self.source} is no {self.kind}: its config.json says {config.model_type}, and a {self.kind} is "
                f"{self.wanted}; {OTHER_MODELS}"
            )

    def check_loaded(self, model: PreTrainedModel, report: dict) -> None:
        """Refuses a model that is of another kind; ``report`` is transformers' on what it found."""
        self.check_value_head(report["unexpected_keys"])
        if missing := sorted(report["missing_keys"]):
            instead = sorted(report["unexpected_keys"])
            raise UserError(
                f"{self.source} is no {self.kind}: it lacks the weights {', '.join(missing[:3])}"
                + (f", and has {', '.join(instead[:3])}" if instead else "")
                + f"; a {self.kind} is {self.wanted}"
            )
        check_shapes(report, self.source)

    def check_value_head(self, weights: Iterable[str]) -> None:
        """Refuses a reward model of reinforcement learning, whose score no class of transformers reads."""

    def release(self) -> None:
        if self.model is not None:
            self.model = self.pads = None
            gc.collect()  # modules refer to each other; the policy needs the memory now, not some time later

    def render(self, messages: list[dict[str, str]], generate: bool) -> str:
        """A conversation through the model's chat template, up to where the assistant speaks or to its end.

        Raises:
            UserError: if the template refuses it, or makes nothing of it.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
        except Exception as error:  # a template is a program
            has_system = any(message["role"] == "system" for message in messages)
            hint = "; it has a system message, which can go before the first user's words" if has_system else ""
            raise UserError(f"the chat template of {self.source} refuses the conversation: {error}{hint}") from None
        if not text.strip():
            raise UserError(f"the chat template of {self.source} makes nothing of the conversation")
        return text

    def encode(self, text: str, where: str) -> list[int]:
        """Tokens without special ones added.

        Raises:
            UserError: if there are more than --oracle_max_tokens; ``where`` names the group.
        """
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) > self.config.oracle_max_tokens:
            raise UserError(
                f"{where}: a question of {len(tokens)} tokens, more than the {self.config.oracle_max_tokens} of "
                "--oracle_max_tokens: shorten prompts or --max_new_tokens, or raise it if the model knows such lengths"
            )
        return tokens

    def padded(self, rows: list[list[int]], side: str, pad: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask``, both (len(rows), longest), on the model's device."""
        embedded = self.loaded().get_input_embeddings().num_embeddings
        if (highest := max(map(max, rows))) >= embedded:
            raise UserError(
                f"the tokenizer of {self.source} does not fit its model: it makes the token {highest}, and the "
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

    def in_batches(
        self, questions: Iterable[tuple[Slot, list[int]]], ask: Callable[[list[list[int]]], torch.Tensor]
    ) -> Iterator[tuple[Slot, float]]:
        """Puts (slot, tokens) to ``ask`` in batches of --oracle_batch_tokens with padding; yields (slot, value).

        One question at a time if padding changes the model's answers: some implementations do not mask it.
        """
        questions = iter(questions)
        while window := list(itertools.islice(questions, WINDOW)):
            window.sort(key=lambda question: -len(question[1]))  # the longest first: memory runs out at once or never
            while window:
                count = max(1, self.config.oracle_batch_tokens // len(window[0][1])) if self._may_pad(ask) else 1
                batch, window = window[:count], window[count:]
                values = self._asked(ask, [tokens for _, tokens in batch])
                yield from zip((slot for slot, _ in batch), values.double().cpu().tolist())

    def _may_pad(self, ask: Callable[[list[list[int]]], torch.Tensor]) -> bool:
        """Whether two questions of different lengths have the same answers in a batch as each has alone."""
        if self.pads is None:
            try:
                with in_float32(self.loaded()):
                    difference = self._difference_by_padding(ask)
                allowed = PADDING_TOLERANCE[torch.float32]
            except (UserError, RuntimeError, ValueError):  # too little memory, or kernels and weights of other types
                difference, allowed = self._difference_by_padding(ask), PADDING_TOLERANCE[torch.bfloat16]
            self.pads = difference <= allowed
            if not self.pads:
                say_once(
                    (self.kind, self.source),
                    f"the {self.kind} {self.source} ({self.loaded().config.model_type}) gives other answers to a batch "
                    f"of questions than to each alone, by up to {difference:.2g}: it is asked one at a time",
                )
        return self.pads

    def _difference_by_padding(self, ask: Callable[[list[list[int]]], torch.Tensor]) -> float:
        """How far two answers in a batch are from those to each question alone, relative to 1 or the largest."""
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in PADDED_TEXTS]
        alone = torch.cat([self._asked(ask, [row]) for row in rows]).double()
        return float((self._asked(ask, rows).double() - alone).abs().max() / alone.abs().max().clamp(min=1))

    def _asked(self, ask: Callable[[list[list[int]]], torch.Tensor], rows: list[list[int]]) -> torch.Tensor:
        """The answers to a batch of questions, (len(rows),), all finite."""
        self.loaded()  # what it raises is said already
        try:
            with torch.no_grad():
                values = ask(rows)
        except UserError:
            raise
        except Exception as error:  # the model's class may be anybody's
            raise UserError(
                f"{self.source} cannot be asked as a {self.kind} ({type(error).__name__}: {error})"
            ) from error
        if not values.isfinite().all():
            raise UserError(
                f"{self.source} answers {values[~values.isfinite()][0].item()}, which is no number to judge by: its "
                "weights are damaged, or --dtype is too narrow for it"
            )
        return values


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Holds a model's half-precision weights in float32 meanwhile. They come back as they were, to the bit."""
    half = (torch.bfloat16, torch.float16)
    tensors = [one for one in itertools.chain(model.parameters(), model.buffers()) if one.dtype in half]
    dtypes = [one.dtype for one in tensors]
    try:
        for one in tensors:
            one.data = one.data.float()
        yield
    finally:
        for one, dtype in zip(tensors, dtypes):
            one.data = one.data.to(dtype)
