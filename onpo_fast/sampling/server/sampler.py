"""Sampling from a policy by an OpenAI-compatible server, such as vLLM or SGLang (--sampler server).

Each request is for one response and has its own seed, so that nothing depends on what else the server does. Before each
stage the server is given the policy's weights, and responses are compared with the policy before others are trusted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from ...config import SamplingConfig
from ...console import Progress
from ...data import Group, Messages, Response
from ...distributed import World
from ...errors import UserError
from ...models.resident import ResidentPolicy, Source
from ...servers import Connection
from .. import handover
from ..gathering import Gathering
from ..interface import OnGroup
from ..returned import request_seeds
from .completions import Asked, CompletionReader
from .reload import policy_directory
from .session import SamplingServer, server_of
from .unfinished import UnfinishedPart, unfinished_file

PROBES = 16  # responses that are compared with the policy before others are trusted
PROBE_TOKENS = 64  # most tokens of each of those that a stage begins with
PROBE_STREAM = 1  # the last of their seeds' numbers, which keeps them apart from responses
SAVED = -1  # marks responses restored from the file of an earlier process, in place of a number of outages

Job = tuple[int, int]  # indices of the prompt in its part, and of the response


class ServerSampler:
    """Samples from a server that was given the policy.

    Responses are compared with the policy (``handover.check``) at the beginning of the stage, by a few short ones.
    Later the first ones of each part are, before they and others are handed on; so are the first after each outage, as
    the server may have been restarted with other weights, and all that a killed process has left.

    Args:
        server: the server.
        policies: loads the policy, which renders prompts and checks responses.
        source: where the policy is.
        config: the options of sampling.
        unfinished: the responses of the part in work.
    """

    def __init__(
        self,
        server: SamplingServer,
        policies: ResidentPolicy,
        source: Source,
        config: SamplingConfig,
        unfinished: UnfinishedPart,
    ) -> None:
        self.server, self.policies, self.source, self.config = server, policies, source, config
        self.unfinished = unfinished
        self.weights = weights_key(source)
        self.probed = False

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress = lambda n: None,
        first: int = 0,
        on_group: OnGroup = lambda index, group: None,
    ) -> list[Group]:
        """Samples responses; see ``Sampler``. Equal seeds give equal tokens if the server heeds seeds.

        Raises:
            ServerError: if the server is down or refuses a request.
            UserError: if a prompt and a response exceed the model's context, or the responses are not the policy's.
        """
        if not prompts:  # the share of a rank may be empty
            return []
        renderer, most = self.policies(self.source).renderer, self.config.max_new_tokens
        rendered = [renderer.render(prompt, most) for prompt in prompts]
        self._check_room(rendered)
        gathering = Gathering(prompts, rendered, responses_per_prompt, progress, first, on_group)
        part = _Part(self, gathering, [(*seed, first + p) for p in range(len(prompts))])
        if not self.probed:
            part.probe()
            self.probed = True
        part.begin()
        part.run()
        return gathering.groups()

    def _check_room(self, rendered: Sequence[list[int]]) -> None:
        """Raises ``UserError`` if the server's context is shorter than a prompt and its response."""
        server, most = self.server, self.config.max_new_tokens
        needed = max(map(len, rendered)) + most
        if server.longest is not None and needed > server.longest:
            raise UserError(
                f"{server.endpoint} takes prompts and responses of {server.longest} tokens together, and a prompt with "
                f"--max_new_tokens {most} needs {needed}: start it with a longer context (vLLM: --max-model-len)"
            )

    def close(self) -> None:
        """Closes the file of the part in work, which stays until the stage is recorded; see ``StageSampler``."""
        self.unfinished.close()

    def check(self, groups: list[Group]) -> None:
        """Compares all these responses with the policy.

        Raises:
            UserError: if they are not the policy's. The server is then given the policy again before it is asked for
                anything else.
        """
        try:
            handover.check(self.policies(self.source), groups, self.config, enough_tokens=math.inf)
        except UserError:
            self.server.given = None
            raise


