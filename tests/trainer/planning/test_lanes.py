"""The time that both roles compute in a step, compared with arithmetic by hand."""

from __future__ import annotations

import pytest

from pool.schedule_builder import Costs
from tests.training import tiny
from trainer.planning.lanes import accumulation_time, role_work

COSTS = Costs(trunk_layer=2.0, head=3.0, pool_layer=5.0, slot=7.0, transfer=0.0)


def test_colocated_lanes_share_launches() -> None:
    """Three micro-batches of three layers: forward and backward are two launches a layer, weight gradients one more."""
    recipe = tiny(train={"global_batch": 6})
    trunk, rows = 3 * 3 * (3 * 2.0 + 3.0), 3 * 3 * 3 * 5.0
    for lanes, rounds in ((1, 3), (2, 2), (3, 1)):
        pool = rows + (rounds * 2 * 3 + 1) * 7.0
        seconds = trunk + pool
        assert accumulation_time(recipe, lanes, COSTS) == (seconds, trunk / seconds, pool / seconds)


def test_a_pool_rank_works_for_every_trunk_rank_that_it_serves() -> None:
    recipe = tiny(parallel={"trunk_ranks": 4, "pool_ranks": 2, "expert_parallel": 1})
    trunk, pool = role_work(recipe, COSTS, launches=10)
    assert trunk == 3 * 1 * (3 * 2.0 + 3.0)
    assert pool == 3 * 1 * 3 * 2 * 5.0 + 10 * 7.0


@pytest.mark.parametrize(("stagger", "seconds"), [(False, 27.0), (True, 40.5)])
def test_a_staggered_rank_ends_later(stagger: bool, seconds: float) -> None:
    """One micro-batch of 27 on each of two trunk ranks, of which the second starts half of it later; a pool at once."""
    recipe = tiny(train={"global_batch": 4}, parallel={"trunk_ranks": 2, "pool_ranks": 1, "stagger": stagger})
    costs = Costs(trunk_layer=2.0, head=3.0, pool_layer=1e-9, slot=0.0, transfer=0.0)
    taken, trunk_busy, _ = accumulation_time(recipe, 1, costs)
    assert (taken, trunk_busy) == (pytest.approx(seconds), pytest.approx(27.0 / seconds))
