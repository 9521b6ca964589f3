"""Sampling from a policy by an OpenAI-compatible server, such as vLLM or SGLang (--sampler server).

Each request is for one response and has its own seed, so that nothing depends on what else the server does. Before each
stage the server is given the policy's weights, and responses are compared with the policy before others are trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...config import SamplingConfig
from ...data import Group, Messages, Response
from ...distributed import World
from ...errors import UserError
from ...models.resident import ResidentPolicy, Source
from ...run.progress import Progress
from ...servers import Connection
from .. import handover
from ..returned import request_seeds
from .completions import Asked, CompletionReader
from .session import SamplingServer, server_of
from .unfinished import UnfinishedPart

PROBES = 16  # responses that are compared with the policy before others are trusted
PROBE_TOKENS = 64  # most tokens of each of those that a stage begins with
PROBE_STREAM = 1  # the last of their seeds' numbers, which keeps them apart from responses
SAVED = -1  # in place of the number of failed requests, for responses that another process has left
UNFINISHED = "unfinished_responses"  # file of the part in work, in the run directory

Job = tuple[int, int]  # indices of the prompt in its part, and of the response


class ServerSampler:
    """Samples from a server that was given the policy.

    Responses are compared with the policy (``handover.check``) at the beginning of the stage, by a few short ones.
    Later the first groups of each part are, before they and others are handed on; so are the first after a request has
    failed, as the server may have been restarted with other weights, and all with responses that a killed process has
    left.

    Args:
        server: the server.
        policies: loads the policy, which renders prompts and checks responses.
        source: where the policy is.
        config: the options of sampling.
        directory: the run directory, for the responses of the part in work; None keeps none.
        rank: number of this process among those of the run.
    """

    def __init__(
        self,
        server: SamplingServer,
        policies: ResidentPolicy,
        source: Source,
        config: SamplingConfig,
        directory: Path | None = None,
        rank: int = 0,
    ) -> None:
        self.server, self.policies, self.source, self.config = server, policies, source, config
        self.unfinished = UnfinishedPart(directory and directory / f"{UNFINISHED}_{rank}.jsonl")
        self.probed = self.part_is_complete = False
        self.trusted: set[int] = set()  # numbers of failed requests after which a response was right

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses_per_prompt: int,
        seed: Sequence[int],
        progress: Progress = lambda n: None,
        first: int = 0,
        on_group: Callable[[int, Group], None] = lambda index, group: None,
    ) -> list[Group]:
        """Samples responses and returns the groups in the order of the prompts.

        Args:
            prompts: conversations that end with the user.
            responses_per_prompt: K.
            seed: non-negative integers; equal seeds give equal tokens, if the server heeds seeds.
            progress: called with 1 for every response.
            first: the index of the first prompt among all prompts of the seed.
            on_group: called in this thread with each group as soon as its K responses are there, and its index among
                all prompts of the seed.

        Raises:
            ServerError: if the server is down or refuses a request.
            UserError: if a prompt and a response exceed the model's context, or the responses are not the policy's.
        """
        part = _Part(self, prompts, responses_per_prompt, [(*seed, first + p) for p in range(len(prompts))])
        if not self.probed:
            part.probe()
            self.probed = True
        self.part_is_complete = False
        part.begin()
        groups = part.run(progress, lambda p, group: on_group(first + p, group))
        self.part_is_complete = True
        self.trusted.clear()  # the server may be restarted before the next part
        return groups

    def close(self) -> None:
        """Closes the file of the part in work, which a resumed run reads; without one, it is removed."""
        self.unfinished.close()
        if self.part_is_complete:
            self.unfinished.remove()

    def check(self, groups: list[Group], times: set[int]) -> None:
        """Compares responses with the policy, and trusts others that are asked for at the same times.

        A group is there the sooner the shorter its responses are, and so the first are no random ones. As they are one
        choice among those that are asked for at a time, this multiplies the probability of a false alarm by the number
        of choices at most, which is allowed for (``handover.FALSE_ALARMS``).

        Args:
            times: numbers of failed requests when the responses were asked for.

        Raises:
            UserError: if they are not the policy's. The server is then given the policy again before it is asked for
                anything else.
        """
        try:
            handover.check(self.policies(self.source), groups, self.config)
        except UserError:
            self.server.given = None
            raise
        self.trusted |= times - {SAVED}


class _Part:
    """A part of a stage: its prompts, and the responses that have come.

    Args:
        streams: the numbers of each prompt's seed.
    """

    def __init__(
        self, sampler: ServerSampler, prompts: Sequence[Messages], count: int, streams: Sequence[tuple[int, ...]]
    ) -> None:
        policy, config = sampler.policies(sampler.source), sampler.config
        self.sampler, self.prompts, self.count, self.streams = sampler, prompts, count, streams
        self.rendered = [policy.renderer.render(prompt, config.max_new_tokens) for prompt in prompts]
        self.reader = CompletionReader(sampler.server.endpoint, policy, config)
        self.asked: dict[Job, Asked] = {}
        self.keys: dict[Job, str] = {}  # in the file of unfinished responses
        self.responses: dict[Job, Response] = {}
        self.times: dict[Job, int] = {}  # numbers of failed requests when they were asked for
        self.groups: dict[int, Group] = {}
        self.held: dict[int, Group] = {}  # complete, and not checked yet
        self._check_room()

    def _check_room(self) -> None:
        """Raises ``UserError`` if the server's context is shorter than a prompt and its response."""
        server, most = self.sampler.server, self.sampler.config.max_new_tokens
        needed = max(map(len, self.rendered)) + most
        if server.longest is not None and needed > server.longest:
            raise UserError(
                f"{server.endpoint} takes prompts and responses of {server.longest} tokens together, and a prompt with "
                f"--max_new_tokens {most} needs {needed}: start it with a longer context (vLLM: --max-model-len)"
            )

    def probe(self) -> None:
        """Compares a few short responses with the policy, before the server is asked for all others."""
        most = min(PROBE_TOKENS, self.sampler.config.max_new_tokens)
        jobs = [(i % len(self.prompts), i // len(self.prompts)) for i in range(PROBES)]
        seeds = request_seeds([(*self.streams[p], k, PROBE_STREAM) for p, k in jobs])
        asked = {job: Asked(self.rendered[job[0]], seed, most) for job, seed in zip(jobs, seeds)}
        found: dict[Job, Response] = {}
        times: set[int] = set()

        async def work(connection: Connection, job: Job) -> None:
            found[job], time = await self._ask(connection, asked[job])
            times.add(time)

        self.sampler.server.run(jobs, work)
        groups = [Group(self.prompts[job[0]], self.rendered[job[0]], [found[job]]) for job in jobs]
        self.sampler.check(groups, times)

    def begin(self) -> None:
        """Takes the responses that a killed process has left."""
        config, source = self.sampler.config, str(self.sampler.source)
        jobs = [(p, k) for p in range(len(self.prompts)) for k in range(self.count)]
        seeds = request_seeds([(*self.streams[p], k) for p, k in jobs])
        for job, seed in zip(jobs, seeds):
            asked = self.asked[job] = Asked(self.rendered[job[0]], seed, config.max_new_tokens)
            drawn_by = (config.temperature, config.top_p, self.reader.eos_tokens)
            self.keys[job] = UnfinishedPart.key(source, *drawn_by, asked.max_new_tokens, seed, asked.prompt_tokens)
        saved = self.sampler.unfinished.begin(set(self.keys.values()))
        for job, key in self.keys.items():
            if key in saved and (response := self.reader.restore(*saved[key], self.asked[job])) is not None:
                self.responses[job], self.times[job] = response, SAVED

    def run(self, progress: Progress, on_group: Callable[[int, Group], None]) -> list[Group]:
        """Asks for all responses that are missing; returns the groups in the order of the prompts."""

        async def work(connection: Connection, job: Job) -> None:
            if job not in self.responses:
                response, self.times[job] = await self._ask(connection, self.asked[job])
                self.responses[job] = response
                self.sampler.unfinished.add(self.keys[job], response.tokens, response.logp)
            if not connection.workers.halted:
                self._complete(job[0], on_group)
                progress(1)

        self.sampler.server.run(self.asked, work)
        self._check_held(on_group)
        return [self.groups[p] for p in range(len(self.prompts))]

    async def _ask(self, connection: Connection, asked: Asked) -> tuple[Response, int]:
        server = self.sampler.server
        return await server.completions.ask(
            connection, asked, server.adapter or server.model, server.owner, self.reader
        )

    def _complete(self, p: int, on_group: Callable[[int, Group], None]) -> None:
        """Hands on the group of a prompt if its responses are there; or holds it until enough of them can be checked.

        Raises:
            UserError: as ``_check_held``.
        """
        jobs = self._jobs(p)
        if p in self.groups or p in self.held or not all(job in self.responses for job in jobs):
            return
        group = Group(self.prompts[p], self.rendered[p], [self.responses[job] for job in jobs])
        if all(self.times[job] in self.sampler.trusted for job in jobs):
            self.groups[p] = group
            on_group(p, group)
            return
        self.held[p] = group
        if self.count * len(self.held) >= PROBES:
            self._check_held(on_group)

    def _check_held(self, on_group: Callable[[int, Group], None]) -> None:
        """Checks the groups that are held, and hands them on.

        Raises:
            UserError: if they are not the policy's. Only responses that are known to be right stay in the file.
        """
        if not self.held:
            return
        times = {self.times[job] for p in self.held for job in self._jobs(p)}
        try:
            self.sampler.check(list(self.held.values()), times)
        except UserError:
            trusted = self.sampler.trusted
            right = [job for job, time in self.times.items() if job[0] in self.groups or time in trusted]
            self.sampler.unfinished.end_with({self.keys[job] for job in right})
            raise
        for p, group in self.held.items():
            self.groups[p] = group
            on_group(p, group)
        self.held.clear()

    def _jobs(self, p: int) -> list[Job]:
        return [(p, k) for k in range(self.count)]


def open_server(
    policies: ResidentPolicy, source: Source, config: SamplingConfig, directory: Path | None, world: World
) -> ServerSampler:
    """Gives the server the policy and returns a sampler of it. All ranks call it.

    Raises:
        UserError: if the server does not take it, or has another model.
    """
    server = server_of(policies, config)
    server.give(policies, source, directory, world)
    server.look()
    return ServerSampler(server, policies, source, config, directory, world.rank)
