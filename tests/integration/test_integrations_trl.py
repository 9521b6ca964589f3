"""``ONPOTrainer`` beside TRL's own trainer on the real small model, and beside plain float64."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings

import datasets
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl", reason="TRL 1.16 wants Python 3.11")

from trl import DPOConfig, DPOTrainer

from onpo_fast.integrations.trl import ONPOConfig, ONPOTrainer

ROWS = [
    {"prompt": "Name a colour.", "chosen": "Blue, like the sky on a clear day.", "rejected": "No."},
    {"prompt": "Greet me.", "chosen": "Hello!", "rejected": "I would rather not greet anyone today, thank you."},
    {"prompt": "Count to three.", "chosen": "One, two, three.", "rejected": "Three."},
    {"prompt": "Say something kind.", "chosen": "You did well today.", "rejected": "Whatever you say."},
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "It depends on whom you ask, and when."},
    {"prompt": "Name a fruit.", "chosen": "A ripe pear.", "rejected": "Stone."},
]
CONVERSATIONS = [
    {key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in row.items()}
    for row in ROWS
]
LABELS = [0.9, 0.5, 0.2, 1.0, 0.0, 0.7]
CPU = {"use_cpu": True, "bf16": False}  # TRL's default is bf16 on a GPU
NEEDS_EVERY_LOGIT = {"entropy", "mean_token_accuracy"}


def dataset(rows: list[dict] = ROWS, labels: list[float] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**r, "preference": p} for r, p in zip(rows, labels)] if labels else rows)


@pytest.fixture
def build(tiny_model, tmp_path):
    """A trainer on the tiny model; options of the config by name, ``trainer=`` for those of the trainer."""

    def build(kind: type = ONPOTrainer, data=None, trainer: dict | None = None, **options) -> DPOTrainer:
        config = ONPOConfig if kind is ONPOTrainer else DPOConfig
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2,
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-4,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            **CPU,
        }
        return kind(
            model=str(tiny_model),
            args=config(**{**defaults, **options}),
            train_dataset=dataset() if data is None else data,
            **trainer or {},
        )

    return build


def batch(trainer: DPOTrainer) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def step(trainer: DPOTrainer, inputs: dict[str, Tensor], model: torch.nn.Module | None = None) -> dict[str, Tensor]:
    """Loss and gradients of one batch, by name."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model if model is None else model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: {float(error):.2g}"


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("how", ["conversations", "LoRA", "precomputed"])
def test_dpo_is_trls_sigmoid_step_by_step(build, how: str) -> None:
    """The one loss that both have: the same training, and the same numbers under the same names."""
    options: dict = {"gradient_accumulation_steps": 2, "beta": 0.3}
    if how == "conversations":
        options["data"] = dataset(CONVERSATIONS)
    if how == "LoRA":
        options |= {"trainer": {"peft_config": lora()}, "learning_rate": 1e-2}
    if how == "precomputed":
        options["precompute_ref_log_probs"] = True
    ours, theirs = build(objective="dpo", **options), build(DPOTrainer, **options)
    for trainer in (ours, theirs):
        trainer.train()
    got, want = ours.state.log_history[:-1], theirs.state.log_history[:-1]
    assert len(got) == len(want) == 3
    del got[0]["rewards/accuracies"], want[0]["rewards/accuracies"]  # all rewards are 0: rounding decides
    for mine, other in zip(got, want):
        assert other.keys() - mine.keys() == NEEDS_EVERY_LOGIT
        for name, value in mine.items():
            assert value == pytest.approx(other[name], rel=2e-4, abs=2e-5), name
    assert abs(got[-1]["rewards/margins"]) > 1e-3  # it did move
    parameters = dict(theirs.model.named_parameters())
    rate = options.get("learning_rate", 1e-3)  # a step of Adam's, whatever the gradient: rounding moves a share of it
    for name, value in ours.model.named_parameters():
        torch.testing.assert_close(value, parameters[name], rtol=1e-3, atol=1e-2 * rate)


