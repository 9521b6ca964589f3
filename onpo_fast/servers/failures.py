"""Errors of servers, and the messages that describe them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import UserError, one_line
from .endpoint import Endpoint, proxy_variable

QUOTED_CHARACTERS = 300  # characters of a server's text that a message quotes
NO_ADDRESS = "a redirect without a valid address"


class ServerError(UserError):
    """A server that gives no answer. The message names the server and quotes what it said."""


class RequestRefused(ServerError):
    """The server understood a request and refused it; another try would be refused too."""


class ServerUnavailable(ServerError):
    """Every try of a request failed."""


class MalformedReply(Exception):
    """A reply that is not what was asked for."""


def is_server_failure(error: BaseException, openai: Any) -> bool:
    """Returns whether an exception is a failure of the server or the network, and not an error in this program."""
    return isinstance(error, (openai.OpenAIError, asyncio.TimeoutError, MalformedReply))


def is_outage(error: BaseException, openai: Any) -> bool:
    """Returns whether the server may have been restarted: the connection failed, timed out, or has a status of 5xx."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code >= 500
    return isinstance(error, (openai.APIConnectionError, asyncio.TimeoutError))


def may_be_temporary(error: BaseException, openai: Any) -> bool:
    """Returns whether another try may succeed: not if the server understood the request and refused it."""
    status = getattr(error, "status_code", None)
    refused = isinstance(error, openai.APIStatusError) and status < 500 and status not in (408, 409, 429)
    return is_server_failure(error, openai) and not refused


def describe_error(error: BaseException, endpoint: Endpoint, body: dict[str, Any]) -> str:
    """Describes an error in one line: what happened, what the server answered and what may help.

    Args:
        error: a failure of the server.
        endpoint: the server; its key is redacted.
        body: the request that failed, whose fields a refusal may name.
    """
    variable = proxy_variable(endpoint.url)
    proxy = f" (the request went through the proxy in ${variable})" if variable else ""
    if isinstance(error, asyncio.TimeoutError):
        return f"no reply in {endpoint.timeout:g} s{proxy}"
    status = getattr(error, "status_code", None)
    text = str(error).rstrip(".")
    if status and 300 <= status < 400:
        text = (
            f"{status}, {describe_redirect(error.response)}: redirects are not followed; check {endpoint.option('url')}"
        )
    elif status and text == f"Error code: {status}":  # the client found no message in the reply
        text = f"{text} - {error.response.text.strip() or 'an empty reply'}"
    elif not status and str(error.__cause__ or ""):
        text = f"{text} ({error.__cause__})"
    hint = f" (the key is read from ${endpoint.key_variable})" if status in (401, 403) else ""
    hint += _hint_on_fields(text, body, endpoint) if status in (400, 422, 501) else ""
    hint += proxy if not status or status in (403, 407) or status >= 500 else ""
    return one_line(endpoint.redact(text)[:QUOTED_CHARACTERS]) + hint


def describe_redirect(response: Any) -> str:
    """Returns where a reply redirects to: scheme and host, and on the same host the path. The rest may hold secrets."""
    asked = urlsplit(str(response.request.url))
    if "location" not in response.headers:
        return NO_ADDRESS
    try:
        target = urlsplit(urljoin(str(response.request.url), response.headers["location"]))
        host = f"{target.hostname}:{target.port}" if target.port else target.hostname
    except ValueError:
        return NO_ADDRESS
    path = target.path if (target.hostname, target.port) == (asked.hostname, asked.port) else ""
    return f"a redirect to {target.scheme}://{host}{path}"


def named_fields(text: str, body: dict[str, Any]) -> list[str]:
    """Returns the fields of a request that a refusal names, without those that every request has."""
    everywhere = ("model", "messages", "prompt")
    return [name for name in body if name not in everywhere and re.search(rf"\b{re.escape(name)}\b", text)]


def request_without(names: list[str], endpoint: Endpoint) -> str:
    """Returns the option that leaves fields out of every request: --judge_request '{"seed": null}'."""
    return f"{endpoint.option('request')} '{json.dumps(dict.fromkeys(names))}'"


def _hint_on_fields(text: str, body: dict[str, Any], endpoint: Endpoint) -> str:
    """Returns a hint on how to leave out the fields of a request that a refusal names; "" if none is or none can be."""
    names = named_fields(text, body) if endpoint.fields_are_optional else []
    if any("logprobs" in name for name in names):
        names = ["logprobs", "top_logprobs"]
    return f" (leave the field out with {request_without(names, endpoint)})" if names else ""
