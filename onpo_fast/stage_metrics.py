"""What metrics.jsonl says of the stages of an iteration but the fits, whose steps are in ``fit_metrics``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import oracles
from .data import Group, Pair
from .device_memory import highest_peak_bytes
from .objectives import Objective


def sampling(groups: Sequence[Group], seconds: float, device: torch.device) -> dict[str, object]:
    """Metrics of sampling."""
    responses = [response for group in groups for response in group.responses]
    tokens = sum(len(response.tokens) for response in responses)
    return {
        "seconds": seconds,
        "responses": len(responses),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "response_tokens_mean": tokens / len(responses),
        "stopped_by_length": float(np.mean([response.stop_reason == "length" for response in responses])),
        "peak_memory_bytes": highest_peak_bytes(device),
    }


def judging(
    preferences: Sequence[np.ndarray],
    cost: dict[str, float],
    pairs: Sequence[oracles.IndexPairs] | None = None,
) -> dict[str, object]:
    """Metrics of judging; ``cost`` is its seconds and the oracle's counters."""
    if pairs is not None:
        return cost | {"comparisons": sum(map(len, pairs))}
    cyclic, triples = oracles.cyclic_triples(preferences)
    return cost | {
        "triples": triples,
        "cyclic_triples": cyclic / triples if triples else None,
        "comparisons": sum(len(p) * (len(p) - 1) // 2 for p in preferences),
    }


def pairing(pairs: Sequence[Pair], identical: int, groups: Sequence[Group], objective: Objective) -> dict[str, object]:
    """Metrics of pairing; ``identical`` is the number of pairs that were dropped."""
    labels = torch.tensor([one.preference for one in pairs], dtype=torch.float64)
    weights = torch.tensor([one.weight * one.importance for one in pairs], dtype=torch.float64)
    losses = objective.loss(torch.zeros_like(labels), labels)  # all margins 0
    untrained = (weights * losses).sum() / weights.sum() / objective.normaliser
    return {
        "untrained_loss": float(untrained),
        "pairs": len(pairs),
        "identical_pairs": identical,
        "prompts_without_pairs": len(groups) - len({one.group for one in pairs}),
        "empty_responses": sum(not response.text.strip() for group in groups for response in group.responses),
    }


def scoring(groups: Sequence[Group], model: str, seconds: float) -> dict[str, object]:
    """Metrics of scoring."""
    tokens = sum(len(response.tokens) for group in groups for response in group.responses)
    return {"model": model, "seconds": seconds, "tokens_per_second": tokens / seconds}