def exact(trainer: ONPOTrainer, inputs: dict[str, Tensor], objective) -> dict[str, Tensor]:
    """Loss and gradients in float64, from the model's own logits."""
    mask = inputs["completion_mask"][:, 1:].bool()

    def logps(model) -> Tensor:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        return (logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0] * mask).sum(1)

    policy = copy.deepcopy(trainer.model)
    policy.forward = type(policy).forward.__get__(policy)  # the copy's own
    policy = policy.double()
    policy.zero_grad()
    with torch.no_grad():
        reference = logps(AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path, dtype=torch.float64))
    chosen, rejected = (logps(policy) - reference).chunk(2)
    loss = objective(chosen - rejected, inputs.get("preference", torch.ones(len(chosen))).double()).mean()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in policy.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("labels", [None, LABELS], ids=["hard labels", "soft labels"])
def test_onpo_is_exact(build, labels: list[float] | None) -> None:
    trainer = build(eta=5.0, data=dataset(labels=labels))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.01)  # away from the reference
    inputs = batch(trainer)
    assert ("preference" in inputs) == bool(labels)
    want = exact(trainer, inputs, lambda g, p: (g - 5 * (p - 0.5)) ** 2)
    close(step(trainer, inputs), want, 1e-4)


def test_ipo_is_on_summed_log_probs(build) -> None:
    trainer = build(objective="ipo", beta=0.2)
    inputs = batch(trainer)
    close(step(trainer, inputs), exact(trainer, inputs, lambda g, p: (g - 2.5) ** 2), 1e-4)


