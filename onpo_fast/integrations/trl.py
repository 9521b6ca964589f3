"""ONPO in TRL: ``ONPOTrainer`` is TRL's ``DPOTrainer`` (1.16) with the fused loss.

    trainer = ONPOTrainer(model, args=ONPOConfig(eta=100.0, …), train_dataset=dataset, processing_class=tokenizer)

One ``train()`` is one fit against one reference: π′_t for the first fit of an iteration of Algorithm 1, π′_{t+1} for
the second (``ref_model``, or the model as it comes). Datasets, collator, PEFT, precomputed reference log-probs,
evaluation and checkpoints are TRL's. Different are the loss and how it is reached: the model's ``forward`` is given a
``tail``, which it calls with its hidden states and head. So the loss runs inside whatever wraps the model, and DDP
and FSDP reduce every gradient. The tail holds the reference's log-probs, and keeps the policy's, out of the sight of
wrappers that cast a call's tensors to bf16: a sum of 1000 nats would lose its units.

Not logged are ``entropy`` and ``mean_token_accuracy``: they need every logit. ``logits/*`` are before a softcap.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from accelerate.utils import is_peft_model
    from trl import DPOConfig, DPOTrainer
except ImportError as error:
    raise ImportError("onpo_fast.integrations.trl needs TRL, and Python 3.11: pip install 'onpo_fast[trl]'") from error

from ..loss import fused_linear_pair_loss, linear_logprobs
from ..models.heads import head_arguments
from ..objectives import Dpo, Ipo, Objective, Onpo
from .stacked import Kept, mean_logits, with_beta

OBJECTIVES = ("onpo", "ipo", "dpo")
IGNORED = -100  # label of the tokens that are no response's
NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "preference")


@dataclass
class ONPOConfig(DPOConfig):
    """``DPOConfig`` with ONPO's objective.

    ``beta`` is TRL's: the pull towards the reference, and the unit of the logged rewards. ONPO's step size η is its
    inverse; give either. A pair is where ONPO and IPO want it when its ``rewards/margins`` is ½ (p − ½ with a label p
    for ONPO, 2p − 1 times ½ for IPO). What ``DPOConfig`` has for other losses must be left alone: ``loss_type``,
    ``loss_weights``, ``label_smoothing``, ``ld_alpha``, ``f_divergence_type``, ``use_weighting``.

    Raises:
        ValueError: names the option that does not fit.
    """

    objective: str = field(
        default="onpo",
        metadata={
            "help": "Loss of a margin g, nats summed over tokens: 'onpo' (g − η/2)², 'ipo' (g − 1/(2β))² (TRL's own "
            "averages over tokens instead), 'dpo' −log σ(βg).",
            "choices": list(OBJECTIVES),
        },
    )
    eta: float | None = field(
        default=None,
        metadata={"help": "Step size of ONPO; the target is η/2 nats. The inverse of beta; 100 in the paper."},
    )
    beta: float | None = field(
        default=None, metadata={"help": "Pull towards the reference; default 1/eta, or else 0.1."}
    )

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.objective != "onpo" and self.eta is not None:
            raise ValueError(f"eta is ONPO's; objective={self.objective!r} takes beta")
        if self.objective == "onpo":
            self.eta = with_beta("eta", self.eta, self.beta, lambda x: 1 / x)
            self.beta = 1 / self.eta
        else:
            self.beta = with_beta("beta", self.beta, None, lambda x: x)
        others = {
            "loss_type": ["sigmoid"],
            "loss_weights": None,
            "label_smoothing": 0.0,
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "use_weighting": False,
        }
        for name, default in others.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to DPOConfig's losses; here the loss is the `objective`, "
                    "and soft labels are a column `preference`"
                )
        super().__post_init__()

    def make_objective(self) -> Objective:
        if self.objective == "onpo":
            return Onpo(self.eta)
        return Ipo(self.beta) if self.objective == "ipo" else Dpo(self.beta)


class ONPOTrainer(DPOTrainer):
    """``DPOTrainer`` with the fused loss and soft labels.

    Takes what ``DPOTrainer`` takes, with an ``ONPOConfig``. A dataset has TRL's columns (``prompt``, ``chosen``,
    ``rejected``) and may have one more, ``preference`` = P(chosen ≻ rejected) in [0, 1].

    Raises:
        ValueError: for what would not be honoured: a config that is not an ``ONPOConfig``, vision datasets, the
            auxiliary loss of a mixture of experts (``router_aux_loss_coef=0.0`` leaves it out), or a ``preference``
            outside [0, 1].
    """

    _tag_names = ["trl", "onpo"]  # noqa: RUF012  as the parent declares it
    _name = "ONPO"
    _paper = {  # noqa: RUF012
        "title": "Improving LLM General Preference Alignment via Optimistic Online Mirror Descent",
        "id": "2502.16852",
        "citation": (
            "@article{zhang2025improving,\n"
            "    title  = {{Improving LLM General Preference Alignment via Optimistic Online Mirror Descent}},\n"
            "    author = {Zhang and others},\n"
            "    year   = 2025,\n"
            "    eprint = {arXiv:2502.16852},\n"
            "}"
        ),
    }

    def __init__(self, model: Any, ref_model: Any = None, args: ONPOConfig | None = None, *rest: Any, **named: Any):
        args = ONPOConfig() if args is None else args
        if not isinstance(args, ONPOConfig):
            raise ValueError(f"args must be an ONPOConfig, not {type(args).__name__}")
        self.objective = args.make_objective()
        super().__init__(model, ref_model, args, *rest, **named)
        if self._is_vision_dataset:
            raise ValueError("train_dataset has images: vision datasets are not supported")
        if self.aux_loss_enabled:
            raise ValueError("router_aux_loss_coef must be 0.0: the experts' auxiliary loss is not computed here")
        self._add_tails()
        self.data_collator = WithPreference(self.data_collator)

    def _add_tails(self) -> None:
        add_tail(self.model)
        if self.ref_model is not None:
            add_tail(self.accelerator.unwrap_model(self.ref_model))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "preference" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "preference"]

    def _precompute_ref_logps(self, *args: Any) -> Any:
        self._add_tails()  # the parent's constructor comes here before ours goes on
        ours = " onpo_fast"  # in the name of the cache: what DPOTrainer left there came from its own arithmetic
        self._precompute_model_hash = self._precompute_model_hash.removesuffix(ours) + ours
        return super()._precompute_ref_logps(*args)

    def compute_ref_log_probs(self, model: Callable, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed log-probs under the reference, chosen and rejected: two (P,), nats.

        TRL's own, with its adapters and contexts, on our token log-probs: in bf16, policy and reference must not round
        their logits differently, or a margin that should be 0 is noise.
        """

        def scored(*, fused_lm_head: bool, **call: Any) -> _Score:
            tail = _Score()
            model(**call, tail=tail)
            return tail

        return super().compute_ref_log_probs(scored, {k: v for k, v in inputs.items() if k != "preference"})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The mean loss of the batch's pairs; the metrics that TRL's users know are kept for the next log."""
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        call = {k: v for k, v in inputs.items() if k not in NOT_FOR_THE_MODEL} | {"use_cache": False}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        tail = _Loss(self.objective, torch.stack(reference, 1).flatten(), inputs.get("preference"))
        loss = model(**call, labels=labels, tail=tail)
        self._keep_metrics(tail, inputs["attention_mask"])
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics wants logits, which the loss never had
            return loss, model(**call)

    def _keep_metrics(self, tail: _Loss, attention_mask: Tensor) -> None:
        """Under TRL's names. Sums over all processes in one go: one wait for the device."""
        mode = "train" if self.model.training else "eval"
        chosen, rejected = tail.logps.double().view(-1, 2).unbind(1)
        chosen_reward, rejected_reward = (self.beta * (tail.logps - tail.ref_logps)).double().view(-1, 2).unbind(1)
        accurate = (chosen_reward > rejected_reward).double()
        names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
        per_pair = torch.stack([chosen_reward, rejected_reward, accurate, chosen, rejected]).sum(1)
        tokens = torch.tensor(tail.tokens, dtype=torch.float64).to(per_pair, non_blocking=True)
        pairs = torch.full_like(per_pair[:1], len(chosen))
        ours = torch.cat([per_pair, pairs, tail.logits, tokens, attention_mask.sum().to(per_pair)[None]])
        *sums, pairs, chosen_logit, rejected_logit, chosen_tokens, rejected_tokens, seen = (
            self.accelerator.gather(ours[None]).sum(0).tolist()
        )
        values = {name: total / pairs for name, total in zip(names, sums)}
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        values["logits/chosen"] = chosen_logit / max(1, chosen_tokens)
        values["logits/rejected"] = rejected_logit / max(1, rejected_tokens)
        for name, value in values.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += int(seen) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


