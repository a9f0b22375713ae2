"""Plans of recipes: what they follow from, and what is predicted of them."""

from __future__ import annotations

import pytest

from trainer.config.recipe import load_recipe
from trainer.planning.schedule import ScheduleSpec, make_schedule, nominal_costs


def test_costs_have_the_proportions_of_facts() -> None:
    """At 182M: trunk layer 4.7 MFLOP and router 0.15, head 78.6, expert 14.2 over 4 shards."""
    costs = nominal_costs(load_recipe("unipool-182m"))
    assert costs.trunk_layer == pytest.approx(4.87e6, rel=0.01)
    assert costs.head == pytest.approx(78.6e6, rel=0.01)
    assert costs.pool_layer == pytest.approx(14.16e6 / 4, rel=0.01)


def test_plans_have_every_request() -> None:
    recipe = load_recipe("unipool-182m")
    layers, ranks, micro_batches = 12, 4, 8
    assert sum(map(len, make_schedule(recipe).step.slots)) == 2 * layers * ranks * micro_batches
    assert sum(map(len, make_schedule(recipe).evaluation(3).slots)) == layers * ranks * 3
    generation = make_schedule(recipe).generation(5)
    assert sum(map(len, generation.slots)) == layers * ranks * 5
    assert generation.lane_order == ((0,) * (layers + 1),) * ranks


def test_lanes_are_the_fewest_that_are_fast() -> None:
    """One more lane would gain 3 % at most, one less would lose more; and a recipe's own number is kept."""
    recipe = load_recipe("unipool-182m")
    schedule = make_schedule(recipe)
    seconds = {lanes: ScheduleSpec(recipe, lanes, schedule.costs).step.seconds for lanes in range(1, 9)}
    assert seconds[schedule.lanes] <= 1.03 * min(seconds.values()) < seconds[schedule.lanes - 1]
    assert make_schedule(load_recipe("unipool-182m", ["parallel.lanes=5"])).lanes == 5


def test_a_saved_schedule_serves_the_same_shape_only() -> None:
    recipe = load_recipe("unipool-182m")
    text = make_schedule(recipe).to_json()
    assert ScheduleSpec.from_json(recipe, text) == make_schedule(recipe)
    assert ScheduleSpec.from_json(load_recipe("unipool-182m", ["train.lr=1e-3"]), text) is not None
    for other in ("parallel.pool_ranks=8", "train.micro_batch=8", "parallel.lanes=7", "parallel.hardware=h100"):
        assert ScheduleSpec.from_json(load_recipe("unipool-182m", [other]), text) is None, other
