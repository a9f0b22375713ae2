"""What a step would last on given hardware, what binds it, and which split of the devices is fastest. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from trainer.common.errors import UserError
from trainer.config.recipe import Recipe
from trainer.planning.hardware import Hardware, request_bytes, seconds, served_by_a_pool_rank, step_end
from trainer.planning.lanes import choose_lanes, simulate_step
from trainer.planning.model_costs import count_flops, estimate_memory

SHOWN = 6
SIMULATED = 12
"""Layouts that are simulated: the best by arithmetic alone."""
REQUESTS_SIMULATED = 500_000
"""Over all layouts and lanes: some seconds."""
FILLED = 0.9
"""Share of a rank's memory that a layout may fill: the estimate leaves some things out."""


@dataclass(frozen=True)
class WireUse:
    """The link of the ranks that send and receive most.

    Attributes:
        role: which ranks these are.
        needed: bytes/s each way up to a step's last gradient, if nothing ever waited for the wire.
        available: bytes/s each way.
        slowdown: the predicted step over that without the wire's delays and limits.
    """

    role: Literal["trunk", "pool"]
    needed: float
    available: float
    slowdown: float

    @property
    def binds(self) -> bool:
        return self.needed > self.available


@dataclass(frozen=True)
class Forecast:
    """A step of one layout. Transfers are delays that do not queue; the busiest link's total is the least it lasts.

    Attributes:
        pool_ranks: 0 is colocated, or a dense model.
        seconds: of a step, with the reduction of gradients and the optimizer.
        step_end: that part of it.
        mfu: the model's FLOPs over the peak of all ranks.
        trunk_busy, pool_busy: shares of the step in which either role computes.
        memory: bytes on the fullest rank, estimated.
        wire: None without a wire.
    """

    trunk_ranks: int
    pool_ranks: int
    expert_parallel: int
    lanes: int
    seconds: float
    step_end: float
    tokens_per_second: float
    mfu: float
    trunk_busy: float
    pool_busy: float
    memory: int
    wire: WireUse | None


def forecast(recipe: Recipe, hardware: Hardware, interconnect: float | None = None) -> Forecast:
    """The step of a recipe's own layout and lanes, at an even load.

    Args:
        interconnect: bytes/s of a rank each way; None: the hardware's own.
    """
    topology = recipe.grid
    costs = seconds(recipe, hardware, interconnect)
    lanes = recipe.parallel.lanes or choose_lanes(recipe, costs)
    end = step_end(recipe, hardware, interconnect)
    step = simulate_step(recipe, lanes, costs)
    taken = step.seconds + end
    wire = None
    if not topology.colocated:
        free = simulate_step(recipe, lanes, replace(costs, transfer=0.0)).seconds
        available = interconnect or hardware.wire_bandwidth
        role, traffic = _traffic(recipe)
        taken = max(step.seconds, traffic / available) + end
        wire = WireUse(role, traffic / free, available, taken / (free + end))
    tokens = recipe.train.global_batch * recipe.model.seq_len
    peak = topology.world_size * hardware.rates(recipe.train.precision).flops
    return Forecast(
        topology.trunk_ranks,
        topology.pool_ranks,
        topology.expert_parallel,
        lanes,
        seconds=taken,
        step_end=end,
        tokens_per_second=tokens / taken,
        mfu=count_flops(recipe).training * tokens / (taken * peak),
        trunk_busy=step.trunk_busy * step.seconds / taken,
        pool_busy=step.pool_busy * step.seconds / taken,
        memory=_fullest(recipe, lanes),
        wire=wire,
    )


def _traffic(recipe: Recipe) -> tuple[Literal["trunk", "pool"], float]:
    """Bytes that the busiest rank sends in a step, and receives as many: a request forward, one backward."""
    trunk = 2 * recipe.model.layers * recipe.micro_batches * request_bytes(recipe)
    pool = trunk / recipe.grid.expert_parallel * served_by_a_pool_rank(recipe)
    return ("trunk", trunk) if trunk > pool else ("pool", pool)


