"""Chooses how a policy's responses are packed, and under which attention: the first choice that its log-probs confirm.

A mask that a model reads in another way gives wrong numbers without a message, so that every choice but the last, a row
for each response, is compared with the model's own log-probs when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from ..errors import UserError
from ..packing import Layout
from .attention import FLEX, is_flash, limits_unknown_here
from .checks import ROUNDING, probe_batch, probe_log_probs
from .policy import Policy

PROBE_WINDOW = 5  # positions: shorter than most rows of the probe
# how much further from float32 a GPU's kernel may be than plain attention is in the same dtype
ERROR_RATIO = 4
DESCRIPTIONS = {
    "shared": "shared prompts",
    "shared_row": "shared prompts in one row",
    "separate_row": "rows end to end",
    "separate": "a row for each response",
}


def choose_layout(policy: Policy, wanted: str, source: str) -> None:
    """Sets the attention implementation and layout of a policy, and adds to its notes what it cannot use.

    Args:
        wanted: the value of --attention.
        source: what errors call the policy.

    Raises:
        UserError: if flex_attention is asked for, and does not give the model's log-probs.
    """
    *tried, last = _choices(policy, wanted)
    for attention, layout in tried:
        reason = _why_not(policy, attention, layout)
        if reason is None:
            policy.use(attention, layout)
            return
        if wanted == FLEX:
            raise UserError(f"--attention {FLEX}: {source} ({policy.family}) does not support it here: {reason}")
        policy.notes.append(f"{attention} attention with {DESCRIPTIONS[layout]} is not used, as {reason}")
    policy.use(*last)


def _choices(policy: Policy, wanted: str) -> Iterator[tuple[str, Layout]]:
    """Yields attention implementations and layouts, the fastest first; the last works with every model."""
    model, own = policy.model, policy.attention
    on_gpu = wanted == "auto" and policy.device.type == "cuda"
    has_flash = on_gpu and is_flash_attn_2_available() and model._supports_flash_attn
    if own == FLEX or (on_gpu and model._supports_flex_attn):
        yield FLEX, "shared_row"
    if is_flash(own) or has_flash:
        yield own if is_flash(own) else "flash_attention_2", "separate_row"
    if own != FLEX and not is_flash(own):
        yield own, "shared"
    if has_flash:
        yield "flash_attention_2", "separate"
    yield own, "separate"


def _why_not(policy: Policy, attention: str, layout: Layout) -> str | None:
    """Returns why a choice cannot be used; None if it gives the log-probs of a row for each response."""
    config, family = policy.model.config.get_text_config(), policy.family
    window = getattr(config, "sliding_window", None) if layout.startswith("shared") else None
    if layout.startswith("shared") and (limits := limits_unknown_here(config)):
        return f"{family} limits what a token sees in a way that is not supported there ({', '.join(limits)})"
    try:
        agrees = _agrees(policy, attention, layout)
        if agrees and window:  # most windows are longer than the probe, and masks are made from the configuration
            with narrow_window(config, PROBE_WINDOW):
                agrees = _agrees(policy, attention, layout)
    except Exception as error:  # families without such masks fail in their own ways
        reason = str(error).partition("\n")[0]
        return f"{family} does not compute there ({type(error).__name__}: {reason})"
    return None if agrees else f"{family} gives other log-probs there"


def _agrees(policy: Policy, attention: str, layout: Layout) -> bool:
    """Returns whether the probe has the log-probs of a row for each response.

    A kernel that runs on GPUs alone is tried in the policy's own dtype, with its gradient, and on a row of several of
    its blocks.
    """
    if not (attention == FLEX or is_flash(attention)):
        with policy.in_float32():
            exact = probe_log_probs(policy, "separate")
            with policy.using(attention, layout):
                return bool((probe_log_probs(policy, layout) - exact).abs().max() <= ROUNDING)

    def computed(layout: Layout) -> list[Tensor]:
        return [probe_log_probs(policy, layout, long=True), _embedding_gradient(policy, layout)]

    with policy.in_float32():
        exact = computed("separate")
    with policy.using(policy.plain_attention, "separate"):
        plain = computed("separate")
    with policy.using(attention, layout):
        ours = computed(layout)
    return all(
        (mine - want).abs().max() <= ERROR_RATIO * (usual - want).abs().max() + ROUNDING * (1 + want.abs().max())
        for mine, usual, want in zip(ours, plain, exact)
    )


@torch.enable_grad()
def _embedding_gradient(policy: Policy, layout: Layout) -> Tensor:
    """Returns the gradient of the probe's summed log-probs by the embedding of every token, (V, H) float32.

    It has passed through the attention of every layer, and needs no memory for the gradients of weights.
    """
    packed = probe_batch(policy, layout, long=True)
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        embedded.append(output if output.requires_grad else output.requires_grad_())

    hook = policy.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with policy.autocast():
            logps = policy.scoring(packed)
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logps.sum(), embedded[:1])
    total = gradient.new_zeros(policy.vocabulary, gradient.shape[-1], dtype=torch.float32)
    total.index_add_(0, packed.input_ids.flatten(), gradient.flatten(0, 1).float())
    return total


@contextmanager
def narrow_window(config: PretrainedConfig, window: int) -> Iterator[None]:
    """Gives layers with a sliding window one of at most ``window`` positions within the block."""
    before = config.sliding_window
    config.sliding_window = min(before, window)
    try:
        yield
    finally:
        config.sliding_window = before
