"""The memory plan of a run: chosen or refused before it begins, said before its first fit, compared with its peak."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..batches import Batch, compared_tokens, split
from ..config import AlgorithmConfig, Config, FitConfig, ModelConfig
from ..config.sections import MOST_TOKENS
from ..console import say
from ..data import Group
from ..device_memory import device_bytes, peak_bytes, release_freed, reset_peak, resident_bytes
from ..errors import UserError
from ..loss import choose_backend
from ..models.attention import FLEX, is_flash
from ..models.policy import Policy
from ..packing import TokenGroup, row_length
from .counting import CannotCount
from .plan import PROCESS, Plan, Planner, Settings

GIB = 2**30
TWO_RESPONSES = ("best_worst", "knockout")  # pairings that choose two responses of a prompt


def longest_group(config: AlgorithmConfig, prompt_tokens: int, max_new_tokens: int) -> TokenGroup:
    """Returns the largest group that a fit may get: a prompt, and responses of the longest length."""
    responses = 2 if config.pairing in TWO_RESPONSES else config.responses_per_prompt
    return [0] * prompt_tokens, [[0] * max_new_tokens] * responses


def planner_of(policy: Policy, loss_backend: str) -> Planner:
    """Returns the planner of a policy on its device, with what the process takes beside it on a CPU."""
    kind, config, device = type(policy.model), copy.deepcopy(policy.model.config), policy.device
    masked = policy.attention != FLEX and not is_flash(policy.attention)
    baseline = {}
    if device.type == "cpu" and (resident := resident_bytes()) is not None:
        weights = sum(one.numel() * one.element_size() for one in policy.model.parameters())
        baseline = {PROCESS: max(resident - weights, 0)}
    return Planner(
        lambda dtype: kind._from_config(config, dtype=dtype, attn_implementation=policy.plain_attention),
        layout=policy.layout,
        masked=masked,
        device=device,
        backend=choose_backend(loss_backend, device, torch.float32),
        memory=device_bytes(device),
        baseline=baseline,
    )


def settings_of_policy(policy: Policy, model: ModelConfig, fit: FitConfig, live_anchor: bool) -> Settings:
    """Returns the settings that the memory of a policy's fit depends on."""
    return Settings(
        weights="bf16-sr" if policy.weights_dtype == torch.bfloat16 else "fp32",
        optimizer=fit.optimizer,
        gradient_checkpointing=model.gradient_checkpointing,
        lora_rank=model.lora_rank,
        ranks=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        compute_dtype=policy.compute_dtype,
        live_anchor=live_anchor,
        loss_mode=fit.loss_mode,
        lora_targets=model.lora_targets,
    )


def with_token_budget(config: Config, policy: Policy, prompt_tokens: int) -> Config:
    """Returns the options with ``tokens_per_microbatch`` chosen, if it is not set: the most that fits the device.

    Args:
        prompt_tokens: of the longest prompt.

    Raises:
        UserError: if a step does not fit the device, and names settings that do; or if the model in float32 does not.
    """
    planner = planner_of(policy, config.loss_backend)
    group = longest_group(config, prompt_tokens, config.max_new_tokens)
    settings = settings_of_policy(
        policy, config.section(ModelConfig), config.section(FitConfig), config.anchor == "live"
    )
    try:
        if config.tokens_per_microbatch is None:
            plan = planner.choose_tokens(settings, group)
            if plan is not None:
                return replace(config, tokens_per_microbatch=plan.tokens)
            plan = planner.largest(settings, group, 1)
        else:
            plan = planner.largest(settings, group, config.tokens_per_microbatch)
            if planner.fits(plan):
                return config
        raise UserError(_refusal(planner, plan, group))
    except CannotCount as error:
        say(f"the memory of a fit is not known before it: the family {policy.family} cannot be counted ({error})")
        return replace(config, tokens_per_microbatch=config.tokens_per_microbatch or MOST_TOKENS)


