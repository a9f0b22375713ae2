"""What the hosts do in a step while the devices compute: they launch work, and handle messages. No torch here."""

from __future__ import annotations

from pool.schedule_builder import Costs
from trainer.config.recipe import Recipe
from trainer.planning.hardware import Hardware
from trainer.planning.model_costs import served_trunk_ranks
from trainer.planning.network.links import Role


def messages(recipe: Recipe) -> dict[Role, int]:
    """Count the messages that a rank of each role sends and receives in a step: requests and answers of all shards."""
    grid = recipe.grid
    if grid.colocated:
        return {}
    requests = 2 * recipe.model.layers * recipe.micro_batches  # of a trunk rank; one forward, one backward
    if grid.every_rank:
        return {"": 4 * requests * (grid.expert_parallel - 1)}
    return {"trunk": 2 * requests * grid.expert_parallel, "pool": 2 * requests * served_trunk_ranks(recipe)}


def busiest_host(recipe: Recipe, hardware: Hardware, costs: Costs) -> tuple[Role, float]:
    """Return the role whose hosts are busiest in a step, and for how many seconds at least.

    The threads of a rank that launch work, send and receive share one interpreter, so their times add up. The pool has
    at least as many launches as if it always merged the requests of all ranks that it serves.
    """
    layers, micro_batches = recipe.model.layers, recipe.micro_batches
    trunk = 3 * micro_batches * (layers * costs.trunk_launch + costs.head_launch)
    pool = 2 * layers * micro_batches * costs.slot_launch
    launching: dict[Role, float] = {"trunk": trunk, "pool": pool} if recipe.grid.dedicated else {"": trunk + pool}
    handled = messages(recipe)
    busy = {role: taken + handled.get(role, 0) * hardware.message for role, taken in launching.items()}
    role = max(busy, key=lambda role: busy[role])
    return role, busy[role]
