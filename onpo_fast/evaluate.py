"""Every policy of a run against every other, on held-out prompts, under the run's oracle.

    python -m onpo_fast.evaluate DIR
    python -m onpo_fast.evaluate DIR --best_of_nash 64    # also the Nash policy over 64 responses of π_1

writes ``DIR/evaluation.json`` and ``DIR/evaluation_responses.jsonl``. Responses of different policies are independent
draws, as the win rate J(π, π′) = E[P(y ≻ y′)] needs. Intervals treat a prompt as the unit, since responses to one
prompt depend on each other. The *restricted* duality gap of π_t asks what the best of the run's own policies gains
against it, max_s J(π_s, π_t) − min_s J(π_t, π_s) = 2·max_s J(π_s, π_t) − 1; the gap over all policies is larger.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from torch import Tensor

from . import best_of_nash, oracles, streams
from . import config as configuration
from .arguments import CommandParser, program
from .best_of_nash import BestOfNash
from .config import Config, FitConfig, ModelConfig, RunConfig, SamplingConfig
from .console import console, progress, say
from .conversations import columns_of
from .data import (
    Group,
    Messages,
    check_tokens,
    read_groups,
    read_preferences,
    read_prompts,
    read_scores,
    write_groups,
    write_preferences,
    write_scores,
)
from .device import device_of
from .errors import UserError, command
from .externals import check_environment, check_oracle, load_environment, load_oracle
from .files import MOST_LINES_BYTES, atomic_write_text, checksum, parse_json, read_regular, write_jsonl
from .journal import Journal
from .models.policy import kl_estimate, score
from .models.resident import ResidentPolicy, Source
from .multi_turn.conversation import Conversation, Transcript
from .multi_turn.environment import CheckedEnvironment
from .multi_turn.evaluation import converse
from .multi_turn.replies import reply_to
from .opening import check_sampler, config_key
from .report import is_evaluation
from .reports.model_card import write_model_cards
from .run.cache import StageCache, was_stopped
from .run.lock import locked
from .run.outputs import EVALUATION, HELD_OUT, RESPONSES, finished_policies, initial_policy, name_of
from .run.resumable import ResumableStage
from .run.tracking import Tracker
from .sampling import StageSampler, TruncationWarning, all_truncated, open_sampler
from .win_rates import CONFIDENCE, intervals, restricted_gap, student_intervals, summary, win_rate_table, win_rates

ASKS = tuple(name for name in configuration.NEEDS_TRUST if name not in ("report_to", "push_to_hub"))
OPTIONS = tuple(  # those that may be given anew: what asks for trust, the oracle, what samples or answers elsewhere
    option.name
    for option in fields(Config)
    if option.name in ("sampler", "environment_timeout", *ASKS)
    or option.name.startswith(("judge_", "oracle_", "sampler_", "vllm_"))
)
PARTS = "evaluation.parts"  # folder of an evaluation that has not ended


def evaluate(
    directory: Path,
    config: Config,
    journal: Journal,
    tracker: Tracker | None = None,
    oracle: oracles.Oracle | None = None,
    oracle_files: dict[str, str] | None = None,
    candidates_per_prompt: int | None = None,
    environment: CheckedEnvironment | None = None,
) -> dict:
    """Samples from every policy of a finished or unfinished run, judges all responses and returns the evaluation.

    Args:
        directory: the run directory.
        config: the run's options.
        journal: the run's journal, which records the parts and both files.
        tracker: takes the time and what the oracle counts.
        oracle: the run's oracle; by default it is loaded.
        oracle_files: ``oracles.fingerprint`` of the oracle; by default its files are read.
        candidates_per_prompt: also evaluates best of Nash over this many responses of π_1.
        environment: the run's environment, if it has one; by default it is loaded.

    Raises:
        UserError: if the run has no finished iteration, or ``candidates_per_prompt`` is below 2.
    """
    if candidates_per_prompt is not None:
        best_of_nash.check_samples(candidates_per_prompt)
    policies = {"π_1": initial_policy(directory, config.model, journal), **finished_policies(directory, journal)}
    if len(policies) < 2:
        raise UserError(f"{directory} has no finished iteration to evaluate")
    if oracle is None:
        oracle = load_oracle(config, directory)
    if oracle_files is None:
        oracle_files = oracles.fingerprint(oracle, config.oracle, functools.cache(checksum))
    evaluator = Evaluator(
        StageCache(journal, tracker, config_key(config, journal.note("model"))),
        ResidentPolicy(config.section(ModelConfig), policies["π_1"]),
        oracle,
        config.oracle,
        oracle_files,
        config.section(SamplingConfig),
        config.section(FitConfig),
        config.section(RunConfig),
        candidates_per_prompt=candidates_per_prompt,
        environment=environment or load_environment(config),
        turns=config.turns,
    )
    return evaluator.evaluate(policies, read_prompts(directory / HELD_OUT))


@dataclass
class Evaluator:
    """Evaluates the policies of a run. Its long stages are made in parts, so that a run that is killed goes on.

    Attributes:
        candidates_per_prompt: number of responses of π_1 that best of Nash chooses from; None: it is left out.
        environment: what answers the policies, so that a response is a conversation; None: they speak once.
        turns: the most turns of a policy in a conversation.
        cost: seconds and what the oracle counted, also in processes before this one.
    """

    cache: StageCache
    policies: ResidentPolicy
    oracle: oracles.Oracle
    oracle_name: str
    oracle_files: dict[str, str]
    sampling: SamplingConfig
    fitting: FitConfig
    run_config: RunConfig
    truncation: TruncationWarning = field(default_factory=TruncationWarning)
    candidates_per_prompt: int | None = None
    environment: CheckedEnvironment | None = None
    turns: int = 1
    cost: Counter[str] = field(default_factory=Counter)

    def evaluate_once(self, policies: dict[str, Source], prompts: Sequence[Messages]) -> dict:
        """The evaluation of these policies, read if it exists and is whole, else made."""
        self.cache.begin_iteration(0)
        is_done = self.cache.is_done(EVALUATION, keep=was_stopped)
        result = self.cache.world.from_main(lambda: self._finished(list(policies)) if is_done else None)
        if result is not None:
            return result
        self.cache.world.from_main(self._begin_anew)
        return self.evaluate(policies, prompts)

    def _finished(self, names: list[str]) -> dict | None:
        """The evaluation of these policies on disk, if both files are whole and of no others."""
        journal = self.cache.journal
        if journal.note(RESPONSES) is None:
            return None
        result = read_evaluation(self.cache.directory / EVALUATION)
        if result is None or result["policies"] != names:
            return None
        journal.forget_folder(PARTS)  # what is left if the run was killed just before
        return result

    def _begin_anew(self) -> None:
        self.cache.journal.forget(EVALUATION, RESPONSES)  # also those of a run that was shorter
        self.cache.tracker.begin(EVALUATION, keep=was_stopped)

    def evaluate(self, policies: dict[str, Source], prompts: Sequence[Messages]) -> dict:
        """Samples from all policies, π_1 first, judges all responses together, and writes both files.

        Returns:
            What ``evaluation.json`` holds.
        """
        names = list(policies)
        self.weights = self.cache.world.from_main(self._checksums, policies)
        samples, candidates, spoken = self._sample_all(policies, prompts)
        # π_1's log-probs last, when the other models are gone
        kl = [0.0, *self._divergences(policies[names[0]], spoken[1:], len(prompts))]
        matrices = self._judge(samples, candidates, prompts)
        own = len(names) * self.run_config.eval_samples  # responses of the policies
        wins = np.stack([win_rates(matrix[:own, :own], len(names)) for matrix in matrices])  # (prompts, M, M)
        result = {
            "policies": names,
            "prompts": len(prompts),
            "samples_per_prompt": self.run_config.eval_samples,
            "oracle": self.oracle_name,
            **({} if self.environment is None else {"environment": self.environment.name, "turns": self.turns}),
            "confidence": CONFIDENCE,
            "win_rate": wins.mean(0).tolist(),
            "interval": intervals(wins).tolist(),
            "duality_gap": restricted_gap(wins.mean(0)).tolist(),
            "kl_to_initial": kl,
            "response_tokens_mean": [
                float(np.mean([len(r.tokens) for g in groups for r in g.responses])) for groups in samples.values()
            ],
        }
        if (shares := oracles.class_shares(self.oracle, samples)) is not None:
            result["class_shares"] = shares
        records = _response_records(samples, prompts, matrices, self.run_config.eval_samples)
        if candidates is not None:
            try:
                chosen = BestOfNash.choose(matrices, self.candidates_per_prompt, len(names))
            except ValueError as error:  # the oracle's answers are checked, files of a stranger are not
                raise UserError(f"{self.cache.directory / PARTS}: preferences that are none: {error}") from error
            result["best_of_nash"] = {
                "samples": self.candidates_per_prompt,
                "responses_played": chosen.played,
                "win_rate": chosen.wins.mean(0).tolist(),
                "interval": student_intervals(chosen.wins).tolist(),
            }
            records = (record | {"best_of_nash": chosen.answers(p, candidates[p])} for p, record in enumerate(records))
        self.cache.world.from_main(self._write, result, records)
        return result

    def _checksums(self, policies: dict[str, Source]) -> list[str | None]:
        entries = [
            self.cache.journal.entries.get(name_of(self.cache.directory, source)) for source in policies.values()
        ]
        return [entry and entry["checksum"] for entry in entries]

    def _write(self, result: dict, records: Iterator[dict]) -> None:
        """Writes and records both files, and removes the parts."""
        journal, directory = self.cache.journal, self.cache.directory
        journal.forget_records(EVALUATION, RESPONSES)
        write_jsonl(directory / RESPONSES, records)
        atomic_write_text(directory / EVALUATION, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        self.cache.log("evaluate", **self.cost)
        journal.record(RESPONSES)
        journal.record(EVALUATION)
        journal.forget_folder(PARTS)

    def _sample_all(
        self, policies: dict[str, Source], prompts: Sequence[Messages]
    ) -> tuple[dict[str, list[Group]], list[Group] | None, list[list[Group]]]:
        """The responses of every policy, and those of π_1 that best of Nash chooses from, if it is wanted.

        The third is what every policy has said: its responses, or the turns of its conversations.
        """
        samples: dict[str, list[Group]] = {}
        candidates, spoken = None, []
        for index, (name, source) in enumerate(policies.items()):
            count, seed = self.run_config.eval_samples, [self.run_config.seed, streams.EVALUATION, index]
            samples[name], turns = self._respond(name, source, prompts, count, seed, f"responses_{index:02d}")
            spoken.append(turns)
            if index == 0 and self.candidates_per_prompt is not None:  # now, while π_1 is in memory
                count, seed = self.candidates_per_prompt, [self.run_config.seed, streams.BEST_OF_NASH]
                candidates, _ = self._respond(name, source, prompts, count, seed, f"best_of_nash_{count}")
        return samples, candidates, spoken

    def _respond(
        self, name: str, source: Source, prompts: Sequence[Messages], count: int, seed: list[int], output: str
    ) -> tuple[list[Group], list[Group]]:
        """``count`` responses of a policy to each prompt, which are conversations with --environment; and its turns."""
        if self.environment is None:
            groups = self._sample(name, source, prompts, count, seed, output)
            return groups, groups

        def sample(states: Sequence[Messages], number: int, last: Sequence[int], ending: str) -> list[Group]:
            return self._sample(name, source, states, number, [*seed, *last], f"{output}{ending}")

        def answer(conversation: Conversation, of_turn: Sequence[int]) -> dict | None:
            room = self.sampling.max_new_tokens
            return reply_to(self.environment, conversation, of_turn, self.policies(source).renderer, room)

        folder, key = f"{PARTS}/{output}", (self.weights, self.environment.files)
        conversations, spoken, cost = converse(
            prompts, count, answer, self.turns, sample, self.cache, folder, [*seed, streams.ENVIRONMENT], key
        )
        self.cost.update(cost)
        return conversations, spoken

    def _sample(
        self,
        name: str,
        source: Source,
        prompts: Sequence[Messages],
        count: int,
        seed: Sequence[int],
        output: str,
    ) -> list[Group]:
        """``count`` responses of a policy to each prompt. The policy is loaded if any are missing."""
        directory, world = self.cache.directory, self.cache.world
        sampler = StageSampler(
            self.policies,
            source,
            self.sampling,
            lambda: open_sampler(self.policies, source, self.sampling, directory, world, evaluation=True),
            directory,
            evaluation=True,
        )
        with sampler, progress(f"evaluate: sample {name}", len(prompts) * count) as done:
            groups, cost = self.cache.in_parts(
                f"{PARTS}/{output}",
                prompts,
                ResumableStage.sampling_size(self.sampling.responses_at_a_time, count),
                compute=lambda part, first: sampler(part, count, seed, done, first),
                read=lambda file, part: read_groups(file, part, count),
                write=write_groups,
                on_known=lambda known: done(known * count),
                stage="evaluate",
                config_key=self.weights,
                check=sampler.check if self.sampling.sampler != "local" else None,
            )
        self.cost.update(cost)
        if sampler.was_opened:
            self.truncation(f"{name} in the evaluation", self.policies(source), groups, self.sampling.max_new_tokens)
        else:
            self.truncation.said |= all_truncated(groups)  # when they were sampled
        return groups

    def _divergences(self, initial: Source, spoken: Sequence[list[Group]], prompts: int) -> list[float]:
        """KL(π ‖ π_1) in nats a response or conversation, estimated on what each later policy π has said."""
        divergences = []
        for index, groups in enumerate(spoken, 1):

            def compute(part: Sequence[Group], first: int, index: int = index) -> list[Tensor]:
                policy = self.policies(initial)
                folder = self.cache.resumable(f"{PARTS}/responses_{index:02d}").folder
                check_tokens(part, policy.vocabulary, folder)
                return score(policy, part, self.fitting.token_budget, done)

            with progress(f"evaluate: score π_{index + 1}", len(groups)) as done:
                scores, cost = self.cache.in_parts(
                    f"{PARTS}/logps_{index:02d}",
                    groups,
                    ResumableStage.judging_size(len(groups)),
                    compute=compute,
                    read=read_scores,
                    write=write_scores,
                    on_known=done,
                    stage="evaluate",
                    config_key=self.weights,
                )
            turns = sum(len(group.responses) for group in groups) / (prompts * self.run_config.eval_samples)
            divergences.append(kl_estimate(groups, scores) * turns)
            self.cost.update(cost)
        return divergences

    def _judge(
        self, samples: dict[str, list[Group]], candidates: list[Group] | None, prompts: Sequence[Messages]
    ) -> list[np.ndarray]:
        """A matrix a prompt over the responses of all policies, policy by policy, then best of Nash's candidates.

        Responses of the same policy are not compared: it wins half of the comparisons with itself.
        """
        compared = [*samples.values(), *([candidates] if candidates is not None else [])]
        joined = [
            Group(prompt, [], [r for groups in compared for r in groups[p].responses])
            for p, prompt in enumerate(prompts)
        ]
        size = ResumableStage.judging_size(len(joined))
        each, own = self.run_config.eval_samples, len(samples) * self.run_config.eval_samples
        everyone = range(own + (self.candidates_per_prompt or 0))
        pairs = [(i, j) for i, j in combinations(everyone, 2) if j >= own or i // each != j // each]
        if candidates is not None:  # as many comparisons in a part as without them
            size = max(1, size * own**2 // (own + self.candidates_per_prompt) ** 2)
        if oracles.holds_model(self.oracle):
            self.policies.drop()  # at most one model is in memory
        with progress("evaluate: judge", len(joined)) as done:
            matrices, cost = self.cache.in_parts(
                f"{PARTS}/preferences",
                joined,
                size,
                compute=lambda part, first: oracles.judge(
                    self.oracle, part, self.oracle_name, done, first, [pairs] * len(part)
                ),
                read=read_preferences,
                write=write_preferences,
                on_known=done,
                stage="evaluate",
                config_key=(self.weights, self.oracle_files),  # another oracle of the same name judges all of it
                take_counters=lambda: oracles.take_counters(self.oracle),
                shared=oracles.is_shared(self.oracle),
            )
        self.cost.update(cost)
        return matrices


def read_evaluation(path: Path) -> dict | None:
    """What ``evaluation.json`` holds; None if it is no evaluation."""
    try:
        result = parse_json(read_regular(path, MOST_LINES_BYTES))
    except ValueError:
        return None
    return result if is_evaluation(result) else None


def _response_records(
    samples: dict[str, list[Group]], prompts: Sequence[Messages], matrices: list[np.ndarray], eval_samples: int
) -> Iterator[dict]:
    last = (len(samples) - 1) * eval_samples
    for p, (prompt, matrix) in enumerate(zip(prompts, matrices)):
        texts = {name: [r.text for r in groups[p].responses] for name, groups in samples.items()}
        record = {**columns_of(prompt), "responses": texts, "preference": float(matrix[last, 0])}
        if isinstance(texts["π_1"][0], Transcript):
            record["conversations"] = {name: [text.messages for text in own] for name, own in texts.items()}
        yield record


@command
def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog=program("evaluate"),
        description="Evaluate the policies of a run.",
        epilog=configuration.TRUST_NOTE,
    )
    parser.add_argument("directory", type=Path, help="the run's output directory")
    parser.add_argument(
        "--best_of_nash",
        metavar="N",
        type=int,
        help="also evaluate best of Nash: the Nash policy over N responses of π_1 (arXiv 2609.08082), for which the "
        "oracle compares N(N-1)/2 pairs a prompt, and N with each response of the policies",
    )
    configuration.add_options(parser, OPTIONS)
    options = parser.parse_args(argv)
    if options.best_of_nash is not None:
        best_of_nash.check_samples(options.best_of_nash)
    directory = options.directory
    config = configuration.read_run(directory, configuration.given_options(options, OPTIONS), ASKS)
    if device_of(config.device).type != "cuda":
        config = replace(config, cuda_graphs=False)  # which the run may have had, on another machine
    check_sampler(config)
    with locked(directory) as lock:
        oracle, oracle_files = check_oracle(directory, config)
        environment = check_environment(directory, config)
        journal = Journal(directory)
        tracker = Tracker(directory, "none" if config.report_to == "none" else "tensorboard")
        journal.before_record += [lock.check, tracker.sync]
        tracker.begin(EVALUATION, keep=lambda record: True)  # the judge was asked then too
        try:
            result = evaluate(
                directory, config, journal, tracker, oracle, oracle_files, options.best_of_nash, environment
            )
            console.print(win_rate_table(result))
            say(summary(result))
            if "best_of_nash" in result:
                say(best_of_nash.summary(result))
        finally:
            tracker.close()
        write_model_cards(directory, journal)


if __name__ == "__main__":
    main()
