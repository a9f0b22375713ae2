"""Layouts of the same devices: which are found, and what the one in which every rank has both roles costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pool.schedule_builder import build_training_schedule
from pool.schedule_timing import time_schedule
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.fit import fits, memory_warnings
from trainer.planning.hardware import DATA_SHEETS, costs_in_seconds, request_bytes, with_link
from trainer.planning.lanes import accumulation_time, deferred_requests
from trainer.planning.memory import CONNECTION, CONTEXT, MEMORY_KINDS, ROLE_CHANNELS, ROLE_PEERS, estimate_memory
from trainer.planning.model_costs import count_parameters
from trainer.planning.schedule import nominal_costs
from trainer.planning.step_time import best_layouts, recommendation, step_time

H100 = DATA_SHEETS["h100"]
EVERY_RANK = ("parallel.layout=every_rank", "parallel.pool_ranks=0", "parallel.trunk_ranks=8")


def at_182m(*overrides: str) -> Recipe:
    return load_recipe("unipool-182m", overrides)


def test_best_layouts_are_valid_and_ordered() -> None:
    best = best_layouts(at_182m(), 8, H100)
    assert [f.seconds for f in best] == sorted(f.seconds for f in best)
    assert {f.layout for f in best} == {"dedicated", "colocated", "every_rank"}
    dedicated = next(f for f in best if f.layout == "dedicated")
    assert (dedicated.trunk_ranks, dedicated.pool_ranks, dedicated.expert_parallel) == (4, 4, 4)
    assert dedicated.tokens_per_second >= step_time(at_182m(), H100).tokens_per_second
    for f in best:
        keys = {"layout": f.layout, "trunk_ranks": f.trunk_ranks, "expert_parallel": f.expert_parallel}
        keys |= {"pool_ranks": f.pool_ranks if f.layout == "dedicated" else 0, "lanes": f.lanes}
        checked = at_182m(*(f"parallel.{key}={value}" for key, value in keys.items()))
        assert checked.grid.world_size == 8 and f.lanes <= checked.micro_batches
        assert f == step_time(checked, H100)
        assert f.memory <= 0.9 * H100.memory
    text = recommendation([f for f in best if f.layout != "colocated"])
    said = re.fullmatch(r"Recommended: (.*); 1\.\d\d times as fast as dedicated\.", text)
    assert said and step_time(at_182m(*said[1].split()), H100) in best
    keys = "layout=dedicated parallel.trunk_ranks=4 parallel.pool_ranks=4 parallel.expert_parallel=4 parallel.lanes=3"
    assert recommendation([dedicated]) == f"Recommended: parallel.{keys}."


def test_only_what_fits_and_divides_is_a_layout() -> None:
    with pytest.raises(UserError, match=r"--devices 2: no layout fits into 80 GB"):
        best_layouts(load_recipe("unipool-978m"), 2, H100)
    with pytest.raises(UserError, match=r"--devices 1: no layout fits into 80 GB"):
        best_layouts(load_recipe("unipool-978m"), 1, H100)
    odd = at_182m(
        "train.global_batch=7", "train.micro_batch=1", "parallel.trunk_ranks=7", "pool.experts=97",
        "parallel.expert_parallel=1",
    )  # fmt: skip
    found = best_layouts(odd, 8, H100)
    assert found and {(f.layout, f.trunk_ranks, f.expert_parallel) for f in found} <= {
        ("dedicated", 1, 1),
        ("dedicated", 7, 1),
    }
    assert [f.layout for f in best_layouts(at_182m(), 1, H100)] == ["colocated"]


def test_a_single_colocated_lane_merges_nothing() -> None:
    """Lanes are compared by what each of them costs, so the fewest are as fast as if they had been asked for."""
    colocated = ("parallel.pool_ranks=0", "parallel.trunk_ranks=8")
    chosen, asked = (step_time(at_182m(*colocated, *lanes), H100) for lanes in ((), ("parallel.lanes=1",)))
    assert chosen == asked
    merged = costs_in_seconds(at_182m(*colocated), H100, lanes=2)
    assert costs_in_seconds(at_182m(*colocated), H100, lanes=1).pool_layer < 0.9 * merged.pool_layer


def test_layouts_of_zero_3_run_in_order() -> None:
    zero3 = ("parallel.trunk_zero=3", "parallel.lanes=1", "parallel.stagger=false")
    best = best_layouts(at_182m(*zero3), 8, H100)
    assert {f.layout for f in best} == {"dedicated", "colocated", "every_rank"}
    assert all(f.lanes == 1 for f in best if f.trunk_ranks > 1 and f.layout != "colocated")


def test_recommended_keys_are_accepted() -> None:
    """Also where the recipe's own layout does not need what ZeRO-3 needs in others."""
    own = ("parallel.layout=colocated", "parallel.pool_ranks=0", "parallel.trunk_ranks=8", "parallel.trunk_zero=3")
    best = best_layouts(at_182m(*own), 4, H100)
    assert any(f.layout == "dedicated" and f.trunk_ranks > 1 for f in best)
    for f in best:
        keys = re.findall(r"parallel\.\w+=\w+", recommendation([f]))
        assert step_time(at_182m(*own, *keys), H100) == f