class _Part:
    """A part of a stage: the responses that have come, and which of them are known to be the policy's.

    A response is handed on (to ``gathering``) once enough responses that were asked for after the same outage, and
    before the next, have been compared with the policy.

    Args:
        gathering: takes the responses.
        streams: the numbers of each prompt's seed.
    """

    def __init__(self, sampler: ServerSampler, gathering: Gathering, streams: Sequence[tuple[int, ...]]) -> None:
        policy = sampler.policies(sampler.source)
        self.sampler, self.gathering, self.streams = sampler, gathering, streams
        self.reader = CompletionReader(sampler.server.endpoint, policy, sampler.config)
        self.asked: dict[Job, Asked] = {}
        self.keys: dict[Job, str] = {}  # in the file of unfinished responses
        self.outages: dict[Job, int] = {}  # before each response that has come was asked for
        self.trusted: set[int] = set()  # numbers of outages after which enough responses passed the check
        self.unchecked: dict[Job, Response] = {}

    def probe(self) -> None:
        """Compares a few short responses with the policy, before the server is asked for all others."""
        rendered, most = self.gathering.rendered, min(PROBE_TOKENS, self.sampler.config.max_new_tokens)
        jobs = [(i % len(rendered), i // len(rendered)) for i in range(PROBES)]
        seeds = request_seeds([(*self.streams[p], k, PROBE_STREAM) for p, k in jobs])
        asked = {job: Asked(rendered[job[0]], seed, most) for job, seed in zip(jobs, seeds)}
        found: dict[Job, Response] = {}
        outages: set[int] = set()

        async def work(connection: Connection, job: Job) -> None:
            found[job], before = await self._ask(connection, asked[job])
            outages.add(before)

        self.sampler.server.run(jobs, work)
        self.sampler.check([self._group(job, found[job]) for job in jobs])
        if len(outages) == 1:  # all of them are from the same time
            self.trusted = outages

    def begin(self) -> None:
        """Takes the responses that a killed process has left, and checks all of them."""
        config, rendered, places = self.sampler.config, self.gathering.rendered, self.gathering.places()
        seeds = request_seeds([(*self.streams[p], k) for p, k in places])
        drawn_by = (self.sampler.weights, config.temperature, config.top_p, self.reader.eos_tokens)
        for job, seed in zip(places, seeds):
            asked = self.asked[job] = Asked(rendered[job[0]], seed, config.max_new_tokens)
            self.keys[job] = UnfinishedPart.key(*drawn_by, asked.max_new_tokens, seed, asked.prompt_tokens)
        saved = self.sampler.unfinished.begin(set(self.keys.values()))
        for job, key in self.keys.items():
            if key in saved and (response := self.reader.restore(*saved[key], self.asked[job])) is not None:
                self.unchecked[job], self.outages[job] = response, SAVED
        if self.unchecked:
            self._check(list(self.unchecked), {SAVED})

    def run(self) -> None:
        """Asks for all responses that are missing, and hands them on."""

        async def work(connection: Connection, job: Job) -> None:
            response, outages = await self._ask(connection, self.asked[job])
            self.sampler.unfinished.add(self.keys[job], response.tokens, response.logp)
            if not connection.workers.halted:
                self._take(job, response, outages)

        self.sampler.server.run([job for job in self.asked if job not in self.outages], work)
        if self.unchecked:
            self._check(list(self.unchecked), {self.outages[job] for job in self.unchecked})

    async def _ask(self, connection: Connection, asked: Asked) -> tuple[Response, int]:
        server = self.sampler.server
        return await server.completions.ask(
            connection, asked, server.adapter or server.model, server.owner, self.reader
        )

    def _take(self, job: Job, response: Response, outages: int) -> None:
        """Takes a response, and hands it on with others as soon as enough of them can be checked.

        Those that are checked are the first in the order in which they are asked for, not in which they come: the first
        to come are shorter than others, and so no draws from the policy.

        Raises:
            UserError: as ``_check``.
        """
        self.unchecked[job], self.outages[job] = response, outages
        if outages in self.trusted:
            self._hand_on({outages})
            return
        chosen = [one for one in self.asked if self.outages.get(one, outages) == outages][:PROBES]
        if all(one in self.unchecked for one in chosen):
            self._check(chosen, {outages})

    def _check(self, jobs: Collection[Job], outages: set[int]) -> None:
        """Compares responses with the policy, and hands on all that were asked for after these numbers of outages.

        Raises:
            UserError: if they are not the policy's. Only responses that are known to be right stay in the file.
        """
        try:
            self.sampler.check([self._group(job, self.unchecked[job]) for job in jobs])
        except UserError:
            right = [job for job, before in self.outages.items() if before in self.trusted]
            self.sampler.unfinished.end_with({self.keys[job] for job in right})
            raise
        self.trusted |= outages
        self._hand_on(outages)

    def _hand_on(self, outages: set[int]) -> None:
        for job in [job for job in self.unchecked if self.outages[job] in outages]:
            self.gathering.add(job, self.unchecked.pop(job))

    def _group(self, job: Job, response: Response) -> Group:
        return Group(self.gathering.prompts[job[0]], self.gathering.rendered[job[0]], [response])


def weights_key(source: Source) -> list[tuple[str, int, int]]:
    """Returns name, size and time of change (ns) of the weights' files: another fit at the same path changes them."""
    files = sorted(Path(policy_directory(source)).glob("*"))
    found = [(file, file.stat()) for file in files if file.suffix in (".safetensors", ".bin")]
    return [(str(file), about.st_size, about.st_mtime_ns) for file, about in found]


def open_server(
    policies: ResidentPolicy,
    source: Source,
    config: SamplingConfig,
    directory: Path | None,
    world: World,
    evaluation: bool = False,
) -> ServerSampler:
    """Gives the server the policy and returns a sampler of it. All ranks call it.

    Args:
        directory, evaluation: whose responses of the part in work are kept; see ``open_sampler``.

    Raises:
        UserError: if the server does not take it, or has another model.
    """
    server = server_of(policies, config)
    server.give(policies, source, directory, world)
    server.look()
    path = None if directory is None else unfinished_file(directory, world.rank, evaluation)
    return ServerSampler(server, policies, source, config, UnfinishedPart(path))
