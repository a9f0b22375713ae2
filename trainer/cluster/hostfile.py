"""DeepSpeed's hostfile: the nodes of a job and this node's place among them, checked before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.cluster.rank_assignment import ROLE, number_of_ranks, ranks_by_order
from trainer.common.errors import UserError
from trainer.common.safe_read import Unreadable, read_text
from trainer.config.recipe import Recipe

DEFAULT_PORT = 29500
"""DeepSpeed's default port for the job's store."""


@dataclass(frozen=True)
class Node:
    """One node of a job.

    Attributes:
        slots: The number of ranks of each node, by host; ranks are numbered in this order.
        rank: This node's line, from 0.
        has_trunk_ranks: Whether any of its ranks are trunk ranks, which need data.
        master_addr: Name or address of node 0. The name need not resolve yet: ranks retry until
            `parallel.start_timeout_seconds` have passed.
    """

    slots: dict[str, int]
    rank: int
    has_trunk_ranks: bool
    master_addr: str
    master_port: int


def find_node(
    recipe: Recipe, hostfile: Path, node_rank: int | None, master_addr: str | None, master_port: int | None
) -> Node:
    """Find this node's place in the job.

    Raises:
        UserError: The hostfile is missing or malformed, the node is not in it, or its slots do not add up to the
            recipe's ranks.
    """
    slots = _read(hostfile)
    if node_rank is None or not 0 <= node_rank < len(slots):
        given = "--node-rank is missing" if node_rank is None else f"--node-rank {node_rank}"
        raise UserError(f"{given}: must be 0 to {len(slots) - 1}, because {hostfile} has {len(slots)} hosts")
    total, grid = sum(slots.values()), recipe.grid
    if total != grid.world_size:
        added = f"{' + '.join(map(str, slots.values()))} = {total}" if len(slots) > 1 else str(total)
        raise UserError(f"--hostfile {hostfile}: the slots are {added}, but {number_of_ranks(grid)}: make them equal")
    first = sum(list(slots.values())[:node_rank])
    mine = ranks_by_order(grid, recipe.topology.order)[first : first + list(slots.values())[node_rank]]
    role = os.environ.get(ROLE)
    has_trunk_ranks = role == "trunk" if role else any(grid.is_trunk(rank) for rank in mine)
    return Node(slots, node_rank, has_trunk_ranks, master_addr or next(iter(slots)), master_port or DEFAULT_PORT)


def _read(path: Path) -> dict[str, int]:
    """Read the slots of each host, in the order of the file."""
    try:
        text = read_text(path)
    except Unreadable as error:
        raise UserError(f"--hostfile {path}: cannot be read ({error})") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, *rest = words
        count = rest[0].removeprefix("slots=") if len(rest) == 1 and rest[0].startswith("slots=") else ""
        if not (count.isascii() and count.isdigit() and 0 < len(count) < 7 and int(count)):
            raise UserError(f"--hostfile {path}, line {number}: {line.strip()!r} must be HOST slots=RANKS")
        if host in slots:
            raise UserError(f"--hostfile {path}, line {number}: {host} is listed twice")
        slots[host] = int(count)
    if not slots:
        raise UserError(f"--hostfile {path}: no host is listed; add lines HOST slots=RANKS")
    return slots
