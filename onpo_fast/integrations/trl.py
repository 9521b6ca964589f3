"""ONPO in TRL: ``ONPOTrainer`` is TRL's ``DPOTrainer`` (1.16) with the fused loss.

    trainer = ONPOTrainer(model, args=ONPOConfig(eta=100.0, …), train_dataset=dataset, processing_class=tokenizer)

One ``train()`` is one fit against one reference: π′_t in the first fit of an iteration of Algorithm 1, π′_{t+1} in the
second (``ref_model``, or the initial state of the model). Datasets, collator, PEFT, precomputed reference log-probs,
evaluation and checkpoints are TRL's. Only the loss differs, and where it is computed: the model's ``forward`` receives
a ``tail``, a function that it calls with its hidden states and head. The loss is thus computed inside any wrapper of
the model, and DDP and FSDP reduce every gradient. The tail holds the reference's and the policy's log-probs, because
wrappers may cast tensor arguments to bf16, in which a sum of 1000 nats loses whole nats.

``entropy`` and ``mean_token_accuracy`` are not logged, as they need all logits. ``logits/*`` are before a softcap.
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
from .stacked import LabelledPositions, mean_logits, with_beta

PAIRWISE_OBJECTIVES = ("onpo", "ipo", "dpo")
IGNORED = -100  # label of tokens outside responses
NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "preference")


@dataclass
class ONPOConfig(DPOConfig):
    """``DPOConfig`` with ONPO's objective.

    ``beta`` is TRL's KL coefficient β, which is also the unit of the logged rewards. ONPO's step size is η = 1/β: set
    eta or beta, not both. At the minimum of ONPO's and IPO's loss, ``rewards/margins`` is ½ (with a label p it is p − ½
    for both). Options of ``DPOConfig``'s own losses must keep their defaults: ``loss_type``, ``loss_weights``,
    ``label_smoothing``, ``ld_alpha``, ``f_divergence_type``, ``use_weighting``.

    Raises:
        ValueError: names an option that does not fit.
    """

    objective: str = field(
        default="onpo",
        metadata={
            "help": "Loss of a margin g, nats summed over tokens: 'onpo' (g − η/2)², 'ipo' (g − 1/(2β))² (TRL's own "
            "averages over tokens instead), 'dpo' −log σ(βg).",
            "choices": list(PAIRWISE_OBJECTIVES),
        },
    )
    eta: float | None = field(
        default=None,
        metadata={"help": "Step size η of ONPO, 1/beta. The target margin is η/2 nats. The paper uses 100."},
    )
    beta: float | None = field(
        default=None, metadata={"help": "KL coefficient β. Default: 1/eta if eta is set, otherwise 0.1."}
    )

    def __post_init__(self) -> None:
        if self.objective not in PAIRWISE_OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(PAIRWISE_OBJECTIVES)}, not {self.objective!r}")
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
        """Returns the objective that the options describe."""
        if self.objective == "onpo":
            return Onpo(self.eta)
        return Ipo(self.beta) if self.objective == "ipo" else Dpo(self.beta)


class ONPOTrainer(DPOTrainer):
    """``DPOTrainer`` with the fused loss and soft labels.

    Takes the arguments of ``DPOTrainer``, with an ``ONPOConfig``. A dataset has TRL's columns (``prompt``, ``chosen``,
    ``rejected``) and may have another, ``preference`` = P(chosen ≻ rejected) in [0, 1].

    Raises:
        ValueError: if ``args`` is not an ``ONPOConfig``, the dataset has images, the auxiliary loss of a mixture of
            experts is on (``router_aux_loss_coef=0.0`` turns it off), or a ``preference`` is outside [0, 1].
    """

    _tag_names = ["trl", "onpo"]  # noqa: RUF012  declared like this in the parent
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
        self._add_tails()  # the parent's constructor calls this method before ours continues
        ours = " onpo_fast"  # in the cache's name, because log-probs that DPOTrainer cached are rounded differently
        self._precompute_model_hash = self._precompute_model_hash.removesuffix(ours) + ours
        return super()._precompute_ref_logps(*args)

    def compute_ref_log_probs(self, model: Callable, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns summed log-probs of chosen and rejected responses under the reference: two (P,) tensors, nats.

        TRL's method, with its adapters and contexts, is called with this package's token log-probs: if policy and
        reference rounded their logits differently in bf16, a margin that should be 0 would be noise.
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
        """Returns the mean loss of the batch's pairs, and stores TRL's metrics for the next log."""
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        call = {k: v for k, v in inputs.items() if k not in NOT_FOR_THE_MODEL} | {"use_cache": False}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        tail = _Loss(self.objective, torch.stack(reference, 1).flatten(), inputs.get("preference"))
        loss = model(**call, labels=labels, tail=tail)
        self._store_metrics(tail, inputs["attention_mask"])
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics needs logits, which the loss does not compute
            return loss, model(**call)

    def _store_metrics(self, tail: _Loss, attention_mask: Tensor) -> None:
        """Stores the metrics by TRL's names. One gather over all processes, one host synchronisation."""
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
# Computed inside the model's forward
# ---------------------------------------------------------------------------------------------------------------------

