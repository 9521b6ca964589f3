"""Measures one fit by this package's trainer or by TRL's DPOTrainer; ``python -m bench training`` compares the two.

    python -m bench.trainers ARGUMENTS

ARGUMENTS is a JSON object with the fields of ``Case``. The last line of the output is the result as JSON.

Both train the same weights on the same tokens, with as many pairs in an optimizer step, AdamW and a clipped
gradient; bfloat16 weights are rounded stochastically by this package and to nearest by TRL. Prompts and responses are
random tokens of random lengths. TRL's trainer runs as its users would have it run fastest:
reference log-probs computed beforehand, its own fused head, Liger's layers on a GPU. It pads (its ``padding_free`` is
disabled in 1.16), and each of its pairs is two rows with a prompt each.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import is_flash_attn_2_available

from onpo_fast.batches import plan_steps
from onpo_fast.config import Config, ModelConfig
from onpo_fast.data import Group, Pair, Response
from onpo_fast.fit import fit, score_as_in_fit
from onpo_fast.models.execution import checkpointed_layers
from onpo_fast.models.heads import head_arguments
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy
from onpo_fast.objectives import Onpo
from onpo_fast.out_of_memory import is_out_of_memory
from onpo_fast.packing import row_length

from .fits import WORKLOADS, random_policy
from .kernels import surroundings
from .memory import Gauge
from .timing import Clock, Spread
from .tiny_checkpoints import make_tokenizer

SPREAD = 0.25  # lengths are uniform within this share of their mean


@dataclass(frozen=True)
class Case:
    """One fit: who trains, what, and on how many pairs."""

    trainer: str
    model: str  # "smollm2", or a name in ``fits.WORKLOADS`` for random weights of that shape
    device: str
    responses: int  # K responses a prompt, all pairs of which are compared
    prompts: int  # in an optimizer step
    steps: int  # timed ones, after a first one
    tokens: int = 128  # mean length of prompts and responses
    at_once: int = 4  # pairs: TRL's per_device_train_batch_size
    microbatch: int | None = None  # tokens: this package's tokens_per_microbatch; None for its default
    seed: int = 0

    @property
    def pairs(self) -> int:
        """Pairs of an optimizer step."""
        return self.prompts * self.responses * (self.responses - 1) // 2

    def groups(self, vocabulary: int) -> list[Group]:
        """The groups of all steps, the first one included."""
        draw = random.Random(self.seed)

        def tokens() -> list[int]:
            length = draw.randint(round((1 - SPREAD) * self.tokens), round((1 + SPREAD) * self.tokens))
            return [draw.randrange(vocabulary) for _ in range(length)]

        return [
            Group([], tokens(), [Response("", tokens(), "length", 0.0) for _ in range(self.responses)])
            for _ in range(self.prompts * (self.steps + 1))
        ]


def measure(case: Case) -> dict[str, Any]:
    """Seconds a step, rates, peak memory above that before the model was loaded, and utilisation."""
    where = torch.device(case.device)
    gauge = Gauge(where)
    train = {"onpo_fast": _ours, "trl": _trl}[case.trainer]  # imports what it needs before memory is read
    prepare = train(case)
    peak_flops = _peak_flops(where, torch.bfloat16 if where.type == "cuda" else torch.float32)
    before = gauge.held()
    policy = _policy(case)
    groups = case.groups(policy.vocabulary)
    gauge.reset()
    with _step_ends(where) as ends:
        prepare(policy, groups)
    peak = gauge.peak() - before
    laps = Spread.of([b - a for a, b in pairwise(ends)])
    flops = sum(_useful_flops(policy, group) for group in groups) / (case.steps + 1)
    response_tokens = sum(len(r.tokens) for group in groups for r in group.responses) / (case.steps + 1)
    return {
        "environment": surroundings(where),
        "status": "measured",
        "attention": policy.attention,
        "layout": policy.layout if case.trainer == "onpo_fast" else "padded",
        "pairs": case.pairs,
        "seconds": laps._asdict(),
        "pairs_per_second": case.pairs / laps.median,
        "response_tokens_per_second": response_tokens / laps.median,
        "model_flops": flops,
        "peak_flops_per_second": peak_flops,
        "utilisation": flops / laps.median / peak_flops,
        "peak_bytes": peak,
    }


@contextmanager
def _step_ends(device: torch.device) -> Iterator[list[float]]:
    """Yields a list to which the time of each optimizer step's end is added."""
    ends: list[float] = []

    def ended(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(ended)
    try:
        yield ends
    finally:
        hook.remove()


def _policy(case: Case) -> Policy:
    if case.model in WORKLOADS:
        policy = random_policy(WORKLOADS[case.model], WORKLOADS[case.model].layers, torch.device(case.device))
        return replace(policy, tokenizer=make_tokenizer())  # TRL asks it for the padding token
    return load(case.model, ModelConfig(model=case.model, device=case.device))


Train = Callable[[Policy, list[Group]], None]


def _ours(case: Case) -> Train:
    def train(policy: Policy, groups: list[Group]) -> None:
        sizes = {"batch_pairs": case.pairs, "tokens_per_microbatch": case.microbatch}
        config = Config(device=case.device, learning_rate=1e-6, **sizes)
        pairs = [Pair(g, i, j, 1.0) for g in range(len(groups)) for i, j in combinations(range(case.responses), 2)]
        batches = plan_steps(pairs, 1, case.pairs, [case.seed])
        anchor = score_as_in_fit(policy, groups, batches, config)
        fit(policy, groups, batches, anchor, Onpo(eta=config.eta), config, lambda metrics: None)

    return train


def _trl(case: Case) -> Train:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """Takes tokens: what TRL would make of text is there already."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    def train(policy: Policy, groups: list[Group]) -> None:
        columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        for group in groups:
            for i, j in combinations(range(case.responses), 2):
                columns["prompt_ids"].append(group.prompt_tokens)
                columns["chosen_ids"].append(group.responses[i].tokens)
                columns["rejected_ids"].append(group.responses[j].tokens)
        gpu = policy.device.type == "cuda"
        # what its users would have; flex_attention, which shares prompts, would compile for every padded shape
        flash = gpu and is_flash_attn_2_available() and policy.model._supports_flash_attn
        policy.use("flash_attention_2" if flash else policy.plain_attention, "separate")
        weights_are_half = next(policy.model.parameters()).dtype == torch.bfloat16
        if case.pairs % case.at_once:
            raise ValueError(f"{case.pairs} pairs a step are not a multiple of {case.at_once} at once")
        with tempfile.TemporaryDirectory() as out:
            options = DPOConfig(
                output_dir=out,
                per_device_train_batch_size=case.at_once,
                gradient_accumulation_steps=case.pairs // case.at_once,
                num_train_epochs=1,
                learning_rate=1e-6,
                max_grad_norm=1.0,
                precompute_ref_log_probs=True,
                max_length=None,
                gradient_checkpointing=bool(checkpointed_layers(policy.model)),
                bf16=gpu and not weights_are_half,
                optim="adamw_torch_fused",
                use_cpu=not gpu,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=case.seed,
            )
            trainer = Tokenized(
                policy.model,
                args=options,
                train_dataset=Dataset.from_dict(columns),
                processing_class=policy.tokenizer,
            )
            trainer.train()

    return train


def _useful_flops(policy: Policy, group: Group) -> float:
    """FLOPs of forward and backward on a group, if its prompt goes through the model once and nothing is recomputed.

    Three times those of the forward pass: products of every token with the weights of the layers, of every response's
    token with the head, and of every token with the keys and values that it attends to.
    """
    text = policy.model.config.get_text_config()
    weight = head_arguments(policy.model)["weight"]
    embeddings = policy.model.get_input_embeddings().weight
    head_and_embeddings = weight.numel() + (0 if embeddings is weight else embeddings.numel())
    body = policy.model.num_parameters() - head_and_embeddings
    prompt, responses = group.prompt_tokens, [response.tokens for response in group.responses]
    tokens, predicted = row_length(prompt, responses), sum(map(len, responses))
    seen = len(prompt) ** 2 / 2 + sum(len(r) * (len(prompt) + len(r) / 2) for r in responses)
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    attention = 4 * text.num_hidden_layers * width * seen
    return 3 * (2 * body * tokens + 2 * weight.numel() * predicted + attention)


def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this dtype, measured here: what utilisation is a share of."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def product(mark: Callable[[], None]) -> None:
        mark()
        torch.mm(a, b, out=out)
        mark()

    laps = Clock(device).block(product, seconds=1.0, fewest=3, most=20)
    return 2 * size**3 / Spread.of([lap for (lap,) in laps]).median


def measure_or_say_why(case: Case) -> dict[str, Any]:
    """Returns what ``measure`` does, or that memory was too small."""
    try:
        return measure(case)
    except Exception as error:
        if not is_out_of_memory(error.__cause__ or error):
            raise
        return {"status": "out of memory", "reason": str(error).partition("\n")[0][:300]}


if __name__ == "__main__":
    print("\n" + json.dumps(measure_or_say_why(Case(**json.loads(sys.argv[1])))))
