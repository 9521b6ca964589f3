"""A sampling server: its model, its limits and the policy that it holds."""

from __future__ import annotations

import json
import weakref
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ...config import SamplingConfig
from ...distributed import World
from ...errors import UserError, nearest
from ...models.resident import ResidentPolicy, Source
from ...servers import Client, Connection, Endpoint, MalformedReply, Workers, check_url, read_key, run_async
from . import reload
from .completions import Completions

Item = TypeVar("Item")

BYTES_PER_TOKEN = 512  # of a reply: id, text, log-probs and their escapes, with room


class SamplingServer:
    """A sampling server: its model, its limits and the policy that it holds.

    Attributes:
        given: the policy that the server was last given; None before the first.
        adapter: the name under which vLLM has it, if it is an adapter.
        model, owner, longest: what the server lists: the model's name, whose it is ("vllm", "sglang"), and the most
            tokens of a prompt and its response, None if it does not say.
    """

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.endpoint = Endpoint(
            role="sampler",
            url=check_url(config.sampler_url, "sampler"),
            key=read_key(config.sampler_key_variable, "sampler"),
            key_variable=config.sampler_key_variable,
            timeout=config.sampler_timeout,
            retries=config.sampler_retries,
            most_bytes=2**22 + BYTES_PER_TOKEN * config.max_new_tokens,
            fields_are_optional=False,
        )
        self.client = Client(self.endpoint, "server")
        self.completions = Completions(self.endpoint)
        self.given: Source | None = None
        self.adapter: str | None = None
        self.model, self.owner = "", ""
        self.longest: int | None = None

    def give(self, policies: ResidentPolicy, source: Source, directory: Path | None, world: World) -> None:
        """Gives the server a policy unless it was the last that it was given. All ranks call it; rank 0 acts.

        Raises:
            UserError: if that fails.
            signals.Stopped: after a signal.
        """
        if self.given != source:
            self.given = None
            self.adapter = world.from_main(self._hand_over, policies, source, directory)
            self.given = source

    def _hand_over(self, policies: ResidentPolicy, source: Source, directory: Path | None) -> str | None:
        """Gives the server a policy; returns the adapter's name where requests have to name it."""
        command = self.config.sampler_reload
        if command != "vllm":
            reload.run_command(command, source, self.endpoint, directory)
            return None
        if policies.config.lora_rank is not None:
            if source == policies.initial:
                return None  # vLLM was started with the base
            return self._do(lambda connection: reload.load_adapter(connection, source))
        reload.check_not_tied(policies(source), source)
        self._do(lambda connection: reload.reload_vllm(connection, source))
        return None

    def look(self) -> None:
        """Asks the server which models it has.

        Raises:
            ServerError: if it does not answer.
            UserError: if --sampler_model is not among them, or is needed to tell which to ask.
        """
        listed = self._do(_list_models)
        wanted = self.config.sampler_model
        names = [model["id"] for model in listed]
        if wanted is None:
            whole = [model for model in listed if not model.get("parent")]  # not an adapter
            if len(whole) != 1:
                raise UserError(
                    f"--sampler_model NAME is needed: {self.endpoint} lists {', '.join(names) or 'no model'}"
                )
            (chosen,) = whole
        elif wanted not in names:
            raise UserError(
                f"--sampler_model {wanted}: {self.endpoint} lists {', '.join(names) or 'no model'}"
                f"{nearest(wanted, names)}"
            )
        else:
            chosen = listed[names.index(wanted)]
        self.model, self.owner = chosen["id"], str(chosen.get("owned_by"))
        longest = chosen.get("max_model_len")
        self.longest = longest if type(longest) is int else None

    def run(self, items: Iterable[Item], work: Callable[[Connection, Item], Awaitable[None]]) -> None:
        """Works on items with requests to the server, --sampler_concurrency at a time.

        Raises:
            Exception: the first that the work raises.
            signals.Stopped: after a signal.
        """

        async def run() -> None:
            workers = Workers(self.config.sampler_concurrency)
            async with self.client.connect(workers) as connection:
                await workers.run(iter(items), lambda item: work(connection, item))

        run_async(run())

    def _do(self, call: Callable[[Connection], Awaitable[Any]]) -> Any:
        """Returns what one call returns."""
        results: list[Any] = []

        async def work(connection: Connection, _: None) -> None:
            results.append(await call(connection))

        self.run([None], work)
        return results[0]


_servers: weakref.WeakKeyDictionary[ResidentPolicy, SamplingServer] = weakref.WeakKeyDictionary()


def server_of(policies: ResidentPolicy, config: SamplingConfig) -> SamplingServer:
    """Returns the server of a run, the same for all its stages: it knows which policy the server has."""
    known = _servers.get(policies)
    if known is None or known.config != config:
        known = _servers[policies] = SamplingServer(config)
    return known


async def _list_models(connection: Connection) -> list[dict[str, Any]]:
    return await connection.with_retries(lambda: connection.request("GET", "/models", {}, _read_models), {})


def _read_models(raw: str) -> list[dict[str, Any]]:
    """Reads the reply of /models. Raises ``MalformedReply`` if it is none."""
    try:
        models = list(json.loads(raw)["data"])
        if not all(isinstance(model["id"], str) for model in models):
            raise TypeError("a name that is no text")
    except Exception:  # not JSON, nested too deeply, JSON of another shape
        raise MalformedReply(f"a reply that is not a list of models: {raw.strip() or 'it is empty'}") from None
    return models
