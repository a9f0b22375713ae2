"""The plans of the shipped recipes on known hardware, whole or with fewer micro-batches."""

from __future__ import annotations

from functools import cache
from pathlib import Path

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


def _with(recipe: Recipe, section: str, **values: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
