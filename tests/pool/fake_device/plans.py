"""The plans of the shipped recipes on known hardware, whole or with fewer micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pool.schedule import PoolSchedule
from pool.schedule_builder import Costs, build_training_schedule
from pool.topology import Topology
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.schedule import ScheduleSpec, make_schedule

HARDWARE = (None, "h100", "h200", "a100")
ROOT = Path(__file__).parents[3]
NAMES = sorted(path.stem for path in (ROOT / "trainer" / "config" / "recipes").glob("*.yaml"))
DEDICATED = [name for name in NAMES if load_recipe(name).parallel.pool_ranks]
"""Recipes whose experts are on ranks of their own."""


@cache
def plan(name: str, hardware: str | None, micro_batches: int = 0) -> ScheduleSpec:
    """The schedules of a recipe on some hardware, with as many micro-batches as it has, or with fewer."""
    recipe = load_recipe(name)
    spec = make_schedule(_with(recipe, "parallel", hardware=hardware))
    if not 0 < micro_batches < recipe.micro_batches:
        return spec
    batch = micro_batches * recipe.train.micro_batch * recipe.parallel.trunk_ranks
    return ScheduleSpec(_with(spec.recipe, "train", global_batch=batch), spec.lanes, spec.costs)


@dataclass(frozen=True)
class Case:
    """A schedule and what it is for."""

    topology: Topology
    schedule: PoolSchedule
    layers: int
    micro_batches: int


def whole(name: str, hardware: str | None, micro_batches: int = 0) -> Case:
    """The step of a recipe on some hardware; see `plan`."""
    spec = plan(name, hardware, micro_batches)
    r = spec.recipe
    return Case(r.grid, spec.step, r.model.layers, r.micro_batches)


def reduced(name: str, hardware: str | None, layers: int = 3, shards: int = 2) -> Case:
    """The step of a recipe with its trunk ranks, lanes and costs, but few layers, shards and micro-batches."""
    spec = plan(name, hardware)
    t = spec.recipe.grid
    topology = Topology(t.trunk_ranks, t.replicas * shards, shards)
    micro_batches = spec.lanes + 1
    stagger = spec.recipe.parallel.stagger
    schedule = build_training_schedule(topology, layers, micro_batches, spec.lanes, stagger, spec.costs)
    return Case(topology, schedule, layers, micro_batches)


def every_rank(ranks: int, shards: int, lanes: int, stagger: bool, costs: Costs, layers: int = 2) -> Case:
    """A step in which every rank has both roles."""
    topology, micro_batches = Topology(ranks, ranks, shards, every_rank=True), lanes + 1
    schedule = build_training_schedule(topology, layers, micro_batches, lanes, stagger, costs)
    return Case(topology, schedule, layers, micro_batches)


def old(name: str, micro_batches: int = 8) -> Case:
    """The step of unipool-182m or 978m on H100s as it was planned when payloads travelled as in the specimen."""
    if name == "unipool-182m":
        topology, layers = Topology(4, 4, 4), 12
        costs = Costs(trunk_layer=161e-6, head=2606e-6, pool_layer=84e-6, slot=151e-6, transfer=156e-6)
    else:
        topology, layers = Topology(8, 16, 16), 24
        costs = Costs(trunk_layer=257e-6, head=2606e-6, pool_layer=42e-6, slot=253e-6, transfer=156e-6)
    schedule = build_training_schedule(topology, layers, micro_batches, 4, True, costs)
    return Case(topology, schedule, layers, micro_batches)


def _with(recipe: Recipe, section: str, **values: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
