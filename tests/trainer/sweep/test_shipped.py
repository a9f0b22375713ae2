"""The sweeps that come with the trainer: their recipes are valid, and they vary what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.planning.model_costs import count_parameters
from trainer.sweep.spec import load_sweep, sweep_names


@pytest.mark.parametrize("name", sweep_names())
def test_shipped_sweeps_have_valid_recipes(name: str) -> None:
    experiment = load_sweep(name)
    assert experiment.folder == Path("runs/sweeps") / name
    assert list(experiment.warnings()) == []
    assert all(cell.baseline for cell in experiment.cells if cell.variant != experiment.sweep.baseline)
    assert len({run.folder for run in experiment.runs}) == len(experiment.runs)
    small = name.startswith("small-")
    assert small == (experiment.cells[0].recipe.data.source == "python-stdlib")
    assert len(experiment.sweep.seeds) >= 3 or name == "mid-learning-rate"  # which only chooses a rate


def test_shipped_sweeps_say_what_the_paper_has() -> None:
    ours = {"scores", "statistic", "coefficient", "table-5", "figure-2b"}
    assert ours | {f"small-{name}" for name in ours} | {"small-reproduction", "small-figure-2a"} <= set(sweep_names())
    for scale, smallest in {"182m": 64, "469m": 96, "650m": 144, "830m": 160}.items():
        pools = {cell.recipe.pool.experts for cell in load_sweep(f"figure-2a-{scale}").cells}
        assert smallest in pools
        vanilla, *_, full = load_sweep(f"figure-2a-{scale}").cells
        assert full.recipe.pool.experts == vanilla.recipe.pool.experts == 8 * full.recipe.model.layers
    assert {cell.recipe.pool.experts for cell in load_sweep("figure-2a-650m").cells} >= {96, 128, 144, 192, 240, 288}
    table_5 = {cell.name: cell.recipe for cell in load_sweep("table-5").cells}
    # A loss per layer uses a micro-batch's own load, the pool loss that of the one before.
    loads = {name: (r.balance.layer > 0, r.balance.scope, r.balance.delay) for name, r in table_5.items()}
    own, before = (True, "micro_batch", 0), (False, "micro_batch", 1)
    of_layers = {"vanilla", "vanilla-norm", "shared-layer-loss-softmax"}
    assert {name for name, load in loads.items() if load == own} == of_layers
    assert all(load == before for name, load in loads.items() if load[0] is False and "sigmoid" not in name)
    assert {name: recipe.model.groups for name, recipe in table_5.items() if "groups" in name} == {
        "groups-6": 6,
        "groups-4": 4,
        "groups-2": 2,
    }
    assert table_5["vanilla-sigmoid-bias"].balance.layer == table_5["vanilla-sigmoid-bias"].balance.pool == 0
    granularity = [cell.recipe for cell in load_sweep("figure-2b").cells]
    assert [(r.pool.experts / 12, r.router.top_k, r.model.groups) for r in granularity] == [
        *((8, 1, 12), (16, 2, 12), (32, 4, 12)),
        *((8, 1, 1), (16, 2, 1), (32, 4, 1)),
    ]


def test_the_reproduction_has_equal_active_parameters() -> None:
    recipes = {cell.name: cell.recipe for cell in load_sweep("small-reproduction").cells}
    assert len(recipes) == 10
    assert len({count_parameters(recipe).active for recipe in recipes.values()}) == 1
    assert [recipes[f"unipool-{experts}"].pool.experts for experts in (43, 32, 21)] == [43, 32, 21]
    b = {name: (r.balance.layer, r.balance.pool, r.balance.scores, r.router.kind) for name, r in recipes.items()}
    assert b["vanilla-norm"] == (1e-2, 0.0, "raw", "norm") and recipes["vanilla-norm"].model.groups == 8
    assert b["shared-layer-loss-softmax"] == (1e-2, 0.0, "raw", "softmax")
    assert b["shared-pool-loss-softmax"] == (0.0, 1e-2, "raw", "softmax")
    assert b["unipool"] == (0.0, 1e-2, "raw", "norm")
    assert b["unipool-normalized"] == (0.0, 1e-2, "normalized", "norm")


def test_additions_are_compared_at_equal_numbers_of_parameters() -> None:
    recipes = {cell.name: cell.recipe for cell in load_sweep("small-beyond").cells}
    counted = {name: count_parameters(recipe) for name, recipe in recipes.items()}
    assert len({parameters.active for parameters in counted.values()}) == 1
    # Routers see different numbers of experts; everything else is equal.
    assert len({parameters.total - parameters.routers for parameters in counted.values()}) == 1
