"""The minimal training loop: one argmin of an objective over an iteration's pairs, against cached anchor log-probs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from .config import Config
from .data import Group, Pair
from .loss import PairLossOutput, fused_linear_pair_loss
from .objectives import Objective
from .packing import microbatches, pack
from .policy import Policy, token_group
from .tracking import peak_memory_bytes


@dataclass(frozen=True)
class Batch:
    """The groups of one optimizer step, and how many pairs they hold."""

    groups: list[int]
    pairs: int


def fit(
    policy: Policy,
    groups: Sequence[Group],
    pairs: Sequence[Pair],
    anchor: Sequence[Tensor],
    objective: Objective,
    *,
    epochs: int,
    seed: Sequence[int],
    config: Config,
    on_step: Callable[[dict[str, float]], None],
) -> None:
    """Trains ``policy`` in place towards argmin E[objective(D(π) − D(anchor))].

    Args:
        groups: the iteration's preference groups.
        pairs: comparisons within them.
        anchor: summed log-probs of the anchor, a (K,) tensor a group, nats.
        epochs: passes over the pairs.
        seed: of the order of the groups.
        on_step: told the metrics of every optimizer step.
    """
    pairs_of: dict[int, list[Pair]] = {}
    for pair in pairs:
        pairs_of.setdefault(pair.group, []).append(pair)
    batches = list(_batches(pairs_of, epochs, config.batch_pairs, seed))
    model = policy.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    warmup = round(config.warmup_ratio * len(batches))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))

    for step, batch in enumerate(batches, 1):
        start = time.perf_counter()
        metrics = _Metrics(objective)
        # one count of pairs for the whole batch: the mean of means would weigh micro-batches, not pairs
        for chosen in _microbatches(groups, batch.groups, policy, config):
            output, preference, tokens = _forward(policy, groups, pairs_of, anchor, objective, chosen, config)
            (output.loss * (len(preference) / batch.pairs)).backward()
            metrics.add(output, preference, tokens)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        on_step(
            {
                "step": step,
                "steps": len(batches),
                **metrics.summary(seconds),
                "gradient_norm": float(norm),
                "learning_rate": rate,
                "peak_memory_bytes": peak_memory_bytes(policy.device),
                "seconds": seconds,
            }
        )


def steps(pairs: Sequence[Pair], epochs: int, batch_pairs: int) -> int:
    """Optimizer steps that ``fit`` will take."""
    counts: dict[int, list[Pair]] = {}
    for pair in pairs:
        counts.setdefault(pair.group, []).append(pair)
    return sum(1 for _ in _batches(counts, epochs, batch_pairs, [0]))


def _batches(pairs_of: dict[int, list[Pair]], epochs: int, batch_pairs: int, seed: Sequence[int]) -> Iterator[Batch]:
    """Whole groups, shuffled every epoch, until a batch has its pairs. Counted without a draw: one shuffle an epoch."""
    for epoch in range(epochs):
        order = sorted(pairs_of)
        random.Random(f"{list(seed)} epoch {epoch}").shuffle(order)
        chosen: list[int] = []
        count = 0
        for group in order:
            chosen.append(group)
            count += len(pairs_of[group])
            if count >= batch_pairs:
                yield Batch(chosen, count)
                chosen, count = [], 0
        if chosen:
            yield Batch(chosen, count)


def _microbatches(groups: Sequence[Group], chosen: list[int], policy: Policy, config: Config) -> Iterator[list[int]]:
    tokens = [token_group(groups[g]) for g in chosen]
    for members in microbatches(tokens, policy.layout, config.tokens_per_microbatch):
        yield [chosen[m] for m in members]


def _forward(
    policy: Policy,
    groups: Sequence[Group],
    pairs_of: dict[int, list[Pair]],
    anchor: Sequence[Tensor],
    objective: Objective,
    chosen: list[int],
    config: Config,
) -> tuple[PairLossOutput, Tensor, int]:
    """The loss of a micro-batch, its labels (P,), and its packed tokens."""
    device = policy.device
    packed = pack([token_group(groups[g]) for g in chosen], policy.layout).to(device)
    indices, preference, first = [], [], 0
    for g in chosen:
        indices += [(first + pair.winner, first + pair.loser) for pair in pairs_of[g]]
        preference += [pair.preference for pair in pairs_of[g]]
        first += len(groups[g].responses)
    labels = torch.tensor(preference, dtype=torch.float64, device=device)
    with policy.autocast():
        output = fused_linear_pair_loss(
            policy.hidden_states(packed),
            targets=packed.targets,
            cu_seqlens=packed.cu_seqlens,
            pairs=torch.tensor(indices),
            objective=objective,
            ref_logps=torch.cat([anchor[g] for g in chosen]).to(device),
            preference=labels,
            backend=config.loss_backend,
            **policy.head,
        )
    pair_index = torch.tensor(indices, device=device)
    return output, torch.cat([labels[:, None], pair_index], 1), packed.input_ids.numel()


class _Metrics:
    """Sums over the pairs of a step."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.tokens = 0
        self.columns: list[dict[str, Tensor]] = []

    def add(self, output: PairLossOutput, labelled: Tensor, tokens: int) -> None:
        preference, winner, loser = labelled[:, 0], labelled[:, 1].long(), labelled[:, 2].long()
        ratio = output.logps - output.ref_logps
        self.tokens += tokens
        self.columns.append(
            {
                "loss": output.loss.detach().double().expand(len(preference)),
                "margin": output.margins.double(),
                "target": self.objective.target(preference),
                "pair_accuracy": (output.margins.sign() + 1).double() / 2,  # a tie is half right
                "logp_winner": output.logps[winner].double(),
                "logp_loser": output.logps[loser].double(),
                "log_ratio_winner": ratio[winner].double(),
                "log_ratio_loser": ratio[loser].double(),
            }
        )

    def summary(self, seconds: float) -> dict[str, float | None]:
        """Means over pairs; the loss also normalised, so that runs compare."""
        joined = {name: torch.cat([c[name] for c in self.columns]) for name in self.columns[0]}
        means: dict[str, float | None] = {name: float(column.mean()) for name, column in joined.items()}
        if not torch.isfinite(joined["target"]).all():
            means["target"] = None
        return {
            "loss": means.pop("loss"),
            "loss_normalised": float(joined["loss"].mean()) / self.objective.normaliser,
            **means,
            "tokens_per_second": self.tokens / seconds,
            "pairs_per_second": len(joined["loss"]) / seconds,
        }
