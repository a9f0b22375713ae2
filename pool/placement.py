"""Placement: which shard holds each expert, as an order of all experts that is cut into equal shards.

`contiguous` needs no measurements. `balanced` uses a recorded load, the rows that each of L layers sent to each of M
experts, and what a schedule has in flight together.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pool.schedule import Slot
from pool.topology import Topology

MOST_MOMENTS = 256
"""Moments of a schedule that `moments` keeps: `balanced` takes time in proportion."""

WORTH_A_MOVE = 0.02
"""Part of the work at the busiest shard that a move must save; less changes by the text of the last steps alone."""


@dataclass(frozen=True)
class Placement:
    """Experts in shard-major order.

    Attributes:
        order: Global expert ids; shard s owns `order[s * e : (s + 1) * e]` with e = M / shards.
        shards: Number of shards; divides M.
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
        """Return the global ids of the experts of `shard`, in the order of its stacked weights."""
        e = self.num_local_experts
        return self.order[shard * e : (shard + 1) * e]

    @cached_property
    def position_M(self) -> Tensor:
        """Position of each global expert in shard-major order, (M,) int64."""
        position_M = torch.empty(len(self.order), dtype=torch.int64)
        position_M[torch.tensor(self.order)] = torch.arange(len(self.order))
        return position_M


def contiguous(num_experts: int, groups: int, shards: int) -> Placement:
    """Give each shard a contiguous part of every sub-pool, as far as the numbers divide.

    With one group, shard s owns experts [s * M / shards, (s + 1) * M / shards). With more groups, every sub-pool is
    spread over the shards, so that the tokens of a layer never all go to the same shard.
    """
    per_group = num_experts // groups
    order = tuple(g * per_group + i for i in range(per_group) for g in range(groups))
    return Placement(order, shards)


@dataclass(frozen=True)
class Imbalance:
    """Imbalance of the shards' load, largest over mean: 1 is even, the number of shards is the worst case.

    Attributes:
        lockstep: If the pool serves one layer at a time: the largest loads summed over layers, over the summed means.
        mixed: If the pool serves all layers at once: the largest total over the mean.
    """

    lockstep: float
    mixed: float


def imbalance(load_LM: Tensor, placement: Placement) -> Imbalance:
    """Return how evenly `placement` spreads a load over its shards; no load counts as even.

    Args:
        load_LM: Rows by layer and global expert id, (L, M).

    Raises:
        ValueError: The load has another number of experts than the placement.
    """
    load_RM = _rows(load_LM)
    if load_RM.shape[1] != placement.num_experts:
        raise ValueError(f"load_LM has {load_RM.shape[1]} experts, but the placement has {placement.num_experts}")
    if not load_RM.any():
        return Imbalance(1.0, 1.0)
    largest_R = load_RM[:, _members(placement)].sum(-1).max(-1)
    mean = load_RM[-1].sum() / placement.shards
    return Imbalance(float(largest_R[:-1].sum() / mean), float(largest_R[-1] / mean))


def moments(slots: Iterable[Slot], topology: Topology, layers: int) -> Tensor:
    """Return which layers a schedule has in flight together: requests of each layer, (moments W, L).

    A lane makes its next request when all shards have answered its last one. So a shard can be ahead of another by at
    most one request of every lane that its replica serves: within as many requests, one after the other in the
    schedule, a busy shard can catch up. A moment is such a window, at the end of a slot. Equal ones are one row, which
    is multiplied. Long schedules are sampled.
    """
    slots = list(slots)
    windows: list[tuple[int, ...]] = []
    for replica in range(topology.replicas):
        served = [[key for key in slot if topology.replica_for(key.trunk_rank) == replica] for slot in slots]
        lanes = {(key.trunk_rank, key.lane) for slot in served for key in slot}
        window: deque[int] = deque(maxlen=len(lanes))
        for slot in filter(None, served):
            window.extend(key.layer for key in slot)
            if len(window) == len(lanes):
                windows.append(tuple(window))
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), MOST_MOMENTS)).round().astype(int)
    counts = Counter(tuple(np.bincount(windows[i], minlength=layers).tolist()) for i in chosen)
    return torch.tensor([[times * requests for requests in moment] for moment, times in sorted(counts.items())])


def in_flight(load_LM: Tensor, placement: Placement, moments_WL: Tensor | None = None) -> float:
    """Return the work of the busiest shard over the mean, both summed over moments; see `balanced`."""
    load_RM = _rows(load_LM, moments_WL)
    total = load_RM.sum()
    return float(_objective(load_RM, _members(placement)) * placement.shards / total) if total else 1.0


def balanced(load_LM: Tensor, shards: int, groups: int = 1, moments_WL: Tensor | None = None) -> Placement:
    """Spread the load of every moment evenly over equal shards.

    Swaps of two experts minimise the largest load of any shard, summed over the moments, from two starting points:
    `contiguous`, so that the result is never worse than it, and a greedy placement. The result is a local minimum,
    typically within a few percent of the optimum. The same arguments always give the same placement.

    Args:
        load_LM: Rows by layer and global expert id, (L, M); with groups, a layer's row is zero outside its group.
        shards: Number of shards; divides M.
        groups: Number of sub-pools, for `contiguous`; divides M.
        moments_WL: What is in flight together, from `moments`. Without it: each layer alone, and all layers together,
            so that lockstep + mixed of `Imbalance` is minimised.

    Returns:
        A placement with ascending experts within each shard, or `contiguous` itself if nothing is better.

    Raises:
        ValueError: The load is not (L, M) of counts, or M is not divisible.
    """
    load_RM = _rows(load_LM, moments_WL)
    experts = load_RM.shape[1]
    for name, parts in (("shards", shards), ("groups", groups)):
        if parts < 1 or experts % parts:
            raise ValueError(f"{name} = {parts}: must be at least 1 and divide the number of experts ({experts})")
    start = contiguous(experts, groups, shards)
    if shards in (1, experts) or not load_RM.any():
        return start
    best, lowest = start, _objective(load_RM, _members(start))
    for members_Se in (_members(start), _greedy(load_RM, shards)):
        _swap(load_RM, members_Se)
        objective = _objective(load_RM, members_Se)
        if objective < lowest:
            best, lowest = Placement(tuple(np.sort(members_Se).ravel().tolist()), shards), objective
    return best


