"""A client of servers that speak OpenAI's API: concurrent requests, retries, time-outs and redacted keys.

``Endpoint`` says which server is asked and how; ``Client`` opens a ``Connection`` to it, which sends requests;
``Workers`` runs several coroutines at a time and stops them together. The caller builds requests and interprets
replies.

The libraries openai and tenacity are imported by ``Client`` when one is made. They are an extra of the package.
"""

from .client import Client, Connection
from .endpoint import Endpoint, check_url, read_key
from .failures import MalformedReply, RequestRefused, ServerError, ServerUnavailable
from .replies import Reply
from .workers import Halted, Workers, run_async

__all__ = [
    "Client",
    "Connection",
    "Endpoint",
    "Halted",
    "MalformedReply",
    "Reply",
    "RequestRefused",
    "ServerError",
    "ServerUnavailable",
    "Workers",
    "check_url",
    "read_key",
    "run_async",
]
