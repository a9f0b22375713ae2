"""How long a step takes on some hardware, what limits it, and which layout of the devices is fastest. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from trainer.common.errors import UserError
from trainer.common.format import count, percent, plural, quantity, seconds, size
from trainer.common.tables import new_table, print_tables
from trainer.config.recipe import Recipe
from trainer.planning.hardware import Hardware, costs_in_seconds, request_bytes
from trainer.planning.lanes import accumulation_time, choose_fitting_lanes, lanes_on, role_work, runs_in_order
from trainer.planning.memory import fullest_rank
from trainer.planning.model_costs import count_flops, served_trunk_ranks
from trainer.planning.network.hosts import busiest_host
from trainer.planning.network.links import LinkUse, Role, busiest_link
from trainer.planning.network.step_end import step_end

if TYPE_CHECKING:
    from rich.table import Table

Layout = Literal["dedicated", "colocated", "every_rank"]

SHOWN = 6
SIMULATED = 12
"""Layouts of a kind whose steps are simulated: those with the smallest lower bound."""
REQUESTS_SIMULATED = 500_000
"""Requests of a replica over all layouts and lanes, which take some seconds to simulate."""


_ASSUMPTION = (
    "The step is simulated at an even load; after the last gradient come the reduction of gradients, AdamW, and sums "
    "of a few numbers over the hosts."
)
_WIRE_ASSUMPTION = (
    "Transfers are delays that do not queue, but a step lasts at least as long as the busiest link needs for its "
    "bytes, and the busiest host for launches and messages."
)
_LAYOUT_ASSUMPTION = (
    "The best layouts divide batch and experts evenly, and fill at most 90% of a rank's memory by the estimate. "
    "busy: of trunk, pool; both are shares of the same time where a rank has both roles."
)


@dataclass(frozen=True)
class WireUse:
    """How the link of the busiest ranks is used.

    Attributes:
        role: The role of the ranks that send and receive most; "" where every rank has both.
        across: Whether it is the link to other nodes.
        needed: Bytes/s each way up to a step's last gradient, if nothing ever waited for the wire.
        available: Bytes/s each way.
        slowdown: The step's time over its time without the wire's delays and limits.
    """

    role: Role
    across: bool
    needed: float
    available: float
    slowdown: float

    @property
    def owner(self) -> str:
        """Whose link it is, as texts say it."""
        return f"a {self.role} rank's link".replace("  ", " ") + (" to other nodes" if self.across else "")

    @property
    def binds(self) -> bool:
        """Whether the wire limits the step."""
        return self.needed > self.available


@dataclass(frozen=True)
class StepTime:
    """A step of one layout. Transfers are delays that do not queue, and a step lasts as long as the busiest link needs.

    Attributes:
        pool_ranks: 0 in the colocated layout or for a dense model; the trunk ranks themselves in `every_rank`.
        seconds: Time of a step, with the reduction of gradients and the optimizer.
        step_end: The part of it after the last gradient.
        host_busy: Share of the time up to the last gradient in which the busiest host launches or handles messages.
        mfu: The model's FLOPs over the peak of all ranks.
        trunk_busy, pool_busy: Shares of the step during which each role computes.
        memory: Estimated bytes on the fullest rank.
        wire: None where nothing travels.
        stagger: `parallel.stagger`, which only the dedicated layout uses.
    """

    layout: Layout
    trunk_ranks: int
    pool_ranks: int
    expert_parallel: int
    lanes: int
    seconds: float
    step_end: float
    host_busy: float
    tokens_per_second: float
    mfu: float
    trunk_busy: float
    pool_busy: float
    memory: int
    wire: WireUse | None
    stagger: bool

    @property
    def ranks(self) -> str:
        """The layout and its ranks, for tables."""
        if self.layout == "dedicated":
            return f"{self.trunk_ranks} + {self.pool_ranks} dedicated"
        return f"{self.trunk_ranks} {self.layout}"


def step_time(recipe: Recipe, hardware: Hardware) -> StepTime:
    """Predict the step of a recipe's own layout and lanes, at an even load over the shards."""
    topology = recipe.grid
    lanes = lanes_on(recipe, hardware)
    costs = costs_in_seconds(recipe, hardware, lanes)
    end = step_end(recipe, hardware).seconds
    simulated, trunk_busy, pool_busy = accumulation_time(recipe, lanes, costs)
    host = busiest_host(recipe, hardware, costs)[1]
    accumulated = max(simulated, host)
    wire = None
    link = busiest_link(recipe, hardware.links)
    if link:
        traffic = _traffic(recipe, link)
        free = max(host, accumulation_time(recipe, lanes, replace(costs, transfer=0.0))[0])
        accumulated = max(accumulated, traffic / link.bandwidth)
        slowdown = (accumulated + end) / (free + end)
        wire = WireUse(link.role, link.across, traffic / free, link.bandwidth, slowdown)
    taken = accumulated + end
    tokens = recipe.train.global_batch * recipe.model.seq_len
    peak = topology.world_size * hardware.rates(recipe.train.precision).flops
    return StepTime(
        topology.layout,
        topology.trunk_ranks,
        topology.pool_ranks,
        topology.expert_parallel,
        lanes,
        seconds=taken,
        step_end=end,
        host_busy=host / accumulated,
        tokens_per_second=tokens / taken,
        mfu=count_flops(recipe).training * tokens / (taken * peak),
        trunk_busy=trunk_busy * simulated / taken,
        pool_busy=pool_busy * simulated / taken,
        memory=fullest_rank(recipe, lanes),
        wire=wire,
        stagger=recipe.parallel.stagger,
    )


