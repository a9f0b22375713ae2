"""Whether a recipe fits into the memory of its ranks, and which change of it would. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.common.format import size
from trainer.config.recipe import Recipe
from trainer.planning.memory import Memory, estimate_memory

FILLED = 0.9
"""Share of a rank's memory that a layout may fill; the estimate leaves out fragmentation and an uneven load."""


def fits(recipe: Recipe, lanes: int, available: float) -> bool:
    """Whether every rank's estimate leaves a tenth of the available bytes free."""
    return all(memory.total <= FILLED * available for memory in estimate_memory(recipe, lanes))


def memory_warnings(recipe: Recipe, lanes: int, available: float, owner: str, role: str = "") -> list[str]:
    """Say in a line for each role whose ranks do not fit how much they need, and what would fit.

    Args:
        lanes: Micro-batches in flight per trunk rank.
        available: Bytes that a rank has.
        owner: Whose memory that is, as in "h100".
        role: "trunk" or "pool", to warn of these ranks only.
    """
    return [
        f"a {memory.role} rank needs {size(memory.total)} by the estimate, more than {FILLED:.0%} of the "
        f"{size(available)} of {owner}: {_remedy(recipe, lanes, memory, available)}"
        for memory in estimate_memory(recipe, lanes)
        if role in memory.role and memory.total > FILLED * available
    ]


def _remedy(recipe: Recipe, lanes: int, memory: Memory, available: float) -> str:
    """Name the first change after which this role fits."""
    for change, changed, in_flight in _changes(recipe, lanes):
        needed = max(m.total for m in estimate_memory(changed, in_flight) if m.role in memory.role)
        if needed <= FILLED * available:
            return f"{change} needs {size(needed)}"
    more = "pool ranks" if recipe.grid.dedicated else "ranks"
    return f"use more {more}, and train.recompute=true with a smaller train.micro_batch"


def _changes(recipe: Recipe, lanes: int) -> Iterator[tuple[str, Recipe, int]]:
    """Changes of a recipe that save memory, those that cost least time first: a text, the recipe, its lanes."""
    p, experts = recipe.parallel, recipe.pool.experts
    for fewer in range(lanes - 1, 0, -1):
        yield f"parallel.lanes={fewer}", recipe, fewer
    if p.trunk_zero and p.trunk_ranks == 1:
        yield "parallel.trunk_zero=0", recipe.changed("parallel", trunk_zero=0), lanes
    if p.pool_zero and experts and recipe.grid.replicas == 1:
        yield "parallel.pool_zero=0", recipe.changed("parallel", pool_zero=0), lanes
    half = recipe.train.micro_batch // 2
    while half and recipe.train.micro_batch % half == 0:
        yield f"train.micro_batch={half}", recipe.changed("train", micro_batch=half), lanes
        half //= 2
    if experts:
        yield "pool.recompute=true", recipe.changed("pool", recompute=True), lanes
        yield "train.recompute=true", recipe.changed("train", recompute=True), lanes
    in_order = p.trunk_zero == 3 and p.trunk_ranks > 1  # then ZeRO-3 allows nothing else between two roles
    if experts and recipe.grid.expert_parallel < p.trunk_ranks and not recipe.grid.dedicated:
        shared = recipe.changed("parallel", layout="every_rank", expert_parallel=None)
        if experts % p.trunk_ranks == 0:
            one_lane = " and parallel.lanes=1" if in_order else ""
            text = f"parallel.layout=every_rank with a shard on each rank{one_lane}"
            yield text, shared, 1 if in_order else lanes
    if experts and not recipe.grid.every_rank:
        more = max(p.trunk_ranks, 2 * p.pool_ranks)
        dedicated = "parallel.layout=dedicated " if p.layout == "colocated" else ""
        unstaggered = " parallel.stagger=false" if in_order and p.stagger else ""
        while more <= experts and experts % more == 0:
            layout = recipe.changed("parallel", layout="dedicated", pool_ranks=more, expert_parallel=None)
            if not in_order:
                yield f"{dedicated}parallel.pool_ranks={more}", layout, lanes
            if in_order or lanes > 1:
                yield f"{dedicated}parallel.pool_ranks={more} with parallel.lanes=1{unstaggered}", layout, 1
            more *= 2
