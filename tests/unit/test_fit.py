"""One argmin over an iteration's pairs, of the tiny model."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from onpo_fast.batches import plan_steps
from onpo_fast.config import Config
from onpo_fast.data import Group, Pair, Response
from onpo_fast.errors import UserError
from onpo_fast.fit import FitFailed, cosine_with_warmup, fit, score_as_in_fit
from onpo_fast.models.loading import load
from onpo_fast.models.policy import score
from onpo_fast.objectives import Dpo, Onpo, Sppo


def make_groups(policy, k: int = 3) -> list[Group]:
    texts = ["Yes.", "No, thank you very much!", "Perhaps it will rain.", ""]
    prompts = [[{"role": "user", "content": q}] for q in ("Tea?", "Will it rain tomorrow?", "Do fish sleep?", "Why?")]
    return [
        Group(
            p,
            policy.renderer.render(p),
            [
                Response(t, policy.tokenizer(t)["input_ids"] + policy.eos_tokens[:1] if t else [], "eos", 0.0)
                for t in (texts[i:] + texts[:i])[:k]
            ],
        )
        for i, p in enumerate(prompts)
    ]


LEARNING_RATE = 1e-5
PAIRS = [Pair(g, w, lo, p) for g in range(4) for w, lo, p in ((0, 1, 1.0), (2, 0, 0.7), (1, 2, 0.9))]


def run(model, **options):
    config = Config(model=str(model), batch_pairs=6, learning_rate=LEARNING_RATE, warmup_ratio=0.0, **options)
    policy = load(model, config)
    groups = make_groups(policy)
    anchor = score(policy, groups, 1000)
    records: list[dict] = []
    fit(policy, groups, plan_steps(PAIRS, config.epochs_policy, 6, [0]), anchor, Onpo(eta=2.0), config, records.append)
    return policy, groups, anchor, records


@pytest.fixture(scope="module")
def fitted(tiny_model):
    return run(tiny_model, epochs_policy=2)


def test_a_plan_takes_whole_groups_until_a_step_has_its_pairs() -> None:
    batches = plan_steps(PAIRS, 2, 5, [0])
    assert [sum(map(len, batch.values())) for batch in batches] == [6, 6, 6, 6]
    for epoch in (batches[:2], batches[2:]):
        assert sorted(g for batch in epoch for g in batch) == [0, 1, 2, 3]
        assert all(pair.group == g for batch in epoch for g, pairs in batch.items() for pair in pairs)
    assert [len(batch) for batch in plan_steps(PAIRS, 1, 7, [0])] == [3, 1]  # the rest is a step of its own
    assert plan_steps(PAIRS, 2, 5, [0]) == batches


def test_a_fit_from_its_anchor_starts_at_margin_zero(fitted) -> None:
    first = fitted[3][0]
    assert first["step"] == 1
    assert abs(first["margin"]) < 1e-4
    batch = [2.0 * (p - 0.5) for p in (1.0, 0.7, 0.9)]
    assert first["loss"] == pytest.approx(sum(t * t for t in batch) / 3, rel=1e-4)
    assert first["loss_normalised"] == pytest.approx(first["loss"] / 4, rel=1e-6)
    assert first["target"] == pytest.approx(sum(batch) / 3)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "gradient_checkpointing": True}])
@pytest.mark.parametrize("pairs", [PAIRS, [Pair(g, 0, 2, 0.8) for g in range(4)], [Pair(0, 1, None, 0.3)]])
def test_the_anchor_is_scored_as_the_fit_computes_it(tiny_model, options: dict, pairs: list[Pair]) -> None:
    """In its micro-batches and by its code: margins begin at 0, in half precision too, and in every epoch's batches."""
    config = Config(model=str(tiny_model), tokens_per_microbatch=60, learning_rate=1e-30, batch_pairs=6, **options)
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    epoch = plan_steps(pairs, 1, config.batch_pairs, [0])
    progress: list[int] = []
    anchor = score_as_in_fit(policy, groups, epoch, config, progress.append)
    records: list[dict] = []
    fit(policy, groups, plan_steps(pairs, 2, 6, [0]), anchor, Onpo(eta=2.0), config, records.append)
    margins = [record["margin"] for record in records]
    if pairs[0].loser is None:
        assert [record["log_ratio_winner"] for record in records] == pytest.approx([0.0, 0.0], abs=1e-4)  # float32
    assert margins == pytest.approx([0.0] * len(records), abs=1e-6)  # MKL's last bits depend on addresses of memory
    assert sum(progress) == len(groups)
    rounding = 1e-3 if policy.compute_dtype == torch.float32 else 1.0
    torch.testing.assert_close(torch.cat(anchor), torch.cat(score(policy, groups, 1000)), atol=rounding, rtol=0)


