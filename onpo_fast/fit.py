"""The minimal training loop: one argmin of an objective over an iteration's pairs, measured from an anchor."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from .config import FitConfig
from .data import Group, Pair
from .errors import UserError
from .loss import PairLossOutput, choose_backend, fused_linear_pair_loss
from .models.checks import probe
from .models.device import device_of, to_device
from .models.policy import Policy, disagreement, token_group
from .objectives import Objective
from .packing import Layout, Packed, TokenGroup, microbatches, pack
from .run import signals
from .run.fit_states import NO_STATE, FitStates, not_a_state
from .run.tracking import peak_memory_bytes

Anchor = Sequence[Tensor] | Policy  # summed log-probs, a (K,) tensor a group, nats; or the frozen policy itself
Batch = dict[int, list[Pair]]  # one optimizer step: its groups, by index, with their pairs


def check_backend(backend: str, device: str) -> None:
    """Raises ``UserError`` if --loss_backend cannot run on --device."""
    try:
        choose_backend(backend, device_of(device), torch.float32)  # bfloat16 runs where this does
    except ValueError as error:
        raise UserError(f"--loss_backend {backend}: {error}") from None


def plan(pairs: Sequence[Pair], epochs: int, batch_pairs: int, seed: Sequence[int]) -> list[Batch]:
    """The optimizer steps of a fit: groups shuffled every epoch, whole ones until a step has its pairs."""
    pairs_of: Batch = {}
    for pair in pairs:
        pairs_of.setdefault(pair.group, []).append(pair)
    batches: list[Batch] = []
    for epoch in range(epochs):
        order = sorted(pairs_of)
        random.Random(f"{list(seed)} epoch {epoch}").shuffle(order)
        batch: Batch = {}
        for group in order:
            batch[group] = pairs_of[group]
            if _count(batch) >= batch_pairs:
                batches.append(batch)
                batch = {}
        if batch:
            batches.append(batch)
    return batches


def fit(
    policy: Policy,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    anchor: Anchor,
    objective: Objective,
    config: FitConfig,
    on_step: Callable[[dict[str, float | None]], None],
    checkpoints: FitStates | None = None,
    starts_at_anchor: bool = False,
) -> None:
    """Trains ``policy`` in place towards argmin E[objective(D(π) − D(anchor))].

    Args:
        groups: the iteration's preference groups.
        batches: the comparisons of every optimizer step, from ``plan``.
        anchor: its summed log-probs, cached; or the anchor itself, which must not be ``policy``.
        on_step: told the metrics of every optimizer step.
        checkpoints: where the fit goes on from, if there is one; saved as often as they say, and when a signal asks.
        starts_at_anchor: whether ``policy`` is the anchor so far: then the first step's log-probs must be the anchor's,
            and are compared with them.

    Raises:
        UserError: if they are not, to the tolerance of ``disagreement``: whatever was fitted would be wrong.
        UserError: if more than ``config.max_skipped_steps`` steps in a row, or all of them, had a loss or a gradient
            that is not finite (such a step leaves the weights as they are), or if the policy is not finite in the end.
            The saved states are removed: from there a lower learning rate would come too late.
        Stopped: if a signal asked for it, after the step, with its state saved.
    """
    model = policy.model
    policy.begin_fit()
    fused = policy.device.type == "cuda"  # what it would otherwise take in passing is as large as the gradients
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
    )
    schedule = _cosine_with_warmup(optimizer, round(config.warmup_ratio * len(batches)), len(batches))
    done = skipped = 0  # steps; of them the last in a row without a finite gradient
    if checkpoints and (state := checkpoints.restore(model, optimizer)):
        try:
            done, skipped = state["step"], int(state["skipped"])
            schedule.load_state_dict(state["schedule"])
        except NO_STATE as error:
            raise UserError(not_a_state(checkpoints.journal.directory / checkpoints.name, error)) from error

    def give_up(reason: str) -> NoReturn:
        if checkpoints:
            checkpoints.clear()
        raise UserError(reason)

    for step, batch in enumerate(batches[done:], done + 1):
        start = time.perf_counter()
        metrics = _Metrics(objective)
        for part in _microbatches(policy, groups, batch, config):
            microbatch = MicroBatch.prepare(groups, part, anchor, policy.layout).to(policy.device)
            output = _compare(policy, microbatch, anchor, objective, config)
            # one sum for the whole batch: a mean of means would weigh micro-batches, not pairs
            (output.loss * (_weight(part) / _weight(batch))).backward()
            metrics.add(microbatch, output)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        summary = metrics.summary(gradient_norm=norm)
        if step == 1 and starts_at_anchor and (differ := metrics.differ_from_anchor(policy.compute_dtype)):
            give_up(
                f"step 1 of {len(batches)}: the fit starts at its anchor, but its log-probs differ from the anchor's "
                f"{differ}: the family {policy.family} computes something else in training than in scoring"
            )
        skipped = 0 if None not in (summary["gradient_norm"], summary["loss"]) else skipped + 1
        if skipped > min(config.max_skipped_steps, len(batches) - 1):
            often = "in any step" if skipped == len(batches) else f"for {skipped} steps in a row (--max_skipped_steps)"
            give_up(
                f"step {step} of {len(batches)}: no finite loss and gradient {often}; lower --learning_rate, or look "
                "for log-probs that are not finite in the model"
            )
        if skipped:
            optimizer.zero_grad(set_to_none=True)
        optimizer.step()  # without gradients it is none; the schedule warns where it is not called
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        on_step(
            {
                "step": step,
                "steps": len(batches),
                **summary,
                "tokens_per_second": metrics.tokens / seconds,
                "pairs_per_second": _count(batch) / seconds,
                "learning_rate": rate,
                "skipped": int(skipped > 0),
                "peak_memory_bytes": peak_memory_bytes(policy.device),
                "seconds": seconds,
            }
        )
        if step < len(batches):  # after the last one the policy itself is saved
            stop = signals.asked()  # once: a signal that comes later stops the next step, with its state saved
            if checkpoints:
                checkpoints.record_written()
                if stop or checkpoints.due(step):
                    checkpoints.save(step, model, optimizer, {"skipped": skipped, "schedule": schedule.state_dict()})
                if stop:
                    checkpoints.finish()
            if stop:
                signals.stop_if_asked()
    try:
        probe(policy, "the fitted policy")
    except UserError as error:
        give_up(f"the fit diverged: {error}; lower --learning_rate")


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def _cosine_with_warmup(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> SequentialLR:
    """Up in ``warmup`` steps, the first of which is not at 0, then down along a cosine."""
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, CosineAnnealingLR(optimizer, max(1, steps - warmup))], milestones=[warmup])


def _count(batch: Batch) -> int:
    return sum(map(len, batch.values()))


def _weight(batch: Batch) -> float:
    return sum(pair.weight for pairs in batch.values() for pair in pairs)


def _microbatches(policy: Policy, groups: Sequence[Group], batch: Batch, config: FitConfig) -> Iterator[Batch]:
    members = list(batch)
    tokens = [_compared_tokens(groups[g], batch[g]) for g in members]
    for chosen in microbatches(tokens, policy.layout, config.tokens_per_microbatch, policy.rotary_boundary):
        yield {members[m]: batch[members[m]] for m in chosen}


def _used(pairs: Sequence[Pair]) -> list[int]:
    """The responses of a group that are in a pair: the others need no pass through the model."""
    return sorted({response for pair in pairs for response in (pair.winner, pair.loser)})


def _compared_tokens(group: Group, pairs: Sequence[Pair]) -> TokenGroup:
    prompt, responses = token_group(group)
    return prompt, [responses[r] for r in _used(pairs)]


@dataclass(frozen=True)
class MicroBatch:
    """P pairs of S responses that go through the model together.

    It is prepared on the host and sent to the device before the forward pass, so that nothing here waits for the device
    between there and the end of the backward pass. (With separate rows the model itself does: transformers looks
    whether there is padding.)
    """

    packed: Packed
    pairs: Tensor  # (P, 2) int64 on the CPU, where the loss plans its work: (winner, loser) indices of responses
    winner: Tensor  # (P,) int64: the same on the device, for the metrics
    loser: Tensor  # (P,) int64
    preference: Tensor  # (P,) float64 labels
    weight: Tensor  # (P,) float64
    ref_logps: Tensor | None  # (S,) float64: a cached anchor's log-probs, nats

    @classmethod
    def prepare(cls, groups: Sequence[Group], batch: Batch, anchor: Anchor, layout: Layout) -> MicroBatch:
        """All of it on the host."""
        packed = pack([_compared_tokens(groups[g], pairs) for g, pairs in batch.items()], layout)
        indices, preference, weight, compared = [], [], [], []
        for g, pairs in batch.items():
            used = _used(pairs)
            row = {response: len(compared) + i for i, response in enumerate(used)}
            indices += [(row[pair.winner], row[pair.loser]) for pair in pairs]
            preference += [pair.preference for pair in pairs]
            weight += [pair.weight for pair in pairs]
            compared += [(g, response) for response in used]
        cached = None if isinstance(anchor, Policy) else [float(anchor[g][response]) for g, response in compared]
        winner, loser = zip(*indices)
        return cls(
            packed,
            torch.tensor(indices),
            torch.tensor(winner),
            torch.tensor(loser),
            torch.tensor(preference, dtype=torch.float64),
            torch.tensor(weight, dtype=torch.float64),
            None if cached is None else torch.tensor(cached, dtype=torch.float64),
        )

    def to(self, device: torch.device) -> MicroBatch:
        """Everything but ``pairs`` on the device."""
        columns = (self.winner, self.loser, self.preference, self.weight, self.ref_logps)
        moved = (None if column is None else to_device(column, device) for column in columns)
        return MicroBatch(self.packed.to(device), self.pairs, *moved)


def _compare(
    policy: Policy, microbatch: MicroBatch, anchor: Anchor, objective: Objective, config: FitConfig
) -> PairLossOutput:
    """The micro-batch through the model and the loss."""
    packed = microbatch.packed
    with policy.autocast():
        reference: dict[str, Tensor | None] = {"ref_logps": microbatch.ref_logps}
        if isinstance(anchor, Policy):
            with torch.no_grad():
                head = anchor.head
                reference = {
                    "ref_hidden": anchor.hidden_states(packed),
                    "ref_weight": head["weight"],
                    "ref_bias": head["bias"],
                }
        return fused_linear_pair_loss(
            policy.hidden_states(packed),
            targets=packed.targets,
            cu_seqlens=packed.cu_seqlens,
            pairs=microbatch.pairs,
            objective=objective,
            preference=microbatch.preference,
            pair_weight=microbatch.weight,
            backend=config.loss_backend,
            mode=config.loss_mode,
            **reference,
            **policy.head,
        )


class _Metrics:
    """The pairs of a step, a column a metric. They stay on the device until ``summary`` reads them, all at once."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.tokens = 0  # packed
        self.logps: list[Tensor] = []  # a micro-batch each: (2, S), the responses' log-probs and the anchor's, nats
        self.cu_seqlens: list[Tensor] = []  # (S+1,), the responses' boundaries, on the CPU
        self.columns: dict[str, list[Tensor]] = {}

    def add(self, microbatch: MicroBatch, output: PairLossOutput) -> None:
        winner, loser, preference = microbatch.winner, microbatch.loser, microbatch.preference
        ratio = output.logps - output.ref_logps
        margins = output.margins.double()
        self.tokens += microbatch.packed.input_ids.numel()
        columns = {
            "weight": microbatch.weight,
            "loss": self.objective.loss(margins, preference),
            "margin": margins,
            "target": self.objective.target(preference),
            "pair_accuracy": (margins.sign() + 1) / 2,  # a tie is half right
            "logp_winner": output.logps[winner],
            "logp_loser": output.logps[loser],
            "log_ratio_winner": ratio[winner],
            "log_ratio_loser": ratio[loser],
        }
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column.double())
        self.logps.append(torch.stack([output.logps.double(), output.ref_logps.double()]))
        self.cu_seqlens.append(microbatch.packed.cu_seqlens)

    def differ_from_anchor(self, dtype: torch.dtype) -> str | None:
        """How the responses' log-probs differ from the anchor's, in words; None if they do not."""
        tokens = torch.cat([boundaries.diff() for boundaries in self.cu_seqlens])
        return disagreement(*torch.cat(self.logps, 1).cpu(), tokens, dtype)

    def summary(self, **more: Tensor) -> dict[str, float | None]:
        """Means over pairs, the loss also normalised, and ``more`` scalars; None where a number is not finite, as DPO's
        target for a sure label is."""
        columns = {name: torch.cat(parts) for name, parts in self.columns.items()}
        weight = columns.pop("weight")
        scalars = {name: (column * weight).sum() / weight.sum() for name, column in columns.items()}
        scalars |= {name: value.double() for name, value in more.items()}
        values = dict(zip(scalars, torch.stack(list(scalars.values())).tolist()))
        values["loss_normalised"] = values["loss"] / self.objective.normaliser
        return {name: _finite(value) for name, value in values.items()}
