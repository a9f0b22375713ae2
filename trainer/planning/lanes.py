"""How long a step lasts with so many lanes, and how many lanes are worth their memory. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from pool.schedule_builder import Costs, training_plan
from trainer.config.recipe import Recipe

MOST_LANES = 8
WORTH = 0.03
"""More lanes must make a step faster by more than this share: each keeps a micro-batch's activations."""


@dataclass(frozen=True)
class Step:
    """A simulated step up to its last gradient, in the unit of the costs; shares of it in which each role works."""

    seconds: float
    trunk_busy: float
    pool_busy: float


def simulate_step(recipe: Recipe, lanes: int, costs: Costs) -> Step:
    """One optimizer step. Colocated, nothing overlaps, and the lanes' requests of a layer are one launch."""
    layers, micro_batches = recipe.model.layers, recipe.micro_batches
    if not recipe.grid.colocated:
        plan = training_plan(recipe.grid, layers, micro_batches, lanes, recipe.parallel.stagger, costs)
        return Step(plan.seconds, plan.trunk_busy, plan.pool_busy)
    trunk = 3 * micro_batches * (layers * costs.trunk_layer + costs.head)
    launches = -(-micro_batches // lanes) * 2 * layers + 1  # the weight gradients in one more
    pool = 3 * micro_batches * layers * costs.pool_layer + launches * costs.slot
    return Step(trunk + pool, trunk / (trunk + pool), pool / (trunk + pool))


def choose_lanes(recipe: Recipe, costs: Costs, most: int = MOST_LANES) -> int:
    """The fewest lanes, up to `most` and the micro-batches, with which a step is within 3 % of the best.

    ZeRO-3 over several trunk ranks goes with one lane only (`trainer.config.recipe`).
    """
    p = recipe.parallel
    if p.trunk_zero == 3 and p.trunk_ranks > 1 and p.pool_ranks:
        return 1
    seconds = {
        lanes: simulate_step(recipe, lanes, costs).seconds for lanes in range(1, min(most, recipe.micro_batches) + 1)
    }
    good_enough = (1 + WORTH) * min(seconds.values())
    return min(lanes for lanes, taken in seconds.items() if taken <= good_enough)