def test_margins_go_to_the_least_squares_solution(tiny_model) -> None:
    """The labels of every group go in a circle, 1 + 0.8 + 0.4 nats round it, where margins add up to 0."""
    config = Config(model=str(tiny_model), learning_rate=1e-4, warmup_ratio=0.0)
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    anchor = score(policy, groups, 1000)
    records: list[dict] = []
    fit(policy, groups, plan_steps(PAIRS, 40, 12, [0]), anchor, Onpo(eta=2.0), config, records.append)
    least = (2.2 / 3) ** 2
    assert records[0]["loss"] - least > 0.05
    assert records[-1]["loss"] - least < 1e-3
    ratio = [after - before for after, before in zip(score(policy, groups, 1000), anchor)]
    margins = torch.stack([ratio[p.group][p.winner] - ratio[p.group][p.loser] for p in PAIRS])
    targets = torch.tensor([2.0 * (p.preference - 0.5) for p in PAIRS])
    assert (margins - (targets - 2.2 / 3)).abs().max() < 0.05


def test_responses_in_no_pair_are_left_out(tiny_model) -> None:
    """The gradient is that of the compared responses alone, and so are the tokens."""
    seen = []
    for width in (4, 2):  # responses a group; the pairs name the first and the last of them, or both
        config = Config(model=str(tiny_model), learning_rate=LEARNING_RATE)
        policy = load(tiny_model, config)
        groups = [
            Group(g.prompt, g.prompt_tokens, [g.responses[0], *g.responses[1:-1][: width - 2], g.responses[-1]])
            for g in make_groups(policy, 4)
        ]
        anchor = score(policy, groups, 1000)
        records: list[dict] = []
        pairs = [Pair(g, 0, width - 1, 0.8) for g in range(4)]
        fit(policy, groups, plan_steps(pairs, 1, 4, [0]), anchor, Onpo(eta=2.0), config, records.append)
        seen.append(records[0])
    assert seen[0]["gradient_norm"] == pytest.approx(seen[1]["gradient_norm"], rel=1e-4)
    assert seen[0]["logp_winner"] == pytest.approx(seen[1]["logp_winner"], rel=1e-5)
    tokens = [record["tokens_per_second"] * record["seconds"] for record in seen]
    assert tokens[0] == pytest.approx(tokens[1])


def test_the_learning_rate_rises_and_falls() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    schedule = cosine_with_warmup(optimizer, 3, 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[3:]))
    assert cosine_with_warmup(torch.optim.AdamW([parameter], lr=1.0), 0, 1).get_last_lr() == [1.0]


def test_a_gradient_that_is_not_finite_stops_the_fit(tiny_model) -> None:
    config = Config(model=str(tiny_model), max_skipped_steps=2)
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    anchor = score(policy, groups, 1000)
    anchor[0][0] = float("nan")
    before = policy.model.lm_head.weight.detach().clone()
    records: list[dict] = []
    with pytest.raises(UserError, match="step 3 of 4: no finite loss and gradient for 3 steps in a row"):
        fit(policy, groups, plan_steps(PAIRS, 4, 12, [0]), anchor, Onpo(eta=2.0), config, records.append)
    assert torch.equal(policy.model.lm_head.weight, before)
    assert [(r["skipped"], r["loss"], r["gradient_norm"]) for r in records] == [(1, None, None)] * 2


@pytest.mark.filterwarnings("error")
def test_a_fit_without_any_finite_step_is_no_fit(tiny_model) -> None:
    config = Config(model=str(tiny_model), max_skipped_steps=5)
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    anchor = [torch.full((3,), float("nan"))] * 4
    with pytest.raises(UserError, match="step 2 of 2: no finite loss and gradient in any step; lower --learning_rate"):
        fit(policy, groups, plan_steps(PAIRS, 2, 12, [0]), anchor, Onpo(eta=2.0), config, lambda metrics: None)


def test_a_policy_that_is_not_finite_in_the_end_is_no_result(tiny_model) -> None:
    config = Config(model=str(tiny_model))
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    anchor = score(policy, groups, 1000)

    def overflow(metrics: dict) -> None:
        policy.model.model.norm.weight.data[0] = torch.inf

    with pytest.raises(
        UserError, match=r"the fit diverged: the weights of the fitted policy are not finite \(.*lower --lear"
    ):
        fit(policy, groups, plan_steps(PAIRS, 1, 12, [0]), anchor, Onpo(eta=2.0), config, overflow)


