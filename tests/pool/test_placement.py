"""Placements: every expert lives in one shard, and sub-pools are cut across the shards."""

from __future__ import annotations

import pytest

from pool.placement import Placement, contiguous

GRIDS = [
    (experts, groups, shards)
    for experts in (1, 6, 12, 20)
    for groups in range(1, experts + 1)
    for shards in range(1, experts + 1)
    if experts % groups == 0 and experts % shards == 0
]


@pytest.mark.parametrize("experts, groups, shards", GRIDS)
def test_every_expert_lives_in_one_shard(experts: int, groups: int, shards: int) -> None:
    placement = contiguous(experts, groups, shards)
    owned = [i for shard in range(shards) for i in placement.experts_of(shard)]
    assert sorted(owned) == list(range(experts))
    assert {len(placement.experts_of(shard)) for shard in range(shards)} == {placement.num_local_experts}
    assert (placement.num_experts, placement.num_local_experts) == (experts, experts // shards)
    assert [placement.position_M[i].item() for i in owned] == list(range(experts))


@pytest.mark.parametrize("experts, groups, shards", GRIDS)
def test_a_sub_pool_spreads_over_the_shards(experts: int, groups: int, shards: int) -> None:
    """Shards own as many experts of a sub-pool as each other, or one more or less; and these are neighbours."""
    placement = contiguous(experts, groups, shards)
    per_group = experts // groups
    for group in range(groups):
        members = range(group * per_group, (group + 1) * per_group)
        parts = [[i for i in placement.experts_of(shard) if i in members] for shard in range(shards)]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert [i for part in parts for i in part] == list(members)


def test_one_group_is_cut_into_slices() -> None:
    placement = contiguous(12, 1, 3)
    assert [placement.experts_of(s) for s in range(3)] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]


def test_two_groups_by_hand() -> None:
    placement = contiguous(8, 2, 2)
    assert [placement.experts_of(s) for s in range(2)] == [(0, 4, 1, 5), (2, 6, 3, 7)]


def test_position_of_any_order() -> None:
    """position_M inverts an order that is not its own inverse."""
    placement = Placement((2, 0, 3, 1), 2)
    assert placement.position_M.tolist() == [1, 3, 0, 2]
    assert placement.experts_of(1) == (3, 1)