# ---------------------------------------------------------------------------------------------------------------------
# What happens inside the model's forward
# ---------------------------------------------------------------------------------------------------------------------

Tail = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]  # hidden (2P, T, H), labels (2P, T) beside them, head


def add_tail(model: nn.Module) -> None:
    """Teaches a causal language model ``model(…, labels=…, tail=…)``: the body, then ``tail(hidden, labels, head)``.

    Without a tail its forward is what it was. Done before the model is wrapped, and once.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    if getattr(model, "takes_tail", False):
        return
    before = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(self, *args: Any, labels: Tensor | None = None, tail: Tail | None = None, **call: Any) -> Any:
        if tail is None:
            return before(*args, **call) if labels is None else before(*args, labels=labels, **call)
        hidden = self.base_model(*args, **call).last_hidden_state
        head = head_arguments(self)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        device = head["weight"].device  # which a model split over devices may have elsewhere than its last layer
        return tail(hidden.to(device), following.to(device), head)

    model.forward = types.MethodType(forward, model)
    model.takes_tail = True


class _Score:
    """Token log-probs of the labels, kept in ``log_probs``: (2P, T − 1) float64, 0 where there is no label."""

    log_probs: Tensor

    def __call__(self, hidden: Tensor, labels: Tensor, head: dict[str, Any]) -> Tensor:
        kept = Kept.of(labels, IGNORED, hidden.device)
        per_token = linear_logprobs(kept.take(hidden), targets=kept.take(labels), **head).double()
        everywhere = per_token.new_zeros(labels.numel()).index_copy(0, kept.rows, per_token)
        self.log_probs = everywhere.view(labels.shape)[:, :-1]
        return per_token


class _Loss:
    """The loss of the batch; what the metrics need is kept."""

    logps: Tensor  # (2P,) nats, pair by pair: chosen, rejected, chosen, …
    tokens: list[int]  # of the chosen, of the rejected
    logits: Tensor  # (2,) float64: mean logits, summed over those tokens

    def __init__(self, objective: Objective, ref_logps: Tensor, preference: Tensor | None) -> None:
        self.objective, self.ref_logps, self.preference = objective, ref_logps, preference

    def __call__(self, hidden: Tensor, labels: Tensor, head: dict[str, Any]) -> Tensor:
        kept = Kept.of(labels, IGNORED, hidden.device)
        rows = kept.take(hidden)
        output = fused_linear_pair_loss(
            rows,
            targets=kept.take(labels),
            cu_seqlens=kept.cu_seqlens,
            objective=self.objective,
            ref_logps=self.ref_logps.to(hidden.device),
            preference=None if self.preference is None else self.preference.to(hidden.device),
            **head,
        )
        self.logps, self.ref_logps = output.logps, output.ref_logps
        self.tokens = [sum(kept.lengths[half::2]) for half in (0, 1)]
        tokens = torch.tensor(self.tokens, device=hidden.device)[:, None]
        parts = [part.sum(0, dtype=output.logps.dtype) for part in rows.detach().split(kept.lengths)]
        means = torch.stack(parts).view(-1, 2, hidden.shape[-1]).sum(0) / tokens.clamp(min=1)
        self.logits = tokens[:, 0] * mean_logits(means, head["weight"], head["bias"], head["logit_scale"]).double()
        return output.loss


class WithPreference:
    """A collator that also takes the column ``preference``, where there is one: (P,) float32.

    Raises:
        ValueError: names a value that is not in [0, 1].
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if "preference" in examples[0]:
            values = [example["preference"] for example in examples]
            for value in values:
                if not (isinstance(value, (int, float)) and 0 <= value <= 1):
                    raise ValueError(f"preference must be in [0, 1] for every pair, not {value!r}")
            batch["preference"] = torch.tensor(values, dtype=torch.float32)
        return batch