def test_a_step_that_is_not_finite_is_left_out(tiny_model) -> None:
    config = Config(model=str(tiny_model))
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    anchor = score(policy, groups, 1000)
    anchor[0][0] = float("nan")  # in one step of four
    records: list[dict] = []
    fit(policy, groups, plan_steps(PAIRS, 1, 3, [0]), anchor, Onpo(eta=2.0), config, records.append)
    assert sorted(r["skipped"] for r in records) == [0, 0, 0, 1]
    assert all(parameter.isfinite().all() for parameter in policy.model.parameters())


def test_metrics_are_complete(fitted) -> None:
    for record in fitted[3]:
        assert all(isinstance(value, (int, float)) for value in record.values())
        assert 0 <= record["pair_accuracy"] <= 1
        assert record["gradient_norm"] > 0
        assert record["logp_winner"] < 0
        assert record["pairs_per_second"] > 0


@pytest.mark.parametrize("options", [{"tokens_per_microbatch": 1}, {"gradient_checkpointing": True}])
def test_memory_options_change_only_rounding(tiny_model, options: dict) -> None:
    """Accumulation weighs pairs, not micro-batches, so the split does not show."""
    plain, *_, a = run(tiny_model)
    other, *_, b = run(tiny_model, **options)
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["gradient_norm"] == pytest.approx(y["gradient_norm"], rel=1e-3)
    ratio = [p.data - q.data for p, q in zip(plain.model.parameters(), other.model.parameters())]
    assert (
        max(float(r.abs().max()) for r in ratio) < 2.1 * 2 * LEARNING_RATE
    )  # Adam's sign flips of vanishing gradients


def test_separate_rows_give_the_same_gradient(tiny_model) -> None:
    _, groups, anchor, a = run(tiny_model)
    config = Config(model=str(tiny_model), batch_pairs=6, learning_rate=LEARNING_RATE, warmup_ratio=0.0)
    again = dataclasses.replace(load(tiny_model, config), layout="separate")
    b: list[dict] = []
    fit(again, groups, plan_steps(PAIRS, 1, 6, [0]), anchor, Onpo(eta=2.0), config, b.append)
    assert a[0]["gradient_norm"] == pytest.approx(b[0]["gradient_norm"], rel=1e-4)


def test_bfloat16_compute_keeps_float32_weights(tiny_model) -> None:
    *_, exact = run(tiny_model)
    policy, *_, rounded = run(tiny_model, dtype="bfloat16")
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert rounded[0]["gradient_norm"] == pytest.approx(exact[0]["gradient_norm"], rel=0.1)
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.01)


