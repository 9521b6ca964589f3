"""The stages of an iteration as plain functions: judge, pair, score, fit, and what is logged of each.

They take what they need and return what they made. ``language_game`` makes them resumable, through ``run.cache``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import fit as fitting
from . import oracles, pairing
from .config import AlgorithmConfig, FitConfig
from .data import Group, Pair
from .device_memory import highest_peak_bytes
from .distributed import World
from .errors import UserError
from .models.policy import Policy
from .models.policy import score as score_policy
from .objectives import Objective, Sppo
from .run.progress import Progress
from .run.tracking import progress
from .selection import Selected

Scores = list[Tensor]  # summed log-probs, a (K,) tensor a group, nats


def sampling_metrics(groups: Sequence[Group], seconds: float, device: torch.device) -> dict[str, object]:
    """What metrics.jsonl says of sampling."""
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


def judge(
    oracle: oracles.Oracle,
    groups: Sequence[Group],
    name: str,
    done: Progress,
    first: int = 0,
    pairs: Sequence[oracles.IndexPairs] | None = None,
) -> list[np.ndarray]:
    """The (K, K) matrix of P(y_i ≻ y_j) of every group; ``name`` is what messages call the oracle.

    With ``pairs``, only their entries mean something.
    """
    return oracles.judge(oracle, groups, name, done, first, pairs)


def judging_metrics(
    preferences: Sequence[np.ndarray],
    cost: dict[str, float],
    pairs: Sequence[oracles.IndexPairs] | None = None,
) -> dict[str, object]:
    """What metrics.jsonl says of judging; ``cost`` is its seconds and the oracle's counters."""
    if pairs is not None:
        return cost | {"comparisons": sum(map(len, pairs))}
    cyclic, triples = oracles.cyclic_triples(preferences)
    return cost | {
        "triples": triples,
        "cyclic_triples": cyclic / triples if triples else None,
        "comparisons": sum(len(p) * (len(p) - 1) // 2 for p in preferences),
    }


def pair(
    preferences: Sequence[np.ndarray],
    groups: Sequence[Group],
    objective: Objective,
    config: AlgorithmConfig,
    seed: Sequence[int],
    selected: Selected | None = None,
) -> tuple[list[Pair], int]:
    """The pairs to learn from, and how many pairs of identical responses were dropped.

    Those that were ``selected`` are all to learn from.

    Raises:
        UserError: if no pair is left.
    """
    if isinstance(objective, Sppo):  # each response by itself, against its win rate
        chosen = pairing.win_rate_pairs(preferences, config.labels, seed)
    elif selected is not None:
        chosen = pairing.label(selected, preferences, config.labels, seed)
    else:
        chosen = pairing.pair(preferences, config.pairing, config.labels, seed)
    pairs = pairing.drop_identical(chosen, groups)
    if not pairs:
        raise UserError(
            f"no pair to learn from: all responses that were to be compared are the same, for each of {len(groups)} "
            "prompts. A higher --temperature, more --responses_per_prompt or a smaller step keep responses apart"
        )
    return pairs, len(chosen) - len(pairs)


def pairing_metrics(
    pairs: Sequence[Pair], identical: int, groups: Sequence[Group], objective: Objective
) -> dict[str, object]:
    """What metrics.jsonl says of pairing; ``identical`` is the number of pairs that were dropped."""
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


def score(
    policy: Policy,
    groups: Sequence[Group],
    config: FitConfig,
    done: Progress,
    batches: Sequence[fitting.Batch] | None = None,
    world: World | None = None,
) -> Scores:
    """Summed log-probs of every response under the policy.

    With ``batches``, they are as a fit on them computes them, and complete on rank 0 only.
    """
    if batches is None:
        return score_policy(policy, groups, config.tokens_per_microbatch, done)
    return fitting.score(policy, groups, batches, config, done, world)


def scoring_metrics(groups: Sequence[Group], model: str, seconds: float) -> dict[str, object]:
    """What metrics.jsonl says of scoring."""
    tokens = sum(len(response.tokens) for group in groups for response in group.responses)
    return {"model": model, "seconds": seconds, "tokens_per_second": tokens / seconds}


def fit(
    policy: Policy,
    groups: Sequence[Group],
    batches: Sequence[fitting.Batch],
    anchor_logps: fitting.AnchorLogps | None,
    objective: Objective,
    config: FitConfig,
    *,
    title: str,
    on_step: Callable[[dict], None],
    states: fitting.States | None = None,
    finished: int = 0,
    starts_at_anchor: bool = False,
    live_anchor: Policy | None = None,
    seed: Sequence[int] = (),
    world: World | None = None,
) -> Policy | None:
    """Trains the policy in place towards the argmin over the pairs and returns it, on rank 0; see ``fit.fit``.

    Args:
        title: what the progress bar calls the fit.
        finished: optimizer steps that ``states`` has already.
    """
    with progress(title, len(batches), stoppable=False) as done:
        done(finished)

        def report(metrics: dict) -> None:
            on_step(metrics)
            done(1)

        return fitting.fit(
            policy,
            groups,
            batches,
            anchor_logps,
            objective,
            config,
            report,
            states,
            starts_at_anchor,
            live_anchor,
            seed,
            world,
        )
