"""How much of a fit its precision keeps: margins in float32 against those of the forward pass and of what is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .batches import Batch, MicroBatch, split
from .config import FitConfig
from .data import Group
from .models.policy import Policy
from .models.precision import round_to_bfloat16
from .models.scoring import PairLossOptions

IN_FORWARD, IN_SAVED = "margins_kept_in_forward", "margins_kept_in_saved"  # metrics of a fit's last step
LEAST = 0.9  # share of the margins, below which there is a warning


class KeptMargins:
    """Measures how the margins of a micro-batch move during a fit, in float32 and in the precisions of the run.

    A margin here is log π(winner) − log π(loser). With m its movement over the fit, computed in float32 from the
    weights in memory, and x the same movement computed otherwise, the share that is kept is <x, m> / <m, m> over the
    pairs: the least-squares slope of x on m. It is 1 if all is kept and 0 if x does not follow m. Where m is small, the
    rounding noise of a bfloat16 forward pass moves the share either way.

    Create it before the fit, and call ``end`` after the last step, with gradients and optimizer gone: bfloat16 weights
    take 4 bytes a parameter while float32 is computed. It costs two forward passes in float32, two in the precision of
    the run if that is another, and one for what is saved if that is rounded; nothing if all three are float32.
    """

    def __init__(self, policy: Policy, groups: Sequence[Group], batch: Batch, config: FitConfig) -> None:
        self.policy = policy
        self.computes_less = policy.compute_dtype != torch.float32
        self.saves_less = policy.saves_rounded
        if not (self.computes_less or self.saves_less):
            return
        part = split(policy, groups, batch, config.tokens_per_microbatch)[0]
        self.microbatch = MicroBatch.prepare(groups, part, None, policy.layout).to(policy.device)
        self.loss = PairLossOptions(None, backend=config.loss_backend, mode=config.loss_mode)
        self.exact = self._margins_in_float32()
        self.computed = self._margins() if self.computes_less else None

    def end(self, policy: Policy, seed: Sequence[int]) -> dict[str, float | None]:
        """Rounds the weights as they will be saved, and returns the shares, by metric; those below full precision.

        Args:
            policy: the fitted policy.
            seed: of stochastic rounding.
        """
        self.policy, shares = policy, {}
        if self.computes_less:
            moved = self._margins_in_float32() - self.exact
            shares[IN_FORWARD] = _share(self._margins() - self.computed, moved)
        if self.saves_less:
            moved = moved if self.computes_less else self._margins_in_float32() - self.exact
            round_to_bfloat16(policy.model, seed)
            shares[IN_SAVED] = _share(self._margins_in_float32() - self.exact, moved)
        return shares

    def _margins_in_float32(self) -> Tensor:
        with self.policy.in_float32():
            return self._margins()

    @torch.no_grad()
    def _margins(self) -> Tensor:
        """Returns log π(winner) − log π(loser) of every pair, (P,) float64 on the CPU, nats."""
        packed, labelled = self.microbatch.packed, self.microbatch.labelled
        with self.policy.autocast():
            logps = self.policy.scoring(packed, labelled, self.loss).double()
        return (logps[labelled.winner] - logps[labelled.loser]).cpu()


def _share(movement: Tensor, exact: Tensor) -> float | None:
    """Returns <movement, exact> / <exact, exact>; None if it is not finite, as where nothing has moved."""
    share = (movement @ exact) / (exact @ exact)
    return float(share) if share.isfinite() else None


def warning(metrics: Mapping[str, float | None], weights: torch.dtype, learning_rate: float) -> str | None:
    """Describes what a fit has lost to its precision, and what to do; None if it has kept ``LEAST`` of its margins.

    Args:
        metrics: those of the fit's last step.
        weights: their dtype in training.
    """
    forward, saved = metrics.get(IN_FORWARD), metrics.get(IN_SAVED)
    if forward is not None and forward < LEAST:
        advice = (
            "--weights bf16-sr or --dtype float32" if weights == torch.float32 else "--weights fp32 --dtype float32"
        )
        return (
            f"the forward pass in bfloat16 sees {forward:.0%} of the margins that the fit has moved in float32, at a "
            f"learning rate of {learning_rate:g}: take {advice}"
        )
    if saved is not None and saved < LEAST:
        return (
            f"rounded to bfloat16, the saved policy keeps {saved:.0%} of the margins that the fit has moved, at a "
            f"learning rate of {learning_rate:g}: take --save_dtype float32"
        )
    return None