def test_soft_labels_through_training_and_evaluation(build) -> None:
    trainer = build(
        eta=5.0,
        learning_rate=1e-4,
        data=dataset(labels=LABELS),
        precompute_ref_log_probs=True,
        trainer={"eval_dataset": dataset(labels=LABELS)},
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=3,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(25 * sum((p - 0.5) ** 2 for p in LABELS) / 6, rel=1e-5)
    trainer.train()
    after = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert after["eval_loss"] < 2
    assert {"eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen"} <= after.keys()
    with pytest.raises(ValueError, match="after training has started"):  # TRL's: the reference is gone
        trainer.evaluate(dataset(labels=LABELS))


def test_a_new_policy_is_its_reference_in_bf16(build) -> None:
    """Policy and reference go through the same arithmetic: TRL's for one and ours for the other would differ."""
    trainer = build(eta=5.0, model_init_kwargs={"dtype": "bfloat16"}, max_steps=1)
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/margins"]) < 1e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(6.25, rel=1e-5)


def test_lora_trains_the_adapters_against_the_model_without_them(build) -> None:
    trainer = build(eta=5.0, trainer={"peft_config": lora()}, max_steps=2, learning_rate=1e-2)
    inputs = batch(trainer)
    assert trainer.ref_model is None
    before = trainer.compute_ref_log_probs(trainer.model, inputs)
    trainer.train()
    after = trainer.compute_ref_log_probs(trainer.model, inputs)
    torch.testing.assert_close(after, before)
    assert trainer.state.log_history[1]["rewards/margins"] != 0
    gradients = step(trainer, inputs).keys() - {"loss"}
    assert gradients
    assert all("lora_" in name for name in gradients)


def test_the_loss_runs_inside_the_wrapped_forward(build) -> None:
    """DDP reduces only what its own forward saw: a hook in place of the reduction triples every gradient."""
    trainer = build(eta=5.0)
    inputs = batch(trainer)
    want = step(trainer, inputs)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        wrapped = DistributedDataParallel(trainer.model)

        def triple(_, bucket):  # DDP reads the annotations, and wants them unquoted
            future = torch.futures.Future()
            future.set_result(3 * bucket.buffer())
            return future

        wrapped.register_comm_hook(None, triple)
        got = step(trainer, inputs, wrapped)
    finally:
        dist.destroy_process_group()
    close(got, {name: value if name == "loss" else 3 * value for name, value in want.items()}, 1e-6)


def test_a_wrapper_that_casts_a_calls_tensors_does_not_reach_the_log_probs(build) -> None:
    """FSDP's mixed precision rounds every float tensor among a forward's arguments and results."""
    trainer = build(eta=5.0)
    inputs = batch(trainer)
    want = trainer.compute_loss(trainer.model, inputs).item()

    def cast(value):
        return value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value

    def wrapped(**call):
        return torch.utils._pytree.tree_map(cast, trainer.model(**torch.utils._pytree.tree_map(cast, call)))

    got = trainer.compute_loss(wrapped, inputs).item()
    assert got == pytest.approx(want, rel=2**-8)  # the loss itself is a result, and rounded once
    reference = trainer.compute_ref_log_probs(wrapped, inputs)
    torch.testing.assert_close(reference, trainer.compute_ref_log_probs(trainer.model, inputs), rtol=0, atol=0)


def test_without_a_tail_the_model_is_what_it_was(build, tiny_model) -> None:
    trainer = build()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    call = tokenizer("Name a colour.", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trainer.model.eval()
    for labels in (None, call["input_ids"]):
        got, want = trainer.model(**call, labels=labels), plain(**call, labels=labels)
        torch.testing.assert_close(got.logits, want.logits)
        assert labels is None or got.loss == want.loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = [m.generate(**call, max_new_tokens=4, do_sample=False).tolist() for m in (trainer.model, plain)]
    assert drawn[0] == drawn[1]


def test_checkpoints_and_metrics_that_want_logits(build, tmp_path) -> None:
    seen = []
    trainer = build(
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        trainer={
            "eval_dataset": dataset(),
            "compute_metrics": lambda p: seen.append(p.predictions.shape) or {"n": 1},
        },
        per_device_eval_batch_size=6,
    )
    trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.evaluate()
    assert seen[0][-1] == trainer.model.config.vocab_size
    saved = tmp_path / "run" / "checkpoint-1"
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(saved).lm_head.weight, trainer.model.lm_head.weight.detach()
    )
    assert "2502.16852" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_eta_and_beta_are_inverse() -> None:
    assert ONPOConfig(**CPU, eta=100.0).beta == pytest.approx(0.01)
    assert ONPOConfig(**CPU, beta=0.01).eta == pytest.approx(100.0)
    assert ONPOConfig(**CPU, eta=100.0, beta=0.01).make_objective().eta == 100.0
    assert ONPOConfig(**CPU).eta == pytest.approx(10.0)
    assert ONPOConfig(**CPU, objective="ipo").make_objective().tau == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -1.0}, "eta must be a positive"),
        ({"objective": "ipo", "beta": 0.0}, "beta must be a positive"),
        ({"eta": 5.0, "beta": 0.1}, "eta=5 means beta=0.2"),
        ({"objective": "dpo", "eta": 5.0}, "eta is ONPO's"),
        ({"objective": "omd"}, "objective must be one of"),
        ({"loss_type": "ipo"}, "loss_type='ipo'"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5"),
        ({"use_weighting": True}, "use_weighting=True"),
        ({"loss_weights": [0.5]}, "loss_weights"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ONPOConfig(**CPU, **options)


def test_what_the_trainer_refuses(build, tiny_model) -> None:
    with pytest.raises(ValueError, match="args must be an ONPOConfig, not DPOConfig"):
        ONPOTrainer(str(tiny_model), args=DPOConfig(**CPU), train_dataset=dataset())
    for labels, value in (([0.5] * 5 + [1.5], "1.5"), ([0.5] * 5 + [None], "None")):
        with pytest.raises(ValueError, match=rf"preference must be in \[0, 1\] for every pair, not {value}"):
            batch(build(data=dataset(labels=labels), per_device_train_batch_size=6))


def test_without_trl_one_line_says_what_to_install(monkeypatch) -> None:
    name = "onpo_fast.integrations.trl"
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'onpo_fast\[trl\]'"):
        importlib.import_module(name)
