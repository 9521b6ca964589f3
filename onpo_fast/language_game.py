"""The game that a language model plays: ``algorithms`` asks for comparisons, fits and mixtures.

A policy is a folder with its weights, and one model is in memory at a time: an anchor is a column of numbers, one
log-prob a response (``--anchor live`` keeps the anchor itself in memory instead). Every stage goes through
``run.cache``, which is how a run is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import fit_precision, oracles, pairing, stage_metrics, streams
from .batches import AnchorLogps, Batch, divided_alike, plan_steps
from .comparisons import Comparisons, Mixture, policy_of, weights_of
from .config import AlgorithmConfig, FitConfig, RunConfig, SamplingConfig
from .console import Progress, progress, say
from .data import (
    Group,
    Messages,
    Pair,
    prompts_of_iteration,
    read_groups,
    read_pairs,
    read_preferences,
    read_scores,
    write_groups,
    write_pairs,
    write_preferences,
    write_scores,
)
from .errors import UserError
from .fit import fit, score_as_in_fit
from .judging_beside import JudgingBeside
from .memory.watch import MemoryWatch
from .models.loading import check_saved
from .models.policy import Policy, kl_estimate
from .models.resident import Source
from .objectives import Objective
from .opening import OpenRun
from .reports.model_card import write_model_card
from .run.cache import StageCache
from .run.fit_states import FitStates
from .run.outputs import iteration_folder
from .run.resumable import ResumableStage
from .sampling import MixtureSampler, Sampler, StageSampler, TruncationWarning, all_truncated, open_sampler
from .selecting import PairSelector
from .selection import Selected


@dataclass
class _FitLog:
    """Logs the steps of a fit, and its memory beside the plan.

    Attributes:
        watch: the plan; None without one.
        last: metrics of the last step, empty before the first.
        done: called with the number of steps that are newly done.
    """

    cache: StageCache
    into: str
    watch: MemoryWatch | None = None
    last: dict[str, float | None] = field(default_factory=dict)
    done: Progress = lambda steps: None

    def __call__(self, metrics: dict[str, float | None]) -> None:
        """Logs a step."""
        self.cache.log("fit", fit=self.into, **metrics)
        self.last.update(metrics)
        if self.watch is not None and (memory := self.watch.after(int(metrics["step"]))):
            self.cache.log("memory", fit=self.into, **memory)
        self.done(1)


class LanguageGame:
    """The ``algorithms.Game`` of a run on a language model; a policy is a folder, a Hugging Face id or "smollm2"."""

    one_response = "response"  # what metrics count the tokens of, in words
    judges_beside = True  # whether an oracle that computes elsewhere judges while the policy samples

    def __init__(
        self,
        run: OpenRun,
        objective: Objective,
        algorithm: AlgorithmConfig,
        sampling: SamplingConfig,
        fitting: FitConfig,
        run_config: RunConfig,
    ) -> None:
        self.run, self.objective, self.algorithm = run, objective, algorithm
        self.sampling, self.fitting, self.run_config = sampling, fitting, run_config
        self.truncation = TruncationWarning()
        self.selects = PairSelector(run, algorithm, fitting, run_config) if algorithm.select is not None else None
        self.watched = False  # whether the memory of a fit has been planned
        self.sampler_checked = False  # whether responses of --sampler were compared with their policy, in any process

    # An iteration ----------------------------------------------------------------------------------------------------

    def begin_iteration(self, t: int) -> None:
        """What is compared and fitted from now on belongs to iteration t, counted from 1."""
        self.t = t
        self.sampled: dict[Source | Mixture, tuple[list[Group], str]] = {}  # with the suffix of their file
        self.comparisons = 0
        self.fitted: set[str] = set()  # what the iteration's fits were called
        self.metrics: dict[str, float | None] = {}
        self.sampler_checked |= t > 1 and self.sampling.sampler == "local"  # π_1's were, in iteration 1
        self.run.cache.begin_iteration(t)

    def end_iteration(self) -> None:
        """Logs the iteration's summary and records that it has ended."""
        cache, folder = self.run.cache, iteration_folder(self.t)
        notes = dict(cache.notes)
        if cache.is_done(folder):
            return
        seconds: dict[str, float] = {}
        for note in notes.values():
            if "stage" in note:
                seconds[note["stage"]] = seconds.get(note["stage"], 0.0) + note["seconds"]
        names = ("response_tokens_mean", "cyclic_triples", "kl_to_initial", "kl_to_anchor")
        metrics = {name: self.metrics.get(name) for name in names}
        total = sum(seconds.values())
        cache.log("iteration", seconds=total, stage_seconds=seconds, **metrics)
        losses = ", ".join(
            f"loss {output.split('/')[-1]} {'not finite' if note['loss'] is None else format(note['loss'], '.3f')}"
            for output, note in notes.items()
            if "loss" in note
        )
        divergences = "".join(
            f", KL of π_{self.t} to {about} {round(value, 2) + 0:.2f} nats"  # + 0 makes 0 of -0
            for about, value in (("π_1", metrics["kl_to_initial"]), ("the anchor", metrics["kl_to_anchor"]))
            if value is not None and self.t > 1  # in iteration 1 all of them are π_1
        )
        say(
            f"iteration {self.t}: {losses} (normalised){divergences}, "
            f"{metrics['response_tokens_mean']:.0f} tokens a {self.one_response}, {total:.0f} s"
        )
        cache.mark_done(folder, {}, file=False)

    # What an algorithm asks for --------------------------------------------------------------------------------------

    def compare(self, policy: Source | Mixture, opponent: Source | None = None) -> Comparisons:
        """Responses of a policy to the iteration's prompts, compared with each other, or each with an opponent's."""
        self.comparisons += 1
        suffix = "" if self.comparisons == 1 else f"_{self.comparisons}"
        with self._judging_beside(policy, opponent, suffix) as beside:
            if policy not in self.sampled:  # once an iteration
                groups = self.sample(policy, f"responses{suffix}", streams.SAMPLING, beside=beside)
                self.sampled[policy] = groups, suffix
            groups, sampled_as = self.sampled[policy]
            selected = None
            if self.selects and opponent is None:
                selected = self.selects(self.t, weights_of(policy), groups, sampled_as)
                preferences, step = self.judge(groups, suffix, pairs=selected.by_group(len(groups))), 1
            elif opponent is None:
                preferences, step = self.judge(groups, suffix, beside), 1
            else:
                preferences, step = self._judge_against(opponent, groups, suffix), 2
        return Comparisons(groups, self.pair(groups, preferences, suffix, selected), policy, step, sampled_as)

    def fit(
        self,
        anchor: Source | Mixture,
        compared: Comparisons,
        *,
        warm_start: Source | None = None,
        into: str = "policy",
        steps: int = 1,
    ) -> Path:
        """One argmin over D_t, measured from the anchor; returns where the fitted policy is."""
        if into in self.fitted:  # the second would be taken for the first, as after a resume
            raise ValueError(f"two fits of an iteration are called {into!r}")
        self.fitted.add(into)
        output = f"{iteration_folder(self.t)}/{into}"
        start = warm_start if warm_start is not None else anchor
        anchor_logps = self._anchor_logps(anchor, compared)
        states = self._states(output)
        finished, log = states.step(), _FitLog(self.run.cache, into)

        def compute() -> Policy | None:
            policy = self.run.policies.take(start, f"{[self.run_config.seed, streams.ADAPTER, self.t]} {into}")
            batches, live = self._steps(compared.pairs, into, states), anchor_logps is None
            title = f"iteration {self.t}: fit {into}"
            with self._naming_fit(into), states.finishing(), progress(title, len(batches), stoppable=False) as log.done:
                log.done(finished)
                if finished == 0:
                    log.watch = self._watch_memory(policy, compared.groups, batches, live)
                fitted = fit(
                    policy,
                    compared.groups,
                    batches,
                    anchor_logps,
                    self.objective.with_steps(steps * compared.step),
                    self.fitting,
                    on_step=log,
                    states=states,
                    starts_at_anchor=start == policy_of(anchor),
                    live_anchor=self.run.policies.beside(anchor) if live else None,
                    seed=[self.run_config.seed, streams.ROUNDING, self.t, int(into == "auxiliary")],
                    world=self.run.world,
                )
            self._warn_of_precision(into, log.last, policy)
            return fitted

        self.run.cache.cached(
            output,
            compute,
            lambda path: None,
            self._save,
            stage=f"fit {into}",
            prepare=lambda: self.run.policies(start),
            note=lambda: {"loss": log.last["loss_normalised"]},
            keep=lambda record: record["stage"] == "fit" and record["step"] <= finished,
        )
        states.clear()  # also what is left if the run was killed just before
        if log.last and self.run.world.is_main:  # it was fitted just now
            write_model_card(self.run.directory, output, self.run.journal)
        return self.run.directory / output

    @contextmanager
    def _naming_fit(self, into: str) -> Iterator[None]:
        """Names the fit in a ``UserError``."""
        try:
            yield
        except UserError as error:
            raise UserError(f"iteration {self.t}, fit {into}, {error}") from error

    def _warn_of_precision(self, into: str, metrics: dict, policy: Policy) -> None:
        if lost := fit_precision.warning(metrics, policy.weights_dtype, self.fitting.learning_rate):
            say(f"iteration {self.t}, fit {into}: {lost}")

    def _save(self, folder: Path, policy: Policy) -> None:
        self.run.policies.save(folder, policy)
        # weights that were gathered have been saved wrongly, without a message, by other programs
        if self.run.world.size > 1 and policy.adapter is None:
            check_saved(folder, policy, self.run.policies.config)

    def _watch_memory(
        self, policy: Policy, groups: list[Group], batches: list[Batch], live_anchor: bool
    ) -> MemoryWatch | None:
        """Compares the memory of the process's first fit with its plan; None for later fits, which take the same."""
        if self.watched or not self.run.world.is_main:
            return None
        self.watched = True
        return MemoryWatch(policy, groups, batches, self.run.policies.config, self.fitting, live_anchor)

    def _states(self, output: str) -> FitStates:
        config = self.run_config
        return FitStates(
            self.run.journal,
            f"{output}.checkpoints",
            config.checkpoint_steps,
            60 * config.checkpoint_minutes,
            self.run.world,
        )

    def _steps(self, pairs: Sequence[Pair], into: str, states: FitStates) -> list[Batch]:
        """The optimizer steps of a fit. All fits of an iteration see the pairs in the same order."""
        epochs = self.fitting.epochs_auxiliary if into == "auxiliary" else self.fitting.epochs_policy
        batches = self._plan(pairs, epochs)
        if states.step() >= len(batches):  # after the last step the policy itself is saved
            raise UserError(
                f"{states.folder} has a state after step {states.step()} of a fit of {len(batches)} steps: remove it, "
                "and --resume starts the fit again"
            )
        return batches

    def _plan(self, pairs: Sequence[Pair], epochs: int) -> list[Batch]:
        batches = plan_steps(pairs, epochs, self.fitting.batch_pairs, [self.run_config.seed, streams.ORDER, self.t])
        return divided_alike(batches) if self.selects else batches

    def mixture(self, initial: Source, policy: Source) -> Source | Mixture:
        """π_1^s · π^(1−s), with the weight s of the algorithm's options; π_1 itself where s is 1."""
        weight = self.algorithm.initial_weight
        if not weight:
            raise ValueError('an algorithm that mixes policies has anchor="mixture" in ALGORITHMS')
        return initial if weight == 1 else Mixture(initial, policy, weight)

    # Stages, made resumable ------------------------------------------------------------------------------------------

    def prompts(self) -> list[Messages]:
        """The prompts of the iteration."""
        config = self.algorithm
        return prompts_of_iteration(self.run.prompts, self.t, config.iterations, config.prompts_per_iteration)

    def _judging_beside(
        self, policy: Source | Mixture, opponent: Source | None, suffix: str
    ) -> AbstractContextManager[JudgingBeside | None]:
        """Judges responses while they are sampled, where that is possible; None where they are judged afterwards.

        No judge is paid for responses before some of the same program have been compared with their policy: a server's
        are when it gets new weights, π_1's at the end of the first stage.
        """
        run, checked = self.run, self.sampler_checked or self.sampling.sampler == "server"
        outputs = [f"{iteration_folder(self.t)}/{name}{suffix}.jsonl" for name in ("responses", "preferences")]
        if (
            not (self.judges_beside and checked and oracles.computes_elsewhere(run.oracle))
            or self.selects
            or opponent is not None
            or policy in self.sampled
            or run.world.size > 1
            or any(run.journal.note(name) is not None for name in outputs)
        ):
            return nullcontext()
        stage = run.cache.resumable(outputs[1], run.oracle_files)
        title = f"iteration {self.t}: judge"
        return JudgingBeside(stage, len(self.prompts()), run.oracle, run.oracle_name, title, run.cache.log)

    def sample(
        self,
        policy: Source | Mixture,
        name: str,
        stream: int,
        responses: int | None = None,
        beside: JudgingBeside | None = None,
        prompts: Sequence[Messages] | None = None,
        substream: Sequence[int] = (),
        **about: object,
    ) -> list[Group]:
        """Responses of a policy to the iteration's prompts, or to others.

        Args:
            name: of their file, without its ending.
            stream, substream: what keeps their random streams apart from others of the iteration.
            responses: to each prompt; default K.
            beside: judges them meanwhile.
            about: what metrics say of them beside.
        """
        run, count = self.run, responses or self.algorithm.responses_per_prompt
        seed = [self.run_config.seed, stream, self.t, *substream]
        source = weights_of(policy)
        on_group, on_part = (beside.add, beside.add_part) if beside else (lambda *group: None, lambda *part: None)
        stage = StageSampler(run.policies, source, self.sampling, lambda: self._sampler(policy), run.directory)
        with stage as sampler:
            groups = run.cache.cached_in_parts(
                f"{iteration_folder(self.t)}/{name}.jsonl",
                self.prompts() if prompts is None else prompts,
                ResumableStage.sampling_size(self.sampling.responses_at_a_time, count),
                compute=lambda part, first, done: sampler(part, count, seed, done, first, on_group),
                read=lambda file: read_groups(file, vocabulary=run.vocabulary),  # more --iterations change prompts
                read_part=lambda file, part: read_groups(file, part, count, run.vocabulary),
                write=write_groups,
                stage="sample",
                title=f"iteration {self.t}: sample",
                ticks=count,
                prepare=sampler.open,
                metrics=lambda groups, cost: stage_metrics.sampling(groups, cost["seconds"], run.device) | about,
                check=sampler.check if (checks := self._checks(policy, stream, first=not substream)) else None,
                on_part=on_part,
            )
        if sampler.was_opened:
            self.sampler_checked |= checks
            self.truncation(f"iteration {self.t}", run.policies(source), groups, self.sampling.max_new_tokens)
        else:
            self.truncation.said |= all_truncated(groups)  # when they were sampled
        if stream == streams.SAMPLING:
            lengths = [len(response.tokens) for group in groups for response in group.responses]
            self.metrics.setdefault("response_tokens_mean", sum(lengths) / len(lengths))
        return groups

    def _sampler(self, policy: Source | Mixture) -> Sampler:
        if (only := policy_of(policy)) is not None:
            return open_sampler(self.run.policies, only, self.sampling, self.run.directory, self.run.world)
        initial = self.run.policies.beside(policy.initial)
        sampler = MixtureSampler(initial, self.run.policies(policy.policy), policy.share, self.sampling)
        sampler.check()
        return sampler

    def _checks(self, policy: Source | Mixture, stream: int, first: bool) -> bool:
        """Whether responses are compared with their policy: all that another program sampled, else π_1's first ones.

        A mixture has no log-probs of its own to compare with.
        """
        only = policy_of(policy)
        if self.sampling.sampler == "local":
            return self.t == 1 and stream == streams.SAMPLING and first and only == self.run.initial
        return only is not None

    def judge(
        self,
        groups: list[Group],
        suffix: str,
        beside: JudgingBeside | None = None,
        pairs: Sequence[oracles.IndexPairs] | None = None,
    ) -> list[np.ndarray]:
        """The oracle's preferences between the responses of each group, or between some pairs of them."""
        run = self.run
        asked = pairs if oracles.compares_pairs(run.oracle) else None  # the others compare all responses
        if beside is not None:
            beside.finish()  # its parts are read below
        preferences = run.cache.cached_in_parts(
            f"{iteration_folder(self.t)}/preferences{suffix}.jsonl",
            groups,
            ResumableStage.judging_size(len(groups), oracles.computes_elsewhere(run.oracle)),
            compute=lambda part, first, done: oracles.judge(
                run.oracle, part, run.oracle_name, done, first, pairs and pairs[first : first + len(part)]
            ),
            read=lambda file: read_preferences(file, groups),
            read_part=read_preferences,
            write=write_preferences,
            stage="judge",
            title=f"iteration {self.t}: judge",
            prepare=run.make_room_for_oracle,
            metrics=lambda found, cost: stage_metrics.judging(found, cost, asked),
            config_key=run.oracle_files,
            take_counters=lambda: oracles.take_counters(run.oracle),
            shared=oracles.is_shared(run.oracle),
        )
        cyclic, triples = (0, 0) if asked is not None else oracles.cyclic_triples(preferences)
        self.metrics.setdefault("cyclic_triples", cyclic / triples if triples else None)
        return preferences

    def _judge_against(self, opponent: Source, groups: list[Group], suffix: str) -> list[np.ndarray]:
        """Labels of all pairs of a group's responses, from their win rates against a response of the opponent."""
        opponents = self.sample(opponent, f"opponents{suffix}", streams.OPPONENT, responses=1)
        matches = [
            Group(group.prompt, group.prompt_tokens, [response, *other.responses])
            for group, other in zip(groups, opponents)
            for response in group.responses
        ]
        wins = iter([matrix[0, 1] for matrix in self.judge(matches, suffix)])
        return [pairing.against_opponent(np.array([next(wins) for _ in group.responses])) for group in groups]

    def pair(
        self, groups: list[Group], preferences: list[np.ndarray], suffix: str, selected: Selected | None = None
    ) -> list[Pair]:
        """The pairs to learn from: those that were selected, or what --pairing says."""
        seed = [self.run_config.seed, streams.PAIRING, self.t]
        identical = 0

        def compute() -> list[Pair]:
            nonlocal identical
            try:
                how = self.algorithm.pairing, self.algorithm.labels
                pairs, identical = pairing.pairs_to_fit(preferences, groups, self.objective, *how, seed, selected)
            except UserError as error:
                done = self.run.directory
                raise UserError(f"iteration {self.t}: {error}. What was done is in {done}") from None
            return pairs

        return self.run.cache.cached(
            f"{iteration_folder(self.t)}/pairs{suffix}.jsonl",
            compute,
            lambda path: read_pairs(path, groups),
            lambda path, pairs: write_pairs(path, pairs, groups),
            stage="pair",
            metrics=lambda pairs, _: stage_metrics.pairing(pairs, identical, groups, self.objective),
        )

    def _anchor_logps(self, anchor: Source | Mixture, compared: Comparisons) -> AnchorLogps | None:
        """The anchor's log-probs of all responses, cached; None for a live anchor.

        All responses are scored, also those in no pair: KL estimates need those that the oracle did not choose.
        """
        groups, first = compared.groups, self.run.initial
        sampled_from_policy = policy_of(compared.policy) is not None  # what a mixture samples with is not its log-prob
        scores = {first: self._score(first, compared)}
        if sampled_from_policy:
            self.metrics.setdefault("kl_to_initial", kl_estimate(groups, scores[first]))
        if self.algorithm.anchor == "live" and not isinstance(anchor, Mixture):
            return None

        def scored(source: Source) -> AnchorLogps:
            if source not in scores:
                scores[source] = self._score(source, compared)
            return scores[source]

        if isinstance(anchor, Mixture):
            share, pairs = anchor.share, zip(scored(anchor.initial), scored(anchor.policy))
            reference = [share * initial + (1 - share) * policy for initial, policy in pairs]
        else:
            reference = scored(anchor)
        if sampled_from_policy:
            self.metrics.setdefault("kl_to_anchor", kl_estimate(groups, reference))
        return reference

    def _score(self, source: Source, compared: Comparisons) -> AnchorLogps:
        run, groups, is_initial = self.run, compared.groups, source == self.run.initial
        model = "initial" if is_initial else Path(source).name  # or auxiliary, or policy
        file = model if is_initial else f"{Path(source).parent.name}_{model}"

        def compute() -> AnchorLogps:
            with progress(f"iteration {self.t}: score {model}", len(groups)) as done:
                epoch = self._plan(compared.pairs, 1)
                return score_as_in_fit(run.policies(source), groups, epoch, self.fitting, done, run.world)

        return run.cache.cached(
            f"{iteration_folder(self.t)}/logps_{file}{compared.suffix}.jsonl",
            compute,
            lambda path: read_scores(path, groups),
            write_scores,
            stage="score",
            prepare=lambda: run.policies(source),
            metrics=lambda scores, seconds: stage_metrics.scoring(groups, model, seconds),
        )
