"""The targets, and whether the numbers of a run meet them. The targets are about one shape and one GPU: an H100."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .peers import CACHED, FAST, FULL, LEAN, LIGER_DPO, MATERIALISED, SCORING, TRL, Method, Task
from .problems import TARGET

GIB = 2**30
TARGET_DEVICE = "H100"


class Measured:
    """The numbers of one shape; None where one was not measured."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.floor = record.get("floor_seconds")
        self.rows = {(row["method"], row["task"]): row for row in record["rows"] if row["status"] == "measured"}

    def value(self, method: Method, task: Task, *keys: str) -> float | None:
        """An entry of a row, as deep as the keys lead."""
        entry: Any = self.rows.get((method.name, task.name))
        for key in keys:
            entry = None if entry is None else entry.get(key)
        return entry

    def seconds(self, method: Method, task: Task) -> float | None:
        return self.value(method, task, "seconds", "both", "median")

    def products(self, logits: int, hidden: int, weight: int) -> float | None:
        """Seconds of so many bare products."""
        if self.floor is None:
            return None
        return logits * self.floor["logits"] + hidden * self.floor["hidden"] + weight * self.floor["weight"]

    def over_floor(self, method: Method, task: Task, recomputed: int = 0) -> float | None:
        floor = self.products(task.logits + recomputed, task.hidden, task.weight)
        return ratio(self.seconds(method, task), floor)

    def over(self, method: Method, peer: Method, *keys: str) -> float | None:
        return ratio(self.value(method, FULL, *keys), self.value(peer, FULL, *keys))


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else (a / b if b else float("inf"))


@dataclass(frozen=True)
class Target:
    claim: str
    limit: float
    value: Callable[[Measured], float | None]
    at_least: bool = False
    unit: str = "×"

    def verdict(self, measured: Measured) -> dict[str, Any]:
        value = self.value(measured)
        if value is None:
            word = "not measured"
        else:  # what is not a number meets nothing
            word = "met" if (value >= self.limit if self.at_least else value <= self.limit) else "missed"
        sign = "≥" if self.at_least else "≤"
        return {"claim": self.claim, "limit": f"{sign} {self.limit:g} {self.unit}", "measured": value, "verdict": word}


def _extra_gib(method: Method) -> Callable[[Measured], float | None]:
    return lambda m: ratio(m.value(method, FULL, "peak_extra_bytes"), GIB)


TARGETS = (
    Target("fast, policy + reference: time over its four bare products", 1.15, lambda m: m.over_floor(FAST, FULL)),
    Target("fast: time over TRL's", 0.80, lambda m: m.over(FAST, TRL, "seconds", "both", "median")),
    Target("fast: time over Liger's FusedLinearDPO", 0.45,
           lambda m: m.over(FAST, LIGER_DPO, "seconds", "both", "median")),
    Target("fast, in one chunk: memory beyond inputs and gradients", 2.8, _extra_gib(FAST), unit="GiB"),
    Target("lean, policy + reference: time over five bare products", 1.12,
           lambda m: m.over_floor(LEAN, FULL, recomputed=1)),
    Target("lean: memory beyond inputs and gradients", 0.35, _extra_gib(LEAN), unit="GiB"),
    Target("fast, cached reference: time over its three bare products", 1.15, lambda m: m.over_floor(FAST, CACHED)),
    Target("scoring: time over its one bare product", 1.10, lambda m: m.over_floor(FAST, SCORING)),
    Target("fast: summed log-prob of a 1000-token response against float64", 0.01,
           lambda m: m.value(FAST, FULL, "error", "logps_nats_max"), unit="nat"),
    Target("fast: log-prob error, times closer to float64 than TRL's", 20.0,
           lambda m: m.over(TRL, FAST, "error", "logps_nats_rms"), at_least=True),
    Target("fast: error of dX over materialised PyTorch's", 1.0,
           lambda m: m.over(FAST, MATERIALISED, "error", "hidden_gradient")),
    Target("fast: error of dW over materialised PyTorch's", 1.0,
           lambda m: m.over(FAST, MATERIALISED, "error", "weight_gradient")),
)  # fmt: skip


def verdicts(shapes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a run's records, by shape."""
    record = next((r for r in shapes if r["shape"] == TARGET.name), {"rows": []})
    return [target.verdict(Measured(record)) for target in TARGETS]
