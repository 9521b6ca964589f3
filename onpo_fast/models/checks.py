"""Checks of a loaded model: the log-probs that a run computes must be those that the model itself gives each row alone.

Kernels and sums have tests of their own, and the sampler checks generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import UserError
from ..out_of_memory import is_out_of_memory
from ..packing import Layout, Packed, TokenGroup, pack, row_length
from ..signals import Stopped
from .policy import Policy

# groups of different lengths; tokens are taken modulo the vocabulary
PROBE_GROUPS: list[TokenGroup] = [
    ([1, 2, 3], [[4, 5, 6], [7, 8, 9, 10]]),
    ([2, 5], [[6, 4], [3, 1]]),
    (list(range(11, 40, 2)), [list(range(12, 30, 3)), [8, 6, 5, 3, 9]]),
]
# for kernels that work in blocks of 128 tokens: 448 in a row with a shared prompt
LONG_GROUP: TokenGroup = (list(range(3, 153)), [list(range(5, 135)), list(range(300, 130, -1))])
# nats per token: larger than the differences of float32 rounding, smaller than those of any mistake that was seen
ROUNDING = 1e-3


@torch.no_grad()
def probe(policy: Policy, name: str) -> Tensor:
    """Returns log-probs of a few tokens, (N,) nats.

    Args:
        name: what errors call the policy.

    Raises:
        UserError: if a weight or a log-prob is not finite.
    """
    for weight, parameter in policy.model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the weights of {name} are not finite ({weight})")
    policy.model.eval()
    logps = probe_log_probs(policy, "separate")
    if not logps.isfinite().all():
        raise UserError(f"the weights of {name} are finite, but not its log-probs")
    return logps


@contextmanager
def computing(model: str) -> Iterator[None]:
    """Turns any error of a model's own code into a one-line ``UserError``, but for that of no memory."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:  # a model's code may be anybody's
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"{model} does not compute here: {type(error).__name__}: {reason}") from error


def _probe_groups(policy: Policy, long: bool = False) -> list[TokenGroup]:
    """Returns ``PROBE_GROUPS`` in the policy's vocabulary, without groups that exceed its context.

    Args:
        long: with ``LONG_GROUP``.
    """
    size, wanted = policy.head_rows, [*PROBE_GROUPS, LONG_GROUP] if long else PROBE_GROUPS
    groups = [
        (prompt, responses)
        for prompt, responses in wanted
        if row_length(prompt, [max(responses, key=len)]) <= policy.safe_length
    ] or PROBE_GROUPS[1:2]
    return [([t % size for t in prompt], [[t % size for t in r] for r in responses]) for prompt, responses in groups]


def probe_batch(policy: Policy, layout: Layout, long: bool = False) -> Packed:
    """Returns all groups of the probe in one batch, as in a run; with ``long`` one that spans several blocks too."""
    return pack(_probe_groups(policy, long), layout).to(policy.device)


@torch.no_grad()
def probe_log_probs(policy: Policy, layout: Layout, long: bool = False) -> Tensor:
    """Returns (N,) log-probs of the probe's response tokens, nats."""
    with policy.autocast():
        return policy.scoring(probe_batch(policy, layout, long))


@torch.no_grad()
def check_log_probs(policy: Policy, source: str) -> None:
    """Compares the log-probs of a packed batch with the model's own logits, in the batch and for each row alone.

    Raises:
        UserError: if they differ; names the family and the difference.
    """
    ours = probe(policy, source).double()
    what = f"the model {source} ({policy.family})"
    again = (ours - probe_log_probs(policy, "separate")).abs().max()
    if again > ROUNDING:
        raise UserError(
            f"{what} gives log-probs that differ by up to {again:.2g} nats from one time to the next: noise is on in it"
        )
    groups = _probe_groups(policy)
    packed = pack(groups, "separate").to(policy.device)
    # both heads get the same hidden states, so that only rounding may differ
    logits = policy.model(input_ids=packed.input_ids, attention_mask=packed.padding_mask).logits
    logits = logits.flatten(0, 1)[packed.rows].double()
    theirs = logits.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    allowed = 32 * torch.finfo(torch.float32).eps * (1 + theirs.abs().max() + logits.abs().max())
    if (error := (ours - theirs).abs().max()) > allowed:
        raise UserError(
            f"{what} shapes its logits in a way that is not known here: log-probs from its head differ by up to "
            f"{error:.3g} nats from the model's own"
        )
    alone = [_log_probs_alone(policy, prompt, response) for prompt, responses in groups for response in responses]
    if (error := (ours - torch.cat(alone)).abs().max()) > ROUNDING:
        raise UserError(
            f"{what} gives other log-probs in a batch, by up to {error:.2g} nats a token, than to each row alone: its "
            "implementation does not mask padding, and a run would learn from wrong numbers"
        )


def _log_probs_alone(policy: Policy, prompt: list[int], response: list[int]) -> Tensor:
    """Returns (n,) float64 log-probs of a response's tokens, nats, from the model's own logits for this row alone."""
    row = torch.tensor([prompt + response[:-1]], device=policy.device)
    logits = policy.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :].double()
    targets = torch.tensor(response, device=policy.device)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
