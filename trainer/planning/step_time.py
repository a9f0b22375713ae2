"""How long a step takes on some hardware, what limits it, and which split of the devices is fastest. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from trainer.common.errors import UserError
from trainer.common.format import count, percent, plural, quantity, seconds
from trainer.common.tables import new_table, print_tables
from trainer.config.recipe import Recipe
from trainer.planning.hardware import Hardware, costs_in_seconds, request_bytes, step_end
from trainer.planning.lanes import accumulation_time, choose_fitting_lanes, lanes_on, role_work, runs_in_order
from trainer.planning.memory import fullest_rank
from trainer.planning.model_costs import count_flops, served_trunk_ranks

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 6
SIMULATED = 12
"""Layouts whose steps are simulated: those with the smallest lower bound."""
REQUESTS_SIMULATED = 500_000
"""Requests over all layouts and lanes, which take some seconds to simulate."""


_ASSUMPTION = "The step is simulated at an even load; after the last gradient come the gradients' reduction and AdamW."
_WIRE_ASSUMPTION = (
    "Transfers are delays that do not queue, but a step lasts at least as long as the busiest link needs for its bytes."
)
_SPLIT_ASSUMPTION = (
    "The best splits divide batch and experts evenly, and fill at most 90% of a rank's memory by the estimate."
)


@dataclass(frozen=True)
class WireUse:
    """How the link of the busiest ranks is used.

    Attributes:
        role: The role of the ranks that send and receive most.
        needed: Bytes/s each way up to a step's last gradient, if nothing ever waited for the wire.
        available: Bytes/s each way.
        slowdown: The step's time over its time without the wire's delays and limits.
    """

    role: Literal["trunk", "pool"]
    needed: float
    available: float
    slowdown: float

    @property
    def binds(self) -> bool:
        """Whether the wire limits the step."""
        return self.needed > self.available


@dataclass(frozen=True)
class StepTime:
    """A step of one layout. Transfers are delays that do not queue, and a step lasts as long as the busiest link needs.

    Attributes:
        pool_ranks: 0 for a colocated layout or a dense model.
        seconds: Time of a step, with the reduction of gradients and the optimizer.
        step_end: The part of it after the last gradient.
        mfu: The model's FLOPs over the peak of all ranks.
        trunk_busy, pool_busy: Shares of the step during which each role computes.
        memory: Estimated bytes on the fullest rank.
        wire: None without pool ranks.
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


def step_time(recipe: Recipe, hardware: Hardware) -> StepTime:
    """Predict the step of a recipe's own layout and lanes, at an even load."""
    topology = recipe.grid
    lanes = lanes_on(recipe, hardware)
    costs = costs_in_seconds(recipe, hardware, lanes)
    end = step_end(recipe, hardware)
    simulated, trunk_busy, pool_busy = accumulation_time(recipe, lanes, costs)
    taken = simulated + end
    wire = None
    if not topology.colocated:
        free = accumulation_time(recipe, lanes, replace(costs, transfer=0.0))[0]
        available = hardware.wire_bandwidth
        role, traffic = _traffic(recipe)
        taken = max(simulated, traffic / available) + end
        wire = WireUse(role, traffic / free, available, taken / (free + end))
    tokens = recipe.train.global_batch * recipe.model.seq_len
    peak = topology.world_size * hardware.rates(recipe.train.precision).flops
    return StepTime(
        topology.trunk_ranks,
        topology.pool_ranks,
        topology.expert_parallel,
        lanes,
        seconds=taken,
        step_end=end,
        tokens_per_second=tokens / taken,
        mfu=count_flops(recipe).training * tokens / (taken * peak),
        trunk_busy=trunk_busy * simulated / taken,
        pool_busy=pool_busy * simulated / taken,
        memory=fullest_rank(recipe, lanes),
        wire=wire,
    )


def _traffic(recipe: Recipe) -> tuple[Literal["trunk", "pool"], float]:
    """The role of the busiest ranks, and the bytes that each of them sends, and also receives, in a step."""
    trunk = 2 * recipe.model.layers * recipe.micro_batches * request_bytes(recipe)  # one forward, one backward
    pool = trunk / recipe.grid.expert_parallel * served_trunk_ranks(recipe)
    return ("trunk", trunk) if trunk > pool else ("pool", pool)


