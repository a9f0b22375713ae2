"""What is said when ranks do not fit, and that lanes respect the memory."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
from click.testing import CliRunner

from trainer.cli import cli
from trainer.common.strict_json import loads
from trainer.config.recipe import load_recipe
from trainer.planning.fit import FILLED, fits, memory_warnings
from trainer.planning.hardware import DATA_SHEETS, costs_in_seconds
from trainer.planning.lanes import choose_fitting_lanes, choose_lanes
from trainer.planning.memory import estimate_memory, fullest_rank

H100 = DATA_SHEETS["h100"]
ZERO1, STASH = "parallel.pool_zero=1", "pool.stash_bytes=1000000000"


@pytest.mark.parametrize(
    ("overrides", "lanes", "role", "change"),
    [
        (("train.micro_batch=128", "parallel.trunk_ranks=2"), 2, "trunk", "parallel.lanes=1"),
        (("train.micro_batch=256", "parallel.trunk_ranks=2"), 1, "trunk", "train.micro_batch=128"),
        (("train.micro_batch=1", "model.seq_len=196608"), 1, "trunk", "train.recompute=true"),
        (("parallel.pool_ranks=1", "pool.experts=480"), 1, "pool", "parallel.pool_ranks=4"),
        (("parallel.pool_ranks=1", "pool.experts=384", ZERO1, STASH), 1, "pool", "parallel.pool_zero=0"),
    ],
)
def test_a_warning_names_a_change_that_fits(overrides: tuple[str, ...], lanes: int, role: str, change: str) -> None:
    recipe = load_recipe("unipool-182m", overrides)
    (warning,) = memory_warnings(recipe, lanes, H100.memory, "h100")
    assert warning.startswith(f"a {role} rank needs ") and "more than 90% of the 80 GB of h100: " in warning
    assert f": {change} needs " in warning, warning
    key, value = change.split("=")
    changed = load_recipe("unipool-182m", (*overrides, change))
    assert fits(changed, int(value) if key == "parallel.lanes" else lanes, H100.memory)


def test_no_warning_where_all_fit_and_a_general_one_where_nothing_helps() -> None:
    assert memory_warnings(load_recipe("unipool-182m"), 2, H100.memory, "h100") == []
    trunk, pool = memory_warnings(load_recipe("unipool-978m"), 1, 2e9, "a small GPU")
    assert trunk.startswith("a trunk rank") and pool.startswith("a pool rank")
    assert "use more pool ranks" in trunk and "use more pool ranks" in pool


def test_a_colocated_pool_gets_ranks_of_its_own_and_fewer_lanes_if_need_be() -> None:
    memory = 0.95 * H100.memory
    recipe = load_recipe("unipool-469m", ("parallel.pool_ranks=0", "parallel.trunk_ranks=8"))
    (warning,) = memory_warnings(recipe, 4, memory, "h100")
    assert ": parallel.pool_ranks=8 with parallel.lanes=1 needs " in warning
    named = load_recipe(
        "unipool-469m", ("parallel.pool_ranks=0", "parallel.trunk_ranks=8", "parallel.layout=colocated")
    )
    (warning,) = memory_warnings(named, 4, memory, "h100")
    assert ": parallel.layout=dedicated parallel.pool_ranks=8 with parallel.lanes=1 needs " in warning
    apart = load_recipe("unipool-469m", ("parallel.trunk_ranks=8", "parallel.pool_ranks=8"))
    assert fits(apart, 1, memory) and not fits(apart, 4, memory)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("trunk_ranks=8", "parallel.layout=every_rank with a shard on each rank and parallel.lanes=1"),
        (
            "trunk_ranks=5",
            "parallel.pool_ranks=5 with parallel.lanes=1 parallel.stagger=false",
        ),
    ],
)
def test_layouts_in_which_zero_3_is_possible(layout: str, said: str) -> None:
    """A recipe accepts the keys of the remedy, where ZeRO-3 allows one lane only."""
    own = ["parallel.layout=colocated", "parallel.pool_ranks=0", "parallel.trunk_zero=3", "parallel.lanes=4"]
    sizes = ["pool.experts=480", "train.global_batch=640"]
    recipe = load_recipe("unipool-978m", [*own, *sizes, f"parallel.{layout}"])
    for available in (30e9, 40e9, 50e9, 60e9, 80e9):
        for warning in memory_warnings(recipe, 4, available, "a GPU"):
            keys = re.findall(r"(?:parallel|train|pool)\.\w+=\w+", warning.partition(": ")[2])
            load_recipe("unipool-978m", [*own, *sizes, f"parallel.{layout}", *keys])
    (warning,) = memory_warnings(recipe, 4, 100e9, "a GPU")
    assert f"{said} needs " in warning


def test_plan_warns_in_a_line_and_in_json() -> None:
    arguments = ["plan", "unipool-978m", "--set", "parallel.pool_ranks=0"]
    shown = CliRunner().invoke(cli, arguments)
    (line,) = shown.stderr.splitlines()
    assert line.startswith("warning: a trunk + pool rank needs ") and "80 GB of h100 (--hardware names another)" in line
    assert shown.exit_code == 0 and "warning" not in shown.stdout
    tree = loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert len(tree["warnings"]) == 1
    larger = CliRunner().invoke(cli, ["plan", "unipool-182m", "--set", "train.micro_batch=128", "--hardware", "h200"])
    assert not larger.stderr


def test_lanes_are_the_fewest_good_ones_of_those_that_fit() -> None:
    recipe = load_recipe("unipool-978m")
    costs_of = partial(costs_in_seconds, recipe, H100)
    free = choose_lanes(recipe, costs_of)
    assert free > 2 and choose_fitting_lanes(recipe, replace(H100, memory=1e12)) == free
    for lanes in range(free):
        small = replace(H100, memory=fullest_rank(recipe, lanes + 1) / FILLED - 1)
        assert choose_fitting_lanes(recipe, small) == (choose_lanes(recipe, costs_of, lanes) if lanes else 0)


def test_every_part_is_counted() -> None:
    """What a rank holds at all times, and the larger of what it needs for micro-batches and at the step's end."""
    trunk, pool = estimate_memory(load_recipe("unipool-182m"), 2)
    for memory in (trunk, pool):
        steady = memory.weights + memory.gradients + memory.optimizer + memory.device
        assert memory.total > steady
        huge = replace(memory, step_end=10**12)
        assert huge.total == steady + 10**12
        assert replace(memory, working=memory.working + 5).total == memory.total + 5
