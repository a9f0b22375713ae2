"""What a recipe costs, and how to split its ranks between trunk and pool."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trainer.common.format import count, percent, plural, size
from trainer.common.tables import new_table, print_tables
from trainer.config.recipe import Recipe
from trainer.planning.fit import memory_warnings
from trainer.planning.hardware import DATA_SHEETS, Hardware
from trainer.planning.lanes import lanes_on
from trainer.planning.memory import ACCUMULATING, KIND_NAMES, MEMORY_KINDS, Memory, estimate_memory
from trainer.planning.model_costs import Flops, Parameters, count_flops, count_parameters
from trainer.planning.schedule import make_schedule

if TYPE_CHECKING:
    from rich.table import Table

ASSUMPTIONS = (
    "Active parameters exclude the routers, as in the paper's model names; the total includes them.",
    "FLOPs are those of matrix products; causal attention counts half of the S x S scores, training is 3 x forward.",
    "Memory is an estimate for GPUs. The total is the first part of the table plus the larger of the other two, which "
    "are not needed at the same time.",
    "Activations are what autograd saves on a CPU; fused kernels on a GPU save less.",
    "Expert activations assume an even load over the shards; a layout should leave 10% free for uneven ones.",
    "Assumed, not measured: CUDA's context takes 0.7 GB, and NCCL 9.6 MB for each channel to a peer: 8 channels in "
    "each of the two communicators between the roles, 24 in a role's own.",
    "Splits assume that a FLOP takes equally long on both roles, and that the roles' work overlaps completely; "
    "--hardware simulates steps, in which launches take time too.",
)


@dataclass(frozen=True)
class Split:
    """A number of trunk and pool ranks; `busy` is the largest share of all ranks' time that can be busy."""

    trunk_ranks: int
    pool_ranks: int
    busy: float


@dataclass(frozen=True)
class CostReport:
    """What a recipe costs.

    Attributes:
        name: The run's folder.
        parameters: Numbers of parameters.
        flops_per_token: FLOPs per token.
        steps: Optimizer steps of the run.
        micro_batches: Micro-batches of one trunk rank in an optimizer step.
        tokens_per_step: Tokens of an optimizer step.
        tokens: Tokens of the run.
        training_flops: FLOPs of the run.
        lanes: Micro-batches in flight per trunk rank.
        memory: One entry per role.
        warnings: Which ranks do not fit into memory, and what would.
        trunk_to_pool: Trunk ranks per pool rank with which both are always busy; None for a dense model.
        split: The recipe's own split; None without ranks that hold only experts.
        recommended: The best split of the recipe's ranks; None for a dense model, or if none divides evenly.
    """

    name: str
    parameters: Parameters
    flops_per_token: Flops
    steps: int
    micro_batches: int
    tokens_per_step: int
    tokens: int
    training_flops: int
    lanes: int
    memory: tuple[Memory, ...]
    warnings: list[str]
    trunk_to_pool: float | None
    split: Split | None
    recommended: Split | None

    def to_json(self) -> dict[str, Any]:
        """The fields by name; every entry of memory also has its `total`, and the assumptions are included."""
        tree = asdict(self)
        for entry, memory in zip(tree["memory"], self.memory, strict=True):
            entry["total"] = memory.total
        return tree | {"assumptions": list(ASSUMPTIONS)}


def make_cost_report(recipe: Recipe, hardware: Hardware | None = None) -> CostReport:
    """Compute what a recipe costs.

    Args:
        hardware: What lanes are chosen for, and whose memory the ranks must fit into. Without it lanes are those of a
            run, and the memory is an H100's.
    """
    flops = count_flops(recipe)
    lanes = lanes_on(recipe, hardware) if hardware else make_schedule(recipe).lanes
    tokens_per_step = recipe.train.global_batch * recipe.model.seq_len
    tokens = tokens_per_step * recipe.train.steps
    topology, pooled = recipe.grid, recipe.model.ffn == "pool"
    owner = hardware or DATA_SHEETS["h100"]
    named = owner.name if hardware else f"{owner.name} (--hardware names another)"
    return CostReport(
        name=recipe.run.dir,
        parameters=count_parameters(recipe),
        flops_per_token=flops,
        steps=recipe.train.steps,
        micro_batches=recipe.micro_batches,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        training_flops=flops.training * tokens,
        lanes=lanes,
        memory=estimate_memory(recipe, lanes),
        warnings=memory_warnings(recipe, lanes, owner.memory, named),
        trunk_to_pool=flops.trunk / flops.pool if pooled else None,
        split=_split(flops, topology.trunk_ranks, topology.pool_ranks) if topology.dedicated else None,
        recommended=_recommend_split(recipe, flops) if pooled else None,
    )


