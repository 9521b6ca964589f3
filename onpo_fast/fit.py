"""The training loop of one fit: the argmin of an objective over an iteration's pairs, measured from an anchor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from . import signals
from .batches import AnchorLogps, Batch, MicroBatch, compared, count, split, total_importance, total_weight
from .config import FitConfig
from .data import Group
from .device import device_of
from .device_memory import highest_peak_bytes
from .distributed import World
from .errors import UserError
from .fit_metrics import StepMetrics
from .fit_precision import KeptMargins
from .loss import PairLossOutput, choose_backend
from .models.checks import probe
from .models.optimizers import make_optimizer
from .models.policy import Policy, score
from .models.precision import random_stream
from .models.scoring import PairLossOptions
from .models.sharding import ShardedPolicy
from .objectives import Objective
from .out_of_memory import TokenBudget, naming_settings
from .run.fit_states import NO_STATE


class FitFailed(UserError):
    """A fit that has no useful result. Its saved states are removed, as going on from them would fail again."""


class States(Protocol):
    """Saves the state of a fit and restores it; ``run.fit_states`` has the implementation."""

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None: ...
    def due(self, step: int) -> bool: ...
    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None: ...
    def record_written(self) -> None: ...
    def finish(self) -> None: ...
    def clear(self) -> None: ...
    def describe_error(self, error: Exception) -> str: ...


def check_backend(backend: str, device: str) -> None:
    """Raises ``UserError`` if --loss_backend cannot run on --device."""
    try:
        choose_backend(backend, device_of(device), torch.float32)  # a backend that takes float32 also takes bfloat16
    except ValueError as error:
        raise UserError(f"--loss_backend {backend}: {error}") from None


def fit(
    policy: Policy,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    anchor_logps: AnchorLogps | None,
    objective: Objective,
    config: FitConfig,
    on_step: Callable[[dict[str, float | None]], None],
    states: States | None = None,
    starts_at_anchor: bool = False,
    live_anchor: Policy | None = None,
    seed: Sequence[int] = (),
    world: World | None = None,
) -> Policy | None:
    """Trains ``policy`` in place towards argmin E[objective(D(π) − D(anchor))].

    If the policy is saved in less precision than its weights have, they are rounded after the last step, so that they
    are those on the disk.

    Several ranks, all of which call this function, take the micro-batches of a step in turn. They shard the weights;
    those of LoRA each rank has whole. The gradient is that of one process up to rounding.

    Args:
        groups: the iteration's preference groups.
        batches: the pairs of every optimizer step, from ``plan_steps``.
        anchor_logps: the anchor's log-probs of all responses; None with ``live_anchor``.
        on_step: called with the metrics of every optimizer step.
        states: saves the state of the fit; if there is one already, training continues from it. If a signal asks the
            run to stop, the state is saved after the step.
        starts_at_anchor: whether ``policy`` equals the anchor now. The log-probs of the first step must then be the
            anchor's.
        live_anchor: the anchor itself, frozen, in place of its log-probs. It must not be ``policy``.
        seed: of stochastic rounding; that of a step depends on nothing but this and the step.
        world: the ranks of the run.

    Returns:
        The fitted policy, on rank 0; None on the others.

    Raises:
        FitFailed: if the log-probs of the first step are not the anchor's, to the tolerance of ``disagreement``, though
            the fit starts there; if more than ``config.max_skipped_steps``
            consecutive steps, or all of them, had a loss or gradient that is not finite, of which each leaves the
            weights as they are; or if the fitted policy is not finite.
        Stopped: if a signal asks the run to stop.
    """
    world = world or World()
    kept = KeptMargins(policy, groups, batches[0], config) if world.is_main else None
    if world.size > 1 and policy.adapter is None:  # the base of adapters stays whole on every rank
        policy = ShardedPolicy.of(policy, world.mesh)
    training = _Training(policy, config, len(batches), seed, world)
    if states:
        training.restore(states)
    loss = PairLossOptions(
        objective, live_anchor.scoring if live_anchor else None, config.loss_backend, config.loss_mode
    )
    try:
        for step, batch in enumerate(batches[training.step :], training.step + 1):
            start = time.perf_counter()
            metrics = training.budget.retry(
                lambda batch=batch: _backward(policy, groups, batch, anchor_logps, loss, training.budget, world),
                undo=lambda: policy.model.zero_grad(set_to_none=True),  # of the whole step: a part may be in them
            )
            if step == 1 and starts_at_anchor:
                _check_starts_at_anchor(policy, metrics, len(batches))
            summary = training.update(batch, metrics, start)
            if step == len(batches):
                training.release_optimizer()
                fitted = policy.whole() if isinstance(policy, ShardedPolicy) else policy
                summary |= world.from_main(lambda whole: kept.end(whole, (*seed, 0)), fitted)
            on_step(summary)
            if step < len(batches):  # after the last step the policy itself is saved
                training.save_or_stop(states)
        if reason := world.from_main(_divergence, fitted):
            raise FitFailed(f"the fit diverged: {reason}; lower --learning_rate")
    except FitFailed:
        if states:
            states.clear()
        raise
    return fitted if world.is_main else None


def _divergence(fitted: Policy) -> str | None:
    """Returns what is not finite in a fitted policy; None if all is."""
    try:
        probe(fitted, "the fitted policy")
    except UserError as error:
        return str(error)
    return None


@torch.no_grad()
def score_as_in_fit(
    policy: Policy,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    config: FitConfig,
    progress: Callable[[int], None] = lambda n: None,
    world: World | None = None,
) -> list[Tensor]:
    """Returns the summed log-probs of every response, those in a pair as a fit on these batches computes them.

    They go through the model in the fit's own micro-batches and through the head as in its loss. In half precision a
    response's log-prob depends on both, by whole nats for a long response (docs/tuning.md), and margins would begin at
    that difference. Responses in no pair follow in micro-batches of their own.

    Args:
        batches: the steps of one epoch, in which each group occurs once.
        progress: called with the number of groups of every micro-batch.
        world: the ranks of the run. Each has the policy whole, and scores the micro-batches that it has in a fit.

    Returns:
        A (K,) float64 CPU tensor a group, nats; complete on rank 0 only.
    """
    world = world or World()
    scores = [torch.zeros(len(group.responses), dtype=torch.float64) for group in groups]
    found: list[tuple[list[tuple[int, int] | None], Tensor]] = []  # tensors on the device, read once at the end
    loss = PairLossOptions(None, backend=config.loss_backend, mode=config.loss_mode)
    policy.model.eval()
    budget = TokenBudget(config.token_budget)
    for batch in batches:
        found += budget.retry(lambda batch=batch: list(_scored(policy, groups, batch, loss, budget, world)))
        progress(len(batch))
    own = [(responses, logps.cpu()) for responses, logps in found]
    for responses, logps in itertools.chain(*world.gather(own)):
        for one, logp in zip(responses, logps):
            if one is not None:
                scores[one[0]][one[1]] = logp
    rest = list(_score_rest(policy, groups, batches, config, world))
    for g, responses, logps in itertools.chain(*world.gather(rest)):
        scores[g][responses] = logps
    progress(len(groups) - sum(map(len, batches)))
    return scores


def _scored(
    policy: Policy, groups: Sequence[Group], batch: Batch, loss: PairLossOptions, budget: TokenBudget, world: World
) -> Iterator[tuple[list[tuple[int, int] | None], Tensor]]:
    """Yields the responses of this rank's micro-batches of a step, and their summed log-probs on the device."""
    for part in world.deal(split(policy, groups, batch, budget.tokens, world.size)):
        microbatch = MicroBatch.prepare(groups, part, None, policy.layout).to(policy.device)
        budget.running = microbatch.packed.input_ids.numel(), len(part)
        yield microbatch.responses, _forward(policy, microbatch, loss)


