"""Performance and accuracy targets for one shape on a Hopper GPU, and whether the results of a run meet them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .peers import CACHED, FAST, FULL, LEAN, MATERIALISED, METHODS, OURS, SCORING, Method, Task
from .problems import TARGET

GIB = 2**30
TARGET_DEVICES = ("H100", "H200")  # one of these is part of the device's name


class Measured:
    """Results of one shape. Every method returns None where a value was not measured."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.floor = record.get("floor_seconds")
        self.rows = {(row["method"], row["task"]): row for row in record["rows"] if row["status"] == "measured"}

    def value(self, method: Method, task: Task, *keys: str) -> float | None:
        """A value of a row, looked up through nested keys."""
        entry: Any = self.rows.get((method.name, task.name))
        for key in keys:
            entry = None if entry is None else entry.get(key)
        return entry

    def seconds(self, method: Method, task: Task) -> float | None:
        return self.value(method, task, "seconds", "both", "median")

    def products(self, logits: int, hidden: int, weight: int) -> float | None:
        """Seconds of these numbers of bare products."""
        if self.floor is None:
            return None
        return logits * self.floor["logits"] + hidden * self.floor["hidden"] + weight * self.floor["weight"]

    def over_floor(self, method: Method, task: Task, recomputed: int = 0) -> float | None:
        """Time divided by that of the task's bare products and ``recomputed`` further products for logits."""
        floor = self.products(task.logits + recomputed, task.hidden, task.weight)
        return ratio(self.seconds(method, task), floor)

    def over(self, method: Method, peer: Method | None, *keys: str) -> float | None:
        """A value of ``method`` divided by that of ``peer``, at ``FULL``."""
        return ratio(self.value(method, FULL, *keys), peer and self.value(peer, FULL, *keys))

    def best_peer(self, *keys: str) -> Method | None:
        """The peer with the smallest such value at ``FULL``."""
        values = {peer: self.value(peer, FULL, *keys) for peer in METHODS if peer not in OURS}
        found = {peer: value for peer, value in values.items() if value is not None and math.isfinite(value)}
        return min(found, key=found.get, default=None)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else (a / b if b else float("inf"))


@dataclass(frozen=True)
class Target:
    """A claim that a measured value is at most ``limit``."""

    claim: str
    limit: float
    value: Callable[[Measured], float | None]
    unit: str = "×"
    peer: Callable[[Measured], Method | None] = lambda measured: (
        None
    )  # the peer that the claim compares with, named in the verdict

    def verdict(self, measured: Measured) -> dict[str, Any]:
        value = self.value(measured)
        word = "not measured" if value is None else "met" if value <= self.limit else "missed"  # NaN counts as missed
        peer = self.peer(measured)
        claim = self.claim if peer is None else f"{self.claim} ({peer.name})"
        return {"claim": claim, "limit": f"≤ {self.limit:g} {self.unit}", "measured": value, "verdict": word}


def _extra_gib(method: Method) -> Callable[[Measured], float | None]:
    return lambda m: ratio(m.value(method, FULL, "peak_extra_bytes"), GIB)


MEDIAN_SECONDS = ("seconds", "both", "median")
LOGP_ERROR = ("error", "logps_nats_rms")

TARGETS = (
    Target("fast, policy + reference: time over its four bare products", 1.12, lambda m: m.over_floor(FAST, FULL)),
    Target(
        "fast: time over the fastest peer's",
        0.90,
        lambda m: m.over(FAST, m.best_peer(*MEDIAN_SECONDS), *MEDIAN_SECONDS),
        peer=lambda m: m.best_peer(*MEDIAN_SECONDS),
    ),
    Target("fast, in one chunk: memory beyond inputs and gradients", 2.8, _extra_gib(FAST), unit="GiB"),
    Target(
        "lean, policy + reference: time over five bare products", 1.12, lambda m: m.over_floor(LEAN, FULL, recomputed=1)
    ),
    Target("lean: memory beyond inputs and gradients", 0.35, _extra_gib(LEAN), unit="GiB"),
    Target("fast, cached reference: time over its three bare products", 1.12, lambda m: m.over_floor(FAST, CACHED)),
    Target("scoring: time over its one bare product", 1.10, lambda m: m.over_floor(FAST, SCORING)),
    Target(
        "fast: summed log-prob of a 1000-token response against float64",
        0.01,
        lambda m: m.value(FAST, FULL, "error", "logps_nats_max"),
        unit="nat",
    ),
    Target(
        "fast: log-prob error over that of the most exact peer",
        1.0,
        lambda m: m.over(FAST, m.best_peer(*LOGP_ERROR), *LOGP_ERROR),
        peer=lambda m: m.best_peer(*LOGP_ERROR),
    ),
    Target(
        "fast: error of dX over materialised PyTorch's",
        1.5,
        lambda m: m.over(FAST, MATERIALISED, "error", "hidden_gradient"),
    ),
    Target(
        "fast: error of dW over materialised PyTorch's",
        1.5,
        lambda m: m.over(FAST, MATERIALISED, "error", "weight_gradient"),
    ),
)


def verdicts(shapes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts on all targets, from the records of a run's shapes."""
    record = next((r for r in shapes if r["shape"] == TARGET.name), {"rows": []})
    return [target.verdict(Measured(record)) for target in TARGETS]