def _traffic(recipe: Recipe, link: LinkUse) -> float:
    """Bytes that cross the busiest link in a step, each way."""
    requests = 2 * recipe.model.layers * recipe.micro_batches * link.requests  # one forward, one backward
    return (2 if recipe.grid.every_rank else 1) * requests * request_bytes(recipe)  # and answers the same way


def best_layouts(recipe: Recipe, devices: int, hardware: Hardware) -> tuple[StepTime, ...]:
    """Find the fastest layouts of `devices` ranks that divide evenly and fit into memory, fastest first.

    Each has the fewest lanes that are within 3 % of its best. A lower bound ranks all layouts of a kind, and the steps
    of the best of them are simulated. The best of each kind is among the result.

    Raises:
        UserError: There is no such layout.
    """
    fastest = [_fastest(layouts(recipe, devices), hardware) for layouts in (_dedicated, _every_rank, _colocated)]
    if not any(fastest):
        raise UserError(
            f"--devices {devices}: no layout fits into {hardware.memory / 1e9:.0f} GB per rank; use more devices, a "
            f"smaller train.micro_batch or train.recompute=true"
        )
    first = [steps[0] for steps in fastest if steps]
    others = _sorted(step for steps in fastest for step in steps[1:])
    return tuple(_sorted([*first, *others[: SHOWN - len(first)]]))