def best_splits(
    recipe: Recipe, devices: int, hardware: Hardware, interconnect: float | None = None
) -> tuple[Forecast, ...]:
    """Forecasts of some fastest layouts of `devices` ranks that divide evenly and fit into memory, fastest first.

    Each has as few lanes as are within 3 % of its best. All layouts are ranked by arithmetic, the best simulated.

    Raises:
        UserError: there is no such layout.
    """
    ranked = sorted(_layouts(recipe, devices), key=lambda layout: _least_seconds(layout, hardware, interconnect))
    if not ranked:
        batches = recipe.train.global_batch // recipe.train.micro_batch
        raise UserError(
            f"--devices {devices}: no split divides evenly: the trunk ranks must divide the {batches} micro-batches of "
            f"a step, and the shards the pool ranks and the {recipe.pool.experts} experts"
        )
    requests = 10 * 2 * recipe.model.layers * recipe.train.global_batch // recipe.train.micro_batch
    found: list[Forecast] = []
    for layout in ranked:
        lanes = fitting_lanes(layout, hardware, interconnect)
        if lanes:
            parallel = layout.parallel.model_copy(update={"lanes": lanes})
            found.append(forecast(layout.model_copy(update={"parallel": parallel}), hardware, interconnect))
        if len(found) >= max(3, min(SIMULATED, REQUESTS_SIMULATED // requests)):
            break
    if not found:
        raise UserError(
            f"--devices {devices}: no split fits into {hardware.memory / 1e9:.0f} GB a rank; take more devices, a "
            f"smaller train.micro_batch or train.recompute=true"
        )
    return tuple(sorted(found, key=lambda f: (-f.tokens_per_second, f.lanes))[:SHOWN])


def _layouts(recipe: Recipe, devices: int) -> Iterator[Recipe]:
    """The recipe in every split of the devices, with every number of replicas, that divides evenly."""
    batches = recipe.train.global_batch // recipe.train.micro_batch
    for trunk_ranks in range(1, devices):
        pool_ranks = devices - trunk_ranks
        if batches % trunk_ranks:
            continue
        in_order = recipe.parallel.trunk_zero == 3 and trunk_ranks > 1  # see trainer.config.recipe
        for shards in range(1, pool_ranks + 1):
            if pool_ranks % shards == 0 and recipe.pool.experts % shards == 0:
                changes = {"trunk_ranks": trunk_ranks, "pool_ranks": pool_ranks, "expert_parallel": shards}
                if in_order:
                    changes["stagger"] = False
                yield recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=changes)})


def _least_seconds(layout: Recipe, hardware: Hardware, interconnect: float | None) -> float:
    """A step in which the busiest of trunk, pool and wire never waits, and a layer's requests are one launch."""
    costs = seconds(layout, hardware, interconnect)
    layers, micro_batches = layout.model.layers, layout.micro_batches
    trunk = 3 * micro_batches * (layers * costs.trunk_layer + costs.head)
    pool = 3 * micro_batches * layers * (served_by_a_pool_rank(layout) * costs.pool_layer + costs.slot)
    wire = _traffic(layout)[1] / (interconnect or hardware.wire_bandwidth)
    return max(trunk, pool, wire) + step_end(layout, hardware, interconnect)


def fitting_lanes(layout: Recipe, hardware: Hardware, interconnect: float | None = None) -> int:
    """The lanes of the layout's choice, or as many fewer as fit into memory; 0 if one does not."""
    lanes = choose_lanes(layout, seconds(layout, hardware, interconnect))
    while lanes and _fullest(layout, lanes) > FILLED * hardware.memory:
        lanes -= 1
    return lanes


def _fullest(layout: Recipe, lanes: int) -> int:
    return max(memory.total for memory in estimate_memory(layout, lanes))
