"""The check of responses that another program has sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SamplingConfig
from ..data import Group
from ..errors import UserError
from ..models.policy import Policy, disagreement, score


def check(policy: Policy, groups: Sequence[Group], config: SamplingConfig) -> dict[str, float]:
    """Raises ``UserError`` if the log-probs of responses are not those of the policy."""
    scored = torch.cat(score(policy, groups, 4096))
    responses = [response for group in groups for response in group.responses]
    sampled = torch.tensor([response.logp for response in responses], dtype=torch.float64)
    tokens = torch.tensor([len(response.tokens) for response in responses])
    if differ := disagreement(sampled, scored, tokens, policy.compute_dtype):
        raise UserError(f"the log-probs of --sampler {config.sampler} differ from those of the policy {differ}")
    return {}
