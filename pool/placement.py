"""Where each expert lives: an order of all experts, cut into equal shards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Experts in shard-major order.

    Attributes:
        order: global expert ids; shard s owns `order[s * e : (s + 1) * e]` with e = M / shards.
        shards: number of shards; divides M.
    """

    order: tuple[int, ...]
    shards: int

    @property
    def num_experts(self) -> int:
        return len(self.order)

    @property
    def num_local_experts(self) -> int:
        return len(self.order) // self.shards

    def experts_of(self, shard: int) -> tuple[int, ...]:
        """Global ids of the experts of `shard`, in the order of its stacked weights."""
        e = self.num_local_experts
        return self.order[shard * e : (shard + 1) * e]

    @cached_property
    def position_M(self) -> Tensor:
        """position_M[i]: index of global expert i in shard-major order (int64)."""
        position_M = torch.empty(len(self.order), dtype=torch.int64)
        position_M[torch.tensor(self.order)] = torch.arange(len(self.order))
        return position_M


def contiguous(num_experts: int, groups: int, shards: int) -> Placement:
    """Each shard owns a contiguous part of every sub-pool, as far as the numbers divide.

    With one group shard s owns experts [s * M / shards, (s + 1) * M / shards). With more groups the sub-pools are cut
    across the shards rather than handed to one each, so that a layer's tokens never all meet in one shard.
    """
    per_group = num_experts // groups
    order = tuple(g * per_group + i for i in range(per_group) for g in range(groups))
    return Placement(order, shards)
