"""A client of servers that speak OpenAI's chat API: concurrent requests, retries, time-outs and redacted keys.

``Endpoint`` says which server is asked and how; ``ChatClient`` sends requests to it and returns ``Reply`` objects;
``Workers`` runs several coroutines at a time and stops them together. The caller builds requests and interprets
replies.

The libraries openai and tenacity are imported by ``ChatClient`` when one is made. They are an extra of the package.
"""

from .client import ChatClient, Connection
from .endpoint import Endpoint, check_url, read_key
from .failures import RequestRefused, ServerError, ServerUnavailable
from .replies import Reply
from .workers import Halted, Workers, run_async

__all__ = [
    "ChatClient",
    "Connection",
    "Endpoint",
    "Halted",
    "Reply",
    "RequestRefused",
    "ServerError",
    "ServerUnavailable",
    "Workers",
    "check_url",
    "read_key",
    "run_async",
]