def test_times_of_every_rank() -> None:
    """One rank computes both roles' work, sends 7/8 of its rows and of its answers, and ends both roles' steps."""
    recipe = at_182m(*EVERY_RANK, "parallel.lanes=2")
    costs = costs_in_seconds(recipe, H100, lanes=2)
    assert costs.payload == pytest.approx(request_bytes(recipe) * 7 / 8 / H100.wire_bandwidth)
    assert costs.pool_layer == costs_in_seconds(at_182m("parallel.pool_ranks=8"), H100, lanes=2).pool_layer
    step = step_time(recipe, H100)
    assert step.trunk_busy * step.seconds == pytest.approx(4 * 3 * (12 * costs.trunk_layer + costs.head))
    rows = 4 * 3 * 12 * 8 * costs.pool_layer
    assert 1.0 < step.pool_busy * step.seconds / rows < 1.25
    assert (step.trunk_busy + step.pool_busy) * step.seconds > 0.98 * (step.seconds - step.step_end)
    state = count_parameters(recipe)
    trunk = 3 * 7 / 8 * 4 * state.trunk / 450e9 + 28 * state.trunk / 8 / H100.memory_bandwidth
    end = trunk + 28 * state.pool / 8 / H100.memory_bandwidth + 2 * 3 * 30e-6
    assert step.step_end == pytest.approx(end), "one role after the other, and two sums in three rounds"
    few = step_time(recipe, with_link(H100, 100))
    traffic = 2 * 2 * 12 * 4 * request_bytes(recipe) * 7 / 8
    assert few.wire is not None and few.wire.owner == "a rank's link" and few.wire.binds
    assert few.seconds >= traffic / 12.5e9 + few.step_end


@pytest.mark.parametrize("stash", [10**9, 10**15])
def test_one_rank_stands_for_all(stash: int) -> None:
    """The ranks do the same at an even load, so the time of a step is found by timing one of them."""
    recipe = at_182m(*EVERY_RANK, "parallel.expert_parallel=4", "parallel.lanes=2", f"pool.stash_bytes={stash}")
    costs, most = costs_in_seconds(recipe, H100, lanes=2), deferred_requests(recipe)
    schedule = build_training_schedule(recipe.grid, 12, 4, 2, True, costs)
    all_ranks = time_schedule(schedule, recipe.grid, 12, costs, most_deferred=most)
    seconds, trunk, pool = accumulation_time(recipe, 2, costs)
    assert seconds == pytest.approx(all_ranks.seconds, rel=1e-12)
    assert (trunk, pool) == pytest.approx((all_ranks.trunk_busy_T.mean(), all_ranks.pool_busy_P.mean()), rel=1e-9)


def test_one_rank_alone_sends_nothing() -> None:
    alone = at_182m("parallel.layout=every_rank", "parallel.pool_ranks=0", "parallel.trunk_ranks=1")
    assert step_time(alone, H100).wire is None
    assert costs_in_seconds(alone, H100, lanes=1).transfer == nominal_costs(alone).transfer == 0


def test_memory_of_every_rank_is_both_roles() -> None:
    """A trunk rank's part, and that of a pool rank that serves as many trunk ranks."""
    (both,) = estimate_memory(at_182m(*EVERY_RANK, "parallel.expert_parallel=4"), 2)
    trunk, pool = estimate_memory(
        at_182m("parallel.trunk_ranks=8", "parallel.pool_ranks=8", "parallel.expert_parallel=4"), 2
    )
    assert (both.role, both.ranks) == ("trunk + pool", 8)
    assert both.step_end == max(trunk.step_end, pool.step_end)
    assert both.device == CONTEXT + 2 * ROLE_CHANNELS * ROLE_PEERS * CONNECTION + 2 * 8 * 3 * CONNECTION
    for kind in set(MEMORY_KINDS) - {"step_end", "device"}:
        assert getattr(both, kind) == getattr(trunk, kind) + getattr(pool, kind), kind


def test_a_colocated_pool_that_does_not_fit_gets_a_shard_on_each_rank() -> None:
    recipe = load_recipe("unipool-978m", ("parallel.pool_ranks=0", "parallel.trunk_ranks=8"))
    (warning,) = memory_warnings(recipe, 1, H100.memory, "h100")
    assert ": parallel.layout=every_rank with a shard on each rank needs " in warning
    assert fits(load_recipe("unipool-978m", EVERY_RANK), 1, H100.memory)
    (warning,) = memory_warnings(load_recipe("unipool-978m", EVERY_RANK), 1, 2e9, "a small GPU")
    assert "use more ranks" in warning


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report, the comparison of schedules and the picture are those of ranks with both roles."""
    monkeypatch.setenv("COLUMNS", "80")
    np.save(tmp_path / "load.npy", np.arange(12 * 96).reshape(12, 96))
    arguments = ["plan", "unipool-182m", "--hardware", "h100", "--simulate", "--loads", str(tmp_path / "load.npy")]
    for key in EVERY_RANK:
        arguments += ["--set", key]
    shown = CliRunner().invoke(cli, [*arguments, "--timeline", str(tmp_path / "step.png")])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    for said in ("trunk + pool x 8", "8 every_rank, 2 lanes", "Best layouts of 8 devices", "the work of a rank alone"):
        assert said in text
    assert "Recommended: parallel.layout=" in text
    assert "…" not in text
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    tree = json.loads(CliRunner().invoke(cli, [*arguments[:2], *arguments[4:], "--json"]).stdout)
    assert tree["split"] is None
    for variant in tree["simulated"]:
        assert variant["trunk_bytes"] == variant["pool_bytes"]
        assert 1 <= variant["slowdown"] == pytest.approx(1 / (variant["trunk_busy"] + variant["pool_busy"]))
