"""Prompts through a model's chat template: the tokens of a conversation, and which prompts a model cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..conversations import (
    Messages,
    characters,
    has_tool_turns,
    message_text,
    template_forms,
    template_tools,
    tools_of,
)
from ..data import Skipped
from ..errors import UserError
from ..sources import quiet

LONG_PROMPT = 2**17  # characters; a longer prompt is measured before it is tokenised whole, which takes 230 bytes each
PIECE = 2**16  # characters of a long prompt that are tokenised at a time
TOKENS_PER_CUT = 64  # tolerance, for each cut of a text, in the number of its tokens
PINNED_DATE = """--chat_template_kwargs '{"date_string": "01 Jan 2026"}' pins it in templates that take it"""


class Digest(Protocol):
    """A hash object of ``hashlib``."""

    def update(self, data: bytes) -> None: ...


class PromptTooLong(UserError):
    """A prompt leaves no room for a response."""


class _TemplateOmission(Exception):
    """A chat template omits tool calls or tool results of a conversation."""


@dataclass
class PromptRenderer:
    """Turns conversations into prompt tokens through the tokenizer's chat template.

    Attributes:
        tokenizer: a tokenizer with a chat template.
        context: the number of positions that the model has, in tokens; None if it does not say.
        vocabulary: the number of rows of the model's embedding.
        rotary_boundary: see ``Policy.rotary_boundary``.
        eos_tokens: the tokens that end a response.
        template_variables: variables for the chat template, the same with every prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    vocabulary: int
    rotary_boundary: int | None
    eos_tokens: list[int]
    template_variables: dict[str, Any] = field(default_factory=dict)

    def render(self, prompt: Messages, room: int = 0) -> list[int]:
        """Returns the tokens of a conversation, up to the beginning of the assistant's turn.

        Args:
            room: the most tokens of a response.

        Raises:
            UserError: if the chat template refuses the conversation or omits its tool turns, or if prompt and response
                exceed what the model can take. Says where the prompt was read, if that is known.
        """
        where = getattr(prompt, "where", "")
        prefix = f"{where}: " if where else ""
        name = f"the prompt that ends {message_text(prompt[-1])[:60]!r}"
        try:
            tokens, length = self._tokenise(prompt, room)
        except _TemplateOmission:
            raise UserError(
                f"{prefix}the model's chat template leaves out what tools are told or say in {name}"
            ) from None
        except Exception as error:  # a template is a program and may raise anything
            raise UserError(f"{prefix}the model's chat template refuses {name}: {error}") from error
        if tokens == []:
            raise UserError(f"{prefix}the model's chat template renders {name} as no tokens")
        if tokens is None or (self.context and len(tokens) + room > self.context):
            raise PromptTooLong(
                f"{prefix}{name} has {length} tokens: with --max_new_tokens {room} it exceeds the model's context of "
                f"{self.context} tokens"
            )
        self._check_tokens(tokens, room, f"{prefix}{name}")
        return tokens

    def _tokenise(self, prompt: Messages, room: int) -> tuple[list[int] | None, str]:
        """Returns the tokens and their number in words. A text that is far too long has None and a lower bound."""
        messages, tools = self._for_template(prompt), template_tools(prompt)
        if self.context and characters(prompt) > LONG_PROMPT:
            limit = self.context - room
            if self.has_more_tokens(self.apply_template(messages, tools, tokenize=False), limit):
                return None, f"more than {max(0, limit)}"
        tokens = self.apply_template(messages, tools, return_dict=True)["input_ids"]
        return tokens, str(len(tokens))

    def _check_tokens(self, tokens: list[int], room: int, about: str) -> None:
        """Raises ``UserError`` for a token without an embedding, or a response that may cross LongRoPE's boundary."""
        if (highest := max(tokens)) >= self.vocabulary:
            named = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(
                f"{about} has the token {named!r} ({highest}), but the model's embedding has {self.vocabulary} rows: "
                "remove it from the prompt"
            )
        boundary = self.rotary_boundary
        if boundary and len(tokens) <= boundary < len(tokens) + room - 1:
            raise PromptTooLong(
                f"{about} has {len(tokens)} tokens: with --max_new_tokens {room} a response may cross the {boundary} "
                "tokens at which the model's rotary embedding (longrope) changes all of its angles, so that what was "
                "sampled is not what is scored; lower --max_new_tokens, or remove the prompt"
            )

    def apply_template(self, messages: Messages, tools: Sequence[dict] | None, **options: Any) -> Any:
        """Calls ``apply_chat_template`` with the template variables."""
        options = {"add_generation_prompt": True, **self.template_variables, **options}
        return self.tokenizer.apply_chat_template(messages, tools=tools, **options)

    def _for_template(self, prompt: Messages) -> Messages:
        """Returns the messages in the form that the chat template takes.

        The role "developer" is OpenAI's newer name of "system". A template that does not name it would refuse it, leave
        the message out, or open a turn that the model has never seen, so it is renamed to "system".

        Raises:
            _TemplateOmission: if the template renders no form of the tool calls or results completely.
        """
        tools = template_tools(prompt)
        roles = {message["role"] for message in prompt}
        if "developer" in roles and "developer" not in str(self.tokenizer.chat_template):
            renamed = {"developer": "system"}
            prompt = [{**message, "role": renamed.get(message["role"], message["role"])} for message in prompt]
        if not has_tool_turns(prompt):
            return prompt
        refusals: list[Exception] = []
        for messages, marked, marks in template_forms(prompt):
            try:
                text = self.apply_template(marked, tools, tokenize=False)
            except Exception as error:  # the template may take the next form
                refusals.append(error)
            else:
                if all(mark in text for mark in marks):
                    return messages
                refusals.insert(0, _TemplateOmission())  # says more than the errors of other forms
        raise refusals[0]

    def has_more_tokens(self, text: str, limit: int) -> bool:
        """Returns whether a long text has more tokens than the limit, without tokenising it whole.

        A tokenizer takes about 230 bytes a character. Its longest token times the context is no useful bound: with
        tokens of 128 characters and a context of 131072 that is 16 million characters, and an unknown token, or blanks
        that a tokenizer drops, may stand for any number. So the text is tokenised in pieces until there are too many
        tokens. A cut changes the tokens near it, which ``TOKENS_PER_CUT`` allows for.
        """
        count = 0
        for start in range(0, len(text), PIECE):
            with quiet():  # transformers warns of long texts
                piece = self.tokenizer.encode(text[start : start + PIECE], add_special_tokens=False)
            count += max(0, len(piece) - TOKENS_PER_CUT)
            if count > limit:
                return True
        return False

    def usable(
        self, prompts: Sequence[Messages], room: int, skipped: Skipped | None, digest: Digest | None = None
    ) -> list[Messages]:
        """Returns the prompts that ``render`` accepts.

        Args:
            room: the most tokens of a response.
            skipped: counts the other prompts; None: they are errors.
            digest: updated with the tokens of every prompt that is returned.

        Raises:
            UserError: as ``render`` does, if ``skipped`` is None; or if no prompt is left.
        """
        accepted = []
        for prompt in prompts:
            try:
                tokens = self.render(prompt, room)
            except UserError as error:
                if skipped is None:
                    raise
                skipped.add(error)
            else:
                accepted.append(prompt)
                if digest is not None:
                    digest.update(np.array([len(tokens), *tokens], np.int64).tobytes())
        if not accepted:
            raise UserError(f"no prompt is left: {skipped}")
        return accepted

    def template_notices(self, prompts: Sequence[Messages]) -> list[str]:
        """Returns notices on how the chat template renders usable prompts, a line each."""
        notices, name = [], "the model's chat template"

        def rendered(prompt: Messages, tools: Sequence[dict] | None, **variables: object) -> str | None:
            """Returns the text of a prompt; None if the template refuses it."""
            try:
                return self.apply_template(self._for_template(prompt), tools, tokenize=False, **variables)
            except Exception:  # a template is a program and may raise anything
                return None

        one = next((prompt for prompt in prompts if tools_of(prompt)), None)
        if one and rendered(one, template_tools(one)) == rendered(one, None):
            notices.append(f"{name} leaves out the tools that prompts come with: the policy is not told of them")
        one = next((prompt for prompt in prompts if _has_tool_calls(prompt)), None)
        if one and not _has_tool_calls(self._for_template(one)):
            notices.append(f"{name} writes no tool calls: the policy reads them as JSON in the assistant's text")
        # a template that calls strftime_now fails without it
        if rendered(prompts[0], template_tools(prompts[0]), strftime_now="no function") is None:
            notices.append(
                f"{name} writes today's date into prompts: a run of more than a day has several, and --resume refuses "
                f"another one; {PINNED_DATE}"
            )
        return notices

    def truncation_remedy(self, max_new_tokens: int) -> str:
        """Returns what to do if every response was cut off.

        Either the token that ends a turn in the chat template is no end-of-sequence token, or the limit is too small.
        """
        small = f"--max_new_tokens {max_new_tokens} may be too small"
        answer = "Fine"
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        try:
            text = self.apply_template(turns, None, tokenize=False, add_generation_prompt=False)
        except Exception:  # a template may refuse this conversation
            return small
        after = self.tokenizer.encode(text.partition(answer)[2].lstrip(), add_special_tokens=False)[:1]
        if not after or after[0] in self.eos_tokens or after[0] not in self.tokenizer.added_tokens_decoder:
            return small
        ends = ", ".join(f"{token} ({self.tokenizer.decode([token])!r})" for token in self.eos_tokens) or "nothing"
        return (
            f"the chat template ends a turn of the assistant with the token {after[0]} "
            f"({self.tokenizer.decode(after)!r}), which does not end a response here: only {ends} does. If the model "
            f"has learned to end its turns so, add {after[0]} to eos_token_id in the model's generation_config.json, "
            f"and begin a new run; if not, {small}"
        )


def _has_tool_calls(prompt: Messages) -> bool:
    return any(message.get("tool_calls") for message in prompt)
