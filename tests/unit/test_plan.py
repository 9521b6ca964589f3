"""Planning of the Triton backend and the order of its rows, on the host: needs neither triton nor a GPU."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onpo_fast.kernels.groups import PairLayout, ResponseGroup
from onpo_fast.kernels.on_device import PerStream
from onpo_fast.kernels.order import GroupedOrder
from onpo_fast.kernels.plan import PairPlan, choose_plan

KERNELS = Path(__file__).parents[2] / "kernels"


def imported(module: str) -> set[str]:
    """The modules that a module of ``kernels/`` imports when it is imported, directly or through others."""
    found, waiting = set(), [module]
    while waiting:
        for node in ast.parse((KERNELS / f"{waiting.pop()}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module)
            elif isinstance(node, ast.ImportFrom):
                names = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [name for name in names if name not in found]
                found |= set(names)
    return found


@pytest.mark.parametrize("module", ["plan", "order", "problem", "chunked", "reference"])
def test_triton_is_not_imported(module: str) -> None:
    assert not any(name.split(".")[0] == "triton" for name in imported(module))
    assert any(name.split(".")[0] == "triton" for name in imported("fused"))


class TestPlan:
    """Of pairs of 2×``length`` tokens, head of Qwen3-8B, bf16."""

    @staticmethod
    def plan(
        pairs: int, length: int, mode: str = "auto", workspace: int | None = None, free: int | None = None
    ) -> PairPlan:
        groups = [ResponseGroup([2 * i, 2 * i + 1], [i], 2 * length) for i in range(pairs)]
        return choose_plan(groups, (151936, 4096), torch.bfloat16, True, mode, workspace, free)

    def test_a_chunk_for_each_pair_of_2048_tokens(self) -> None:
        plan = self.plan(4, 1024)
        assert (plan.mode, len(plan.chunks)) == ("fast", 4)
        assert 0.9 * 2**30 < plan.workspace < 2**30

    def test_free_memory_limits_it(self) -> None:
        assert self.plan(4, 1024, free=2**40).mode == "fast"
        plan = self.plan(4, 1024, free=2**30)
        assert plan.mode == "lean"
        assert plan.workspace < 0.35 * 2**30

    def test_a_quarter_of_the_free_memory_makes_one_chunk(self) -> None:
        """Of the 70 GiB that are free on an 80 GB GPU beside the inputs and gradients; a workspace still bounds it."""
        plan = self.plan(4, 1024, free=70 * 2**30)
        assert (plan.mode, len(plan.chunks)) == ("fast", 1)
        assert 8192 * 151936 * 2 < plan.workspace < 3 * 10**9
        assert len(self.plan(4, 1024, free=8 * 2**30).chunks) > 1
        assert len(self.plan(4, 1024, workspace=2**30, free=70 * 2**30).chunks) == 4

    def test_lean_only_where_it_takes_less(self) -> None:
        assert self.plan(1, 8192).mode == "lean"
        assert self.plan(16, 2048).mode == "fast"  # 65536 tokens: lean's slices and dX alone take more than a chunk

    def test_no_chunks_of_a_few_rows(self) -> None:
        assert self.plan(128, 32, workspace=400 * 2**20).mode == "lean"
        assert self.plan(128, 32, "fast", workspace=400 * 2**20).mode == "fast"


def test_an_order_puts_groups_with_pairs_first_and_together() -> None:
    """Responses 0 and 2 are a pair, 1 is in none, 3 to 5 are a group; every range of a chunk is contiguous."""
    lengths = [2, 3, 1, 4, 0, 2]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    layout = PairLayout.of(edges, torch.tensor([[4, 3], [0, 2], [5, 4]]))
    order = GroupedOrder(layout, torch.device("cpu"))
    responses = [0, 2, 3, 4, 5, 1]
    assert order.on_device["responses"].tolist() == responses
    assert order.on_device["pairs"].tolist() == [1, 0, 2]
    assert order.edges == [0, 2, 3, 7, 7, 9, 12]
    assert order.on_device["winner"].tolist() == [0, 3, 4]
    assert order.on_device["loser"].tolist() == [1, 2, 3]
    values = torch.arange(6.0)
    assert order.order_responses(values).tolist() == responses
    rows = torch.randn(12, 3)
    assert torch.equal(order.order_rows(rows)[:2], rows[:2])
    for there, back, original in (
        (order.order_rows, order.restore_rows, rows),
        (order.order_responses, order.restore_responses, values),
        (order.order_pairs, order.restore_pairs, torch.arange(3.0)),
    ):
        assert torch.equal(back(there(original)), original)
        assert not torch.equal(there(original), original)


def test_an_order_that_moves_nothing_copies_nothing() -> None:
    order = GroupedOrder(PairLayout.of(torch.tensor([0, 2, 5]), torch.tensor([[1, 0]])), torch.device("cpu"))
    rows = torch.randn(5, 3)
    assert order.order_rows(rows) is order.restore_rows(rows) is rows


def test_a_layout_is_copied_once_for_each_stream(monkeypatch) -> None:
    """A second stream could read what the first one is still copying; a graph takes what is there, for good."""
    device = torch.device("cuda")
    stream, graph = [1], [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream[0]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: graph[0])
    layouts = [PairLayout([0, i], torch.zeros(0, 2), []) for i in range(40)]
    cache = PerStream(lambda layout, device: object())
    first = cache(layouts[0], device)
    assert cache(layouts[0], device) is first
    stream[0] = 2
    second = cache(layouts[0], device)
    assert second is not first
    stream[0], graph[0] = 3, True
    assert cache(layouts[0], device) is second
    graph[0] = False
    for layout in layouts[1:]:
        cache(layout, device)
    assert len(cache.entries) == PerStream.CAPACITY
    assert cache.read_by_graphs == [second]
