"""Which launcher rank becomes which rank of the job, and what runs on which host.

The job uses the rank numbers of `pool.topology`, trunk ranks first. The launcher numbers its processes node by node.
`topology.order`, or `UNIPOOL_ROLE` in the environment of every rank, decides which of them are trunk ranks and which
are pool ranks; within a role the numbers follow the launcher's, and so they do where every rank has both roles. Nothing
else uses launcher ranks, so losses, checkpoints and the schedule do not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from typing import Literal

from pool.topology import Topology
from trainer.common.errors import SharedUserError
from trainer.common.format import spans

ROLE = "UNIPOOL_ROLE"
"""Environment variable: the role of this rank, "trunk" or "pool". It overrides `topology.order`."""

Order = Literal["pool_last", "interleaved"]


def ranks_by_order(grid: Topology, order: Order) -> list[int]:
    """Return the job rank of each launcher rank, according to `topology.order`.

    With "interleaved", any s consecutive launcher ranks hold s P / W pool ranks, rounded up or down, so that each of n
    nodes with equal slots holds both roles if there are at least n ranks of each. Launcher rank 0 is a trunk rank.
    """
    world = grid.world_size
    if order == "pool_last" or not grid.dedicated:
        return list(range(world))
    return _number(grid, [(r + 1) * grid.pool_ranks // world > r * grid.pool_ranks // world for r in range(world)])


def provisional_names(grid: Topology, order: Order, world_size: int) -> list[str]:
    """Return how errors name each launcher rank before the rendezvous: by its future job rank, if that is known."""
    if os.environ.get(ROLE) or grid.world_size != world_size:
        return [f"launcher rank {rank}" for rank in range(world_size)]
    return [grid.describe(rank) for rank in ranks_by_order(grid, order)]


def provisional_rank(grid: Topology, order: Order, world_size: int, launcher_rank: int) -> int | None:
    """Return the job rank of a launcher rank, if it is known before the rendezvous."""
    if os.environ.get(ROLE) or grid.world_size != world_size:
        return None
    return ranks_by_order(grid, order)[launcher_rank]


def assign_ranks(grid: Topology, order: Order, roles: Sequence[str]) -> list[int]:
    """Return the job rank of each launcher rank.

    Args:
        roles: `UNIPOOL_ROLE` of each launcher rank, "" where it is not set.

    Raises:
        SharedUserError: Only some ranks have a role, or the roles do not fit the recipe.
    """
    if not any(roles):
        return ranks_by_order(grid, order)
    if grid.every_rank:
        raise SharedUserError(
            f"{ROLE} is set on launcher rank {spans(r for r, role in enumerate(roles) if role)}, but with "
            "parallel.layout = every_rank each rank has both roles: do not set it"
        )
    if without := [r for r, role in enumerate(roles) if not role]:
        raise SharedUserError(
            f"{ROLE} is set on {len(roles) - len(without)} of {len(roles)} ranks, but not on launcher rank "
            f"{spans(without)}: set it on all ranks or on none"
        )
    for rank, role in enumerate(roles):
        if role not in ("trunk", "pool"):
            raise SharedUserError(f"{ROLE} = {role!r} on launcher rank {rank}: must be trunk or pool")
    counts = roles.count("trunk"), roles.count("pool")
    if counts != (grid.trunk_ranks, grid.pool_ranks):
        raise SharedUserError(
            f"{ROLE} names {counts[0]} trunk and {counts[1]} pool ranks, but parallel.trunk_ranks and "
            f"parallel.pool_ranks are {grid.trunk_ranks} and {grid.pool_ranks}: make them equal"
        )
    return _number(grid, [role == "pool" for role in roles])


def number_of_ranks(grid: Topology) -> str:
    """Say which recipe keys ask for how many ranks: "parallel.trunk_ranks + parallel.pool_ranks = 4 + 4 = 8"."""
    if grid.every_rank:
        return f"parallel.trunk_ranks = {grid.trunk_ranks}"
    total = f"{grid.trunk_ranks} + {grid.pool_ranks} = {grid.world_size}"
    return f"parallel.trunk_ranks + parallel.pool_ranks = {total}"


def _number(grid: Topology, is_pool: Sequence[bool]) -> list[int]:
    trunk, pool = count(), count(grid.trunk_ranks)
    return [next(pool if in_pool else trunk) for in_pool in is_pool]


def payload_device(grid: Topology, devices: Sequence[str], wire: Literal["auto", "gloo"], shared: bool) -> str:
    """Return the device type from which the wire sends payloads: "cuda" only if NCCL can join all ranks.

    Args:
        devices: Device type of each job rank.
        shared: Whether ranks share a GPU.

    Raises:
        SharedUserError: Ranks that average gradients with each other (all trunk ranks, or the replicas of a shard) have
            different device types.
    """
    first: dict[str, int] = {}
    for rank, device in enumerate(devices):
        other = first.setdefault(grid.role_world(rank)[0], rank)
        if device != devices[other]:
            which = "all ranks" if grid.every_rank else "all trunk ranks, and all pool ranks of a shard,"
            raise SharedUserError(
                f"{grid.describe(other)} uses {devices[other]}, but {grid.describe(rank)} uses {device}: {which} need "
                "the same device type (parallel.device=cpu, or DS_ACCELERATOR=cpu in a rank's environment, chooses the "
                "CPU)"
            )
    return "cuda" if wire == "auto" and set(devices) == {"cuda"} and not shared else "cpu"


def roster(grid: Topology, hosts: Sequence[str], devices: Sequence[str]) -> str:
    """Return one line that says which ranks run where: "a: trunk 0-1, pool 0-1; b: trunk 2-3, pool 2-3".

    Where every rank has both roles it is "a: rank 0-1; b: rank 2-3".

    Args:
        hosts, devices: Host name and device type of each job rank; the types are shown if they differ.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for rank, (host, device) in enumerate(zip(hosts, devices, strict=True)):
        role, number = ("trunk", rank) if grid.is_trunk(rank) else ("pool", rank - grid.trunk_ranks)
        role = "rank" if grid.every_rank else role
        suffix = f" on {device}" if len(set(devices)) > 1 else ""
        found.setdefault(host, {}).setdefault(f"{role} {{}}{suffix}", []).append(number)
    return "; ".join(
        f"{host}: " + ", ".join(text.format(spans(numbers)) for text, numbers in roles.items())
        for host, roles in found.items()
    )
