"""How long a step takes with a given number of lanes, and how many lanes are worth their memory. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from pool.schedule_builder import Costs, build_training_schedule, staggered_starts
from pool.schedule_timing import time_schedule
from pool.topology import Topology
from trainer.config.recipe import Recipe
from trainer.planning.fit import fits
from trainer.planning.hardware import Hardware, costs_in_seconds
from trainer.planning.memory import pool_row_bytes
from trainer.planning.model_costs import served_trunk_ranks

MOST_LANES = 8
WORTH = 0.03
"""More lanes must shorten a step by more than this share, because each keeps a micro-batch's activations."""


def role_work(recipe: Recipe, costs: Costs, launches: int) -> tuple[float, float]:
    """Time that a trunk rank, and the busiest pool rank with this many launches, compute in a step without waits."""
    layers, micro_batches = recipe.model.layers, recipe.micro_batches
    trunk = 3 * micro_batches * (layers * costs.trunk_layer + costs.head)
    pool = 3 * micro_batches * layers * served_trunk_ranks(recipe) * costs.pool_layer + launches * costs.slot
    return trunk, pool


def deferred_requests(recipe: Recipe) -> float:
    """Requests, at an even load, whose weight gradients a shard defers at most (`pool.stash_bytes`)."""
    rows = recipe.train.micro_batch * recipe.model.seq_len * recipe.router.top_k / recipe.grid.expert_parallel
    return recipe.stash_limit / (rows * pool_row_bytes(recipe)[1])


def accumulation_time(recipe: Recipe, lanes: int, costs: Costs) -> tuple[float, float, float]:
    """Time a step up to its last gradient, at an even load over the shards.

    Replicas do not wait for each other before, so only the last one to end is simulated.

    Returns:
        The time, in the unit of the costs, and the shares of it during which trunk and pool compute.
    """
    grid, layers, micro_batches = recipe.grid, recipe.model.layers, recipe.micro_batches
    if grid.colocated:
        return _colocated_time(recipe, lanes, costs)
    most_deferred, shards, stagger = deferred_requests(recipe), grid.expert_parallel, recipe.parallel.stagger
    replica, late = grid, 0.0
    if grid.every_rank:  # all ranks do the same, so one stands for those whose requests it serves
        replica = Topology(1, 1, 1, every_rank=True)
        costs, most_deferred = replace(costs, pool_layer=shards * costs.pool_layer), most_deferred / shards
    elif grid.trunk_ranks % grid.replicas == 0:
        replica = Topology(grid.trunk_ranks // grid.replicas, shards, shards)
        if stagger:  # what the last replica's first trunk rank waits for
            late = max(staggered_starts(grid, layers, costs)[: grid.replicas])
    seconds, trunk, pool = _simulated(replica, layers, micro_batches, lanes, stagger, costs, most_deferred)
    shorter = seconds / (seconds + late)
    return seconds + late, trunk * shorter, pool * shorter


@lru_cache(maxsize=4096)
def _simulated(
    topology: Topology, layers: int, micro_batches: int, lanes: int, stagger: bool, costs: Costs, most_deferred: float
) -> tuple[float, float, float]:
    """See `accumulation_time`. A command asks for the same step several times, and it can take half a second."""
    schedule = build_training_schedule(topology, layers, micro_batches, lanes, stagger, costs)
    starts_T = staggered_starts(topology, layers, costs) if stagger else None
    step = time_schedule(schedule, topology, layers, costs, starts_T=starts_T, most_deferred=most_deferred)
    return step.seconds, float(step.trunk_busy_T.mean()), float(step.pool_busy_P.mean())


def _colocated_time(recipe: Recipe, lanes: int, costs: Costs) -> tuple[float, float, float]:
    """See `accumulation_time`. Nothing overlaps, the lanes share a layer's launch, and the host is ahead if it can."""
    layers, micro_batches = recipe.model.layers, recipe.micro_batches
    merged = [min(lanes, micro_batches - first) for first in range(0, micro_batches, lanes)]
    backwards = layers * len(merged)
    # Weight gradients are computed when those of so many backwards exceed the limit, and at the end.
    flushes = math.ceil(backwards / (deferred_requests(recipe) // merged[0] + 1))
    launches = 2 * backwards + flushes
    trunk, pool = role_work(recipe, costs, launches)
    pool += flushes * costs.flush
    pool += 2 * layers * sum(max(0.0, costs.weights - number * costs.pool_layer) for number in merged)
    launching = 3 * micro_batches * (layers * costs.trunk_launch + costs.head_launch) + launches * costs.slot_launch
    seconds = max(trunk + pool, launching)
    return seconds, trunk / seconds, pool / seconds


def runs_in_order(recipe: Recipe) -> bool:
    """Whether only one lane is possible: ZeRO-3 gathers weights, so all trunk ranks must compute the same thing."""
    p = recipe.parallel
    return p.trunk_zero == 3 and p.trunk_ranks > 1 and not recipe.grid.colocated


def choose_lanes(recipe: Recipe, costs_of: Callable[[int], Costs], most: int = MOST_LANES) -> int:
    """Choose the fewest lanes, up to `most` and the micro-batches, with which a step is within 3 % of the fastest.

    Args:
        costs_of: Maps a number of lanes to the costs of a micro-batch's pieces.
    """
    if runs_in_order(recipe):
        return 1
    choices = range(1, min(most, recipe.micro_batches) + 1)
    seconds = {lanes: accumulation_time(recipe, lanes, costs_of(lanes))[0] for lanes in choices}
    return min(lanes for lanes in choices if seconds[lanes] <= (1 + WORTH) * min(seconds.values()))


def choose_fitting_lanes(recipe: Recipe, hardware: Hardware) -> int:
    """Choose lanes for some hardware among those that fit into its memory; 0 if not even one fits."""
    most = MOST_LANES
    while most and not fits(recipe, min(most, recipe.micro_batches), hardware.memory):
        most -= 1
    return choose_lanes(recipe, lambda lanes: costs_in_seconds(recipe, hardware, lanes), most) if most else 0


def lanes_on(recipe: Recipe, hardware: Hardware) -> int:
    """Return the recipe's own lanes; without them those chosen for the hardware, 1 if not even one fits."""
    return recipe.parallel.lanes or max(1, choose_fitting_lanes(recipe, hardware))
