"""Algorithm 1 of ONPO (arXiv 2502.16852), top to bottom.

    python -m onpo_fast.train --help

A policy plays itself. In each iteration it answers prompts, an oracle says how likely each answer beats each other one,
and two least-squares fits take the optimistic mirror-descent step:

    π′_{t+1} = argmin_π E (D(π) − D(π′_t)     − η/2)²        D(π) = log π(y_w) − log π(y_l)
    π_{t+1}  = argmin_π E (D(π) − D(π′_{t+1}) − η/2)²        on the same pairs (y_w, y_l) from π_t

One model is in memory at a time: an anchor is a column of numbers, one log-prob a response (``--anchor live`` keeps the
anchor itself instead). Every stage writes its files whole before the next one starts. Left out: a value model, a reward
model.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from . import config as configuration
from . import oracles
from .checkpoint import atomic_write_text
from .config import Config
from .data import (
    Group,
    Messages,
    Pair,
    prompts_of_iteration,
    split_prompts,
    write_groups,
    write_pairs,
    write_preferences,
    write_prompts,
)
from .errors import UserError, command
from .evaluate import HELD_OUT, evaluate, initial_policy, summary
from .fit import Anchor, fit, plan
from .objectives import Objective
from .pairing import pair
from .policy import Policy, kl_estimate, load, score
from .report import write_report
from .sampling import make_sampler
from .tracking import Tracker, console, environment, peak_memory_bytes, progress

Scores = list[torch.Tensor]  # summed log-probs, a (K,) tensor a group, nats
Source = str | Path  # where a policy's weights are


def train(config: Config) -> dict:
    """Runs Algorithm 1 and returns the evaluation. Every file is in ``config.out``, which must be new or empty."""
    run = Run(config)
    policy = auxiliary = run.initial  # π_1 = π′_1
    objective = config.make_objective()

    for t in range(1, config.iterations + 1):
        groups = run.sample(t, policy)  # y_1 … y_K ~ π_t
        preferences = run.judge(t, groups)  # P(y_i ≻ y_j)
        pairs = run.pair(t, groups, preferences)  # D_t
        if objective.optimistic:
            anchor = run.anchor(t, objective, auxiliary, groups)
            start = auxiliary if config.fit_start == "anchor" else policy
            auxiliary = run.fit(t, "auxiliary", start, groups, pairs, anchor, objective)  # π′_{t+1}
            start = auxiliary if config.fit_start == "anchor" else policy
            if config.second_fit == "chained":
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

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = Path(config.out)
        # everything that a typo can break, before anything is written
        _check_unused(self.directory)
        self.oracle = oracles.load(config.oracle)
        self.prompts, held_out = split_prompts(config.prompts, config.eval_prompts, config.eval_fraction, config.seed)
        self.resident: tuple[Source, Policy] | None = None
        policy = self.load(config.model)
        for prompt in [*self.prompts, *held_out]:
            policy.render(prompt, config.max_new_tokens)
        _make(self.directory)
        self.initial = initial_policy(self.directory, config)
        if policy.converted:  # dequantised once, and kept: what π_1 was is then in the run itself
            self.initial = self.directory / "initial"
            policy.save(self.initial)
            self.resident = (self.initial, policy)
        write_prompts(self.directory / HELD_OUT, held_out)
        atomic_write_text(self.directory / "config.yaml", config.to_yaml())
        atomic_write_text(self.directory / "environment.json", json.dumps(environment(self.device), indent=1) + "\n")
        self.tracker = Tracker(self.directory)
        self.seconds: dict[str, float] = {}
        self.numbers: dict[str, float | None] = {}
        console.print(
            f"{config.objective} on {config.model} ({self.device}), {len(self.prompts)} prompts to train on and "
            f"{len(held_out)} held out, oracle {config.oracle}, into {self.directory}"
        )
        if len(self.prompts_of(1)) < config.prompts_per_iteration:
            console.print(
                f"{len(self.prompts_of(1))} prompts an iteration, not {config.prompts_per_iteration}: there are no more"
            )

    @property
    def device(self) -> torch.device:
        return self.resident[1].device

    def load(self, source: Source) -> Policy:
        """The policy from here, and no other: at most one model is in memory."""
        if self.resident is None or self.resident[0] != source:
            self.resident = None
            self.resident = (source, load(source, self.config))
        return self.resident[1]

    # Stages, in the order of an iteration ----------------------------------------------------------------------------

    def sample(self, t: int, source: Source) -> list[Group]:
        config, prompts, policy = self.config, self.prompts_of(t), self.load(source)
        start = time.perf_counter()
        with progress(f"iteration {t}: sample", len(prompts) * config.responses_per_prompt) as done:
            groups = make_sampler(policy, config)(prompts, config.responses_per_prompt, [config.seed, 0, t], done)
        write_groups(self.path(t) / "responses.jsonl", groups)
        responses = [response for group in groups for response in group.responses]
        tokens = sum(len(response.tokens) for response in responses)
        self.numbers = {"response_tokens_mean": tokens / len(responses)}
        seconds = self.spent("sample", start)
        self.tracker.log(
            "sample", t, seconds=seconds, responses=len(responses), tokens=tokens,
            tokens_per_second=tokens / seconds, response_tokens_mean=tokens / len(responses),
            stopped_by_length=float(np.mean([r.stop_reason == "length" for r in responses])),
            peak_memory_bytes=peak_memory_bytes(self.device),
        )  # fmt: skip
        return groups

    def judge(self, t: int, groups: list[Group]) -> list[np.ndarray]:
        start = time.perf_counter()
        with progress(f"iteration {t}: judge", len(groups)) as done:
            preferences = oracles.judge(self.oracle, groups, self.config.oracle, done)
        write_preferences(self.path(t) / "preferences.jsonl", preferences)
        cyclic, triples = oracles.cyclic_triples(preferences)
        share = cyclic / triples if triples else None
        self.numbers["cyclic_triples"] = share
        self.tracker.log(
            "judge", t, seconds=self.spent("judge", start), triples=triples, cyclic_triples=share,
            comparisons=sum(len(p) * (len(p) - 1) // 2 for p in preferences),
        )  # fmt: skip
        return preferences

    def pair(self, t: int, groups: list[Group], preferences: list[np.ndarray]) -> list[Pair]:
        pairs = pair(preferences, self.config.pairing, self.config.labels, [self.config.seed, 2, t])
        write_pairs(self.path(t) / "pairs.jsonl", pairs, groups)
        identical = sum(
            groups[p.group].responses[p.winner].tokens == groups[p.group].responses[p.loser].tokens for p in pairs
        )
        self.tracker.log("pair", t, pairs=len(pairs), identical_pairs=identical)
        return pairs

    def anchor(self, t: int, objective: Objective, source: Source, groups: list[Group]) -> Anchor:
        """What the margins of a fit are measured from: the policy that is updated, or π_1, or INPO's mixture of both.

        Cached, its log-probs of all responses, also those in no pair: KL estimates need the ones that the oracle did
        not choose. Live, the policy itself.
        """
        if "kl_to_initial" not in self.numbers:  # once an iteration
            self.initial_logps = self._score(t, self.initial, groups)
            self.numbers["kl_to_initial"] = kl_estimate(groups, self.initial_logps)
        share = objective.initial_share
        if self.config.anchor == "live":
            return load(self.initial if share == 1 else source, self.config).frozen()
        known = source == self.initial or share == 1
        current = self.initial_logps if known else self._score(t, source, groups)
        anchor = [share * first + (1 - share) * now for first, now in zip(self.initial_logps, current)]
        self.numbers.setdefault("kl_to_anchor", kl_estimate(groups, anchor))
        return anchor

    def fit(
        self, t: int, name: str, source: Source, groups: list[Group], pairs: list[Pair], anchor: Anchor,
        objective: Objective,
    ) -> Path:  # fmt: skip
        """One argmin over D_t; returns where the fitted policy is."""
        config = self.config
        policy = self.load(source)
        start = time.perf_counter()
        self.resident = None  # its weights are about to change
        epochs = config.epochs_auxiliary if name == "auxiliary" else config.epochs_policy
        # the same seed for both fits of an iteration: they see the pairs in the same order
        batches = plan(pairs, epochs, config.batch_pairs, [config.seed, 3, t])
        with progress(f"iteration {t}: fit {name}", len(batches)) as done:

            def on_step(metrics: dict) -> None:
                self.tracker.log("fit", t, fit=name, **metrics)
                self.numbers[f"loss {name}"] = metrics["loss_normalised"]
                done(1)

            fit(policy, groups, batches, anchor, objective, config, on_step)
        target = self.path(t) / name
        policy.save(target)
        self.resident = (target, policy)
        self.spent(f"fit {name}", start)
        return target

    def end_iteration(self, t: int) -> None:
        stages, self.seconds = self.seconds, {}
        names = ("response_tokens_mean", "cyclic_triples", "kl_to_initial", "kl_to_anchor")
        numbers = {name: self.numbers.get(name) for name in names}
        to_anchor = numbers["kl_to_anchor"]  # known where the anchor was scored
        self.tracker.log("iteration", t, seconds=sum(stages.values()), stage_seconds=stages, **numbers)
        losses = ", ".join(f"{k} {v:.3f}" for k, v in self.numbers.items() if k.startswith("loss "))
        console.print(
            f"iteration {t}: {losses} (normalised), KL to π_1 {numbers['kl_to_initial']:.2f} nats"
            f"{'' if to_anchor is None else f' and to the anchor {to_anchor:.2f}'}, "
            f"{numbers['response_tokens_mean']:.0f} tokens a response, "
            f"{sum(stages.values()):.0f} s"
        )

    def finish(self) -> dict:
        self.resident = None
        result = evaluate(self.directory, self.config, self.tracker)
        self.tracker.close()
        report = write_report(self.directory)
        table = Table("row against column", *result["policies"], title="Win rates on held-out prompts")
        for name, row in zip(result["policies"], result["win_rate"]):
            table.add_row(name, *(f"{rate:.3f}" for rate in row))
        console.print(table)
        console.print(summary(result))
        console.print(f"report: {report}")
        return result

    # Shared by the stages -------------------------------------------------------------------------------------------

    def path(self, t: int) -> Path:
        return self.directory / f"iteration_{t:02d}"

    def spent(self, stage: str, start: float) -> float:
        seconds = time.perf_counter() - start
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        return seconds

    def prompts_of(self, t: int) -> list[Messages]:
        config = self.config
        return prompts_of_iteration(self.prompts, t, config.iterations, config.prompts_per_iteration)

    def _score(self, t: int, source: Source, groups: list[Group]) -> Scores:
        name = "initial" if source == self.initial else Path(source).name  # or auxiliary, or policy
        policy = self.load(source)
        start = time.perf_counter()
        with progress(f"iteration {t}: score {name}", len(groups)) as done:
            scores = score(policy, groups, self.config.tokens_per_microbatch, done)
        seconds = self.spent("score", start)
        tokens = sum(len(r.tokens) for group in groups for r in group.responses)
        self.tracker.log("score", t, model=name, seconds=seconds, tokens_per_second=tokens / seconds)
        return scores


def _check_unused(directory: Path) -> None:
    """A run directory that holds anything is somebody's."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"--out {directory} is not empty: give a new directory")


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {directory}: cannot make it ({error})") from None


@command
def main(argv: list[str]) -> None:
    train(configuration.parse(argv))


if __name__ == "__main__":
    main()
