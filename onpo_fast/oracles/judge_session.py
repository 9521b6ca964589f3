"""One round of questions to the judge: which are asked, which answers are taken from the cache, and when it stops."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..servers import Halted, Reply, ServerError, ServerUnavailable, Workers
from ..servers.logprobs import without_logprobs
from . import judge_cache
from .interface import (
    GroupProgress,
    IndexPairs,
    Progress,
    PromptAndResponses,
    average_orders,
    describe_prompt,
    drop_duplicates,
    expand_duplicates,
    questions_of,
)
from .judge_cache import Answer, JudgeCache, answer_key
from .verdicts import PARSER_VERSION, preference_of, read_answer, top_logprobs

if TYPE_CHECKING:
    from .chat_judge import ChatJudge

MIN_ANSWERS = 20  # answers before the share of those without a verdict is checked
CACHE_POLL_SECONDS = 0.2  # between two looks for an answer that another run has asked for
MAX_TEXT_CHARACTERS = 1000  # of an answer's text in the cache


class NoVerdicts(UserError):
    """Too many of the judge's answers contain no verdict."""


@dataclass(frozen=True)
class Question:
    """A comparison of two responses in one order."""

    group: int
    """Index of the group."""
    first: int
    """Index of the response shown first, among the group's different texts."""
    second: int
    """Index of the response shown second."""
    body: dict[str, Any]
    """JSON of the request."""
    key: str
    """Key of the answer in the cache."""
    key_without_logprobs: str
    """Key of an answer to the same request without log-probs, from a server that gives none."""


