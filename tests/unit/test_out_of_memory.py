"""A batch that does not fit the memory is computed again in smaller parts, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_fit import PAIRS, make_groups
from torch.optim.optimizer import register_optimizer_step_pre_hook

from onpo_fast.batches import plan_steps, split
from onpo_fast.config import Config
from onpo_fast.data import Group
from onpo_fast.errors import UserError
from onpo_fast.fit import fit, score_as_in_fit
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, score
from onpo_fast.objectives import Onpo
from onpo_fast.out_of_memory import in_halves, is_out_of_memory
from onpo_fast.sampling import LocalSampler, TransformersSampler

MESSAGES = [[{"role": "user", "content": text}] for text in ("Tea?", "Will it rain?", "Why?")]


def full_memory() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@contextmanager
def limited(policy: Policy, most_tokens: int, in_backward: bool) -> Iterator[list[int]]:
    """A model that runs out of memory with more tokens than that, in its forward, or in the middle of its backward.

    Yields the tokens of every attempt.
    """
    attempts: list[int] = []

    def check(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if in_backward and not output.requires_grad:
            return
        attempts.append(output.shape[:2].numel())
        if attempts[-1] <= most_tokens:
            return
        if not in_backward:
            raise full_memory()

        def fail(_: torch.Tensor) -> None:
            raise full_memory()

        output.register_hook(fail)  # layers above have their gradients by then, this and those below have not

    handle = policy.model.model.layers[0].mlp.register_forward_hook(check)
    try:
        yield attempts
    finally:
        handle.remove()


def fitted(model, most_tokens: int, in_backward: bool = False, **options) -> tuple[list, list[dict], list[int]]:
    """The gradients of every step of a fit whose memory ends at so many tokens, its records, and its attempts."""
    config = Config(model=str(model), learning_rate=1e-9, warmup_ratio=0.0, max_grad_norm=1e9, **options)
    policy = load(model, config)
    groups = make_groups(policy)
    anchor = score(policy, groups, 1000)
    gradients: list[torch.Tensor] = []
    records: list[dict] = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: gradients.append(torch.cat([one.grad.flatten() for one in policy.model.parameters()]))
    )
    try:
        with limited(policy, most_tokens, in_backward) as attempts:
            fit(policy, groups, plan_steps(PAIRS, 2, 12, [0]), anchor, Onpo(eta=2.0), config, records.append)
    finally:
        hook.remove()
    return gradients, records, attempts


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["", "recomputed"])
def test_a_micro_batch_that_does_not_fit_is_computed_again(
    tiny_model, in_backward: bool, options: dict, capsys
) -> None:
    """The second of a step, after which the gradients of the first are there, and a part of its own."""
    options["tokens_per_microbatch"] = 180
    whole, records, attempts = fitted(tiny_model, 10**6, **options)
    most = max(attempts) - 1
    assert attempts[0] <= most
    gradients, again, tried = fitted(tiny_model, most, in_backward, **options)
    assert sum(tokens > most for tokens in tried) == 1  # kept for the rest of the fit
    assert len(gradients) == len(whole) == 2
    for one, other in zip(whole, gradients):
        assert (one - other).norm() < 1e-5 * one.norm()
    for one, other in zip(records, again):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(said) == 1
    assert "--tokens_per_microbatch" in said[0]


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_group_that_does_not_fit_names_settings(tiny_model, in_backward: bool) -> None:
    with pytest.raises(UserError, match="--gradient_checkpointing") as error:
        fitted(tiny_model, 5, in_backward)
    assert "\n" not in str(error.value)


def test_several_ranks_repeat_nothing(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(UserError, match="lower --tokens_per_microbatch"):
        fitted(tiny_model, 40)


def test_a_state_has_the_smaller_budget(tiny_model) -> None:
    """A fit that is resumed goes on with the micro-batches that it had."""
    saved: list[dict] = []

    class States:
        def restore(self, model, optimizer):
            return saved[0] if saved else None

        def due(self, step: int) -> bool:
            return step == 1

        def save(self, step, model, optimizer, rest) -> None:
            saved.append({"step": step, **rest})

        def record_written(self) -> None: ...

    config = Config(model=str(tiny_model), batch_pairs=6, learning_rate=1e-3)
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    anchor, steps = score(policy, groups, 1000), plan_steps(PAIRS, 2, 6, [0])
    longest = max(len(group.prompt_tokens) + sum(len(r.tokens) for r in group.responses) for group in groups)
    with limited(policy, longest, in_backward=True):
        fit(policy, groups, steps, anchor, Onpo(eta=2.0), config, lambda record: None, States())
    assert saved[0]["tokens_per_microbatch"] < 1024
    with limited(policy, longest, in_backward=True) as attempts:
        fit(policy, groups, steps, anchor, Onpo(eta=2.0), config, lambda record: None, States())
    assert max(attempts) <= longest


def groups_and_limit(policy: Policy) -> tuple[list[Group], int]:
    groups = make_groups(policy)
    return groups, max(len(g.prompt_tokens) + sum(len(r.tokens) for r in g.responses) for g in groups)


@pytest.mark.parametrize(
    "scores",
    [
        lambda policy, groups, config: score(policy, groups, 1000),
        lambda policy, groups, config: score_as_in_fit(policy, groups, plan_steps(PAIRS, 1, 12, [0]), config),
    ],
    ids=["responses", "a fit's micro-batches"],
)
def test_scores_are_computed_in_smaller_parts(policy: Policy, scores: Callable) -> None:
    groups, most = groups_and_limit(policy)
    config = Config()
    want = scores(policy, groups, config)
    with limited(policy, most, in_backward=False) as attempts:
        got = scores(policy, groups, config)
    assert max(attempts) > most
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    with limited(policy, 5, in_backward=False), pytest.raises(UserError, match="out of memory"):
        scores(policy, groups, config)


@pytest.mark.parametrize("kind", [LocalSampler, TransformersSampler])
def test_responses_are_sampled_in_smaller_batches(policy: Policy, kind: type) -> None:
    sampler = kind(policy, Config(max_new_tokens=6))
    want = sampler(MESSAGES, 2, [0])
    with limited(policy, 70, in_backward=False) as attempts:
        got = sampler(MESSAGES, 2, [0])
    assert max(attempts) > 70
    assert [[r.tokens for r in g.responses] for g in got] == [[r.tokens for r in g.responses] for g in want]


def test_which_errors_say_so() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(full_memory())
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_pass() -> None:
    def compute(items: list[int]) -> list[int]:
        raise ValueError("another")

    with pytest.raises(ValueError, match="another"):
        in_halves(compute, [1, 2], "", "")


def test_micro_batches_of_half_the_tokens_are_smaller(policy: Policy) -> None:
    """What a retry relies on: at half of a micro-batch's tokens it is split."""
    groups, _ = groups_and_limit(policy)
    batch = plan_steps(PAIRS, 1, 12, [0])[0]
    assert len(list(split(policy, groups, batch, 1000))) < len(list(split(policy, groups, batch, 60)))