def _fastest(layouts: Iterable[Recipe], hardware: Hardware) -> list[StepTime]:
    """Simulate the layouts of a kind that have the smallest lower bounds, and sort them."""
    found: list[StepTime] = []
    for layout in sorted(layouts, key=lambda layout: _least_seconds(layout, hardware)):
        served = 1 if layout.grid.every_rank else served_trunk_ranks(layout)
        requests = 10 * 2 * layout.model.layers * layout.micro_batches * served
        lanes = choose_fitting_lanes(layout, hardware)
        if lanes:
            found.append(step_time(layout.changed("parallel", lanes=lanes), hardware))
        if len(found) >= max(3, min(SIMULATED, REQUESTS_SIMULATED // requests)):
            break
    return _sorted(found)


def _sorted(steps: Iterable[StepTime]) -> list[StepTime]:
    return sorted(steps, key=lambda step: (-step.tokens_per_second, step.lanes))


def _dedicated(recipe: Recipe, devices: int) -> Iterator[Recipe]:
    """The recipe in every split of the devices that divides evenly, with every possible number of replicas."""
    batches = recipe.train.global_batch // recipe.train.micro_batch
    for trunk_ranks in range(1, devices):
        if batches % trunk_ranks:
            continue
        pool_ranks = devices - trunk_ranks
        split = recipe.changed("parallel", layout="dedicated", trunk_ranks=trunk_ranks, pool_ranks=pool_ranks)
        for layout in _with_shards(split, pool_ranks):
            yield layout.changed("parallel", stagger=False) if runs_in_order(layout) else layout


def _every_rank(recipe: Recipe, devices: int) -> Iterator[Recipe]:
    """The recipe with a shard on each of the devices, with every possible number of replicas.

    With a single shard it would be the colocated layout, in which nothing has to be scheduled.
    """
    if recipe.train.global_batch // recipe.train.micro_batch % devices == 0:
        both = recipe.changed("parallel", layout="every_rank", trunk_ranks=devices, pool_ranks=0)
        yield from (layout for layout in _with_shards(both, devices) if layout.grid.expert_parallel > 1)


def _colocated(recipe: Recipe, devices: int) -> Iterator[Recipe]:
    """The recipe with the whole pool on each of the devices."""
    if recipe.train.global_batch // recipe.train.micro_batch % devices == 0:
        yield recipe.changed("parallel", layout="colocated", trunk_ranks=devices, pool_ranks=0, expert_parallel=1)


def _with_shards(recipe: Recipe, pool_ranks: int) -> Iterator[Recipe]:
    for shards in range(1, pool_ranks + 1):
        if pool_ranks % shards == 0 and recipe.pool.experts % shards == 0:
            yield recipe.changed("parallel", expert_parallel=shards)


def _least_seconds(layout: Recipe, hardware: Hardware) -> float:
    """Lower bound: the busiest of trunk, pool and wire never waits; a layer's requests share a launch, unmerged."""
    launches = 3 * layout.micro_batches * layout.model.layers
    costs = costs_in_seconds(layout, hardware, lanes=1)
    trunk, pool = role_work(layout, costs, launches)
    computing = max(trunk, pool) if layout.grid.dedicated else trunk + pool
    link = busiest_link(layout, hardware.links)
    sending = _traffic(layout, link) / link.bandwidth if link else 0.0
    return max(computing, sending, busiest_host(layout, hardware, costs)[1]) + step_end(layout, hardware).seconds


def print_step_time(own: StepTime, best: Sequence[StepTime], hardware: Hardware) -> None:
    """Print the recipe's own step on some hardware, and the best layouts of the devices, as tables."""
    where = f"{own.ranks}, {plural(own.lanes, 'lane')}" if own.pool_ranks else plural(own.trunk_ranks, "rank")
    table = new_table("Predicted step", hardware.name, where)
    table.add_row("step", seconds(own.seconds))
    table.add_row("part of it after the last gradient", seconds(own.step_end))
    table.add_row("tokens/s", count(own.tokens_per_second))
    table.add_row("MFU (share of all ranks' peak)", percent(own.mfu, 1))
    table.add_row("trunk busy", percent(own.trunk_busy))
    table.add_row("pool busy", percent(own.pool_busy))
    table.add_row("estimated memory of the fullest rank", percent(own.memory / hardware.memory))
    tables, notes = [table], [*hardware.assumptions, _ASSUMPTION]
    if own.wire:
        table.add_row(f"use of {own.wire.owner}, each way", percent(own.wire.needed / own.wire.available))
        table.add_row("host busy", percent(own.host_busy))
        notes = [_wire_note(own.lanes, own.wire), *notes, _WIRE_ASSUMPTION]
    if best:
        tables.append(_best_table(best))
        notes = [recommendation(best), *notes, _LAYOUT_ASSUMPTION]
    print_tables(*tables, notes=notes)


def _wire_note(lanes: int, wire: WireUse) -> str:
    needed, available = (quantity(rate, "B/s") for rate in (wire.needed, wire.available))
    rates = f"{wire.owner} must carry {needed} each way and carries {available}"
    slower = f"waiting for it makes the step {wire.slowdown:.2f} times as long"
    if wire.binds:
        return f"The wire limits the step: {rates}; {slower}."
    if wire.slowdown > 1.05:
        return f"The wire is fast enough ({rates}), but {plural(lanes, 'lane')} cannot hide its delays: {slower}."
    return f"The wire is fast enough: {rates}; {slower}."


def _best_table(best: Sequence[StepTime]) -> Table:
    devices = best[0].trunk_ranks + (best[0].pool_ranks if best[0].layout == "dedicated" else 0)
    columns = ("ranks", "shards", "lanes", "step", "MFU", "busy", "link", "memory")
    table = new_table(f"Best layouts of {plural(devices, 'device')}", *columns)
    for step in best:
        table.add_row(
            step.ranks,
            str(step.expert_parallel),
            str(step.lanes),
            seconds(step.seconds),
            percent(step.mfu, 1),
            f"{percent(step.trunk_busy)}, {percent(step.pool_busy)}",
            percent(step.wire.needed / step.wire.available) if step.wire else "",
            size(step.memory),
        )
    return table


def recommendation(best: Sequence[StepTime]) -> str:
    """Say which keys make the fastest layout, and how much faster it is than the best of the other kinds."""
    first = best[0]
    keys: dict[str, object] = {
        "layout": first.layout,
        "trunk_ranks": first.trunk_ranks,
        "pool_ranks": first.pool_ranks if first.layout == "dedicated" else 0,
        "expert_parallel": first.expert_parallel,
        "lanes": first.lanes,
    }
    if first.layout == "dedicated" and not first.stagger:  # as ZeRO-3 needs it
        keys["stagger"] = "false"
    others = {step.layout: step.seconds for step in reversed(best) if step.layout != first.layout}
    faster = [f"{taken / first.seconds:.2f} times as fast as {layout}" for layout, taken in others.items()]
    said = f"Recommended: {' '.join(f'parallel.{key}={value}' for key, value in keys.items())}"
    return f"{said}; {' and '.join(faster)}." if faster else f"{said}."
