"""What the oracles that are models share: loading, the guard against long questions, batches of tokens.

Weights are read from safetensors only, and a model's own code is not run unless asked for.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..device import device_of
from ..errors import UserError
from ..policy import locate, without_cudnn_attention
from ..sources import quiet
from .interface import BatchOracle

WINDOW = 1024  # questions sorted by length at a time: batches of equal lengths, while few tokens wait in memory
Slot = TypeVar("Slot", bound=Hashable)


class ModelOracle(BatchOracle):
    """A Hugging Face model that judges. Its tokenizer is read at once, its weights when it is first asked."""

    holds_model = True
    kind: str  # as --oracle names it
    auto_class: Any  # the transformers class that loads it

    def __init__(self, source: str | None, config: Config) -> None:
        if not source:
            raise UserError(f"--oracle {self.kind} needs --oracle_model, a Hugging Face id or a directory")
        self.source, self.config = source, config
        self.model: PreTrainedModel | None = None
        self.device = device_of(config.device)
        locate(source)  # a directory that is there, with a model in it, or what may be a hub's id
        with _loading(source):
            model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, trust_remote_code=config.trust_remote_code
            )
        if self.tokenizer.chat_template is None:
            raise UserError(f"the tokenizer of {source} has no chat template, which is how a {self.kind} is asked")
        self.check_config(model_config)

    def loaded(self) -> PreTrainedModel:
        """The model, in bfloat16 on a GPU and float32 elsewhere (--dtype)."""
        if self.model is None:
            chosen = {"auto": torch.bfloat16 if self.device.type == "cuda" else torch.float32}.get(self.config.dtype)
            with _loading(self.source):
                model, report = self.auto_class.from_pretrained(
                    self.source,
                    dtype=chosen or getattr(torch, self.config.dtype),
                    use_safetensors=True,
                    trust_remote_code=self.config.trust_remote_code,
                    output_loading_info=True,
                )
            self.check_loaded(model, report)
            without_cudnn_attention()
            self.model = model.eval().requires_grad_(False).to(self.device)
        return self.model

    def check_config(self, config: PretrainedConfig) -> None:
        """Refuses a model that says itself that it is of another kind."""

    def check_loaded(self, model: PreTrainedModel, report: dict) -> None:
        """Refuses a model that is of another kind; ``report`` is transformers' on what it found."""
        if report["missing_keys"]:
            raise UserError(
                f"{self.source} is no {self.kind}: it lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}"
            )

    def release(self) -> None:
        if self.model is not None:
            self.model = None
            gc.collect()  # modules refer to each other; the policy needs the memory now, not some time later

    def render(self, messages: list[dict[str, str]], generate: bool) -> str:
        """A conversation through the model's chat template, up to where the assistant speaks or to its end."""
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
        except Exception as error:  # a template is a program
            raise UserError(f"the chat template of {self.source} refuses the conversation: {error}") from None

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
        """Puts (slot, tokens) to ``ask`` in batches of --oracle_batch_tokens with padding; yields (slot, value)."""
        questions = iter(questions)
        while window := list(itertools.islice(questions, WINDOW)):
            window.sort(key=lambda question: -len(question[1]))  # the longest first: memory runs out at once or never
            while window:
                count = max(1, self.config.oracle_batch_tokens // len(window[0][1]))
                batch, window = window[:count], window[count:]
                with torch.no_grad():
                    values = ask([tokens for _, tokens in batch])
                yield from zip((slot for slot, _ in batch), values.double().cpu().tolist())


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """What transformers raises about a model that cannot be had, in one line, and no report beside it."""
    try:
        with quiet():
            yield
    except Exception as error:  # what is loaded is the user's: anything may be wrong with it
        raise UserError(f"cannot load the model {source}: {error}") from error
