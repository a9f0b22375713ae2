"""Which rank does what: one small frozen grid, which does not import torch.

World ranks are numbered with the trunk ranks first. There are three layouts:

- Dedicated: pool ranks follow the trunk ranks. Pool rank p holds shard p mod EP as its replica p div EP; trunk rank t
  talks to replica t mod R of every shard.
- Every rank: each rank is a trunk rank and a pool rank. Rank r holds shard r mod EP as its replica r div EP; the EP
  ranks of a replica talk to each other only.
- Colocated: there are no pool ranks; every trunk rank holds the whole pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Topology:
    """The grid of a job.

    Attributes:
        trunk_ranks: Number of data-parallel ranks that hold embeddings, attention, routers and head (T).
        pool_ranks: Number of ranks that hold a shard of the pool (P): 0 is the colocated layout, and with `every_rank`
            it equals `trunk_ranks`.
        expert_parallel: Number of shards of the pool (EP); divides `pool_ranks`.
        every_rank: Whether the ranks of both roles are the same.
    """

    trunk_ranks: int
    pool_ranks: int
    expert_parallel: int
    every_rank: bool = False

    @property
    def colocated(self) -> bool:
        return self.pool_ranks == 0

    @property
    def dedicated(self) -> bool:
        return self.pool_ranks > 0 and not self.every_rank

    @property
    def layout(self) -> Literal["dedicated", "colocated", "every_rank"]:
        return "colocated" if self.colocated else "every_rank" if self.every_rank else "dedicated"

    @property
    def world_size(self) -> int:
        return self.trunk_ranks + (0 if self.every_rank else self.pool_ranks)

    @property
    def replicas(self) -> int:
        """Number of copies of each shard (R); in the colocated layout every trunk rank holds one."""
        return self.trunk_ranks if self.colocated else self.pool_ranks // self.expert_parallel

    @property
    def first_pool_rank(self) -> int:
        """World rank of the first rank that holds a shard; the others follow it."""
        return 0 if self.every_rank else self.trunk_ranks

    def is_trunk(self, rank: int) -> bool:
        return rank < self.trunk_ranks

    def is_pool(self, rank: int) -> bool:
        """Whether `rank` (a world rank) serves a shard of the pool to trunk ranks."""
        return not self.colocated and rank >= self.first_pool_rank

    def shard(self, rank: int) -> int:
        """Return the shard that pool rank `rank` (a world rank) holds."""
        return (rank - self.first_pool_rank) % self.expert_parallel

    def replica(self, rank: int) -> int:
        """Return which copy of its shard pool rank `rank` (a world rank) holds."""
        return (rank - self.first_pool_rank) // self.expert_parallel

    def replica_for(self, trunk_rank: int) -> int:
        """Return which copy of every shard serves `trunk_rank`."""
        return trunk_rank // self.expert_parallel if self.every_rank else trunk_rank % self.replicas

    def pool_rank(self, shard: int, trunk_rank: int) -> int:
        """Return the world rank of the pool rank that serves `shard` to `trunk_rank`."""
        return self.first_pool_rank + self.replica_for(trunk_rank) * self.expert_parallel + shard

    def served_trunk_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the trunk ranks whose tokens pool rank `rank` (a world rank) serves, in order."""
        return tuple(t for t in range(self.trunk_ranks) if self.replica_for(t) == self.replica(rank))

    def role_world(self, rank: int) -> tuple[str, int, int]:
        """Return (name, rank, size) of the role's group: all trunk ranks, or all replicas of one shard.

        Where every rank has both roles, this is the group of the trunk.
        """
        if self.is_trunk(rank):
            return "trunk", rank, self.trunk_ranks
        return f"pool{self.shard(rank)}", self.replica(rank), self.replicas

    def describe(self, rank: int) -> str:
        """Return how errors and logs name a rank."""
        if self.every_rank:
            return f"rank {rank} (trunk {rank}, shard {self.shard(rank)})"
        if self.is_trunk(rank):
            return f"rank {rank} (trunk {rank})"
        pool = rank - self.trunk_ranks
        return f"rank {rank} (pool {pool}, shard {self.shard(rank)})"
