"""Requests to an OpenAI-compatible server.

Retries are tenacity's. Those of the openai client are turned off: they do not count requests, do not limit the time of
a reply that arrives slowly, do not cover replies that are not chat completions, and keep waiting after another request
has found the server to be down.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from ..console import say_once
from ..errors import UserError
from .endpoint import Endpoint, authorization_headers, proxies_in_environment
from .failures import (
    RequestRefused,
    ServerUnavailable,
    describe_error,
    is_outage,
    is_server_failure,
    may_be_temporary,
    request_without,
)
from .logprobs import LogprobsRefusal, logprobs_refusal, without_logprobs
from .replies import Reply, bound_replies, read_reply
from .retries import wait_before_retry
from .workers import Workers

TOLD_AFTER = 3  # failed tries of a request, after which a terminal is told that it is tried again
COUNTERS = ("requests", "failures", "prompt_tokens", "completion_tokens")

Value = TypeVar("Value")


class Client:
    """A client of one server. It counts the requests of all its connections, and remembers that log-probs are refused.

    Attributes:
        outages: number of requests after which the server may have been restarted (``is_outage``).

    Args:
        endpoint: the server.
        extra: the extra of the package that installs openai and tenacity, for the message when they are absent.
        on_logprobs_refused: called once, when the server is first found to refuse requests with log-probs.

    Raises:
        UserError: if openai or tenacity is not installed.
    """

    def __init__(self, endpoint: Endpoint, extra: str, on_logprobs_refused: Callable[[], None] = lambda: None) -> None:
        try:
            import openai
            import tenacity
        except ImportError as error:
            raise UserError(
                f"{endpoint.option('url')} needs the package {error.name}: pip install 'onpo_fast[{extra}]'"
            ) from error
        self.openai, self.tenacity = openai, tenacity
        self.endpoint = endpoint
        self.gives_logprobs = True
        self.counters: Counter[str] = Counter()
        self.outages = 0
        self._on_logprobs_refused = on_logprobs_refused

    def take_counters(self) -> dict[str, int]:
        """Returns requests (retries included), failures and tokens since the last call, and resets them."""
        taken, self.counters = self.counters, Counter()
        return {name: taken[name] for name in COUNTERS}

    def stop_asking_for_logprobs(self) -> None:
        """Leaves log-probs out of all further requests."""
        if self.gives_logprobs:
            self.gives_logprobs = False
            self._on_logprobs_refused()

    def option_without_logprobs(self) -> str:
        """Returns the option that leaves log-probs out of requests from the start."""
        return request_without(["logprobs", "top_logprobs"], self.endpoint)

    @asynccontextmanager
    async def connect(self, workers: Workers) -> AsyncIterator[Connection]:
        """Opens a connection pool in the running event loop. Redirects are not followed.

        Args:
            workers: the workers that send requests. When they are stopped, no request is tried again.

        Raises:
            UserError: if the environment names a proxy that cannot be used.
        """
        key = self.endpoint.key or "none"  # the openai client requires one
        try:
            hooks = {"response": [bound_replies(self.endpoint.most_bytes)]}
            http = self.openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks=hooks)
        except Exception as error:  # httpx raises several types for a proxy that it cannot use
            if not (names := proxies_in_environment()):
                raise
            detail = f": {error}" if isinstance(error, ImportError) else ""  # other texts may contain its password
            raise UserError(f"cannot use the proxy in {' or '.join(names)}{detail}") from None
        async with self.openai.AsyncOpenAI(
            base_url=self.endpoint.url,
            api_key=key,
            timeout=self.endpoint.timeout,
            max_retries=0,
            http_client=http,
            default_headers=authorization_headers(self.endpoint.url, key, self.openai.Omit()),
        ) as http_client:
            yield Connection(self, http_client, workers)


class Connection:
    """An open connection pool of a ``Client``."""

    def __init__(self, client: Client, http_client: Any, workers: Workers) -> None:
        self.client, self.endpoint, self.workers = client, client.endpoint, workers
        self._http_client = http_client

    async def ask_with_retries(self, body: dict[str, Any]) -> tuple[Reply, bool]:
        """Tries a request for a chat completion until there is a reply.

        Args:
            body: the JSON of the request.

        Returns:
            The reply, and whether it is to ``body`` as it is; False if log-probs had to be left out.

        Raises:
            ServerError, Halted: as ``with_retries``.
        """
        return await self.with_retries(lambda: self.send(body), body)

    async def with_retries(self, send: Callable[[], Awaitable[Value]], body: dict[str, Any]) -> Value:
        """Calls a function that sends a request until it returns, waiting longer after every failure.

        Args:
            send: sends the request once, by ``request``.
            body: the JSON of the request, whose fields a refusal may name.

        Raises:
            RequestRefused: if the server refuses the request.
            ServerUnavailable: if every try fails.
            Halted: if the workers are stopped while it waits for the next try.
        """
        openai, tenacity = self.client.openai, self.client.tenacity
        tries = self.endpoint.retries + 1
        try:
            async for attempt in tenacity.AsyncRetrying(
                stop=tenacity.stop_after_attempt(tries),
                wait=lambda state: wait_before_retry(state.attempt_number, state.outcome.exception()),
                retry=tenacity.retry_if_exception(
                    lambda error: may_be_temporary(error, openai) and not self.workers.halted
                ),
                before_sleep=lambda state: self._tell_of_retries(state, body),
                sleep=self.workers.sleep,
                reraise=True,
            ):
                with attempt:
                    return await send()
        except Exception as error:
            if not is_server_failure(error, openai):
                raise
            cause = describe_error(error, self.endpoint, body)
            if not may_be_temporary(error, openai):
                raise RequestRefused(f"{self.endpoint} refused the request: {cause}") from None
            raise ServerUnavailable(f"{self.endpoint} is down: {tries} tries failed, the last with {cause}") from None
        raise AssertionError("unreachable: the last try returns or raises")

    def _tell_of_retries(self, state: Any, body: dict[str, Any]) -> None:
        """Says once that a server does not answer, so that the minutes of all tries do not pass in silence."""
        if state.attempt_number == TOLD_AFTER:
            cause = describe_error(state.outcome.exception(), self.endpoint, body)
            tries = f"{self.endpoint.retries + 1} times in all, after longer and longer waits"
            say_once((self.endpoint, "retries"), f"{self.endpoint} does not answer ({cause}): it is tried {tries}")

    async def send(self, body: dict[str, Any]) -> tuple[Reply, bool]:
        """Tries a request for a chat completion once, and without log-probs if the server refuses them.

        If the failure may have another cause, log-probs count as refused only if they fail once more after a request
        without them has succeeded: the server may just have recovered.

        Returns:
            As ``ask_with_retries``.
        """
        client = self.client
        bare = without_logprobs(body)
        if not client.gives_logprobs or bare == body:
            return await self._post(bare), bare == body
        try:
            return await self._post(body), True
        except client.openai.APIStatusError as error:
            failure = error
        refusal = _refusal(failure, body)
        if refusal is LogprobsRefusal.NO:
            raise failure
        if refusal is LogprobsRefusal.CERTAIN:
            client.counters["failures"] -= 1
            client.stop_asking_for_logprobs()
            return await self._post(bare), False
        try:
            reply = await self._post(bare)
        except client.openai.APIStatusError:
            raise failure from None
        if client.gives_logprobs:  # unless another request has found them refused meanwhile
            try:
                return await self._post(body), True
            except client.openai.APIStatusError as error:
                if _refusal(error, body) is LogprobsRefusal.NO:
                    raise
                client.counters["failures"] -= 1
        client.counters["failures"] -= 1
        client.stop_asking_for_logprobs()
        return reply, False

    async def _post(self, body: dict[str, Any]) -> Reply:
        """Sends one request for a chat completion."""
        reply = await self.request("POST", "/chat/completions", body, read_reply)
        self.client.counters["prompt_tokens"] += reply.prompt_tokens
        self.client.counters["completion_tokens"] += reply.completion_tokens
        return reply

    async def request(
        self, method: Literal["GET", "POST"], path: str, body: dict[str, Any], read: Callable[[str], Value]
    ) -> Value:
        """Sends one request. It ends after the time-out: the openai client's own restarts with every byte.

        Args:
            path: below the server's base URL, or a whole URL of the same server.
            body: the JSON of the request; not sent with GET.
            read: reads the text of the reply; raises ``MalformedReply`` if it is not what was asked for.

        Raises:
            Exception: ``is_server_failure`` tells failures of the server from others.
        """
        http = self._http_client
        self.client.counters["requests"] += 1
        try:
            sent = http.get(path, cast_to=str) if method == "GET" else http.post(path, body=body, cast_to=str)
            return read(await asyncio.wait_for(sent, self.endpoint.timeout))
        except Exception as error:
            self.client.counters["failures"] += 1
            self.client.outages += is_outage(error, self.client.openai)
            raise


def _refusal(error: Any, body: dict[str, Any]) -> LogprobsRefusal:
    return logprobs_refusal(error.status_code, error.response.text, body)