# hidden states (2P, T, H), labels (2P, T) at the positions that predict them, arguments of the head -> loss
Tail = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def add_tail(model: nn.Module) -> None:
    """Lets a causal language model be called as ``model(…, labels=…, tail=…)``, which returns the tail's result.

    The tail is called with the hidden states below the head. Without a tail, forward is unchanged. Call this before the
    model is wrapped; a second call does nothing.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    if getattr(model, "takes_tail", False):
        return
    before = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self, *args: Any, labels: Tensor | None = None, tail: Tail | None = None, **call: Any) -> Any:
        if tail is None:
            return before(*args, **call) if labels is None else before(*args, labels=labels, **call)
        hidden = self.base_model(*args, **call).last_hidden_state
        head = head_arguments(self)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        device = head["weight"].device  # if a model is split, perhaps not that of its last layer
        return tail(hidden.to(device), following.to(device), head)

    model.forward = types.MethodType(forward, model)
    model.takes_tail = True


class _Score:
    """A tail that stores token log-probs in ``log_probs``: (2P, T − 1) float64, 0 at positions without a label."""

    log_probs: Tensor

    def __call__(self, hidden: Tensor, labels: Tensor, head: dict[str, Any]) -> Tensor:
        labelled = LabelledPositions.of(labels, IGNORED, hidden.device)
        per_token = linear_logprobs(labelled.take(hidden), targets=labelled.take(labels), **head).double()
        everywhere = per_token.new_zeros(labels.numel()).index_copy(0, labelled.rows, per_token)
        self.log_probs = everywhere.view(labels.shape)[:, :-1]
        return per_token


class _Loss:
    """A tail that returns the loss of the batch and stores what the metrics need."""

    logps: Tensor  # (2P,) nats, pair by pair: chosen, rejected, chosen, …
    tokens: list[int]  # number of tokens of the chosen and of the rejected responses
    logits: Tensor  # (2,) float64: mean logits over the vocabulary, summed over these tokens

    def __init__(self, objective: Objective, ref_logps: Tensor, preference: Tensor | None) -> None:
        self.objective, self.ref_logps, self.preference = objective, ref_logps, preference

    def __call__(self, hidden: Tensor, labels: Tensor, head: dict[str, Any]) -> Tensor:
        labelled = LabelledPositions.of(labels, IGNORED, hidden.device)
        rows = labelled.take(hidden)
        output = fused_linear_pair_loss(
            rows,
            targets=labelled.take(labels),
            cu_seqlens=labelled.cu_seqlens,
            objective=self.objective,
            ref_logps=self.ref_logps.to(hidden.device),
            preference=None if self.preference is None else self.preference.to(hidden.device),
            **head,
        )
        self.logps, self.ref_logps = output.logps, output.ref_logps
        self.tokens = [sum(labelled.lengths[half::2]) for half in (0, 1)]
        tokens = torch.tensor(self.tokens, device=hidden.device)[:, None]
        parts = [part.sum(0, dtype=output.logps.dtype) for part in rows.detach().split(labelled.lengths)]
        means = torch.stack(parts).view(-1, 2, hidden.shape[-1]).sum(0) / tokens.clamp(min=1)
        self.logits = tokens[:, 0] * mean_logits(means, head["weight"], head["bias"], head["logit_scale"]).double()
        return output.loss


class WithPreference:
    """A collator that adds the column ``preference``, (P,) float32, if the dataset has one.

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
