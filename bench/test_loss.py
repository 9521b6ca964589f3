"""Time of the pairwise loss, forward and backward: ours, the peers, and the bare products.

pytest bench --benchmark-only
"""

from __future__ import annotations

import pytest

from .peers import PEERS, bare_gemms
from .problems import SHAPES, Problem

ROUNDS = 5


@pytest.fixture(scope="module", params=SHAPES)
def problem(request) -> Problem:
    return Problem.make(SHAPES[request.param])


@pytest.mark.parametrize("peer", [*PEERS, "bare_gemms"])
def test_time(benchmark, problem: Problem, peer: str) -> None:
    benchmark.group = problem.shape.name
    benchmark.extra_info["peer"] = peer
    benchmark.extra_info["gemm_flops"] = problem.shape.gemm_flops
    call = PEERS.get(peer, bare_gemms)
    benchmark.pedantic(call, args=(problem,), rounds=ROUNDS, warmup_rounds=1)
