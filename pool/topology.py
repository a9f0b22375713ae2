"""Which rank does what: one small frozen grid, without torch in it.

World ranks: trunk ranks first, pool ranks after them. Pool rank p holds shard p mod EP as its replica p div EP; trunk
rank t talks to replica t mod R of every shard. With `pool_ranks` = 0 the layout is colocated: every trunk rank holds
the whole pool.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The grid of a job.

    Attributes:
        trunk_ranks: data-parallel ranks that hold embeddings, attention, routers and head (T).
        pool_ranks: ranks that hold experts and nothing else (P); 0 is the colocated layout.
        expert_parallel: shards of the pool (EP); divides `pool_ranks`.
    """

    trunk_ranks: int
    pool_ranks: int
    expert_parallel: int

    @property
    def colocated(self) -> bool:
        return self.pool_ranks == 0

    @property
    def world_size(self) -> int:
        return self.trunk_ranks + self.pool_ranks

    @property
    def replicas(self) -> int:
        """Copies of each shard (R): the trunk ranks themselves when colocated."""
        return self.trunk_ranks if self.colocated else self.pool_ranks // self.expert_parallel

    def is_trunk(self, rank: int) -> bool:
        return rank < self.trunk_ranks

    def shard(self, rank: int) -> int:
        """Shard that world rank `rank`, a pool rank, holds."""
        return (rank - self.trunk_ranks) % self.expert_parallel

    def replica(self, rank: int) -> int:
        """Which copy of its shard world rank `rank`, a pool rank, holds."""
        return (rank - self.trunk_ranks) // self.expert_parallel

    def pool_rank(self, shard: int, trunk_rank: int) -> int:
        """World rank of the pool rank that serves `shard` to `trunk_rank`."""
        return self.trunk_ranks + (trunk_rank % self.replicas) * self.expert_parallel + shard

    def served_trunk_ranks(self, rank: int) -> tuple[int, ...]:
        """Trunk ranks whose tokens pool rank `rank` (a world rank) serves, in order."""
        return tuple(t for t in range(self.trunk_ranks) if t % self.replicas == self.replica(rank))

    def role_world(self, rank: int) -> tuple[str, int, int]:
        """(name, rank, size) of the role-local world: all trunk ranks, or all replicas of one shard."""
        if self.is_trunk(rank):
            return "trunk", rank, self.trunk_ranks
        return f"pool{self.shard(rank)}", self.replica(rank), self.replicas

    def describe(self, rank: int) -> str:
        """How errors and logs name a rank."""
        if self.is_trunk(rank):
            return f"rank {rank} (trunk {rank})"
        pool = rank - self.trunk_ranks
        return f"rank {rank} (pool {pool}, shard {self.shard(rank)})"
