"""Requests to a server's ``/completions``, and the responses in its replies, which are not trusted.

vLLM and SGLang take prompts as token ids and return token ids. Where a server does neither, the prompt is sent as text
and the tokens are found by their text; both are refused where the tokens could be others.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...config import SamplingConfig
from ...console import say
from ...data import Response
from ...errors import UserError
from ...models.policy import Policy
from ...servers import Connection, Endpoint, MalformedReply
from ...servers.failures import named_fields
from ..returned import ResponseReader

TOKEN_ID = re.compile(r"token_id:(\d{1,9})")  # how vLLM writes a token that it is asked for by its id
TYPE = re.compile(r"\b(?:list|array|integers?|int|strings?|str|token[ _-]?ids?)\b", re.IGNORECASE)
LENGTH = re.compile(r"\b(?:lengths?|long|longer|too many|exceed\w*|context|maximum|at most)\b", re.IGNORECASE)

# The policy itself is sampled from, whatever the server's defaults are. vLLM and SGLang know all of these.
NEUTRAL = {
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
# A server without one of these samples from the same distribution, and its reply shows what it has done.
OPTIONAL = (
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "add_special_tokens",
    "return_token_ids",
    "return_tokens_as_token_ids",
)


@dataclass(frozen=True)
class Asked:
    """A response that is asked for."""

    prompt_tokens: list[int]
    """The rendered prompt."""
    seed: int
    """Seed of its random numbers."""
    max_new_tokens: int
    """Most tokens of the response."""


@dataclass
class Completions:
    """Request format of one server, learned from its refusals.

    Attributes:
        endpoint: the server.
        left_out: fields of ``OPTIONAL`` that it has refused.
        prompts_as_text: whether it has refused prompts as token ids.
    """

    endpoint: Endpoint
    left_out: set[str] = field(default_factory=set)
    prompts_as_text: bool = False

    async def ask(
        self, connection: Connection, asked: Asked, model: str, owner: str, reader: CompletionReader
    ) -> tuple[Response, int]:
        """Asks for a response until the server returns one.

        Args:
            model: the name of the model, as the server lists it.
            owner: who the server says its models are owned by: "vllm" or "sglang".
            reader: reads the reply.

        Returns:
            The response, and the number of outages (``Client.outages``) before it was asked for.

        Raises:
            ServerError, Halted: as ``Connection.with_retries``.
            UserError: if the server's replies cannot be used.
        """
        body: dict[str, Any] = {}

        async def send() -> tuple[Response, int]:
            while True:
                outages = connection.client.outages
                body.clear()  # the same object, whose fields an error may name
                body.update(self.body(asked, model, owner, reader))
                try:
                    as_text = isinstance(body["prompt"], str)
                    read = functools.partial(reader.read, asked=asked, prompt_as_text=as_text)
                    return await connection.request("POST", "/completions", body, read), outages
                except connection.client.openai.APIStatusError as error:
                    if error.status_code not in (400, 422) or not self._learn(error.response.text, body):
                        raise

        return await connection.with_retries(send, body)

    def body(self, asked: Asked, model: str, owner: str, reader: CompletionReader) -> dict[str, Any]:
        """Returns the JSON of a request."""
        prompt = reader.text_of(asked.prompt_tokens) if self.prompts_as_text else asked.prompt_tokens
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": asked.max_new_tokens,
            "temperature": reader.config.temperature,
            "top_p": reader.config.top_p,
            "logprobs": 1,
            **NEUTRAL,
            "seed": asked.seed,
            "stop_token_ids": reader.eos_tokens,
            "ignore_eos": owner == "vllm",  # which then ends at no others; SGLang would end at none
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return {name: value for name, value in body.items() if name not in self.left_out}

    def _learn(self, refusal: str, body: dict[str, Any]) -> bool:
        """Decides what is no longer sent, because a refusal names it; returns whether another try may succeed."""
        named = named_fields(refusal, body)
        if any(name not in OPTIONAL for name in named):
            return False
        if named:
            if new := sorted(set(named) - self.left_out):
                self.left_out |= set(new)
                lost = " (the same seed may give other responses)" if "seed" in new else ""
                say(f"{self.endpoint} does not take {', '.join(new)}: requests are sent without{lost}")
            return True
        if isinstance(body["prompt"], list) and refuses_type_of_prompt(refusal):
            if not self.prompts_as_text:
                say(f"{self.endpoint} takes no prompts as token ids: they are sent as text")
            self.prompts_as_text = True
            return True
        return False


def refuses_type_of_prompt(refusal: str) -> bool:
    """Returns whether a refusal is of the type of the prompt, and not of its length."""
    return bool(re.search(r"\bprompt\b", refusal) and TYPE.search(refusal) and not LENGTH.search(refusal))


class CompletionReader:
    """Reads responses of a policy in a server's replies.

    Args:
        endpoint: the server, for messages.
        policy: the policy that the server has.
        config: the options of sampling.
    """

    def __init__(self, endpoint: Endpoint, policy: Policy, config: SamplingConfig) -> None:
        self.endpoint, self.tokenizer, self.config = endpoint, policy.tokenizer, config
        self.eos_tokens, self.vocabulary = list(policy.eos_tokens), policy.token_bound
        self._response = ResponseReader(self.tokenizer, self.eos_tokens, self.vocabulary)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, special ones included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def read(self, raw: str, asked: Asked, prompt_as_text: bool) -> Response:
        """Reads a reply.

        Raises:
            MalformedReply: if it is no completion that was asked for; another one may be.
            UserError: if no reply of this server can be used.
        """
        try:
            reply = json.loads(raw)
            (choice,) = reply["choices"]
            finish, logprobs = choice.get("finish_reason"), choice.get("logprobs")
            logps = None if logprobs is None else logprobs["token_logprobs"]
        except Exception:  # not JSON, nested too deeply, JSON of another shape
            raise MalformedReply(f"a reply that is not a completion: {raw.strip() or 'it is empty'}") from None
        if not logps:
            raise UserError(f"{self.endpoint} returns no log-probs of tokens, by which its responses are checked")
        self._check_prompt(reply, choice, asked.prompt_tokens, prompt_as_text)
        if finish not in ("stop", "length"):
            raise MalformedReply(f"a completion that ended with {str(finish)[:40]!r}, neither stop nor length")
        tokens = self._tokens(choice, logprobs)
        end = next((i for i, token in enumerate(tokens) if token in self.eos_tokens), None)
        if end is not None:  # a server that does not stop there goes on
            tokens, logps = tokens[: end + 1], logps[: end + 1] if isinstance(logps, list) else logps
        else:
            self._check_end(finish, tokens, asked.max_new_tokens)
        try:
            return self._response(tokens, logps, end is not None, asked.max_new_tokens)
        except ValueError as error:
            raise MalformedReply(f"a completion that cannot be used: {error}") from None

    def restore(self, tokens: Any, logp: Any, asked: Asked) -> Response | None:
        """Returns a response that was saved as its tokens and summed log-prob; None if it is none to the request."""
        try:
            rest = [0.0] * (len(tokens) - 1)
            return self._response(tokens, [logp, *rest], tokens[-1] in self.eos_tokens, asked.max_new_tokens)
        except (ValueError, TypeError, LookupError):
            return None

    def _check_prompt(self, reply: dict, choice: dict, prompt_tokens: list[int], as_text: bool) -> None:
        """Raises ``UserError`` if the server has seen other tokens than those of the prompt."""
        usage = reply.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if type(counted) is int and counted != len(prompt_tokens):
            raise UserError(
                f"{self.endpoint} counts {counted} tokens in a prompt of {len(prompt_tokens)}: it has another "
                "tokenizer, or adds tokens"
            )
        if as_text and type(counted) is not int:
            raise UserError(
                f"{self.endpoint} takes prompts as text only, and does not say how many tokens it reads in them "
                "(usage.prompt_tokens)"
            )
        seen = choice.get("prompt_token_ids")
        if seen is not None and seen != prompt_tokens:
            raise UserError(f"{self.endpoint} reads other tokens in a prompt than were sent: it has another tokenizer")

    def _check_end(self, finish: str, tokens: list[int], most: int) -> None:
        """Raises ``UserError`` if a response without an end-of-sequence token ended before its maximum length."""
        if finish == "stop":
            last = (
                f"{tokens[-1]} ({self.text_of(tokens[-1:])!r})"
                if 0 <= tokens[-1] < self.vocabulary
                else str(tokens[-1])[:20]
            )
            raise UserError(
                f"{self.endpoint} ended a response after the token {last}, and only {self.eos_tokens} end a response "
                "of the policy: it has another model, another generation_config.json, or leaves out the last token"
            )
        if len(tokens) < most:
            raise UserError(
                f"{self.endpoint} cut off a response after {len(tokens)} of {most} tokens: start it with a longer "
                "context, or lower --max_new_tokens"
            )

    def _tokens(self, choice: dict[str, Any], logprobs: dict[str, Any]) -> list[int]:
        """Returns the tokens of a response: as the reply gives them, or else found by their text.

        Raises:
            MalformedReply: if it does not give them.
            UserError: if the texts do not tell the tokens.
        """
        tokens, words = choice.get("token_ids"), logprobs.get("tokens")
        if tokens is None and isinstance(words, list) and all(isinstance(word, str) for word in words):
            ids = [TOKEN_ID.fullmatch(word) for word in words]
            tokens = [int(one[1]) for one in ids] if all(ids) else self._find(words, choice.get("text"))
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise MalformedReply("a completion without its tokens")
        return tokens

    def _find(self, words: list[str], text: object) -> list[int]:
        unknown = next((word for word in words if self._token_of.get(word) is None), None)
        tokens = [] if unknown is not None else [self._token_of[word] for word in words]
        if unknown is None and text in (self.text_of(tokens), self.text_of(tokens[:-1]), "".join(words)):
            return tokens
        what = f"{unknown[:20]!r} is the text of no single one" if unknown is not None else "its text is another"
        raise UserError(
            f"{self.endpoint} returns no token ids, and the tokens of a response cannot be told by their text: {what}. "
            "vLLM and SGLang return them (return_token_ids)"
        )

    @cached_property
    def _token_of(self) -> dict[str, int | None]:
        """The token of each text; None of a text that several tokens have."""
        found: dict[str, int | None] = {}
        for token in range(min(len(self.tokenizer), self.vocabulary)):
            text = self.text_of([token])
            found[text] = None if text in found else token
        return found
