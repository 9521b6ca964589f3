"""Metrics of an optimizer step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .batches import MicroBatch
from .distributed import World
from .loss import PairLossOutput
from .models.policy import disagreement
from .objectives import Objective


class StepMetrics:
    """Collects a step's metrics over its micro-batches. Tensors stay on the device until ``summary`` reads them."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.tokens = 0  # packed tokens, padding included
        self.logps: list[Tensor] = []  # (2, S) per micro-batch: log-probs of the policy and of the anchor, nats
        self.cu_seqlens: list[Tensor] = []  # (S+1,) per micro-batch: response boundaries, on the CPU
        self.columns: dict[str, list[Tensor]] = {}  # (P,) per micro-batch, for each metric of a pair

    def add(self, microbatch: MicroBatch, output: PairLossOutput) -> None:
        """Adds a micro-batch. The log-prob of a missing loser counts as 0."""
        labelled = microbatch.labelled
        winner, loser, preference = labelled.winner, labelled.loser, labelled.preference
        ratio = output.logps - output.ref_logps
        margins = output.margins.double()
        target = self.objective.target(preference)
        agreement = torch.where(target < 0, -margins, margins)  # SPPO's targets may be negative
        self.tokens += microbatch.packed.input_ids.numel()
        columns = {
            "weight": labelled.weight,
            "loss": self.objective.loss(margins, preference),
            "margin": margins,
            "target": target,
            "pair_accuracy": (agreement.sign() + 1) / 2,  # a tie counts as half
            "logp_winner": output.logps[winner],
            "logp_loser": output.logps[loser],
            "log_ratio_winner": ratio[winner],
            "log_ratio_loser": ratio[loser],
        }
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column.double())
        self.logps.append(torch.stack([output.logps.double(), output.ref_logps.double()]))
        self.cu_seqlens.append(microbatch.packed.cu_seqlens)

    def gather(self, world: World) -> None:
        """Collects the micro-batches of all ranks on the host, in the order in which they were dealt out."""
        if world.size == 1:
            return
        columns = {name: [part.cpu() for part in parts] for name, parts in self.columns.items()}
        own = self.tokens, columns, [part.cpu() for part in self.logps], self.cu_seqlens
        tokens, of_ranks, logps, cu_seqlens = zip(*world.gather_on_all(own))
        self.tokens = sum(tokens)
        names = max(of_ranks, key=len)  # a rank without a micro-batch has none
        self.columns = {name: _in_turn([one.get(name, []) for one in of_ranks]) for name in names}
        self.logps, self.cu_seqlens = _in_turn(logps), _in_turn(cu_seqlens)

    def difference_from_anchor(self, dtype: torch.dtype) -> str | None:
        """Describes how the responses' log-probs differ from the anchor's; None if they agree. See ``disagreement``."""
        tokens = torch.cat([boundaries.diff() for boundaries in self.cu_seqlens])
        ours, theirs = torch.cat(self.logps, 1).cpu()[:, tokens > 0]
        return disagreement(ours, theirs, tokens[tokens > 0], dtype)

    def summary(self, **scalars: Tensor) -> dict[str, float | None]:
        """Returns weighted means over the pairs, the normalised loss and the scalars, with one read of the device.

        A number that is not finite is None, as JSON has no such numbers; DPO's target for a certain label is one.
        """
        columns = {name: torch.cat(parts) for name, parts in self.columns.items()}
        weight = columns.pop("weight")
        means = {name: (column * weight).sum() / weight.sum() for name, column in columns.items()}
        means |= {name: value.double() for name, value in scalars.items()}
        values = dict(zip(means, torch.stack(list(means.values())).tolist()))
        values["loss_normalised"] = values["loss"] / self.objective.normaliser
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _in_turn(of_ranks: Sequence[list[Tensor]]) -> list[Tensor]:
    """Returns the tensors of all ranks: the first of each, then the second of each, and so on."""
    return [one for turn in itertools.zip_longest(*of_ranks) for one in turn if one is not None]