def best_splits(recipe: Recipe, devices: int, hardware: Hardware) -> tuple[StepTime, ...]:
    """Find the fastest layouts of `devices` ranks that divide evenly and fit into memory, fastest first.

    Each has the fewest lanes that are within 3 % of its best. A lower bound ranks all layouts, and the steps of the
    best of them are simulated.

    Raises:
        UserError: There is no such layout.
    """
    ranked = sorted(_layouts(recipe, devices), key=lambda layout: _least_seconds(layout, hardware))
    batches = recipe.train.global_batch // recipe.train.micro_batch
    if not ranked:
        raise UserError(
            f"--devices {devices}: no split divides evenly: the trunk ranks must divide the {batches} micro-batches of "
            f"a step, and the shards must divide the pool ranks and the {recipe.pool.experts} experts"
        )
    requests = 10 * 2 * recipe.model.layers * batches
    found: list[StepTime] = []
    for layout in ranked:
        lanes = choose_fitting_lanes(layout, hardware)
        if lanes:
            found.append(step_time(_in_layout(layout, lanes=lanes), hardware))
        if len(found) >= max(3, min(SIMULATED, REQUESTS_SIMULATED // requests)):
            break
    if not found:
        raise UserError(
            f"--devices {devices}: no split fits into {hardware.memory / 1e9:.0f} GB per rank; use more devices, a "
            f"smaller train.micro_batch or train.recompute=true"
        )
    return tuple(sorted(found, key=lambda step: (-step.tokens_per_second, step.lanes))[:SHOWN])


def _in_layout(recipe: Recipe, **parallel: int | bool) -> Recipe:
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=parallel)})


def _layouts(recipe: Recipe, devices: int) -> Iterator[Recipe]:
    """The recipe in every split of the devices that divides evenly, with every possible number of replicas."""
    batches = recipe.train.global_batch // recipe.train.micro_batch
    for trunk_ranks in range(1, devices):
        pool_ranks = devices - trunk_ranks
        if batches % trunk_ranks:
            continue
        for shards in range(1, pool_ranks + 1):
            if pool_ranks % shards == 0 and recipe.pool.experts % shards == 0:
                layout = _in_layout(recipe, trunk_ranks=trunk_ranks, pool_ranks=pool_ranks, expert_parallel=shards)
                yield _in_layout(layout, stagger=False) if runs_in_order(layout) else layout


def _least_seconds(layout: Recipe, hardware: Hardware) -> float:
    """Lower bound: the busiest of trunk, pool and wire never waits; a layer's requests share a launch, unmerged."""
    launches = 3 * layout.micro_batches * layout.model.layers
    trunk, pool = role_work(layout, costs_in_seconds(layout, hardware, lanes=1), launches)
    wire = _traffic(layout)[1] / hardware.wire_bandwidth
    return max(trunk, pool, wire) + step_end(layout, hardware)


def print_step_time(own: StepTime, best: Sequence[StepTime], hardware: Hardware) -> None:
    """Print the recipe's own step on some hardware, and the best splits of the devices, as tables."""
    where = f"{own.trunk_ranks} trunk + {own.pool_ranks} pool ranks, {plural(own.lanes, 'lane')}"
    table = new_table("Predicted step", hardware.name, where if own.pool_ranks else plural(own.trunk_ranks, "rank"))
    table.add_row("step", seconds(own.seconds))
    table.add_row("part of it after the last gradient", seconds(own.step_end))
    table.add_row("tokens/s", count(own.tokens_per_second))
    table.add_row("MFU (share of all ranks' peak)", percent(own.mfu, 1))
    table.add_row("trunk busy", percent(own.trunk_busy))
    table.add_row("pool busy", percent(own.pool_busy))
    table.add_row("estimated memory of the fullest rank", percent(own.memory / hardware.memory))
    tables, notes = [table], [*hardware.assumptions, _ASSUMPTION]
    if own.wire:
        table.add_row(f"use of a {own.wire.role} rank's link, each way", percent(own.wire.needed / own.wire.available))
        notes = [_wire_note(own.lanes, own.wire), *notes, _WIRE_ASSUMPTION]
    if best:
        tables.append(_best_table(best))
        notes.append(_SPLIT_ASSUMPTION)
    print_tables(*tables, notes=notes)


def _wire_note(lanes: int, wire: WireUse) -> str:
    needed, available = (quantity(rate, "B/s") for rate in (wire.needed, wire.available))
    rates = f"a {wire.role} rank needs {needed} each way and has {available}"
    slower = f"waiting for it makes the step {wire.slowdown:.2f} times as long"
    if wire.binds:
        return f"The wire limits the step: {rates}; {slower}."
    if wire.slowdown > 1.05:
        return f"The wire is fast enough ({rates}), but {plural(lanes, 'lane')} cannot hide its delays: {slower}."
    return f"The wire is fast enough: {rates}; {slower}."


def _best_table(best: Sequence[StepTime]) -> Table:
    devices = best[0].trunk_ranks + best[0].pool_ranks
    columns = ("trunk + pool", "shards", "lanes", "step", "tokens/s", "MFU", "busy", "link")
    table = new_table(f"Best splits of {devices} devices", *columns)
    for step in best:
        assert step.wire is not None
        table.add_row(
            f"{step.trunk_ranks} + {step.pool_ranks}",
            str(step.expert_parallel),
            str(step.lanes),
            seconds(step.seconds),
            count(step.tokens_per_second),
            percent(step.mfu, 1),
            f"{percent(step.trunk_busy)}, {percent(step.pool_busy)}",
            percent(step.wire.needed / step.wire.available),
        )
    return table
