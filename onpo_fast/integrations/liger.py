"""Drop-in losses for ``liger_kernel.chunked_loss.LigerFusedLinearDPOLoss`` (0.8.5): swap the import, keep the call.

    loss_function = FusedLinearONPOLoss(eta=100.0)
    loss, (chosen_logps, rejected_logps, *_) = loss_function(
        lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias
    )

Arguments, their order and the results are Liger's, and ``FusedLinearDPOLoss`` has the same loss; the computation is
``fused_linear_pair_loss``. Beside other objectives this gives gradients accumulated in float32 (Liger's are in the
weight's dtype), exact fp32 log-probs, long responses without all of their logits at once, soft labels and softcaps.
Liger need not be installed.

As with Liger's, call the loss inside the ``forward`` of a module that DDP or FSDP wraps: outside of it, the head's
gradient is not reduced (``docs/your-trainer.md`` shows how).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import loss_checks as check
from ..loss import fused_linear_pair_loss, linear_logprobs
from ..objectives import Dpo, Ipo, Objective, Onpo
from .stacked import LabelledPositions, mean_logits, with_beta

HeadInputs = tuple[Tensor, Tensor, Tensor | None]  # hidden states (N, H), and weight and bias of their head


class FusedLinearPairLoss(nn.Module):
    """The loss of any objective, with the call of Liger's DPO loss. Base class of the losses of this file.

    Args:
        objective: ``onpo_fast.objectives.Onpo(eta=…)`` or another.
        beta: unit of the returned rewards, beta·(log-prob − reference log-prob). It does not change the loss.
        ignore_index: label of the positions that do not count.
        alpha: weight of the NLL in the loss.
        compute_nll_loss: add alpha·(mean NLL of the chosen tokens, nats).
        use_ref_model: measure margins from the reference. If False, margins are measured from 0 and ``ref_input`` is
            ignored.
        average_log_prob: use the mean log-prob of a response in place of the sum; 0 without labels (Liger: NaN).
        logit_scale, softcap: as from ``onpo_fast.models.heads.logit_options(config)``. Liger has neither.
        compiled, chunk_size: accepted for compatibility and ignored: nothing is compiled, and chunks are as large as
            the workspace allows.
        loss_type, label_smoothing, discopop_tau: must keep their defaults, because the class determines the loss; soft
            labels are the argument ``preference`` of the call.

    ``compute_nll_loss`` and ``average_log_prob`` need the log-prob of every token. They use ``linear_logprobs``, which
    computes the logits twice (four products with the head in place of three).

    Raises:
        ValueError: names the argument that is not supported or does not fit.
    """

    liger_loss_type: ClassVar[str | None] = None  # Liger's name of this loss; None if Liger does not have it

    def __init__(
        self,
        objective: Objective,
        *,
        beta: float,
        ignore_index: int = -100,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        compiled: bool = True,
        chunk_size: int = 1,
        loss_type: str | None = None,
        label_smoothing: float = 0.0,
        discopop_tau: float | None = None,
    ) -> None:
        super().__init__()
        if loss_type not in (None, self.liger_loss_type):
            raise ValueError(f"loss_type={loss_type!r}: {type(self).__name__} is a loss of its own; leave it out")
        if label_smoothing:
            raise ValueError(f"label_smoothing={label_smoothing}: call with preference={1 - label_smoothing} instead")
        if discopop_tau is not None:
            raise ValueError(f"discopop_tau={discopop_tau}: there is no DiscoPOP loss here; leave it out")
        self.objective, self.beta = objective, beta
        self.ignore_index, self.alpha, self.compute_nll_loss = ignore_index, alpha, compute_nll_loss
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.logit_scale, self.softcap = logit_scale, softcap

    def extra_repr(self) -> str:
        return repr(self.objective)

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2P, T, H)
        target: Tensor,  # (2P, T) int64
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (2P, T, H_ref)
        ref_weight: Tensor | None = None,  # (V, H_ref)
        ref_bias: Tensor | None = None,  # (V,)
        preference: Tensor | float | None = None,  # (P,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Computes the mean loss of P pairs.

        Args:
            lin_weight, bias: the LM head.
            _input: hidden states, P chosen responses stacked on the P rejected ones.
            target: the token that each hidden state predicts (not shifted here), or ``ignore_index``. On a GPU it costs
                a host synchronisation; a copy on the CPU costs none.
            ref_input, ref_weight, ref_bias: hidden states and head of the reference; without ``ref_weight`` the head is
                the policy's.
            preference: P(chosen ≻ rejected) in [0, 1]; default 1. Liger has no such argument.

        Returns:
            loss, (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards (P,), rejected_rewards (P,)): fp32 (float64 for float64 inputs), nats; the others are
            scalars. Only the loss is differentiable. As in Liger, mean logits are over all T positions, with or without
            a label; here they are before a softcap. nll_loss is 0 without ``compute_nll_loss``.

        Raises:
            ValueError: names the argument whose shape, dtype, device or value does not fit.
        """
        if isinstance(preference, (int, float)):
            preference = torch.full((len(_input) // 2,), float(preference), device=_input.device)
        self._check(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias, preference)
        labelled = LabelledPositions.of(target, self.ignore_index, _input.device)
        targets = labelled.take(target.to(_input.device))
        policy = (labelled.take(_input), lin_weight, bias)
        reference = (labelled.take(ref_input), ref_weight, ref_bias) if self.use_ref_model else None
        by_token = self.compute_nll_loss or self.average_log_prob
        compute = self._by_token if by_token else self._by_response
        loss, logps, ref_logps, nll = compute(labelled, targets, policy, reference, preference)
        means = (
            mean_logits(half.detach().mean((0, 1), dtype=loss.dtype), lin_weight, bias, self.logit_scale)
            for half in _input.chunk(2)
        )
        rewards = self.beta * (logps - ref_logps)
        return loss, (*logps.view(-1, 2).unbind(1), *means, nll, *rewards.view(-1, 2).unbind(1))

    def _by_response(
        self,
        labelled: LabelledPositions,
        targets: Tensor,
        policy: HeadInputs,
        reference: HeadInputs | None,
        preference: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the fused loss of summed log-probs: loss, log-probs and reference log-probs (2P,), and 0."""
        hidden, weight, bias = policy
        if reference is None:
            anchor = {"ref_logps": hidden.new_zeros(len(labelled.lengths), dtype=torch.float32)}
        else:
            anchor = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), reference))
        output = fused_linear_pair_loss(
            hidden,
            weight,
            targets,
            labelled.cu_seqlens,
            objective=self.objective,
            preference=preference,
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            **anchor,
        )
        return output.loss, output.logps, output.ref_logps, torch.zeros_like(output.loss)

    def _by_token(
        self,
        labelled: LabelledPositions,
        targets: Tensor,
        policy: HeadInputs,
        reference: HeadInputs | None,
        preference: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the loss from token log-probs: loss, log-probs and reference log-probs (2P,), and the NLL."""

        def sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            options = {"bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
            return labelled.sums(linear_logprobs(hidden, weight, targets, **options))

        summed = sums(*policy)
        lengths = torch.tensor(labelled.lengths, device=summed.device)
        count = lengths.clamp(min=1) if self.average_log_prob else 1
        logps, ref_logps = summed / count, torch.zeros_like(summed)
        if reference is not None:
            ref_hidden, *ref_head = reference
            with torch.no_grad():
                ref_logps = sums(ref_hidden, *(policy[1:] if ref_head[0] is None else ref_head)) / count
        chosen, rejected = (logps - ref_logps).view(-1, 2).unbind(1)
        label = torch.ones_like(chosen) if preference is None else preference.to(chosen)
        loss = self.objective.loss(chosen - rejected, label).mean()
        nll = torch.zeros_like(loss)
        if self.compute_nll_loss:
            nll = -summed[::2].sum() / max(1, sum(labelled.lengths[::2]))
            loss = loss + self.alpha * nll
        dtype = torch.promote_types(policy[0].dtype, torch.float32)
        return loss.to(dtype), *(x.detach().to(dtype) for x in (logps, ref_logps, nll))

    def _check(self, lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias, preference) -> None:
        """Checks shapes, devices and preferences by this call's names; the loss checks dtypes and targets."""
        if _input.dim() != 3 or len(_input) % 2 or not len(_input):
            raise ValueError(
                f"_input must have shape (2P, T, H), chosen stacked on rejected, not {tuple(_input.shape)}"
            )
        rows, length, features = _input.shape
        device = _input.device
        check.shape_and_device("target", target, (rows, length), target.device)
        check.shape_and_device("lin_weight", lin_weight, (None, features), device)
        if bias is not None:
            check.shape_and_device("bias", bias, (len(lin_weight),), device)
        if preference is not None:
            check.shape_and_device("preference", preference, (rows // 2,), device)
        if preference is not None and device.type == "cpu" and not ((preference >= 0) & (preference <= 1)).all():
            raise ValueError(f"preference must be in [0, 1], not {preference.tolist()[:8]}")
        if not self.use_ref_model:
            return
        if ref_input is None:
            raise ValueError("ref_input is needed, or use_ref_model=False")
        if ref_weight is None and ref_bias is not None:
            raise ValueError("ref_bias goes with ref_weight; without either, the policy's head is the reference's too")
        own_head = ref_weight is not None
        check.shape_and_device("ref_input", ref_input, (rows, length, None if own_head else features), device)
        if ref_weight is not None:
            check.shape_and_device("ref_weight", ref_weight, (len(lin_weight), ref_input.shape[2]), device)
        if ref_bias is not None:
            check.shape_and_device("ref_bias", ref_bias, (len(lin_weight),), device)


class FusedLinearONPOLoss(FusedLinearPairLoss):
    """(g − η/2)², with soft labels (g − η(p − ½))². arXiv 2502.16852, Algorithm 1.

    Args:
        eta: step size η.
        beta: 1/η: the KL coefficient, as DPO's β. Pass eta or beta, not both. Default: beta=0.1, as in Liger. At the
            loss's minimum the rewards of a pair differ by ½.
        options: arguments of ``FusedLinearPairLoss``. With ``average_log_prob`` the loss is not the paper's, which is
            derived for sums.
    """

    def __init__(self, *, eta: float | None = None, beta: float | None = None, **options: Any) -> None:
        eta = with_beta("eta", eta, beta, lambda x: 1 / x)
        super().__init__(Onpo(eta), beta=1 / eta, **options)


class FusedLinearIPOLoss(FusedLinearPairLoss):
    """(g − 1/(2τ))² on summed log-probs, with soft labels (g − (2p − 1)/(2τ))². arXiv 2310.12036, equation 17.

    TRL's ``loss_type="ipo"`` divides each log-prob by the number of tokens, as ``average_log_prob=True`` does here.
    Liger has neither.

    Args:
        tau: the KL coefficient τ.
        beta: TRL's name of tau. Pass tau or beta, not both. Default: 0.1.
        options: arguments of ``FusedLinearPairLoss``.
    """

    def __init__(self, *, tau: float | None = None, beta: float | None = None, **options: Any) -> None:
        tau = with_beta("tau", tau, beta, lambda x: x)
        super().__init__(Ipo(tau), beta=tau, **options)


class FusedLinearDPOLoss(FusedLinearPairLoss):
    """−log σ(βg), the default of ``LigerFusedLinearDPOLoss``. arXiv 2305.18290, equation 7.

    Args:
        beta: the KL coefficient β.
        options: arguments of ``FusedLinearPairLoss``.
    """

    liger_loss_type = "sigmoid"

    def __init__(self, *, beta: float = 0.1, **options: Any) -> None:
        super().__init__(Dpo(beta), beta=beta, **options)
