"""`python -m trainer plan`: what a recipe costs, and how to split its ranks between trunk and pool."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trainer.config.recipe import Recipe
from trainer.planning.model_costs import (
    MEMORY_KINDS,
    Flops,
    Memory,
    Parameters,
    count_flops,
    count_parameters,
    estimate_memory,
)
from trainer.planning.schedule import make_schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from trainer.planning.hardware import Hardware
    from trainer.planning.step_time import Forecast, WireUse

ASSUMPTIONS = (
    "Active parameters leave the routers out, as the paper's names do; the total has them.",
    "FLOPs: causal attention counts half of the S x S scores, training is 3 x forward; matrix products only.",
    "Memory is an estimate, with parallel.lanes micro-batches in flight a trunk rank.",
    "Memory leaves out the device's context, fragmentation, and DeepSpeed's reduction bucket (up to 2 GB).",
    "Activations are what autograd saves on a CPU; fused kernels on a GPU save less.",
    "Expert activations take the load to be even over the shards.",
    "Splits take a FLOP to last equally long on both roles, and the roles' work to overlap wholly.",
)


@dataclass(frozen=True)
class Split:
    """Trunk and pool ranks. `busy` is the share of all ranks' time that can be busy at best."""

    trunk_ranks: int
    pool_ranks: int
    busy: float


@dataclass(frozen=True)
class CostReport:
    """What a recipe costs.

    Attributes:
        name: the run's folder.
        micro_batches: of one trunk rank in an optimizer step.
        training_flops: of the whole run.
        memory: one entry a role.
        trunk_to_pool: trunk ranks a pool rank at which both are always busy, Ta / Te; None for a dense model.
        split: the recipe's own; None without pool ranks.
        recommended: the best for the recipe's number of ranks; None for a dense model, or if none divides evenly.
    """

    name: str
    parameters: Parameters
    flops_per_token: Flops
    steps: int
    micro_batches: int
    tokens_per_step: int
    tokens: int
    training_flops: int
    memory: tuple[Memory, ...]
    trunk_to_pool: float | None
    split: Split | None
    recommended: Split | None

    def to_json(self) -> dict[str, Any]:
        """The fields by name, for machines; every memory entry has its `total`, and there are the assumptions."""
        tree = asdict(self)
        for entry, memory in zip(tree["memory"], self.memory, strict=True):
            entry["total"] = memory.total
        return tree | {"assumptions": list(ASSUMPTIONS)}


def make_plan(recipe: Recipe) -> CostReport:
    """Compute everything."""
    flops = count_flops(recipe)
    tokens_per_step = recipe.train.global_batch * recipe.model.seq_len
    tokens = tokens_per_step * recipe.train.steps
    topology, pooled = recipe.grid, recipe.model.ffn == "pool"
    return CostReport(
        name=recipe.run.dir,
        parameters=count_parameters(recipe),
        flops_per_token=flops,
        steps=recipe.train.steps,
        micro_batches=recipe.micro_batches,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        training_flops=flops.training * tokens,
        memory=estimate_memory(recipe, make_schedule(recipe).lanes),
        trunk_to_pool=flops.trunk / flops.pool if pooled else None,
        split=None if topology.colocated else _split(flops, topology.trunk_ranks, topology.pool_ranks),
        recommended=recommend_split(recipe, flops) if pooled else None,
    )


def _split(flops: Flops, trunk_ranks: int, pool_ranks: int) -> Split:
    slowest = max(flops.trunk / trunk_ranks, flops.pool / pool_ranks)
    return Split(trunk_ranks, pool_ranks, flops.forward / (slowest * (trunk_ranks + pool_ranks)))


def recommend_split(recipe: Recipe, flops: Flops) -> Split | None:
    """The split of the recipe's ranks that can be busiest, among those whose batch and experts divide evenly."""
    world, p = recipe.grid.world_size, recipe.parallel
    candidates = []
    for pool_ranks in range(1, world):
        trunk_ranks, shards = world - pool_ranks, p.expert_parallel or pool_ranks
        batch_divides = recipe.train.global_batch % (recipe.train.micro_batch * trunk_ranks) == 0
        if batch_divides and pool_ranks % shards == 0 and recipe.pool.experts % shards == 0:
            candidates.append(_split(flops, trunk_ranks, pool_ranks))
    return max(candidates, key=lambda split: split.busy, default=None)


def print_plan(plan: CostReport) -> None:
    """The plan as tables on stdout."""
    from rich.console import Console, Group

    tables = [_model_table(plan), _flops_table(plan), _memory_table(plan)]
    if plan.trunk_to_pool:
        tables.append(_split_table(plan))
    Console().print(Group(*tables), *(f"[dim]- {line}[/dim]" for line in ASSUMPTIONS), sep="\n")


FORECAST_ASSUMPTIONS = (
    "Predicted by simulating a step in seconds, at an even load; its end is the gradients' reduction and AdamW.",
    "Transfers are delays that do not queue; a step lasts at least as long as the busiest link's bytes.",
    "Best splits divide batch and experts evenly and fill, as estimated, at most 90% of a rank's memory.",
)


