"""Schedules of recipes: their costs, requests and lanes, and the saved schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from pool.schedule import SERVE
from tests.training import tiny
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.lanes import accumulation_time
from trainer.planning.schedule import ScheduleSpec, make_schedule, nominal_costs, schedule_of


def test_nominal_costs_by_hand() -> None:
    """Of the tiny recipe: D 24, F 20, S 9, vocabulary 61, half as many heads for keys and values, 8 experts, top-2."""
    costs = nominal_costs(tiny(parallel={"pool_ranks": 2}))
    attention = 2 * (24 * 24 + 2 * 24 * 12 + 24 * 24) + 2 * 9 * 24
    assert costs.trunk_layer == attention + 2 * 8 * 24
    assert costs.head == 2 * 61 * 24
    assert costs.pool_layer == 2 * (2 * 3 * 24 * 20) / 2, "half of the pool's experts are this shard's"
    assert costs.slot == pytest.approx(0.4 * costs.pool_layer)
    assert costs.transfer == pytest.approx(0.1 * costs.trunk_layer)


def test_schedules_have_every_request() -> None:
    recipe = load_recipe("unipool-182m")
    layers, ranks, micro_batches = 12, 4, 8
    assert sum(map(len, make_schedule(recipe).step.slots)) == 2 * layers * ranks * micro_batches
    assert sum(map(len, make_schedule(recipe).evaluation(3).slots)) == layers * ranks * 3
    generation = make_schedule(recipe).generation(5)
    assert sum(map(len, generation.slots)) == layers * ranks * 5
    assert generation.lane_order == ((0,) * (layers + 1),) * ranks


def test_lanes_are_the_fewest_that_are_fast() -> None:
    """More lanes would gain at most 3 %, and one less would lose more; a recipe's own number is kept."""
    recipe = load_recipe("unipool-182m")
    schedule = make_schedule(recipe)
    seconds = {lanes: accumulation_time(recipe, lanes, schedule.costs)[0] for lanes in range(1, 9)}
    assert seconds[schedule.lanes] <= 1.03 * min(seconds.values()) < seconds[schedule.lanes - 1]
    assert make_schedule(load_recipe("unipool-182m", ["parallel.lanes=5"])).lanes == 5


def test_a_saved_schedule_serves_the_same_shape_only() -> None:
    recipe = load_recipe("unipool-182m")
    text = make_schedule(recipe).to_json()
    assert ScheduleSpec.from_json(recipe, text) == make_schedule(recipe)
    assert ScheduleSpec.from_json(load_recipe("unipool-182m", ["train.lr=1e-3"]), text) is not None
    for other in ("parallel.pool_ranks=8", "train.micro_batch=8", "parallel.lanes=7", "parallel.hardware=h100"):
        assert ScheduleSpec.from_json(load_recipe("unipool-182m", [other]), text) is None, other


def test_a_saved_schedule_of_every_rank_is_that_of_no_other_layout() -> None:
    def recipe(*keys: str) -> Recipe:
        return load_recipe("unipool-182m", [f"parallel.{key}" for key in ("trunk_ranks=4", "pool_ranks=0", *keys)])

    both = recipe("layout=every_rank", "expert_parallel=1")
    spec = make_schedule(both)
    assert ScheduleSpec.from_json(both, spec.to_json()) == spec
    for other in (
        recipe("expert_parallel=1"),
        recipe("pool_ranks=4", "expert_parallel=1"),
        recipe("layout=every_rank", "expert_parallel=2"),
    ):
        assert ScheduleSpec.from_json(other, spec.to_json()) is None
        assert ScheduleSpec.from_json(both, make_schedule(other).to_json()) is None


def test_each_rank_of_every_rank_serves_all_slots() -> None:
    spec = make_schedule(load_recipe("unipool-182m", ["parallel.layout=every_rank", "parallel.pool_ranks=0"]))
    for schedule in (spec.step, spec.evaluation(2), spec.generation(1)):
        slots = sum(1 for slot in schedule.slots if slot)
        assert [order.count(SERVE) for order in schedule.lane_order] == [slots] * 4


OLD_FILE = """{"shape": {"model": {"layers": 8, "hidden": 128, "heads": 4, "kv_heads": 4, "ffn_hidden": 256,
"vocab": 2048, "seq_len": 256, "ffn": "pool", "groups": 1, "init_std": 0.02, "rope_base": 1000000.0, "norm_eps": 1e-05},
"experts": [64, 1], "batch": [16, 8, "fp32"], "ranks": [1, 1, 1], "hardware": null}, "lanes": 2,
"costs": {"trunk_layer": 212992, "head": 524288, "pool_layer": 196608.0, "slot": 7.0, "transfer": 21299.2}}"""


def test_a_resumed_run_keeps_the_schedule_of_an_earlier_version(tmp_path: Path) -> None:
    recipe, file = load_recipe("quickstart"), tmp_path / "plan.json"
    file.write_text(OLD_FILE)
    resumed = schedule_of(recipe, file, resume=True)
    assert (resumed.lanes, resumed.costs.slot) == (2, 7.0)
    assert schedule_of(recipe, file, resume=False) == make_schedule(recipe) != resumed


@pytest.mark.parametrize("text", ["", OLD_FILE.replace('"head"', '"heads"'), OLD_FILE.replace("524288", "-1")])
def test_a_damaged_schedule_is_set_aside(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, file = load_recipe("quickstart"), tmp_path / "plan.json"
    file.write_text(text)
    assert schedule_of(recipe, file, resume=True) == make_schedule(recipe)
    assert not file.exists() and (tmp_path / "damaged_plan.json").read_text() == text
    assert f"WARNING: {file} is damaged and now damaged_plan.json" in capsys.readouterr().err


def test_a_schedule_that_cannot_be_read_is_kept(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(UserError, match=r"plan.json: cannot be read \(Is a directory\)"):
        schedule_of(load_recipe("quickstart"), tmp_path / "plan.json", resume=True)
