"""Seeded problems for the loss, with the same computation in plain PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from onpo_fast import fused_linear_pair_loss
from onpo_fast.objectives import Dpo, Inpo, Ipo, Omd, Onpo

ALL_PAIRS_OF_4 = list(itertools.combinations(range(4), 2))
ALL_PAIRS_OF_TWO_GROUPS = ALL_PAIRS_OF_4 + [(i + 4, j + 4) for i, j in ALL_PAIRS_OF_4]


@dataclass
class Case:
    """A seeded problem. ``arguments`` are those of the call that are not tensors of the model."""

    lengths: list[int]
    pairs: list[tuple[int, int]] | None = None
    vocabulary: int = 97
    features: int = 24
    bias: bool = False
    soft: bool = False
    weighted: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    objective: object = field(default_factory=lambda: Onpo(eta=2.0))
    spread: float = 0.3  # of the head's weights: how sure the model is
    shared_head: bool = False  # the anchor's head is the policy's

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        g = torch.Generator().manual_seed(1)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        n, v, h = sum(self.lengths), self.vocabulary, self.features
        p = len(self.pairs) if self.pairs is not None else len(self.lengths) // 2
        values = {
            "hidden": normal(n, h),
            "weight": normal(v, h, scale=self.spread),
            "ref_hidden": normal(n, h),
            "ref_weight": normal(v, h, scale=self.spread),
            "bias": normal(v),
            "ref_bias": normal(v),
            "targets": torch.randint(v, (n,), generator=g),
            "cu_seqlens": torch.tensor([0, *self.lengths]).cumsum(0).int(),
            "pairs": None if self.pairs is None else torch.tensor(self.pairs).view(-1, 2),
            "preference": torch.rand(p, generator=g, dtype=torch.float64) if self.soft else None,
            "pair_weight": torch.rand(p, generator=g, dtype=torch.float64) + 0.1 if self.weighted else None,
        }
        if not self.bias:
            values["bias"] = values["ref_bias"] = None
        if self.shared_head:
            values["ref_weight"] = values["ref_bias"] = None
        return values

    def run(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", asked=("hidden", "weight", "bias"), **overrides
    ) -> dict[str, torch.Tensor]:
        """Loss, log-probs, margins and the gradients that are asked for, on the CPU."""
        on_host = ("cu_seqlens", "pairs")
        values = {k: x if x is None or k in on_host else x.to(device) for k, x in self.tensors(dtype).items()}
        leaves = {k: values[k].requires_grad_() for k in asked if values[k] is not None}
        keywords = {
            "objective": self.objective,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "temperature": self.temperature,
            "backend": "torch",
        }
        output = fused_linear_pair_loss(**values, **{**keywords, **overrides})
        output.loss.backward()
        results = {**output._asdict(), **{f"{k} gradient": x.grad for k, x in leaves.items()}}
        return {k: x.detach().cpu() for k, x in results.items()}

    def materialised(self, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        """Everything at once in plain PyTorch, from the inputs as ``run`` sees them in its dtype."""
        values = self.tensors(dtype)
        leaves = {k: values[k].requires_grad_() for k in ("hidden", "weight", "bias") if values[k] is not None}
        return self.plain(values, leaves)

    def exact(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """In float64, on inputs that were rounded to ``dtype``."""
        values = {
            k: x.double() if x is not None and x.is_floating_point() else x for k, x in self.tensors(dtype).items()
        }
        leaves = {k: values[k].requires_grad_() for k in ("hidden", "weight", "bias") if values[k] is not None}
        return self.plain(values, leaves)

    def plain(self, values, leaves) -> dict[str, torch.Tensor]:
        def response_logps(hidden, weight, bias):
            logits = F.linear(hidden, weight, bias) * self.logit_scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            logps = F.log_softmax(logits / self.temperature, -1).gather(1, values["targets"][:, None])[:, 0]
            return torch.stack([part.sum() for part in logps.split(self.lengths)])

        policy = response_logps(values["hidden"], values["weight"], values["bias"])
        with torch.no_grad():
            head = ("weight", "bias") if self.shared_head else ("ref_weight", "ref_bias")
            reference = response_logps(values["ref_hidden"], *(values[name] for name in head))
        pairs = self.pairs or [(i, i + 1) for i in range(0, len(self.lengths), 2)]
        winner, loser = torch.tensor(pairs).T
        ratio = policy - reference
        margins = ratio[winner] - ratio[loser]
        p = torch.ones(len(pairs)) if values["preference"] is None else values["preference"]
        w = torch.ones(len(pairs)) if values["pair_weight"] is None else values["pair_weight"]
        p, w = p.to(margins.dtype), w.to(margins.dtype)
        o = self.objective
        if isinstance(o, Dpo):
            losses = -p * F.logsigmoid(o.beta * margins) - (1 - p) * F.logsigmoid(-o.beta * margins)
        else:
            half = {
                Onpo: lambda: o.eta / 2,
                Omd: lambda: o.eta / 2,
                Ipo: lambda: 1 / (2 * o.tau),
                Inpo: lambda: 1 / (2 * o.eta),
            }[type(o)]()
            losses = (margins - half * (2 * p - 1)) ** 2
        loss = (losses * w).sum() / w.sum()
        loss.backward()
        return {
            "loss": loss,
            "logps": policy,
            "ref_logps": reference,
            "margins": margins,
            **{f"{k} gradient": x.grad for k, x in leaves.items()},
        }


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


CASES = {
    "pairs": Case([5, 7, 1, 9, 8, 3]),
    "empty and one-token responses": Case([5, 0, 1, 9, 0, 1]),
    "groups with all pairs": Case([5, 7, 3, 9, 8, 2, 4, 6], ALL_PAIRS_OF_TWO_GROUPS),
    "arbitrary pairs": Case([5, 7, 3, 9, 8, 2, 4], [(6, 0), (1, 4), (4, 1), (0, 3), (1, 4)]),
    "soft labels of pairs among each other": Case(
        [5, 7, 3, 9, 4], [(0, 4), (1, 3), (4, 2), (3, 1)], soft=True, weighted=True
    ),
    "a response in no pair": Case([5, 7, 3, 9], [(0, 2)]),
    "soft labels": Case([5, 7, 3, 9], soft=True),
    "weights": Case([5, 7, 3, 9, 2, 2], weighted=True),
    "bias": Case([5, 7, 3, 9], vocabulary=600, bias=True),
    "softcap": Case([5, 7, 3, 9], softcap=2.5, bias=True),
    "scale and temperature": Case([5, 7, 3, 9], logit_scale=0.4, temperature=1.7),
    "everything": Case(
        [5, 0, 3, 9], ALL_PAIRS_OF_4, bias=True, soft=True, weighted=True, logit_scale=1.4, softcap=4.0, temperature=0.8
    ),
    "one head for both": Case([5, 7, 3, 9, 1, 4], [(5, 0), (1, 2), (1, 3)], shared_head=True, bias=True),
    "sure of most tokens": Case([5, 7, 3, 9], spread=3.0),
    "a vocabulary of one": Case([5, 7], vocabulary=1, objective=Onpo(eta=1.0)),
    "a prime vocabulary": Case([5, 7], vocabulary=1009, features=31),
    **{
        type(o).__name__: Case([5, 7, 3, 9], soft=True, objective=o)
        for o in (Omd(eta=3.0), Inpo(eta=0.4, tau=0.1), Ipo(tau=0.2), Dpo(beta=0.3))
    },
}