class JudgeSession:
    """One call of ``ChatJudge.many`` or ``compare``.

    Args:
        judge: the judge.
        groups: prompts, each with its K responses.
        pairs: for each group the responses to compare; None: all.
        progress: told how many groups are done.
    """

    def __init__(
        self,
        judge: ChatJudge,
        groups: Sequence[PromptAndResponses],
        pairs: Sequence[IndexPairs] | None,
        progress: Progress,
    ) -> None:
        self.judge, self.groups, self.config = judge, groups, judge.config
        self.unique = [drop_duplicates(texts) for _, texts in groups]
        # P(i ≻ j) of each group with i shown first, over its different texts
        self.shown_first = [np.full((len(texts), len(texts)), 0.5) for texts, _ in self.unique]
        self.pairs = pairs or [None] * len(groups)
        self.progress = GroupProgress(progress, len(groups), sum(1 for _ in self._triples()))
        self.in_flight: dict[str, asyncio.Future[Answer]] = {}  # by key: the same question may occur twice
        self.answers = 0
        self.without_verdict: list[Question] = []
        self.last_without_verdict = ""  # the text of the last such answer
        self.some_cut_off = False  # whether an answer without a verdict had reached its token limit

    async def run(self) -> list[np.ndarray]:
        """Asks all questions.

        Returns:
            For each group its (K, K) matrix of P(i ≻ j).

        Raises:
            ServerError: if the server is down or refuses a question.
            NoVerdicts: if too few answers contain a verdict.
            UserError: if the cache cannot be used.
        """
        self.workers = Workers(self.config.judge_concurrency)
        self.cache = JudgeCache(self.judge.cache_path)
        try:
            async with self.judge.client.connect(self.workers) as self.connection:
                await self.workers.run(self._questions(), self._answer_question, self._renew_claims())
            self._check_verdicts(1)
        finally:
            self.cache.close()
        self.progress.finish()
        return [
            expand_duplicates(average_orders(matrix), indices)
            for matrix, (_, indices) in zip(self.shown_first, self.unique)
        ]

    def _questions(self) -> Iterator[Question]:
        """Yields all questions. They are made as they are asked, since there may be millions.

        As many as are asked at a time are claimed at once, which costs a single write to the disk.
        """
        triples = self._triples()
        while some := list(itertools.islice(triples, self.config.judge_concurrency)):
            questions = [self._question(*triple) for triple in some]
            self.cache.claim(
                [one.key for one in questions if one.key not in self.in_flight and not self._cached_answer(one)]
            )
            yield from questions

    def _triples(self) -> Iterator[tuple[int, int, int]]:
        """Yields the group, and the response that is shown first and second, of every question."""
        for g, (own, unique) in enumerate(zip(self.pairs, self.unique)):
            yield from ((g, i, j) for i, j in questions_of(own, *unique))

    def _question(self, g: int, i: int, j: int) -> Question:
        prompt, texts = self.groups[g][0], self.unique[g][0]
        body = self.judge.request(self.judge.question(prompt, texts[i], texts[j]))
        url = self.judge.client.endpoint.url
        keys = [answer_key(url, request, PARSER_VERSION) for request in (body, without_logprobs(body))]
        return Question(g, i, j, body, *keys)

    async def _renew_claims(self) -> None:
        """Keeps the claims on questions that are being asked from expiring."""
        while True:
            await asyncio.sleep(judge_cache.CLAIM_SECONDS / 4)
            try:
                self.cache.renew()
            except UserError as error:
                self.workers.stop(error)
                return

    async def _answer_question(self, question: Question) -> None:
        """Finds the answer to a question and enters it into the group's matrix; an answer without a verdict as ½."""
        answer = await self._find_answer(question)
        preference = 0.5 if answer.preference is None else answer.preference
        self.shown_first[question.group][question.first, question.second] = preference
        self.answers += 1
        if self.answers >= MIN_ANSWERS:
            self._check_verdicts(MIN_ANSWERS)
        self.progress()

    async def _find_answer(self, question: Question) -> Answer:
        """Returns the answer from a request in flight, the cache, another run that is asking, or the server."""
        key = question.key
        answer = await self.in_flight[key] if key in self.in_flight else self._cached_answer(question)
        counted_as = "cached"
        if answer is None:
            future = self.in_flight[key] = asyncio.get_running_loop().create_future()
            try:
                answer = await self._wait_for_other_run(question)
                if answer is None:
                    new, with_logprobs = await self.ask_server(question)
                    answer = self.cache.put(key if with_logprobs else question.key_without_logprobs, new)
                    counted_as = "answered"
                future.set_result(answer)
            except Exception as error:
                future.set_exception(error)
                future.exception()  # marks it as retrieved: perhaps nobody is waiting for it
                raise
            finally:
                del self.in_flight[key]
                self.cache.release(key)
        self.cache.release(key)  # if it was claimed in advance just when another run saved the answer
        self.judge.counters[counted_as] += 1
        if answer.preference is None:
            self.without_verdict.append(question)
            self.last_without_verdict = answer.text
            self.judge.counters["nonsense"] += 1
        return answer

    def _cached_answer(self, question: Question) -> Answer | None:
        """Returns the answer in the cache; of two, the one with log-probs."""
        return self.cache.get(question.key) or self.cache.get(question.key_without_logprobs)

    async def _wait_for_other_run(self, question: Question) -> Answer | None:
        """Returns the answer that another run with the same cache is asking for; None once this run has to ask."""
        while not self.cache.claim([question.key]):
            await self.workers.sleep(CACHE_POLL_SECONDS)
        return self._cached_answer(question)  # the other run may have saved it just before its claim ended

    async def ask_server(self, question: Question) -> tuple[Answer, bool]:
        """Asks the server, and once more if the answer has no verdict, in case the server was at fault.

        Returns:
            The answer, and whether it is to the request with the log-probs that it asks for.

        Raises:
            ServerError: if the server is down or refuses the question; the message names the group.
            Halted: if the workers are stopped before an answer without a verdict could be asked for again. Saved, it
                would count as ½ from then on.
        """
        for _ in range(2):
            try:
                reply, with_logprobs = await self.connection.ask_with_retries(question.body)
            except ServerError as error:
                here = describe_prompt(question.group, self.groups[question.group][0])
                saved = f"; all answers so far are saved in {self.judge.cache_path}"
                raise type(error)(f"{here}: {error}{saved if isinstance(error, ServerUnavailable) else ''}") from None
            answer = self._read(reply)
            if answer.preference is not None:
                break
            if self.workers.halted:
                raise Halted
        return answer, with_logprobs

    def _read(self, reply: Reply) -> Answer:
        """Reads the verdict in a reply."""
        reading = read_answer(reply.text, ended=not reply.reached_token_limit)
        preference = preference_of(reply.text, reading, top_logprobs(reply.choice))
        self.some_cut_off |= preference is None and (reading.unclosed_reasoning or reply.reached_token_limit)
        text = reply.text if reply.text.strip() else reply.explain_no_text()
        text = self.judge.client.endpoint.redact(text)[:MAX_TEXT_CHARACTERS]
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is not UTF-8
        return Answer(preference, text, reply.prompt_tokens, reply.completion_tokens)

    def _check_verdicts(self, least: int) -> None:
        """Checks the share of answers without a verdict once there are ``least`` answers.

        Raises:
            NoVerdicts: if it is above --judge_max_invalid_rate. Those answers are deleted from the cache, so that they
                are asked for again when the judge has been corrected.
        """
        invalid, allowed = len(self.without_verdict), self.config.judge_max_invalid_rate
        if self.answers < least or invalid <= allowed * self.answers:
            return
        self.cache.delete(key for one in self.without_verdict for key in (one.key, one.key_without_logprobs))
        hint = "; some were cut off before a verdict: raise --judge_max_tokens" if self.some_cut_off else ""
        raise NoVerdicts(
            f"the judge {self.judge.model} gave no verdict, A or B, in {invalid} of {self.answers} answers, a larger "
            f"share than --judge_max_invalid_rate {allowed:g} allows; the last was "
            f"{self.last_without_verdict[:80]!r}{hint}"
        )
