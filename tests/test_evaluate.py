"""Win rates, intervals and the restricted duality gap on numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from onpo_fast import evaluate
from onpo_fast.config import Config
from onpo_fast.errors import UserError


def test_blocks_average_the_samples_of_two_policies() -> None:
    upper = np.array([[0.5, 0.6, 0.9, 0.7], [0.4, 0.5, 0.5, 0.3], [0.1, 0.5, 0.5, 0.2], [0.3, 0.7, 0.8, 0.5]])
    blocks = evaluate._blocks(upper, 2)
    np.testing.assert_allclose(blocks, [[0.5, 0.6], [0.4, 0.5]])


def test_restricted_gap() -> None:
    cycle = np.array([[0.5, 0.7, 0.2], [0.3, 0.5, 0.9], [0.8, 0.1, 0.5]])
    np.testing.assert_allclose(evaluate.restricted_gap(cycle), [0.6, 0.4, 0.8])
    assert evaluate.restricted_gap(np.full((3, 3), 0.5)).tolist() == [0, 0, 0]


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        wins = np.clip(rng.normal(0.6, 0.15, size=(40, 2, 2)), 0, 1)
        low, high = evaluate._intervals(wins)[0, 1]
        hits += low <= 0.6 <= high
    assert hits / 500 >= 0.93


@pytest.mark.parametrize(("prompts", "sure"), [(1, False), (3, False), (80, True)])
def test_a_few_prompts_that_all_agree_are_not_certain(prompts: int, sure: bool) -> None:
    wins = np.tile([[0.5, 1.0], [0.0, 0.5]], (prompts, 1, 1))
    intervals = evaluate._intervals(wins)
    low, high = intervals[0, 1]
    assert (low > 0.5) == sure
    assert high == 1
    np.testing.assert_allclose(intervals[1, 0], [0, 1 - low])
    assert intervals[0, 0].tolist() == [0.5, 0.5]


def test_policies_in_the_order_they_were_made(tmp_path) -> None:
    for t in (1, 2, 99, 100):
        (tmp_path / f"iteration_{t:02d}" / "policy").mkdir(parents=True)
    assert list(evaluate.finished_policies(tmp_path)) == ["π_2", "π_3", "π_100", "π_101"]


def test_nothing_to_evaluate(tmp_path, capsys) -> None:
    with pytest.raises(UserError, match="no finished iteration"):
        evaluate.evaluate(tmp_path, Config())
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "is not a run directory" in capsys.readouterr().err
