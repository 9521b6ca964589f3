"""Batches of a fit: which groups are in an optimizer step, and its micro-batches as tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .data import Group, Pair
from .models.policy import Policy, token_group
from .models.scoring import LabelledPairs
from .packing import Layout, Packed, TokenGroup, microbatches, pack

AnchorLogps = Sequence[Tensor]  # summed log-probs of all responses under a cached anchor, a (K,) tensor a group, nats
Batch = dict[int, list[Pair]]  # index of a group -> its pairs


def plan_steps(pairs: Sequence[Pair], epochs: int, batch_pairs: int, seed: Sequence[int]) -> list[Batch]:
    """Returns the batch of every optimizer step: whole groups in a random order, until there are enough pairs.

    Later epochs have the batches of the first in other orders, so that a micro-batch is the same in all of them: in
    half precision a response's log-prob depends on what it is computed with.

    Args:
        batch_pairs: pairs of a step; its last group may exceed it, and the last step of an epoch may have fewer.
        seed: of the order.
    """
    pairs_of: Batch = {}
    for pair in pairs:
        pairs_of.setdefault(pair.group, []).append(pair)
    order = sorted(pairs_of)
    random.Random(f"{list(seed)} epoch 0").shuffle(order)
    batches: list[Batch] = []
    for group in order:
        if not batches or count(batches[-1]) >= batch_pairs:
            batches.append({})
        batches[-1][group] = pairs_of[group]
    steps = list(batches)
    for epoch in range(1, epochs):
        random.Random(f"{list(seed)} epoch {epoch}").shuffle(batches)
        steps += batches
    return steps


def count(batch: Batch) -> int:
    """Returns the number of pairs."""
    return sum(map(len, batch.values()))


def total_weight(batch: Batch) -> float:
    """Returns the sum of the pairs' weights, by which the loss of a step is divided."""
    return sum(pair.weight for pairs in batch.values() for pair in pairs)


def total_importance(batch: Batch) -> float:
    """Returns the sum of what the pairs' losses count, each by its weight."""
    return sum(pair.weight * pair.importance for pairs in batch.values() for pair in pairs)


def divided_alike(batches: Sequence[Batch]) -> list[Batch]:
    """Returns the steps of a fit with losses that are divided by their mean weight, instead of each by its own.

    Pairs that were drawn stand for all pairs only together: a step with more draws than others must count more. So the
    mean over the steps of an epoch is the mean over draws, and an unbiased estimate of the mean over all pairs.
    """
    weight = sum(map(total_weight, batches)) / len(batches)
    found = []
    for batch in batches:
        factor = total_weight(batch) / weight  # a step divides by its own weight
        found.append({g: [replace(one, importance=one.importance * factor) for one in own] for g, own in batch.items()})
    return found


def split(
    policy: Policy, groups: Sequence[Group], batch: Batch, tokens_per_microbatch: int, ranks: int = 1
) -> list[Batch]:
    """Splits a batch into micro-batches of whole groups with at most so many packed tokens, if a group has no more.

    Their number is a multiple of that of the ranks, which take them in turn, unless there are too few groups.
    """
    members = list(batch)
    tokens = [compared_tokens(groups[g], batch[g]) for g in members]
    chosen = list(microbatches(tokens, policy.layout, tokens_per_microbatch, policy.rotary_boundary))
    wanted = min(-(-len(chosen) // ranks) * ranks, len(members))
    while len(chosen) < wanted:
        largest = max(range(len(chosen)), key=lambda part: len(chosen[part]))
        half = len(chosen[largest]) // 2
        chosen[largest : largest + 1] = [chosen[largest][:half], chosen[largest][half:]]
    return [{members[m]: batch[members[m]] for m in part} for part in chosen]


def compared(pairs: Sequence[Pair]) -> list[int]:
    """Returns the responses of a group that are in a pair; the others need no forward pass."""
    return sorted({response for pair in pairs for response in (pair.winner, pair.loser) if response is not None})


def compared_tokens(group: Group, pairs: Sequence[Pair]) -> TokenGroup:
    prompt, responses = token_group(group)
    return prompt, [responses[r] for r in compared(pairs)]


@dataclass(frozen=True)
class MicroBatch:
    """Responses that go through the model together, and their labelled pairs.

    It is prepared on the host and copied to the device before the forward pass, so that nothing synchronises between
    there and the end of the backward pass.
    """

    packed: Packed
    labelled: LabelledPairs
    responses: list[tuple[int, int] | None]  # group and index of each of the S responses; None for an empty one

    @classmethod
    def prepare(
        cls, groups: Sequence[Group], batch: Batch, anchor_logps: AnchorLogps | None, layout: Layout
    ) -> MicroBatch:
        """Makes the tensors of a micro-batch on the host; ``anchor_logps`` is None for a live anchor, or for scoring.

        A pair without a loser gets an empty response, whose log-prob is 0, right after its winner: the two are then a
        preference group of their own, and the loss takes groups in chunks without moving rows.
        """
        packed = pack([compared_tokens(groups[g], pairs) for g, pairs in batch.items()], layout)
        boundaries, edges = packed.cu_seqlens.tolist(), [0]
        pairs, labels, weights = [], [], []
        responses: list[tuple[int, int] | None] = []
        position = 0  # of the next response in the packed batch
        for g, own_pairs in batch.items():
            index, empty = {}, {}  # of the responses, and of the empty ones after them, in the micro-batch
            alone = {pair.winner for pair in own_pairs if pair.loser is None}
            for response in compared(own_pairs):
                position += 1
                index[response] = len(edges) - 1
                edges.append(boundaries[position])
                responses.append((g, response))
                if response in alone:
                    empty[response] = len(edges) - 1
                    edges.append(boundaries[position])
                    responses.append(None)
            for pair in own_pairs:
                loser = empty[pair.winner] if pair.loser is None else index[pair.loser]
                pairs.append((index[pair.winner], loser))
            labels += [pair.preference for pair in own_pairs]
            weights += [pair.weight * pair.importance for pair in own_pairs]
        packed = replace(packed, cu_seqlens=torch.tensor(edges, dtype=torch.int32))
        cached = None
        if anchor_logps is not None:
            cached = [0.0 if one is None else float(anchor_logps[one[0]][one[1]]) for one in responses]
        return cls(packed, LabelledPairs.make(pairs, labels, weights, cached), responses)

    def to(self, device: torch.device) -> MicroBatch:
        """Returns a copy on the device, except for the boundaries and pairs that the loss reads on the CPU."""
        return replace(self, packed=self.packed.to(device), labelled=self.labelled.to(device))
