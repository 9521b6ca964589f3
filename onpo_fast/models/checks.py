"""A model is asked about itself: does what a run computes with it agree with what it says of each row alone?

Left out: kernels and sums are tested elsewhere (tests/gpu/triton_kernels); generation is checked by the sampler.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import UserError
from ..loss import linear_logprobs
from ..packing import Layout, TokenGroup, pack, row_length
from ..run.signals import Stopped
from .policy import Policy

# groups of different lengths, of tokens that a vocabulary of any size is taken to
PROBE: list[TokenGroup] = [
    ([1, 2, 3], [[4, 5, 6], [7, 8, 9, 10]]),
    ([2, 5], [[6, 4], [3, 1]]),
    (list(range(11, 40, 2)), [list(range(12, 30, 3)), [8, 6, 5, 3, 9]]),
]
ROUNDING = 1e-3  # nats a token: more than float32 computations of the same thing differ by, less than any mistake seen


@torch.no_grad()
def probe(policy: Policy, name: str) -> Tensor:
    """Log-probs of a few tokens, (N,) nats.

    Raises:
        UserError: if they are not finite, or not all weights are; says so of ``name``.
    """
    for weight, parameter in policy.model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the weights of {name} are not finite ({weight})")
    policy.model.eval()
    logps = _probe_log_probs(policy, "separate")
    if not logps.isfinite().all():
        raise UserError(f"the weights of {name} are finite, but not its log-probs")
    return logps


@contextmanager
def computing(model: str) -> Iterator[None]:
    """What a model's own code raises where it is first tried, in one line."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:  # a model's code may be anybody's
        reason = str(error).partition("\n")[0]
        raise UserError(f"{model} does not compute here: {type(error).__name__}: {reason}") from error


def _probe_groups(policy: Policy) -> list[TokenGroup]:
    """``PROBE``, in the policy's vocabulary; of a model with a small context, those groups that fit."""
    size = len(policy.head["weight"])
    groups = [group for group in PROBE if row_length(group[0], group[1][:1]) <= policy.safe_length] or PROBE[1:2]
    return [([t % size for t in prompt], [[t % size for t in r] for r in responses]) for prompt, responses in groups]


def _probe_log_probs(policy: Policy, layout: Layout) -> Tensor:
    """(N,) log-probs of the probe's response tokens, all groups in one batch, as a run computes them; nats."""
    packed = pack(_probe_groups(policy), layout).to(policy.device)
    with policy.autocast():
        return linear_logprobs(policy.hidden_states(packed), targets=packed.targets, **policy.head)


@torch.no_grad()
def check_log_probs(policy: Policy, source: str) -> None:
    """What a run computes must be what the model itself says of one row after the other, without padding or a mask.

    Raises:
        UserError: if it is not; names the family and the difference.
    """
    ours = probe(policy, source).double()
    what = f"the model {source} ({policy.family})"
    again = (ours - _probe_log_probs(policy, "separate")).abs().max()
    if again > ROUNDING:
        raise UserError(
            f"{what} gives log-probs that differ by up to {again:.2g} nats from one time to the next: noise is on in it"
        )
    groups = _probe_groups(policy)
    packed = pack(groups, "separate").to(policy.device)
    # the same hidden states through both heads: only rounding may differ
    logits = policy.model(input_ids=packed.input_ids, attention_mask=packed.attention_mask).logits
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
    """(n,) log-probs of a response's tokens from the model's own logits for this row alone, nats, float64."""
    row = torch.tensor([prompt + response[:-1]], device=policy.device)
    logits = policy.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :].double()
    targets = torch.tensor(response, device=policy.device)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


WINDOW_OPTION = re.compile(r"(window|attention_chunk)(_size)?$")  # names of options that limit how far attention sees


def has_window(config: PretrainedConfig) -> bool:
    """Whether attention sees a part of a row only: the one mask of shared prompts would widen a window, or, where the
    model counts positions along the row, hide the prompt. It may be narrower or wider than the probe could show."""
    text = config.get_text_config()
    windows = [value for name, value in vars(text).items() if WINDOW_OPTION.search(name) and value]
    return bool(windows) or bool(set(getattr(text, "layer_types", None) or []) - {"full_attention"})


@torch.no_grad()
def shared_or_separate(policy: Policy) -> Layout:
    """Prompts are shared if the model, asked, gives the same log-probs either way."""
    apart = _probe_log_probs(policy, "separate")
    try:
        together = _probe_log_probs(policy, "shared")
    except Exception as error:  # whatever a family makes of a 4-D mask that it does not take
        logging.getLogger("onpo_fast").debug("no shared prompts for %s: %s", policy.family, error)
        return "separate"
    return "shared" if (apart - together).abs().max() <= ROUNDING else "separate"