def _refusal(planner: Planner, plan: Plan, group: TokenGroup) -> str:
    if not planner.loads(plan):
        return (
            f"loading and checks take {plan.loading / GIB:.1f} GiB on every rank, for the whole model in float32, and "
            f"the {planner.device.type} has {planner.memory / GIB:.1f} GiB: take a smaller model or a larger device"
        )
    return (
        f"an optimizer step would take {plan.total / GIB:.1f} GiB at {plan.tokens} tokens a micro-batch, and "
        f"{planner.usable / GIB:.1f} GiB of the {planner.device.type} may be used; {advice(planner, plan, group)}"
    )


def advice(planner: Planner, plan: Plan, group: TokenGroup) -> str:
    """Returns which settings would fit, each checked by a plan, in words.

    Args:
        plan: that does not fit.
        group: the largest that there may be.
    """
    found = [
        f"{other.settings.changes_from(plan.settings)} ({other.total / GIB:.1f} GiB at {other.tokens} tokens)"
        for other in planner.alternatives(plan.settings, group)
    ]
    fewer = planner.choose_tokens(plan.settings, group)
    if fewer is not None and fewer.tokens < plan.tokens:
        found.insert(0, f"--tokens_per_microbatch {fewer.tokens} ({fewer.total / GIB:.1f} GiB)")
    return f"would fit: {'; '.join(found)}" if found else "no other settings of this model would fit"


class MemoryWatch:
    """Says the plan of a fit before its first step, and its measured peak after the second, or after the only one.

    The first step has no optimizer states beside its backward passes, so that its peak is lower.

    Raises:
        UserError: if the step, or the model in float32, does not fit the device.
    """

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        model: ModelConfig,
        fit: FitConfig,
        live_anchor: bool,
    ) -> None:
        self.device, self.steps, self.plan = policy.device, len(batches), None
        release_freed()
        reset_peak(self.device)
        planner = planner_of(policy, fit.loss_backend)
        largest, several = _largest_microbatch(policy, groups, batches, fit.token_budget)
        settings = settings_of_policy(policy, model, fit, live_anchor)
        try:
            self.plan = planner.plan(settings, largest, several)
            if not planner.fits(self.plan):
                raise UserError(_refusal(planner, self.plan, max(largest, key=_tokens)))
            # what is measured is that of the first two steps, whose micro-batches may be smaller
            first, *second = (
                planner.plan(settings, *_largest_microbatch(policy, groups, [batch], fit.token_budget))
                for batch in batches[:2]
            )
            self.planned = max([first.total_of_first_step, *(plan.total for plan in second)])
        except CannotCount as error:
            say(f"the memory of a fit is not known before it: the family {policy.family} cannot be counted ({error})")
            return
        parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in self.plan.at_peak.items())
        say(
            f"memory of a step, GiB: {parts}; {self.plan.total / GIB:.2f} planned with micro-batches of at most "
            f"{fit.token_budget} tokens (the largest has {self.plan.tokens})"
        )

    def after(self, step: int) -> dict[str, object] | None:
        """Returns the record of metrics.jsonl after the step that is compared with the plan; None after others."""
        if self.plan is None or step != min(2, self.steps):
            return None
        peak = peak_bytes(self.device)
        if peak is not None:
            what = "step 1" if step == 1 else "steps 1 and 2"
            say(f"memory of {what}: {peak / GIB:.2f} GiB measured, {self.planned / GIB:.2f} planned")
        return {"planned": dict(self.plan.at_peak), "planned_memory_bytes": self.planned, "peak_memory_bytes": peak}


def _largest_microbatch(
    policy: Policy, groups: Sequence[Group], batches: Sequence[Batch], tokens: int
) -> tuple[list[TokenGroup], bool]:
    """Returns the groups of the micro-batch with most tokens, and whether a step has several micro-batches."""
    largest: list[TokenGroup] = []
    several = False
    for batch in batches:
        parts = [
            [compared_tokens(groups[g], pairs) for g, pairs in part.items()]
            for part in split(policy, groups, batch, tokens)
        ]
        several |= len(parts) > 1
        largest = max([largest, *parts], key=lambda part: sum(map(_tokens, part)))
    return largest, several


def _tokens(group: TokenGroup) -> int:
    return row_length(*group)