def _split(flops: Flops, trunk_ranks: int, pool_ranks: int) -> Split:
    slowest = max(flops.trunk / trunk_ranks, flops.pool / pool_ranks)
    return Split(trunk_ranks, pool_ranks, flops.forward / (slowest * (trunk_ranks + pool_ranks)))


def _recommend_split(recipe: Recipe, flops: Flops) -> Split | None:
    """The split of the recipe's ranks that can be busiest, among those that divide batch and experts evenly."""
    world, p = recipe.grid.world_size, recipe.parallel
    candidates = []
    for pool_ranks in range(1, world):
        trunk_ranks, shards = world - pool_ranks, p.expert_parallel or pool_ranks
        batch_divides = recipe.train.global_batch % (recipe.train.micro_batch * trunk_ranks) == 0
        if batch_divides and pool_ranks % shards == 0 and recipe.pool.experts % shards == 0:
            candidates.append(_split(flops, trunk_ranks, pool_ranks))
    return max(candidates, key=lambda split: split.busy, default=None)


def print_cost_report(report: CostReport) -> None:
    """Print the report as tables."""
    tables = [_model_table(report), _flops_table(report), _memory_table(report)]
    if report.trunk_to_pool:
        tables.append(_split_table(report))
    print_tables(*tables, notes=ASSUMPTIONS)


def _model_table(report: CostReport) -> Table:
    p = report.parameters
    table = new_table(report.name, "", "")
    for name, number in (("total", p.total), ("active per token", p.active), ("trunk", p.trunk), ("pool", p.pool)):
        table.add_row(f"parameters, {name}", count(number))
    for memory in report.memory:
        table.add_row(f"parameters per {memory.role} rank", count(memory.parameters))
    table.add_section()
    table.add_row("optimizer steps", f"{report.steps:,}")
    table.add_row("micro-batches per step and trunk rank", f"{report.micro_batches:,}")
    table.add_row("tokens per step", f"{report.tokens_per_step:,}")
    table.add_row("tokens in total", count(report.tokens))
    return table


def _flops_table(report: CostReport) -> Table:
    f = report.flops_per_token
    table = new_table("FLOPs per token", "", "")
    for name, number in (
        ("one trunk layer, forward", f.trunk_layer),
        ("one router, forward", f.router),
        ("one expert, forward", f.expert),
        ("LM head, forward", f.head),
        ("whole trunk, forward", f.trunk),
        ("all experts of a token, forward", f.pool),
        ("forward", f.forward),
        ("training (forward and backward)", f.training),
    ):
        table.add_row(name, count(number))
    table.add_section()
    table.add_row("training, the whole run", f"{report.training_flops:.3g}")
    return table


def _memory_table(report: CostReport) -> Table:
    title = f"Estimated memory per rank, {plural(report.lanes, 'lane')}"
    table = new_table(title, "", *(f"{m.role} x {m.ranks}" for m in report.memory))
    for kind in MEMORY_KINDS:
        name = KIND_NAMES.get(kind, kind.replace("_", " "))
        table.add_row(name, *(size(getattr(m, kind)) for m in report.memory))
        if kind in ("device", ACCUMULATING[-1], MEMORY_KINDS[-1]):
            table.add_section()
    table.add_row("total", *(size(m.total) for m in report.memory))
    table.add_row("host memory, while a checkpoint is written", *(size(m.host) for m in report.memory))
    return table


def _split_table(report: CostReport) -> Table:
    table = new_table("Trunk and pool ranks", "", "trunk", "pool", "busy at best")
    table.add_row("ideal ratio", f"{report.trunk_to_pool:.2f}", "1", "100%")
    for name, split in (("this recipe", report.split), ("best by FLOPs", report.recommended)):
        if split:
            table.add_row(name, str(split.trunk_ranks), str(split.pool_ranks), percent(split.busy))
    return table