@pytest.mark.parametrize("objective", [Onpo(eta=2.0), Dpo(beta=0.5)], ids=["onpo", "dpo"])
def test_a_live_anchor_gives_the_weights_of_a_cached_one(tiny_model, objective) -> None:
    config = Config(model=str(tiny_model), batch_pairs=6, learning_rate=LEARNING_RATE)
    frozen = load(tiny_model, config).frozen()
    weights, records = [], []
    for live in (False, True):
        policy = load(tiny_model, config)
        groups = make_groups(policy)
        logps, anchor = (None, frozen) if live else (score(policy, groups, 1000), None)
        seen: list[dict] = []
        batches = plan_steps(PAIRS, 2, 6, [0])
        fit(policy, groups, batches, logps, objective, config, seen.append, live_anchor=anchor)
        weights.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
        records.append(seen)
    for cached, live in zip(*records):
        assert live["loss"] == pytest.approx(cached["loss"], rel=1e-4)
        assert live["gradient_norm"] == pytest.approx(cached["gradient_norm"], rel=1e-3)
    start = torch.cat([p.detach().flatten() for p in frozen.model.parameters()])
    moved = (weights[0] - start).norm()
    assert moved > 0
    # Adam turns vanishing gradients, whose sign is rounding, into whole steps: few enough not to show in the norm
    assert (weights[1] - weights[0]).norm() < 0.05 * moved
    assert all(parameter.grad is None for parameter in frozen.model.parameters())


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("live", [False, True], ids=["cached", "live"])
def test_responses_without_a_loser_have_the_gradient_of_sppos_loss(tiny_model, layout: str, live: bool) -> None:
    """Against float64 autograd on each row alone: mean of (log π(y)/π_t(y) − η(p − ½))²; mixed with a plain pair."""
    config = Config(model=str(tiny_model), learning_rate=1e-12, max_grad_norm=1e9)
    policy = dataclasses.replace(load(tiny_model, config), layout=layout)
    groups = make_groups(policy)
    frozen = load(tiny_model, config)
    for parameter in frozen.model.parameters():
        parameter.data *= 1.01
    anchor = score(frozen, groups, 1000)
    pairs = [Pair(g, i, None, p) for g in range(4) for i, p in enumerate((0.2, 0.65, 0.9))] + [Pair(1, 2, 0, 0.8)]
    records: list[dict] = []
    reference = {"anchor_logps": None, "live_anchor": frozen.frozen()} if live else {"anchor_logps": anchor}
    found: dict[str, torch.Tensor] = {}

    def take(optimizer, *_) -> None:
        found.update((name, p.grad.clone()) for name, p in policy.model.named_parameters())

    hook = register_optimizer_step_pre_hook(take)
    try:
        batches = plan_steps(pairs, 1, 100, [0])
        fit(policy, groups, batches, objective=Sppo(eta=3.0), config=config, on_step=records.append, **reference)
    finally:
        hook.remove()

    model = copy.deepcopy(policy.model).double()
    model.zero_grad()

    def logp(pair: Pair, response: int) -> torch.Tensor:
        prompt, tokens = groups[pair.group].prompt_tokens, groups[pair.group].responses[response].tokens
        if not tokens:
            return torch.zeros((), dtype=torch.float64)
        logps = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(1, torch.tensor(tokens)[:, None]).sum()

    losses = []
    for pair in pairs:
        ratio = logp(pair, pair.winner) - anchor[pair.group][pair.winner]
        if pair.loser is not None:
            ratio = ratio - (logp(pair, pair.loser) - anchor[pair.group][pair.loser])
        losses.append((ratio - 3.0 * (pair.preference - 0.5)) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()
    assert records[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    error = sum(float((found[name] - p.grad).square().sum()) for name, p in model.named_parameters())
    norm = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert (error / norm) ** 0.5 < 1e-4
    assert records[0]["logp_loser"] == pytest.approx(float(logp(pairs[-1], 0)) / len(pairs), rel=1e-4)


class OneState:
    """States of a fit with one saved state; remembers what was asked of it."""

    def __init__(self, state: dict | None) -> None:
        self.state = state
        self.calls: list[str] = []

    def restore(self, model, optimizer) -> dict | None:
        if self.state and "rate" in self.state:
            optimizer.param_groups[0]["lr"] = self.state["rate"]
        return self.state

    def due(self, step: int) -> bool:
        return step == 2

    def save(self, step: int, model, optimizer, rest: dict) -> None:
        self.calls.append(f"save {step}")
        self.saved = {"step": step, "rate": optimizer.param_groups[0]["lr"], **rest}

    def record_written(self) -> None:
        pass

    def finish(self) -> None:
        self.calls.append("finish")

    def clear(self) -> None:
        self.calls.append("clear")

    def describe_error(self, error: Exception) -> str:
        return f"STATE {type(error).__name__}"


def test_a_fit_goes_on_from_a_state(tiny_model) -> None:
    config = Config(model=str(tiny_model), learning_rate=LEARNING_RATE)
    steps, saved = [], None
    states = OneState(None)
    for _ in range(2):  # the second time, from the schedule and the counters of step 2 alone
        policy = load(tiny_model, config)
        groups = make_groups(policy)
        batches = plan_steps(PAIRS, 2, 6, [0])
        anchor = score(policy, groups, 1000)
        records: list[dict] = []
        fit(policy, groups, batches, anchor, Onpo(eta=2.0), config, records.append, states)
        steps.append([(record["step"], record["learning_rate"]) for record in records])
        saved = saved or states.saved
        states = OneState(saved)
    assert [step for step, _ in steps[0]] == [1, 2, 3, 4]
    assert steps[1] == steps[0][2:]


def test_a_state_that_does_not_fit_is_named_and_kept(tiny_model) -> None:
    config = Config(model=str(tiny_model))
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    states = OneState({"step": 1, "skipped": 0})
    anchor = score(policy, groups, 1000)
    with pytest.raises(UserError, match="STATE KeyError"):
        fit(policy, groups, plan_steps(PAIRS, 2, 6, [0]), anchor, Onpo(eta=2.0), config, print, states)
    assert states.calls == []


def test_the_states_of_a_fit_that_fails_are_removed(tiny_model) -> None:
    config = Config(model=str(tiny_model), max_skipped_steps=0)
    policy = load(tiny_model, config)
    groups = make_groups(policy)
    states = OneState(None)
    anchor = [torch.full((3,), float("nan"))] * 4
    with pytest.raises(FitFailed):
        fit(policy, groups, plan_steps(PAIRS, 2, 6, [0]), anchor, Onpo(eta=2.0), config, lambda metrics: None, states)
    assert states.calls == ["clear"]
