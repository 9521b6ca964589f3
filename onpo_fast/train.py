"""Algorithm 1 of ONPO (arXiv 2502.16852), top to bottom.

    python -m onpo_fast.train --help
    python -m onpo_fast.train --resume --out DIR

A policy plays itself. In each iteration it answers prompts, an oracle says how likely each answer beats each other one,
and two least-squares fits take the optimistic mirror-descent step:

    π′_{t+1} = argmin_π E (D(π) − D(π′_t)     − η/2)²        D(π) = log π(y_w) − log π(y_l)
    π_{t+1}  = argmin_π E (D(π) − D(π′_{t+1}) − η/2)²        on the same pairs (y_w, y_l) from π_t

One model is in memory at a time: an anchor is a column of numbers, one log-prob a response (``--anchor live`` keeps the
anchor itself instead). Every stage reads files, writes its own whole, and is passed over when they are there: that is
what resuming is. Left out: a value model, a reward model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from . import config as configuration
from . import oracles
from .config import Config, JudgeConfig, ModelConfig, OracleConfig
from .data import (
    Group,
    Messages,
    Pair,
    Skipped,
    prompts_digest,
    prompts_of_iteration,
    read_groups,
    read_pairs,
    read_preferences,
    read_scores,
    split_prompts,
    write_groups,
    write_pairs,
    write_preferences,
    write_prompts,
    write_scores,
)
from .errors import UserError, command, printable
from .evaluate import HELD_OUT, INITIAL, PARTS, evaluate, summary
from .files import MOST_LINES_BYTES, PARTIAL, atomic_write_text, checksum, is_amount, parse_json, read_regular
from .fit import check_backend, fit, plan
from .models.loading import load, locate
from .models.policy import PINNED_DATE, Policy, disagreement, kl_estimate, score
from .objectives import Objective
from .pairing import distinct, pair
from .report import is_evaluation, write_report
from .run import signals
from .run.fingerprint import changes, model_fingerprint
from .run.fit_states import Checkpoints
from .run.journal import Journal, not_made
from .run.lock import LOCK, locked
from .run.parts import Parts
from .run.tracking import Tracker, check_reporter, console, counted, environment, peak_memory_bytes, progress, say
from .sampling import TruncationWarning, all_truncated, make_sampler

MANY_PROMPTS = 2000  # that to render takes seconds

Scores = list[torch.Tensor]  # summed log-probs, a (K,) tensor a group, nats
Source = str | Path  # where a policy's weights are
Anchor = Scores | Source  # cached, or live


def train(config: Config, resume: bool = False, force: bool = False) -> dict:
    """Runs Algorithm 1 and returns the evaluation. Every file is in ``config.out``, which must be new or empty.

    With ``resume`` it goes on with the run that is there, to the end that it would have had, bit for bit where the
    device computes the same bits twice (a CPU with as many threads does). ``force``: also from another model.
    """
    with Run(config, resume, force) as run:
        policy = auxiliary = run.initial  # π_1 = π′_1
        objective = config.make_objective()

        for t in range(1, config.iterations + 1):
            groups = run.sample(t, policy)  # y_1 … y_K ~ π_t
            preferences = run.judge(t, groups)  # P(y_i ≻ y_j)
            pairs = run.pair(t, groups, preferences)  # D_t
            if objective.optimistic:
                anchor = run.anchor(t, objective, auxiliary, groups)
                start = auxiliary if config.objective != "onpo_from_policy" else policy
                auxiliary = run.fit(t, "auxiliary", start, groups, pairs, anchor, objective)  # π′_{t+1}
                start = auxiliary if config.objective != "onpo_from_policy" else policy
                if config.objective != "onpo_direct":
                    anchor = run.anchor(t, objective, auxiliary, groups)
                    policy = run.fit(t, "policy", start, groups, pairs, anchor, objective)  # π_{t+1}
                else:
                    policy = run.fit(t, "policy", start, groups, pairs, anchor, doubled(objective))
            else:
                anchor = run.anchor(t, objective, policy, groups)
                policy = run.fit(t, "policy", policy, groups, pairs, anchor, objective)
            run.end_iteration(t)

        return run.finish()


def doubled(objective: Objective) -> Objective:
    """Both steps of an iteration at once: the target of two fits, against the anchor of the first."""
    return replace(objective, eta=2 * objective.eta)


class Run:
    """The stages of a run: each reads the last one's results, shows its progress, and leaves its files."""

    def __init__(self, config: Config, resume: bool = False, force: bool = False) -> None:
        self.config = config
        self.directory = Path(config.out)
        # everything that a typo can break, before anything is written
        _check_directory(self.directory, resume)
        self.oracle = oracles.load(
            config.oracle,
            config.section(OracleConfig),
            config.section(JudgeConfig),
            config.section(ModelConfig),
            self.directory,
        )
        check_reporter(config.report_to)
        check_backend(config.loss_backend, config.device)
        self.resident: tuple[Source, Policy] | None = None
        self.to_judge = _anything_to_judge(self.directory, config)
        skipped = Skipped() if config.skip_bad_prompts else None
        self.prompts, held_out, rendering = self._read_prompts(skipped)
        policy = self.load(config.model)
        self.device, self.compute_dtype, self.family = policy.device, policy.compute_dtype, policy.family
        self.vocabulary = policy.vocabulary
        self.lock = locked(self.directory, "--out ")
        try:
            self._open_directory(policy, held_out, rendering, resume, force)
        except BaseException:  # whoever keeps the exception would keep the lock
            self.lock.release()
            raise
        counts = {"train": len(self.prompts), "held_out": len(held_out), "skipped": skipped.count if skipped else 0}
        if not self.tracker.begin("prompts", keep=lambda record: counts.items() <= record.items()):
            self.tracker.log("prompts", 0, **counts)
        self.notes: dict[str, dict] = {}  # on the outputs of the iteration so far
        self.numbers: dict[str, float | None] = {}  # of the iteration so far, for its summary
        self.truncation = TruncationWarning()
        self._say_what_starts(policy, held_out, skipped)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def _read_prompts(self, skipped: Skipped | None) -> tuple[list[Messages], list[Messages], str]:
        """The prompts to train on, those held out, and a SHA-256 of the tokens of all: templates may write the date.

        Each is checked against the model. The oracle is tried on each kind of conversation among them.
        """
        config = self.config
        tried: set[frozenset[str]] = set()  # kinds of conversation
        rendered = hashlib.sha256()

        def usable(prompts: list[Messages]) -> list[Messages]:
            kinds = oracles.shortest_by_kind(prompts) if self.to_judge else {}
            if new := {kind: prompt for kind, prompt in kinds.items() if kind not in tried}:
                locate(config.model)  # a typo comes before minutes of loading
                if oracles.holds_model(self.oracle):
                    self.resident = None  # at most one model is in memory
                oracles.probe(self.oracle, config.oracle, list(new.values()), in_directory=False)
                tried.update(new)
            policy = self.load(config.model)
            shown = progress("check the prompts", len(prompts)) if len(prompts) > MANY_PROMPTS else nullcontext()
            with shown as done:
                listed = counted(prompts, done) if done else prompts
                return policy.usable(listed, config.max_new_tokens, skipped, rendered)

        prompts, held_out = split_prompts(
            config.prompts,
            config.eval_prompts,
            config.eval_fraction,
            config.seed,
            config.prompt_column,
            skipped,
            usable,
        )
        return prompts, held_out, rendered.hexdigest()

    def _open_directory(
        self, policy: Policy, held_out: list[Messages], rendering: str, resume: bool, force: bool
    ) -> None:
        """Checks that the run there is this one, and writes what a run has from its first moment on."""
        config = self.config
        _check_directory(self.directory, resume)
        self.journal = Journal(self.directory)
        self.journal.before_record.append(self.lock.check)
        if self.journal.mended:
            say(f"the first file of the journal in {self.directory} is damaged or gone: its copy is taken")
        checksum_once = functools.cache(checksum)  # the policy and the oracle may be the same model
        model = model_fingerprint(config.model, getattr(policy.model.config, "_commit_hash", None), checksum_once)
        oracle = oracles.fingerprint(self.oracle, config.oracle, checksum_once)
        prompts = {"sha256": prompts_digest(self.prompts, held_out)}
        inputs = {"model": model, "oracle": oracle, "prompts": prompts, "rendering": {"sha256": rendering}}
        self._check_inputs(inputs, force)
        self.made_by = ({name: value for name, value in asdict(config).items() if name != "out"}, model)
        self.oracle_files = oracle
        self.judged_by = (*self.made_by, oracle)
        # before config.yaml: from its first file on, a run can say what it began with
        self.journal.begin({"options": asdict(config), **inputs})
        atomic_write_text(self.directory / configuration.CONFIG_FILE, config.to_yaml())
        if self.to_judge and oracles.keeps_files(self.oracle):  # it may do so from here on
            shortest = min([*self.prompts, *held_out], key=oracles.length)
            oracles.probe(self.oracle, config.oracle, [shortest], in_directory=True)
        self.initial = self._keep_initial(policy)
        write_prompts(self.directory / HELD_OUT, held_out)
        atomic_write_text(self.directory / "environment.json", json.dumps(environment(self.device), indent=1) + "\n")
        self.tracker = Tracker(self.directory, config.report_to, asdict(config))
        self.journal.before_record.append(self.tracker.sync)

    def _say_what_starts(self, policy: Policy, held_out: list[Messages], skipped: Skipped | None) -> None:
        config = self.config
        say(
            f"{config.objective} on {config.model} ({self.device}, {policy.attention} attention), {len(self.prompts)} "
            f"prompts to train on and {len(held_out)} held out, oracle {config.oracle}, into {self.directory}"
        )
        for note in policy.notes:
            say(note)
        if skipped and skipped.count:
            say(str(skipped))
        for notice in policy.template_notices(self.prompts):
            say(f"note: {notice}")
        if len(self.prompts_of(1)) < config.prompts_per_iteration:
            say(
                f"{len(self.prompts_of(1))} prompts an iteration, not {config.prompts_per_iteration}: there are no more"
            )

    def _keep_initial(self, policy: Policy) -> Source:
        """Where π_1 is. One that was dequantised is kept in the run, which then can say what it was."""
        if not policy.converted:
            self.journal.forget_records(INITIAL)  # of another model that the run began with
            return self.config.model
        kept = self.directory / INITIAL
        if self.journal.note(INITIAL) is None:
            policy.save(kept)
            self.journal.record(INITIAL)
        self.resident = (kept, policy)
        return kept

    def load(self, source: Source) -> Policy:
        """The policy from here, and no other: at most one model is in memory."""
        if self.resident is None or self.resident[0] != source:
            self.resident = None
            self.resident = (source, load(source, self.config))
        return self.resident[1]

    def made(self, name: str, keep: Callable[[dict], bool] = lambda record: False) -> bool:
        """Whether this output is there from before. If not, its stage is to run, and logs anew but for ``keep``."""
        signals.stop_if_asked()
        note = self.journal.note(name)
        if note is None:
            if self.journal.damaged(name):
                say(f"{name} is not what it was: it is made again")
            self.tracker.begin(name, keep)
            return False
        if not _is_note(note):
            raise UserError(not_made(self.journal, name))
        self.notes[name] = note
        return True

    def whole(self, name: str, keep: Callable[[dict], bool] = lambda record: False) -> bool:
        """``made``, of an output that is made in parts."""
        made = self.made(name, keep)
        if made:
            Parts(self.journal, name).clear()  # a kill may have come between the record and this
        return made

    def complete(self, name: str, file: bool = True, **note) -> None:
        """The output is there, or an iteration has ended."""
        self.journal.record(name, note, file)
        self.notes[name] = note

    # Stages, in the order of an iteration ----------------------------------------------------------------------------

    def sample(self, t: int, source: Source) -> list[Group]:
        self.notes, self.numbers = {}, {}
        name = f"{self.name(t)}/responses.jsonl"
        if self.whole(name):
            groups = read_groups(self.directory / name, vocabulary=self.vocabulary)
            self.truncation.said |= all_truncated(groups)  # when it was sampled
        else:
            groups = self._sample(t, source, name)
            self.truncation(f"iteration {t}", self.load(source), groups, self.config.max_new_tokens)
        if t == 1:
            self._check_sampled(groups)
        lengths = [len(response.tokens) for group in groups for response in group.responses]
        self.numbers["response_tokens_mean"] = sum(lengths) / len(lengths)
        return groups

    def _check_sampled(self, groups: list[Group]) -> None:
        """What π_1 said of its responses when it was sampled must be what it is scored by; it is scored anyway."""
        scores = self._score(1, self.initial, groups)
        tokens = torch.tensor([len(response.tokens) for group in groups for response in group.responses])
        sampled = torch.tensor([response.logp for group in groups for response in group.responses], dtype=torch.float64)
        if differ := disagreement(sampled, torch.cat(scores), tokens, self.compute_dtype):
            raise UserError(
                f"the log-probs that {self.config.model} (family {self.family}) generates with differ from those that "
                f"it is scored by {differ}: it would learn from wrong numbers. Another version of "
                "transformers, or kernels that the family can use (mamba-ssm, causal-conv1d), may agree"
            )

    def _sample(self, t: int, source: Source, name: str) -> list[Group]:
        config, prompts, count = self.config, self.prompts_of(t), self.config.responses_per_prompt
        sampler, parts = make_sampler(self.load(source), config), Parts(self.journal, name, self.made_by)
        with progress(f"iteration {t}: sample", len(prompts) * count) as done:
            groups, spent = parts.make(
                prompts,
                Parts.sampling_size(config.sampling_batch_size, count),
                lambda part, first: sampler(part, count, [config.seed, 0, t], done, first),
                write_groups,
                lambda file, part: read_groups(file, part, count, self.vocabulary),
                lambda known: done(known * count),
            )
        write_groups(self.directory / name, groups)
        responses = [response for group in groups for response in group.responses]
        tokens, seconds = sum(len(response.tokens) for response in responses), spent["seconds"]
        self.tracker.log(
            "sample",
            t,
            seconds=seconds,
            responses=len(responses),
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            response_tokens_mean=tokens / len(responses),
            stopped_by_length=float(np.mean([r.stop_reason == "length" for r in responses])),
            peak_memory_bytes=peak_memory_bytes(self.device),
        )
        self.complete(name, stage="sample", seconds=seconds)
        parts.clear()
        return groups

    def judge(self, t: int, groups: list[Group]) -> list[np.ndarray]:
        name = f"{self.name(t)}/preferences.jsonl"
        made = self.whole(name, keep=_stopped)
        preferences = read_preferences(self.directory / name, groups) if made else self._judge(t, groups, name)
        cyclic, triples = oracles.cyclic_triples(preferences)
        self.numbers["cyclic_triples"] = cyclic / triples if triples else None
        return preferences

    def _judge(self, t: int, groups: list[Group], name: str) -> list[np.ndarray]:
        parts = Parts(self.journal, name, self.judged_by)
        if oracles.holds_model(self.oracle):
            self.resident = None  # at most one model is in memory
        with progress(f"iteration {t}: judge", len(groups)) as done:
            try:
                preferences, spent = parts.make(
                    groups,
                    Parts.judging_size(len(groups)),
                    lambda part, first: oracles.judge(self.oracle, part, self.config.oracle, done, first),
                    write_preferences,
                    read_preferences,
                    done,
                    lambda: oracles.take_counters(self.oracle),
                )
            except Exception:
                if any((spent := oracles.take_counters(self.oracle)).values()):
                    self.tracker.log("judge", t, seconds=time.perf_counter() - parts.began, stopped=True, **spent)
                raise
        write_preferences(self.directory / name, preferences)
        cyclic, triples = oracles.cyclic_triples(preferences)
        self.tracker.log(
            "judge",
            t,
            **spent
            | {
                "triples": triples,
                "cyclic_triples": cyclic / triples if triples else None,
                "comparisons": sum(len(p) * (len(p) - 1) // 2 for p in preferences),
            },
        )
        self.complete(name, stage="judge", seconds=spent["seconds"])
        parts.clear()
        return preferences

    def pair(self, t: int, groups: list[Group], preferences: list[np.ndarray]) -> list[Pair]:
        name = f"{self.name(t)}/pairs.jsonl"
        if self.made(name):
            return read_pairs(self.directory / name, groups)
        chosen = pair(preferences, self.config.pairing, self.config.labels, [self.config.seed, 2, t])
        pairs = distinct(chosen, groups)
        if not pairs:
            raise UserError(
                f"iteration {t} has no pair to learn from: whatever was to be compared is the same response twice, for "
                f"each of {len(groups)} prompts. What was done is in {self.directory}; a higher --temperature, more "
                "--responses_per_prompt or a smaller step keep responses apart"
            )
        write_pairs(self.directory / name, pairs, groups)
        objective = self.config.make_objective()
        labels = torch.tensor([one.preference for one in pairs], dtype=torch.float64)
        untrained = objective.loss(torch.zeros_like(labels), labels).mean() / objective.normaliser  # all margins 0
        self.tracker.log(
            "pair",
            t,
            untrained_loss=float(untrained),
            pairs=len(pairs),
            identical_pairs=len(chosen) - len(pairs),
            prompts_without_pairs=len(groups) - len({p.group for p in pairs}),
            empty_responses=sum(not response.text.strip() for group in groups for response in group.responses),
        )
        self.complete(name)
        return pairs

    def anchor(self, t: int, objective: Objective, source: Source, groups: list[Group]) -> Anchor:
        """What the margins of a fit are measured from: the policy that is updated, or π_1, or INPO's mixture of both.

        Cached, its log-probs of all responses, also those in no pair: KL estimates need the ones that the oracle did
        not choose. Live, where the policy is: the fit loads it, and lets go of it.
        """
        share = objective.initial_share
        # the policy that the anchor is; a mixture is none, unless of π_1 with itself
        self.anchored_at = self.initial if share == 1 else source if share == 0 or source == self.initial else None
        initial = self._score(t, self.initial, groups)
        self.numbers.setdefault("kl_to_initial", kl_estimate(groups, initial))
        if self.config.anchor == "live":
            return self.initial if share == 1 else source
        known = source == self.initial or share == 1
        current = initial if known else self._score(t, source, groups)
        anchor = [share * first + (1 - share) * now for first, now in zip(initial, current)]
        self.numbers.setdefault("kl_to_anchor", kl_estimate(groups, anchor))
        return anchor

    def fit(
        self,
        t: int,
        name: str,
        source: Source,
        groups: list[Group],
        pairs: list[Pair],
        anchor: Anchor,
        objective: Objective,
    ) -> Path:
        """One argmin over D_t; returns where the fitted policy is."""
        config, output = self.config, f"{self.name(t)}/{name}"
        target = self.directory / output
        checkpoints = Checkpoints(
            self.journal, f"{output}.checkpoints", config.checkpoint_steps, 60 * config.checkpoint_minutes
        )
        before = checkpoints.step()
        if self.made(output, keep=lambda record: record["stage"] == "fit" and record["step"] <= before):
            checkpoints.clear()  # a kill may have come between the record and this
            return target
        policy = self.load(source)
        start = time.perf_counter()
        self.resident = None  # its weights are about to change
        epochs = config.epochs_auxiliary if name == "auxiliary" else config.epochs_policy
        # the same seed for both fits of an iteration: they see the pairs in the same order
        batches = plan(pairs, epochs, config.batch_pairs, [config.seed, 3, t])
        if before >= len(batches):  # the policy is saved after the last step, and no state
            raise UserError(
                f"{self.directory / checkpoints.name} has a state after step {before} of a fit of {len(batches)} "
                "steps: remove it, and --resume begins the fit again"
            )
        with progress(f"iteration {t}: fit {name}", len(batches), stoppable=False) as done:
            done(before)

            last = {}

            def on_step(metrics: dict) -> None:
                self.tracker.log("fit", t, fit=name, **metrics)
                last.update(metrics)
                done(1)

            reference = anchor if isinstance(anchor, list) else load(anchor, config).frozen()
            try:
                at_anchor = source == self.anchored_at
                fit(policy, groups, batches, reference, objective, config, on_step, checkpoints, at_anchor)
            except UserError as error:
                raise UserError(f"iteration {t}, fit {name}, {error}") from error
            finally:  # also when the fit has failed: a run that is resumed goes on from the newest state
                checkpoints.finish()
        policy.save(target)
        self.resident = (target, policy)
        seconds = time.perf_counter() - start
        self.complete(output, stage=f"fit {name}", seconds=seconds, loss=last["loss_normalised"])
        checkpoints.clear()
        return target

    def end_iteration(self, t: int) -> None:
        if self.made(self.name(t)):
            return
        stages: dict[str, float] = {}
        for note in self.notes.values():
            if "stage" in note:
                stages[note["stage"]] = stages.get(note["stage"], 0.0) + note["seconds"]
        names = ("response_tokens_mean", "cyclic_triples", "kl_to_initial", "kl_to_anchor")
        numbers = {name: self.numbers.get(name) for name in names}
        self.tracker.log("iteration", t, seconds=sum(stages.values()), stage_seconds=stages, **numbers)
        losses = ", ".join(
            f"loss {output.split('/')[-1]} {'not finite' if note['loss'] is None else format(note['loss'], '.3f')}"
            for output, note in self.notes.items()
            if "loss" in note
        )
        # + 0 makes 0 of -0; the anchor's is known where it was scored
        to_initial, to_anchor = (None if numbers[name] is None else round(numbers[name], 2) + 0 for name in names[2:])
        say(
            f"iteration {t}: {losses} (normalised), KL to π_1 {to_initial:.2f} nats"
            f"{'' if to_anchor is None else f' and to the anchor {to_anchor:.2f}'}, "
            f"{numbers['response_tokens_mean']:.0f} tokens a response, "
            f"{sum(stages.values()):.0f} s"
        )
        self.complete(self.name(t), file=False)

    def finish(self) -> dict:
        self.resident = None
        result = self.evaluation()
        self.tracker.close()
        report = write_report(self.directory)
        table = Table("row against column", *result["policies"], title="Win rates on held-out prompts")
        for name, row in zip(result["policies"], result["win_rate"]):
            table.add_row(name, *(f"{rate:.3f}" for rate in row))
        console.print(table)
        say(summary(result))
        say(f"report: {report}")
        return result

    def evaluation(self) -> dict:
        """Every policy against every other."""
        name, responses = "evaluation.json", "evaluation_responses.jsonl"
        if self.made(name, keep=_stopped) and self.journal.note(responses) is not None:
            try:
                result = parse_json(read_regular(self.directory / name, MOST_LINES_BYTES))
            except ValueError:
                result = None
            if is_evaluation(result) and len(result["policies"]) == self.config.iterations + 1:
                self.journal.forget_folder(PARTS)  # a kill may have come between the record and this
                return result
        self.journal.forget(name, responses)  # also of a run that was shorter then
        self.tracker.begin(name, keep=_stopped)
        return evaluate(self.directory, self.config, self.tracker, self.journal, self.truncation, self.oracle_files)

    # Shared by the stages -------------------------------------------------------------------------------------------

    def name(self, t: int) -> str:
        """Of an iteration's folder in the run directory."""
        return _iteration_name(t)

    def prompts_of(self, t: int) -> list[Messages]:
        config = self.config
        return prompts_of_iteration(self.prompts, t, config.iterations, config.prompts_per_iteration)

    def _score(self, t: int, source: Source, groups: list[Group]) -> Scores:
        model = "initial" if source == self.initial else Path(source).name  # or auxiliary, or policy
        where = model if source == self.initial else f"{Path(source).parent.name}_{model}"
        name = f"{self.name(t)}/logps_{where}.jsonl"
        if self.made(name):
            return read_scores(self.directory / name, groups)
        policy = self.load(source)
        start = time.perf_counter()
        with progress(f"iteration {t}: score {model}", len(groups)) as done:
            scores = score(policy, groups, self.config.tokens_per_microbatch, done)
        write_scores(self.directory / name, scores)
        seconds = time.perf_counter() - start
        tokens = sum(len(r.tokens) for group in groups for r in group.responses)
        self.tracker.log("score", t, model=model, seconds=seconds, tokens_per_second=tokens / seconds)
        self.complete(name, stage="score", seconds=seconds)
        return scores

    def _check_inputs(self, inputs: dict[str, dict[str, str]], force: bool) -> None:
        """A run goes on with the prompts that it began with, in the same tokens, the same π_1 and the same oracle."""
        began = {name: self.journal.note(name) or now for name, now in inputs.items()}
        if began["prompts"] != inputs["prompts"]:
            raise UserError(f"the prompts are not those that {self.directory} began with: start a new run")
        changed = changes(began["model"], inputs["model"])
        if changed and not force:
            raise UserError(
                f"--model {self.config.model} is not what {self.directory} began with: {', '.join(changed)} changed. "
                "Put it back, or add --force: what is done stays as it is, the rest goes by the new one"
            )
        changed = changes(began["oracle"], inputs["oracle"])
        if changed and not force:
            raise UserError(
                f"{oracles.title(self.config)} is not what {self.directory} began with: {', '.join(changed)} changed. "
                "Put it back, or add --force: what is judged stays as it is, the rest goes by the new one"
            )
        if began["rendering"] != inputs["rendering"] and not force:
            raise UserError(
                f"the chat template renders the prompts differently now than when {self.directory} began: one that "
                f"writes today's date does that. {PINNED_DATE}; here give it with --force and the day on which the run "
                "began. --force alone goes on as it is: the rest of the run has the new tokens"
            )


def _iteration_name(t: int) -> str:
    return f"iteration_{t:02d}"


def _anything_to_judge(directory: Path, config: Config) -> bool:
    """Whether a run has preferences or its evaluation still to make. If not, the oracle need not be there."""
    journal = Journal(directory)
    judged = (f"{_iteration_name(t)}/preferences.jsonl" for t in range(1, config.iterations + 1))
    return journal.note("evaluation.json") is None or any(journal.note(name) is None for name in judged)


def _is_note(note: dict) -> bool:
    """Whether it is what a run notes of an output: its stage with the seconds that it took, a fit its loss too."""
    if "stage" in note and not (isinstance(note["stage"], str) and is_amount(note.get("seconds"))):
        return False
    return note.get("loss") is None or (isinstance(note["loss"], float) and math.isfinite(note["loss"]))


def _stopped(record: dict) -> bool:
    """Whether it is of an oracle that did not come to an end: what it was asked has been paid for all the same."""
    return bool(record.get("stopped"))


JOURNALS = Journal.FILES + Journal.EARLIER_FILES


def _check_directory(directory: Path, resume: bool) -> None:
    """A run directory that holds anything is somebody's, unless it is a run, to go on with."""
    if resume and any((directory / name).exists() for name in (*JOURNALS, configuration.CONFIG_FILE)):
        return
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory} is a file: give a directory")
    # what a run leaves that was killed before it had a journal
    beginnings = (LOCK, *(name + PARTIAL for name in JOURNALS))
    if directory.exists() and any(path.name not in beginnings for path in directory.iterdir()):
        if resume:
            raise UserError(f"--out {directory} is not empty, and has no run to go on with: give a new directory")
        raise UserError(f"--out {directory} is not empty: give a new directory, or --resume to go on with it")


@command
def main(argv: list[str]) -> None:
    config, resume = configuration.parse_run(argv)
    signals.listen()
    try:
        train(config, resume, force="--force" in argv)
    except signals.Stopped as stopped:
        directory = printable(shlex.quote(config.out))
        trust = " --trust_run" if configuration.options_needing_trust(config) else ""
        console.print(f"{stopped}; to go on: python -m onpo_fast.train --resume --out {directory}{trust}")
        raise SystemExit(stopped.exit_status) from None


if __name__ == "__main__":
    main()
