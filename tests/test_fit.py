"""One argmin over an iteration's pairs, on a real model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from onpo_fast.config import Config
from onpo_fast.data import Group, Pair, Response
from onpo_fast.fit import fit, steps
from onpo_fast.objectives import Onpo
from onpo_fast.policy import load, score


def make_groups(policy, k: int = 3) -> list[Group]:
    texts = ["Yes.", "No, thank you very much!", "Perhaps it will rain.", ""]
    prompts = [[{"role": "user", "content": q}] for q in ("Tea?", "Will it rain tomorrow?", "Do fish sleep?", "Why?")]
    return [
        Group(p, policy.render(p), [
            Response(t, policy.tokenizer(t)["input_ids"] + policy.eos_tokens[:1] if t else [], "eos", 0.0)
            for t in (texts[i:] + texts[:i])[:k]
        ])
        for i, p in enumerate(prompts)
    ]  # fmt: skip


LEARNING_RATE = 1e-5
PAIRS = [Pair(g, w, lo, p) for g in range(4) for w, lo, p in ((0, 1, 1.0), (2, 0, 0.7), (1, 2, 0.9))]


def run(model, **options):
    config = Config(model=str(model), batch_pairs=6, learning_rate=LEARNING_RATE, warmup_ratio=0.0, **options)
    policy = load(model, config)
    groups = make_groups(policy)
    anchor = score(policy, groups, 1000)
    records: list[dict] = []
    fit(policy, groups, PAIRS, anchor, Onpo(eta=2.0), epochs=config.epochs_policy, seed=[0], config=config,
        on_step=records.append)  # fmt: skip
    return policy, groups, anchor, records


@pytest.fixture(scope="module")
def fitted(shallow_model):
    return run(shallow_model, epochs_policy=10)


def test_a_fit_from_its_anchor_starts_at_margin_zero(fitted) -> None:
    first = fitted[3][0]
    assert first["step"] == 1
    assert abs(first["margin"]) < 1e-4
    batch = [2.0 * (p - 0.5) for p in (1.0, 0.7, 0.9)]
    assert first["loss"] == pytest.approx(sum(t * t for t in batch) / 3, rel=1e-4)
    assert first["loss_normalised"] == pytest.approx(first["loss"] / 4, rel=1e-6)
    assert first["target"] == pytest.approx(sum(batch) / 3)


def test_margins_move_to_their_targets(fitted) -> None:
    policy, groups, anchor, records = fitted
    assert len(records) == steps(PAIRS, 10, 6) == 20
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    ratio = [after - before for after, before in zip(score(policy, groups, 1000), anchor)]
    margins = torch.stack([ratio[p.group][p.winner] - ratio[p.group][p.loser] for p in PAIRS])
    targets = torch.tensor([2.0 * (p.preference - 0.5) for p in PAIRS])
    assert (margins - targets).square().mean() < 0.3 * targets.square().mean()


def test_metrics_are_complete(fitted) -> None:
    for record in fitted[3]:
        assert all(isinstance(value, (int, float)) for value in record.values())
        assert 0 <= record["pair_accuracy"] <= 1
        assert record["gradient_norm"] > 0
        assert record["logp_winner"] < 0
        assert record["pairs_per_second"] > 0


@pytest.mark.parametrize("options", [{"tokens_per_microbatch": 1}, {"gradient_checkpointing": True}])
def test_memory_options_change_only_rounding(shallow_model, options: dict) -> None:
    """Accumulation weighs pairs, not micro-batches, so the split does not show."""
    plain, *_, a = run(shallow_model)
    other, *_, b = run(shallow_model, **options)
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["gradient_norm"] == pytest.approx(y["gradient_norm"], rel=1e-3)
    ratio = [p.data - q.data for p, q in zip(plain.model.parameters(), other.model.parameters())]
    assert (
        max(float(r.abs().max()) for r in ratio) < 2.1 * 2 * LEARNING_RATE
    )  # Adam's sign flips of vanishing gradients


def test_separate_rows_give_the_same_gradient(shallow_model) -> None:
    _, groups, anchor, a = run(shallow_model)
    config = Config(model=str(shallow_model), batch_pairs=6, learning_rate=LEARNING_RATE, warmup_ratio=0.0)
    again = dataclasses.replace(load(shallow_model, config), layout="separate")
    b: list[dict] = []
    fit(again, groups, PAIRS, anchor, Onpo(eta=2.0), epochs=1, seed=[0], config=config, on_step=b.append)
    assert a[0]["gradient_norm"] == pytest.approx(b[0]["gradient_norm"], rel=1e-4)


def test_bfloat16_compute_keeps_float32_weights(shallow_model) -> None:
    policy, *_, records = run(shallow_model, dtype="bfloat16", epochs_policy=6)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert records[-1]["loss"] < records[0]["loss"]