def _score_rest(
    policy: Policy, groups: Sequence[Group], batches: Sequence[Batch], config: FitConfig, world: World
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Yields this rank's groups with responses that are in no pair: the group's index, theirs, and their log-probs."""
    in_pairs = {g: compared(pairs) for batch in batches for g, pairs in batch.items()}
    rest = {g: sorted({*range(len(group.responses))} - {*in_pairs.get(g, ())}) for g, group in enumerate(groups)}
    rest = dict(world.deal([(g, responses) for g, responses in rest.items() if responses]))
    left = [replace(groups[g], responses=[groups[g].responses[r] for r in chosen]) for g, chosen in rest.items()]
    yield from zip(rest, rest.values(), score(policy, left, config.token_budget))


def _backward(
    policy: Policy,
    groups: Sequence[Group],
    batch: Batch,
    anchor_logps: AnchorLogps | None,
    loss: PairLossOptions,
    budget: TokenBudget,
    world: World,
) -> StepMetrics:
    """Adds the gradient of the batch's mean loss to the parameters, a micro-batch at a time.

    Every rank has equally many, since each gathers weights and reduces gradients with the others.
    """
    metrics = StepMetrics(loss.objective)
    parts = split(policy, groups, batch, budget.tokens, world.size)
    for index in range(world.rank, -(-len(parts) // world.size) * world.size, world.size):
        is_spare = index >= len(parts)  # none is left for this rank: a dummy of weight 0
        part = parts[-1 if is_spare else index]
        microbatch = MicroBatch.prepare(groups, part, anchor_logps, policy.layout).to(policy.device)
        budget.running = microbatch.packed.input_ids.numel(), len(part)
        output = _forward(policy, microbatch, loss)
        # micro-batches differ in size: a mean of their means would not be the mean over pairs. Gradients are the
        # mean over ranks
        share = 0.0 if is_spare else total_importance(part) / total_weight(batch) * world.size
        (output.loss * share).backward()
        if not is_spare:
            metrics.add(microbatch, output)
    if not isinstance(policy, ShardedPolicy):
        world.average_gradients(one for one in policy.model.parameters() if one.requires_grad)
    metrics.gather(world)
    return metrics


def _forward(policy: Policy, microbatch: MicroBatch, loss: PairLossOptions) -> PairLossOutput | Tensor:
    """Computes the loss of a micro-batch, or its responses' log-probs."""
    with policy.autocast(cached=False):  # a cache would hold all weights in half precision beside the loss
        return policy.scoring(microbatch.packed, microbatch.labelled, loss)


def _check_starts_at_anchor(policy: Policy, metrics: StepMetrics, steps: int) -> None:
    if differ := metrics.difference_from_anchor(policy.compute_dtype):
        raise FitFailed(
            f"step 1 of {steps}: the fit starts at its anchor, but its log-probs differ from the anchor's "
            f"{differ}: the family {policy.family} computes something else in training than in scoring"
        )


class _Training:
    """The optimizer and learning rate schedule of a fit, and how many steps are finished."""

    def __init__(self, policy: Policy, config: FitConfig, steps: int, seed: Sequence[int], world: World) -> None:
        self.policy, self.config, self.steps, self.seed, self.world = policy, config, steps, seed, world
        self.budget = TokenBudget(config.token_budget)
        policy.begin_fit()
        self.optimizer = make_optimizer(policy, config)
        self.schedule = cosine_with_warmup(self.optimizer, round(config.warmup_ratio * steps), steps)
        self.step = 0  # finished steps
        self.skipped = 0  # how many of the last steps in a row were skipped

    def restore(self, states: States) -> None:
        """Continues from a saved state, if there is one.

        Raises:
            UserError: if the state does not fit.
        """
        state = states.restore(self.policy.model, self.optimizer)
        if state is None:
            return
        try:
            self.step, self.skipped = state["step"], int(state["skipped"])
            self.budget.tokens = min(self.budget.tokens, state.get("tokens_per_microbatch", self.budget.tokens))
            self.schedule.load_state_dict(state["schedule"])
        except NO_STATE as error:
            raise UserError(states.describe_error(error)) from error

    def update(self, batch: Batch, metrics: StepMetrics, start: float) -> dict[str, float | None]:
        """Takes the optimizer step, unless loss or gradient is not finite; returns the metrics of the step.

        Args:
            start: when the step began, by ``time.perf_counter``.

        Raises:
            FitFailed: if too many steps were skipped.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), self.config.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.world.size > 1:
            norm = norm.cpu()  # where the metrics of all ranks are
        rate = self.schedule.get_last_lr()[0]
        summary = metrics.summary(gradient_norm=norm)
        self.skipped = 0 if None not in (summary["gradient_norm"], summary["loss"]) else self.skipped + 1
        self.step += 1
        self._check_skipped()
        if self.skipped:
            self.optimizer.zero_grad(set_to_none=True)
        with random_stream((*self.seed, self.step), self.policy.device), naming_settings("the optimizer's step"):
            self.optimizer.step()  # does nothing without gradients, but the schedule warns if it is not called
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        return {
            "step": self.step,
            "steps": self.steps,
            **summary,
            "tokens_per_second": metrics.tokens / seconds,
            "pairs_per_second": count(batch) / seconds,
            "learning_rate": rate,
            "skipped": int(self.skipped > 0),
            "peak_memory_bytes": highest_peak_bytes(self.policy.device),
            "seconds": seconds,
        }

    def release_optimizer(self) -> None:
        """Frees the states of the optimizer, of which no more is needed after the last step."""
        del self.optimizer, self.schedule

    def _check_skipped(self) -> None:
        skipped = self.skipped
        if skipped > min(self.config.max_skipped_steps, self.steps - 1):
            often = "in any step" if skipped == self.steps else f"for {skipped} steps in a row (--max_skipped_steps)"
            raise FitFailed(
                f"step {self.step} of {self.steps}: no finite loss and gradient {often}; lower --learning_rate, or "
                "look for log-probs that are not finite in the model"
            )

    def save_or_stop(self, states: States | None) -> None:
        """Saves the state if it is due or a signal asks the run to stop; raises ``Stopped`` in the latter case."""
        # read once: a signal that comes later stops the run after the next step
        stop = self.world.largest(signals.asked())
        if states:
            states.record_written()
            if stop or states.due(self.step):
                rest = {
                    "skipped": self.skipped,
                    "schedule": self.schedule.state_dict(),
                    "tokens_per_microbatch": self.budget.tokens,
                }
                states.save(self.step, self.policy.model, self.optimizer, rest)
            if stop:
                states.finish()
        if stop:
            raise signals.Stopped(stop)


def cosine_with_warmup(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> SequentialLR:
    """Returns a schedule that rises linearly over ``warmup`` steps, the first above 0, then falls along a cosine."""
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, CosineAnnealingLR(optimizer, max(1, steps - warmup))], milestones=[warmup])