def more_even(load_LM: Tensor, placement: Placement, groups: int = 1, moments_WL: Tensor | None = None) -> Placement:
    """Return `balanced` for as many shards if that is worth a move, otherwise `placement` itself."""
    found = balanced(load_LM, placement.shards, groups, moments_WL)
    before, after = (in_flight(load_LM, p, moments_WL) for p in (placement, found))
    return found if after < (1 - WORTH_A_MOVE) * before else placement


@dataclass(frozen=True)
class ShardSplit:
    """Pool ranks as shards x replicas, and the imbalance that `balanced` reaches with that number of shards."""

    shards: int
    replicas: int
    imbalance: Imbalance


def recommend_shards(load_LM: Tensor, pool_ranks: int, groups: int = 1) -> list[ShardSplit]:
    """Return every way to divide the pool among `pool_ranks`, fewest shards first.

    Fewer shards are nearly always more even, because a hot expert is a smaller part of a larger shard, but each rank
    holds more experts. Choose the first split that fits into memory. See `balanced` for the other arguments and errors.
    """
    experts = load_LM.shape[-1]
    return [
        ShardSplit(shards, pool_ranks // shards, imbalance(load_LM, balanced(load_LM, shards, groups)))
        for shards in range(1, pool_ranks + 1)
        if pool_ranks % shards == 0 and experts % shards == 0
    ]


# Rows R are moments, what is minimised is a sum over rows of maxima over shards S. Counts are whole numbers in float64,
# and so are all sums (halves in `_swap`), hence exact, and ties are found as ties.


def _rows(load_LM: Tensor, moments_WL: Tensor | None = None) -> NDArray[np.float64]:
    """Return load_RM: the load of every moment, by default of each layer, and of all layers (L + 1, M)."""
    if load_LM.dim() != 2 or not load_LM.numel():
        raise ValueError(f"load_LM has shape {tuple(load_LM.shape)}: it must be (layers, experts)")
    if load_LM.is_floating_point() or (load_LM < 0).any():
        raise ValueError("load_LM must hold counts: whole numbers from 0 up")
    counts_LM = load_LM.cpu().numpy().astype(np.float64)
    if moments_WL is None:
        return np.vstack((counts_LM, counts_LM.sum(0)))
    return moments_WL.numpy().astype(np.float64) @ counts_LM


def _members(placement: Placement) -> NDArray[np.int64]:
    """Return the expert ids of each shard, (S, e)."""
    return np.array(placement.order).reshape(placement.shards, -1)


def _objective(load_RM: NDArray[np.float64], members_Se: NDArray[np.int64]) -> float:
    return float(load_RM[:, members_Se].sum(-1).max(-1).sum())


def _greedy(load_RM: NDArray[np.float64], shards: int) -> NDArray[np.int64]:
    """Place the heaviest expert first, each on the shard with room whose maxima (then total) it raises least."""
    experts = load_RM.shape[1]
    load_SR = np.zeros((shards, len(load_RM)))
    members: list[list[int]] = [[] for _ in range(shards)]
    for i in np.argsort(-load_RM.sum(0), kind="stable").tolist():
        raised_S = np.maximum(load_SR + load_RM[:, i] - load_SR.max(0), 0).sum(1)
        room = (s for s in range(shards) if len(members[s]) < experts // shards)
        shard = min(room, key=lambda s: (raised_S[s], load_SR[s].sum(), s))
        load_SR[shard] += load_RM[:, i]
        members[shard].append(i)
    return np.array(members)


def _swap(load_RM: NDArray[np.float64], members_Se: NDArray[np.int64]) -> None:
    """Swap experts between shards in place while the best swap of some pair of shards lowers the objective."""
    shards, e = members_Se.shape
    load_RS = load_RM[:, members_Se].sum(-1)
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(shards), 2):
            # The larger of two numbers is their mean plus half their distance, and a swap keeps the mean.
            mean_R = (load_RS[:, a] + load_RS[:, b]) / 2
            half_R = (load_RS[:, a] - load_RS[:, b]) / 2
            others_R = np.delete(load_RS, (a, b), axis=1).max(1, initial=0.0) - mean_R
            from_a_Re, from_b_Re = load_RM[:, members_Se[a]], load_RM[:, members_Se[b]]
            half_Ree = np.abs((from_a_Re - half_R[:, None])[:, :, None] - from_b_Re[:, None, :])
            objective_ee = np.maximum(half_Ree, others_R[:, None, None]).sum(0)
            i, j = divmod(int(objective_ee.argmin()), e)
            if objective_ee[i, j] < np.maximum(np.abs(half_R), others_R).sum():
                moved_R = from_a_Re[:, i] - from_b_Re[:, j]
                load_RS[:, a] -= moved_R
                load_RS[:, b] += moved_R
                members_Se[a, i], members_Se[b, j] = members_Se[b, j], members_Se[a, i]
                improved = True