def print_forecast(own: Forecast, best: Sequence[Forecast], hardware: Hardware) -> None:
    """What a step would last on some hardware, and the best splits of the devices, as tables on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_forecast_table(own, hardware))
    if own.wire:
        console.print(_wire_line(own.lanes, own.wire))
    if best:
        console.print(_best_table(best))
    for line in (*hardware.assumptions, *FORECAST_ASSUMPTIONS[: 3 if best else 2 if own.wire else 1]):
        console.print(f"[dim]- {line}[/dim]")


def _forecast_table(own: Forecast, hardware: Hardware) -> Table:
    where = f"{own.trunk_ranks} trunk + {own.pool_ranks} pool ranks, {own.lanes} lanes"
    table = new_table("Predicted step", hardware.name, where if own.pool_ranks else f"{own.trunk_ranks} ranks")
    table.add_row("a step", _seconds(own.seconds))
    table.add_row("of it, its end", _seconds(own.step_end))
    table.add_row("tokens/s", human(own.tokens_per_second))
    table.add_row("MFU, of all ranks' peak", f"{own.mfu:.1%}")
    table.add_row("trunk busy", f"{own.trunk_busy:.0%}")
    table.add_row("pool busy", f"{own.pool_busy:.0%}")
    table.add_row("memory of the fullest rank, about", f"{own.memory / hardware.memory:.0%}")
    if own.wire:
        table.add_row(f"link of a {own.wire.role} rank, each way", f"{own.wire.needed / own.wire.available:.0%}")
    return table


def _wire_line(lanes: int, wire: WireUse) -> str:
    rates = f"a {wire.role} rank needs {_rate(wire.needed)} each way and has {_rate(wire.available)}"
    slower = f"step {wire.slowdown:.2f}x slower"
    if wire.binds:
        return f"[bold]The wire binds[/bold]: {rates}; {slower}."
    if wire.slowdown > 1.05:
        return f"The wire does not bind ({rates}), but {lanes} lanes do not hide its delays: {slower}."
    return f"The wire does not bind: {rates}; {slower}."


def _best_table(best: Sequence[Forecast]) -> Table:
    devices = best[0].trunk_ranks + best[0].pool_ranks
    columns = ("trunk + pool", "shards", "lanes", "step", "tokens/s", "MFU", "busy", "link")
    table = new_table(f"Best splits of {devices} devices", *columns)
    for f in best:
        assert f.wire is not None
        table.add_row(
            f"{f.trunk_ranks} + {f.pool_ranks}",
            str(f.expert_parallel),
            str(f.lanes),
            _seconds(f.seconds),
            human(f.tokens_per_second),
            f"{f.mfu:.1%}",
            f"{f.trunk_busy:.0%}, {f.pool_busy:.0%}",
            f"{f.wire.needed / f.wire.available:.0%}",
        )
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.3g} GB/s"


def new_table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _model_table(plan: CostReport) -> Table:
    p = plan.parameters
    table = new_table(plan.name, "", "")
    for name, number in (("total", p.total), ("active a token", p.active), ("trunk", p.trunk), ("pool", p.pool)):
        table.add_row(f"parameters, {name}", human(number))
    for memory in plan.memory:
        table.add_row(f"parameters on each of {memory.ranks} {memory.role} ranks", human(memory.parameters))
    table.add_section()
    table.add_row("optimizer steps", f"{plan.steps:,}")
    table.add_row("micro-batches a step and trunk rank", f"{plan.micro_batches:,}")
    table.add_row("tokens a step", f"{plan.tokens_per_step:,}")
    table.add_row("tokens in all", human(plan.tokens))
    return table


def _flops_table(plan: CostReport) -> Table:
    f = plan.flops_per_token
    table = new_table("FLOPs a token", "", "")
    for name, number in (
        ("one trunk layer, forward", f.trunk_layer),
        ("one router, forward", f.router),
        ("one expert, forward", f.expert),
        ("LM head, forward", f.head),
        ("all of the trunk, forward", f.trunk),
        ("all experts of a token, forward", f.pool),
        ("forward", f.forward),
        ("training (forward and backward)", f.training),
    ):
        table.add_row(name, human(number))
    table.add_section()
    table.add_row("training, the whole run", f"{plan.training_flops:.3g}")
    return table


def _memory_table(plan: CostReport) -> Table:
    from rich.filesize import decimal

    table = new_table("Memory a rank, about", "", *(f"{m.role} x {m.ranks}" for m in plan.memory))
    for kind in MEMORY_KINDS:
        table.add_row(kind.replace("_", " "), *(decimal(getattr(m, kind)) for m in plan.memory))
    table.add_section()
    table.add_row("total", *(decimal(m.total) for m in plan.memory))
    return table


def _split_table(plan: CostReport) -> Table:
    table = new_table("Trunk and pool ranks", "", "trunk", "pool", "busy at best")
    table.add_row("ideal ratio", f"{plan.trunk_to_pool:.2f}", "1", "100%")
    for name, split in (("this recipe", plan.split), ("recommended", plan.recommended)):
        if split:
            table.add_row(name, str(split.trunk_ranks), str(split.pool_ranks), f"{split.busy:.0%}")
    return table


def human(number: float) -> str:
    """A number with four significant digits and K, M, B or T behind it."""
    for unit in ("", "K", "M", "B"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"
