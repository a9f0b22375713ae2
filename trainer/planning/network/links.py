"""What the links of ranks carry: the rows of requests, within a node and to other nodes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pool.topology import Topology
from trainer.cluster.rank_assignment import Order, ranks_by_order
from trainer.config.recipe import Recipe

Role = Literal["trunk", "pool", ""]
"""The role of a rank; "" where every rank has both."""


@dataclass(frozen=True)
class Links:
    """A rank's two links, which carry data at the same time.

    Attributes:
        node: Ranks of a node, which the launcher numbers node by node; 0 if all ranks are on one node.
        within, between: Bytes/s to ranks of its own node, and to those of other nodes, each way.
    """

    node: int
    within: float
    between: float


@dataclass(frozen=True)
class LinkUse:
    """The link that limits, of the ranks that use it most.

    Attributes:
        requests: Requests whose rows such a rank sends over the link, and receives, when every trunk rank makes one.
        bandwidth: Bytes/s, each way.
        across: Whether it leads to other nodes.
    """

    role: Role
    requests: float
    bandwidth: float
    across: bool


@lru_cache(maxsize=4096)
def nodes_of(grid: Topology, order: Order, node: int) -> NDArray[np.int64]:
    """Return the number of the node of each rank of the job."""
    node_R = np.empty(grid.world_size, dtype=np.int64)
    node_R[ranks_by_order(grid, order)] = np.arange(grid.world_size) // (node or grid.world_size)
    return node_R


def busiest_link(recipe: Recipe, links: Links) -> LinkUse | None:
    """Find the link that needs longest when every trunk rank makes a request; None if no tokens travel.

    A rank with both roles sends as many answers later. They are not counted.
    """
    if recipe.grid.colocated:
        return None
    nodes_R = nodes_of(recipe.grid, recipe.topology.order, links.node)
    uses = [
        LinkUse(role, requests, links.between if across else links.within, across)
        for across in (False, True)
        for role, requests in _requests(recipe.grid, nodes_R.tobytes(), across).items()
        if requests
    ]
    return max(uses, key=lambda use: use.requests / use.bandwidth, default=None)


@lru_cache(maxsize=4096)
def _requests(grid: Topology, nodes: bytes, across: bool) -> dict[Role, float]:
    """Most requests that a rank of each role exchanges with other ranks of its node, or with those of other nodes."""
    node_R = np.frombuffer(nodes, dtype=np.int64)
    trunk_T, shard_S = np.arange(grid.trunk_ranks), np.arange(grid.expert_parallel)
    replica_T = np.array([grid.replica_for(t) for t in range(grid.trunk_ranks)])
    server_TS = grid.first_pool_rank + replica_T[:, None] * grid.expert_parallel + shard_S
    across_TS = node_R[server_TS] != node_R[trunk_T, None]
    counted_TS = across_TS if across else ~across_TS & (server_TS != trunk_T[:, None])
    trunk = float(counted_TS.sum(axis=1).max()) / grid.expert_parallel
    if grid.every_rank:
        return {"": trunk}
    served_RS = np.zeros((grid.replicas, grid.expert_parallel))
    np.add.at(served_RS, replica_T, counted_TS)
    return {"pool": float(served_RS.max()) / grid.expert_parallel, "trunk": trunk}
