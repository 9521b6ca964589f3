"""The address of a server and its API key, which is sent to no other server and shown in no message."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ..errors import UserError

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"  # the only variable that need not be set: local servers ask for no key
OPENAI_HOST = "api.openai.com"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True)
class Endpoint:
    """A server and the limits of a request to it."""

    role: str
    """What the server is to the run, such as "judge". Messages name it and its options: --judge_url."""
    url: str
    """The base URL, checked by ``check_url``."""
    key: str = field(default="", repr=False)
    """The API key; "" for none. It is sent to the server and neither saved nor shown."""
    key_variable: str = DEFAULT_KEY_VARIABLE
    """The environment variable that holds the key, for messages."""
    timeout: float = 60.0
    """Seconds that one request may take, from the connection to the last byte of the reply."""
    retries: int = 15
    """Further tries of a request that failed."""
    most_bytes: int = 2**22
    """Largest reply that is read, after decompression."""
    fields_are_optional: bool = True
    """Whether an option leaves fields out of requests, such as --judge_request. Messages name it."""

    def __str__(self) -> str:
        return f"the {self.role} at {self.url}"

    def option(self, name: str) -> str:
        """Returns the command-line option that sets a property, such as --judge_url."""
        return f"--{self.role}_{name}"

    def redact(self, text: str) -> str:
        """Replaces the key in a server's text, also where it is escaped as JSON or Python would, by "[key]"."""
        in_json = json.dumps(self.key)[1:-1]
        for form in (self.key, in_json, in_json.replace("/", r"\/"), repr(self.key)[1:-1]):
            text = text.replace(form, "[key]") if form else text
        return text


def check_url(url: str, role: str) -> str:
    """Returns the base URL without a slash at its end.

    A URL is saved in config.yaml, so it may not contain a password or a key.

    Raises:
        UserError: if it is not an http or https URL of a server, or contains more than a path.
    """
    try:
        parts = urlsplit(url)
        names_server = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # an unmatched bracket, or a port that is not a number
        names_server = False
    if not names_server:
        raise UserError(
            f"--{role}_url must begin with http:// or https:// and name a server, such as http://localhost:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"--{role}_url must not contain a user, a password, a query or a #fragment: put the key into an "
            f"environment variable and name it with --{role}_key_variable"
        )
    return url.rstrip("/")


def read_key(variable: str, role: str) -> str:
    """Reads the key from an environment variable; "" if the default variable is not set.

    Raises:
        UserError: if the name is not that of a variable that is set, or the value cannot be a key. The message does
            not repeat the name, which may be the key itself, given by mistake.
    """
    is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable) is not None
    if not is_name or (variable != DEFAULT_KEY_VARIABLE and variable not in os.environ):
        raise UserError(
            f"--{role}_key_variable must be the NAME of an environment variable that is set, such as "
            f"{DEFAULT_KEY_VARIABLE} (the value given is not shown: it may be the key itself)"
        )
    key = os.environ.get(variable, "").strip()
    if key and not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"the value of ${variable} is not a key: a key is printable ASCII without spaces")
    return key


def authorization_headers(url: str, key: str, omitted: object) -> dict[str, object]:
    """Headers for the openai client, which would send the environment's OpenAI settings to any server.

    For a server other than OpenAI's, the organization, the project and the custom headers of the environment are
    marked with ``omitted``, the client's value for a header that is not sent.
    """
    if urlsplit(url).hostname == OPENAI_HOST:
        return {}
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
    custom = [line.partition(":")[0].strip() for line in lines if ":" in line]
    names = [name for name in ("OpenAI-Organization", "OpenAI-Project", *custom) if name.lower() != "authorization"]
    return {**dict.fromkeys(names, omitted), "Authorization": f"Bearer {key}"}


def proxy_variable(url: str) -> str | None:
    """Returns the environment variable of the proxy that requests to a URL go through; None if they go straight."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    proxies = urllib.request.getproxies()
    if urllib.request.proxy_bypass(f"{parts.hostname}:{port}"):
        return None
    for scheme in (parts.scheme, "all"):
        # A lower-case name overrides the same name in capitals, also when its value is empty.
        for name in sorted(os.environ, reverse=True):
            if name.lower() == f"{scheme}_proxy" and os.environ[name] and os.environ[name] == proxies.get(scheme):
                return name
    return None


def proxies_in_environment() -> list[str]:
    """Returns the environment variables that name a proxy, each as "$NAME"."""
    return [f"${name}" for name in os.environ if name.lower() in PROXY_VARIABLES and os.environ[name]]
