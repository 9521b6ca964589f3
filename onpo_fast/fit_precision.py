"""How much of a fit its precision keeps: margins in float32 against those of the forward pass and of what is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .batches import Batch, MicroBatch, split
from .config import FitConfig
from .console import say_once
from .data import Group
from .models.policy import Policy
from .models.precision import round_to_bfloat16
from .models.scoring import PairLossOptions
from .out_of_memory import free, is_out_of_memory

MOST_ERROR = 0.5  # error of the margins' movement, as a share of it, above which there is a warning


class KeptMargins:
    """Measures how the margins of a micro-batch move during a fit, in float32 and in the precisions of the run.

    A margin here is log π(winner) − log π(loser). With m its movement over the fit, computed in float32 from the
    weights in memory, and x the same movement computed otherwise, over the pairs:

    - the share that is kept is <x, m> / <m, m>, the least-squares slope of x on m: 1 if x follows m, 0 if not;
    - the error is |x − m| / |m|, which has rounding noise in it too. Where it is as large as m, the share says nothing.

    Create it before the fit, and call ``end`` after the last step, with gradients and optimizer gone: bfloat16 weights
    take 4 bytes a parameter while float32 is computed. It costs two forward passes in float32, two in the precision of
    the run if that is another, and one for what is saved if that is rounded; nothing if all three are float32. Where
    the memory is too small for that, nothing is measured, and a line says so.
    """

    def __init__(self, policy: Policy, groups: Sequence[Group], batch: Batch, config: FitConfig) -> None:
        self.policy = policy
        self.computes_less = policy.compute_dtype != torch.float32
        self.saves_less = policy.saves_rounded
        if not (self.computes_less or self.saves_less):
            return
        self.groups, self.part = groups, split(policy, groups, batch, config.token_budget)[0]
        self.loss = PairLossOptions(None, backend=config.loss_backend, mode=config.loss_mode)
        self.is_measured = True  # until the memory is too small
        self.exact = self._if_it_fits(self._margins_in_float32)
        self.computed = self._if_it_fits(self._margins) if self.computes_less else None

    def end(self, policy: Policy, seed: Sequence[int]) -> dict[str, float | None]:
        """Rounds the weights as they will be saved, and returns metrics of what is kept, none of what is all float32.

        Args:
            policy: the fitted policy.
            seed: of stochastic rounding.
        """
        if not (self.computes_less or self.saves_less):
            return {}
        self.policy = policy
        exact = self._if_it_fits(self._margins_in_float32)
        computed = self._if_it_fits(self._margins) if self.computes_less else None
        if self.saves_less:
            round_to_bfloat16(self.policy.model, seed)
        saved = self._if_it_fits(self._margins_in_float32) if self.saves_less else None
        if not self.is_measured:
            return {}
        metrics, moved = {}, exact - self.exact
        if computed is not None:
            metrics |= _compare("forward", computed - self.computed, moved)
        if saved is not None:
            metrics |= _compare("saved", saved - self.exact, moved)
        return metrics

    def _if_it_fits(self, margins: Callable[[], Tensor]) -> Tensor | None:
        """Returns the margins; None if the memory is, or was, too small: a measurement must not cost a fit."""
        if not self.is_measured:
            return None
        try:
            return margins()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.is_measured = False
        free()
        say_once("precision", "out of memory: what the precision keeps of the fits is not measured")
        return None

    def _margins_in_float32(self) -> Tensor:
        with self.policy.in_float32():
            return self._margins()

    @torch.no_grad()
    def _margins(self) -> Tensor:
        """Returns log π(winner) − log π(loser) of every pair, (P,) float64 on the CPU, nats."""
        policy = self.policy
        policy.model.eval()
        microbatch = MicroBatch.prepare(self.groups, self.part, None, policy.layout).to(policy.device)
        labelled = microbatch.labelled
        with policy.autocast():
            logps = policy.scoring(microbatch.packed, labelled, self.loss).double()
        return (logps[labelled.winner] - logps[labelled.loser]).cpu()


def _compare(where: str, movement: Tensor, exact: Tensor) -> dict[str, float | None]:
    """Returns the share and the error of a movement (P,), by metric; None if not finite, as where nothing has moved."""
    share = (movement @ exact) / (exact @ exact)
    error = (movement - exact).norm() / exact.norm()
    values = {f"margins_kept_{where}": float(share), f"margins_error_{where}": float(error)}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def warning(metrics: Mapping[str, float | None], weights: torch.dtype, learning_rate: float) -> str | None:
    """Says what a fit has lost to its precision, and what to do; None if the errors are at most ``MOST_ERROR``.

    Args:
        metrics: those of the fit's last step.
        weights: their dtype in training.
    """
    lost = []
    more = "--weights bf16-sr or --dtype float32" if weights == torch.float32 else "--weights fp32 --dtype float32"
    for where, what, remedy in (
        ("forward", "the forward pass in bfloat16 sees", more),
        ("saved", "rounded to bfloat16, the saved policy has", "--save_dtype float32"),
    ):
        share, error = metrics.get(f"margins_kept_{where}"), metrics.get(f"margins_error_{where}")
        if share is not None and error is not None and error > MOST_ERROR:
            lost.append(
                f"{what} {share:.0%} of the margins that the fit has moved in float32, with an error of {error:.0%}, "
                f"at a learning rate of {learning_rate:g}: take {remedy}"
            )
    return "; ".join(lost) or None
