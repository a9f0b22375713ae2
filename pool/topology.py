"""Which rank does what: one small frozen grid, which does not import torch.

World ranks are numbered with the trunk ranks first. Pool rank p holds shard p mod EP as its replica p div EP; trunk
rank t talks to replica t mod R of every shard. With `pool_ranks` = 0 the layout is colocated: every trunk rank holds
the whole pool.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The grid of a job.

    Attributes:
        trunk_ranks: Number of data-parallel ranks that hold embeddings, attention, routers and head (T).
        pool_ranks: Number of ranks that hold only experts (P); 0 is the colocated layout.
        expert_parallel: Number of shards of the pool (EP); divides `pool_ranks`.
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
        """Number of copies of each shard (R); in the colocated layout every trunk rank holds one."""
        return self.trunk_ranks if self.colocated else self.pool_ranks // self.expert_parallel

    def is_trunk(self, rank: int) -> bool:
        return rank < self.trunk_ranks

    def shard(self, rank: int) -> int:
        """Return the shard that pool rank `rank` (a world rank) holds."""
        return (rank - self.trunk_ranks) % self.expert_parallel

    def replica(self, rank: int) -> int:
        """Return which copy of its shard pool rank `rank` (a world rank) holds."""
        return (rank - self.trunk_ranks) // self.expert_parallel

    def pool_rank(self, shard: int, trunk_rank: int) -> int:
        """Return the world rank of the pool rank that serves `shard` to `trunk_rank`."""
        return self.trunk_ranks + (trunk_rank % self.replicas) * self.expert_parallel + shard

    def served_trunk_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the trunk ranks whose tokens pool rank `rank` (a world rank) serves, in order."""
        return tuple(t for t in range(self.trunk_ranks) if t % self.replicas == self.replica(rank))

    def role_world(self, rank: int) -> tuple[str, int, int]:
        """Return (name, rank, size) of the role's group: all trunk ranks, or all replicas of one shard."""
        if self.is_trunk(rank):
            return "trunk", rank, self.trunk_ranks
        return f"pool{self.shard(rank)}", self.replica(rank), self.replicas

    def describe(self, rank: int) -> str:
        """Return how errors and logs name a rank."""
        if self.is_trunk(rank):
            return f"rank {rank} (trunk {rank})"
        pool = rank - self.trunk_ranks
        return f"rank {rank} (pool {pool}, shard {self.shard(rank)})"
