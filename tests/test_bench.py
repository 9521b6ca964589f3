"""The benchmark compares like with like: every peer computes the same loss and gradients."""

from __future__ import annotations

import pytest
import torch

from bench.memory import peak_extra_bytes
from bench.peers import PEERS, bare_gemms
from bench.problems import SHAPES, Problem, Shape

TINY = Shape("tiny", pairs=3, tokens=9, features=16, vocabulary=77)


@pytest.mark.parametrize("peer", PEERS)
def test_peers_agree(peer: str) -> None:
    problem = Problem.make(TINY)
    for got, want in zip(PEERS[peer](problem), PEERS["materialised"](Problem.make(TINY, torch.float64))):
        # the float64 problem is drawn in float32 too, so the inputs are the same
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5)


def test_the_floor_runs_on_every_shape_of_rows() -> None:
    bare_gemms(Problem.make(Shape("odd", pairs=1, tokens=300, features=8, vocabulary=33)))


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    shape = SHAPES["smollm2-1x2x1024"]
    logits = 4 * shape.rows * shape.vocabulary
    gradient = 4 * shape.features * shape.vocabulary
    assert gradient < peak_extra_bytes("ours", shape.name) < logits
