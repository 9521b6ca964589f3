"""The scoring module: a causal language model whose forward computes log-probs or the pair loss.

The LM head's weight is read, and the loss computed, inside ``forward``. DDP prepares the reduction of gradients, and
FSDP2 gathers sharded weights, while the forward of the module that they wrap runs, so this is the module to wrap.
LoRA layers belong inside the wrapped model; ``head_arguments`` adds an adapter of the head to its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..device import to_device
from ..loss import PairLossOutput, fused_linear_pair_loss, linear_logprobs, linear_response_logprobs
from ..objectives import Objective
from ..packing import Packed
from .attention import attention_arguments
from .heads import head_arguments


@dataclass(frozen=True)
class LabelledPairs:
    """P labelled pairs of the S responses of a packed batch.

    ``forward`` takes this class and ``Packed`` rather than separate tensors: DDP and FSDP2 move tensor arguments to the
    GPU, where reading ``pairs`` would synchronise, but leave dataclasses as they are. FSDP2's mixed precision casts the
    tensors of both, which the loss refuses as it would round ``ref_logps`` by whole nats: give the wrapped module
    ``MixedPrecisionPolicy(…, cast_forward_inputs=False)``.
    """

    pairs: Tensor  # (P, 2) int64 on the CPU, where the loss plans its work: (winner, loser) indices of responses
    winner: Tensor  # (P,) int64: the first column of ``pairs`` on the device, for metrics
    loser: Tensor  # (P,) int64: the second column
    preference: Tensor  # (P,) float64 labels P(winner ≻ loser)
    weight: Tensor  # (P,) float64
    ref_logps: Tensor | None  # (S,) float64, nats: summed log-probs of a cached anchor; None for a live anchor

    @classmethod
    def make(
        cls,
        pairs: Sequence[tuple[int, int]],
        preference: Sequence[float],
        weight: Sequence[float],
        ref_logps: Sequence[float] | None,
    ) -> LabelledPairs:
        """Makes the tensors, on the CPU."""
        winner, loser = zip(*pairs)
        return cls(
            torch.tensor(pairs),
            torch.tensor(winner),
            torch.tensor(loser),
            torch.tensor(preference, dtype=torch.float64),
            torch.tensor(weight, dtype=torch.float64),
            None if ref_logps is None else torch.tensor(ref_logps, dtype=torch.float64),
        )

    def to(self, device: torch.device) -> LabelledPairs:
        """Returns a copy on the device, except for ``pairs``, which stays on the CPU."""
        names = ("winner", "loser", "preference", "weight", "ref_logps")
        columns = {name: column for name in names if (column := getattr(self, name)) is not None}
        return replace(self, **{name: to_device(column, device) for name, column in columns.items()})


@dataclass(frozen=True)
class PairLossOptions:
    """How the loss of labelled pairs is computed; one for a whole fit.

    Without an ``objective`` only the responses' log-probs are computed, as the loss would compute them. ``anchor`` is a
    live anchor: a frozen model whose hidden states and head go through the loss with the policy's. It must be whole on
    this device, not sharded.
    """

    objective: Objective | None
    anchor: ScoringModule | None = None
    backend: str = "auto"
    mode: str = "auto"


class ScoringModule(nn.Module):
    """A causal language model whose forward computes token log-probs or the pair loss of a packed batch.

    Call it under autocast if products are to be in half precision. Nothing in forward or backward synchronises with
    the device, except that with separate rows transformers checks whether there is padding.

    Args:
        model: the language model. Its parameters are the only ones of this module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, packed: Packed, labelled: LabelledPairs | None = None, loss: PairLossOptions | None = None
    ) -> Tensor | PairLossOutput:
        """Computes log-probs of the response tokens, or the loss of pairs of responses.

        Args:
            packed: the batch, on the module's device.
            labelled: pairs of its responses, with labels; needs ``loss``.
            loss: the loss of the pairs.

        Returns:
            Without ``labelled``: (N,) float32 log-probs of the response tokens, nats, differentiable. With it: the
            results of ``fused_linear_pair_loss``, of which only the loss is differentiable; without an objective,
            those of ``linear_response_logprobs``, (S,) float64 log-probs of the responses, nats.
        """
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule):  # sharded in a group of its own, which its own forward would gather
            head.unshard()
        if labelled is None:
            return linear_logprobs(self.hidden_states(packed), targets=packed.targets, **head_arguments(self.model))
        common = {
            "targets": packed.targets,
            "cu_seqlens": packed.cu_seqlens,
            "pairs": labelled.pairs,
            "backend": loss.backend,
            "mode": loss.mode,
            **head_arguments(self.model),
        }
        if loss.objective is None:
            return linear_response_logprobs(self.hidden_states(packed), **common)
        reference = _reference(packed, labelled, loss.anchor)  # first, so that its activations are freed by then
        return fused_linear_pair_loss(
            self.hidden_states(packed),
            objective=loss.objective,
            preference=labelled.preference,
            pair_weight=labelled.weight,
            **reference,
            **common,
        )

    def hidden_states(self, packed: Packed) -> Tensor:
        """Returns the hidden states that predict the response tokens, (N, H), differentiable.

        Only ``forward`` may call it if the module is wrapped.
        """
        output = backbone(self.model)(
            input_ids=packed.input_ids, use_cache=False, **attention_arguments(self.model, packed)
        )
        return output.last_hidden_state.flatten(0, 1)[packed.rows]


def _reference(packed: Packed, labelled: LabelledPairs, anchor: ScoringModule | None) -> dict[str, Tensor | None]:
    """Returns the anchor's arguments of ``fused_linear_pair_loss``: cached log-probs, or hidden states and head."""
    if anchor is None:
        return {"ref_logps": labelled.ref_logps}
    with torch.no_grad():
        head = head_arguments(anchor.model)
        return {
            "ref_hidden": anchor.hidden_states(packed),
            "ref_weight": head["weight"],
            "ref_bias": head["bias"],
        }


def sum_by_response(logps: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Sums token log-probs (N,) over each of the S responses: S float64 scalars, nats.

    Args:
        cu_seqlens: (S+1,) response boundaries, on the CPU.
    """
    return [part.sum() for part in logps.double().split(cu_seqlens.diff().tolist())]


def backbone(model: PreTrainedModel) -> nn.Module:
    """Returns the part of a model below its LM head."""
    body = model.base_model
    if body is model:  # Llama 4 does not declare its base model
        body = getattr(model, "model", None) or model.get_decoder()
    return backbone(body) if body is not model and hasattr(body, "lm_head") else body
