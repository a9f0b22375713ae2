"""Placements: every expert lives in one shard, sub-pools are cut across the shards, and recorded load is spread."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from torch import Tensor

from pool.placement import (
    MOST_MOMENTS,
    Imbalance,
    Placement,
    balanced,
    contiguous,
    imbalance,
    in_flight,
    moments,
    more_even,
    recommend_shards,
)
from pool.schedule import Kind, RequestKey, lockstep_schedule
from pool.topology import Topology

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


def skewed(layers: int, experts: int, seed: int, skew: float = 1.5, rows: int = 1000) -> Tensor:
    """Load of a layer whose experts are preferred log-normally, about `rows` a layer, (L, M)."""
    generator = torch.Generator().manual_seed(seed)
    preferred_LM = (skew * torch.randn(layers, experts, generator=generator, dtype=torch.float64)).softmax(-1)
    return (rows * preferred_LM).round().long()


def grouped(layers: int, groups: int, per_group: int, seed: int) -> Tensor:
    """Load that is zero outside a layer's group, (L, groups x per_group)."""
    load_LM = torch.zeros(layers, groups * per_group, dtype=torch.int64)
    for layer, load in enumerate(skewed(layers, per_group, seed)):
        group = layer * groups // layers
        load_LM[layer, group * per_group : (group + 1) * per_group] = load
    return load_LM


def partitions(experts: tuple[int, ...], e: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut experts into unordered shards of e, as orders."""
    if not experts:
        yield ()
        return
    first, rest = experts[0], experts[1:]
    for others in combinations(rest, e - 1):
        left = tuple(i for i in rest if i not in others)
        for order in partitions(left, e):
            yield (first, *others, *order)


def by_hand(load_LM: Tensor, placement: Placement) -> Imbalance:
    """`imbalance` by loops."""
    shards = [placement.experts_of(s) for s in range(placement.shards)]
    rows = [[sum(int(row[i]) for i in shard) for shard in shards] for row in load_LM]
    totals = [sum(column) for column in zip(*rows, strict=True)]
    mean = sum(totals) / len(totals)
    return Imbalance(sum(max(row) for row in rows) / mean, max(totals) / mean)


def objective(load_LM: Tensor, placement: Placement) -> float:
    spread = by_hand(load_LM, placement)
    return spread.lockstep + spread.mixed


def test_imbalance_by_hand() -> None:
    """Layer 0 is all on shard 0, layer 1 is 1 : 3; the totals are 5 : 3."""
    load_LM = torch.tensor([[3, 1, 0, 0], [0, 1, 1, 2]])
    assert imbalance(load_LM, Placement((0, 1, 2, 3), 2)) == Imbalance((4 + 3) / 4, 5 / 4)
    assert imbalance(load_LM, Placement((0, 2, 3, 1), 2)) == Imbalance((3 + 3) / 4, 4 / 4)


def test_imbalance_is_that_of_the_loop() -> None:
    load_LM = skewed(5, 12, seed=0)
    placement = Placement(tuple(torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()), 3)
    ours, reference = imbalance(load_LM, placement), by_hand(load_LM, placement)
    assert (ours.lockstep, ours.mixed) == pytest.approx((reference.lockstep, reference.mixed), rel=1e-12)


def test_no_load_is_even() -> None:
    assert imbalance(torch.zeros(2, 4, dtype=torch.int64), contiguous(4, 1, 2)) == Imbalance(1.0, 1.0)


@pytest.mark.parametrize(
    "layers, experts, shards", [(1, 8, 4), (3, 6, 2), (3, 6, 3), (4, 8, 2), (4, 8, 4), (6, 8, 4), (3, 9, 3)]
)
def test_balanced_is_near_the_optimum(layers: int, experts: int, shards: int) -> None:
    """Of every load within 5 % of the best of all placements, on average within 0.5 %, and never under contiguous."""
    losses = []
    for seed in range(15):
        load_LM = skewed(layers, experts, seed)
        found = objective(load_LM, balanced(load_LM, shards))
        orders = partitions(tuple(range(experts)), experts // shards)
        losses.append(found / min(objective(load_LM, Placement(order, shards)) for order in orders) - 1)
        assert found <= objective(load_LM, contiguous(experts, 1, shards))
    assert max(losses) < 0.05
    assert sum(losses) / len(losses) < 0.005


def test_no_swap_improves_what_balanced_has_found() -> None:
    for seed in range(20):
        load_LM = torch.randint(0, 10, (3, 8), generator=torch.Generator().manual_seed(seed))
        order = balanced(load_LM, 4).order
        found = objective(load_LM, Placement(order, 4))
        for i, j in combinations(range(8), 2):
            swapped = list(order)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            assert objective(load_LM, Placement(tuple(swapped), 4)) >= found - 1e-9


def test_the_greedy_start_regards_every_layer() -> None:
    """Swaps alone, from contiguous shards or from shards of an even total, do not lead here."""
    load_LM = torch.tensor([[0, 7, 5, 0, 3, 2], [6, 0, 4, 8, 8, 6]])
    best = min(objective(load_LM, Placement(order, 3)) for order in partitions(tuple(range(6)), 2))
    assert objective(load_LM, balanced(load_LM, 3)) == best


def test_balanced_separates_what_a_layer_prefers() -> None:
    """Each layer sends all to two neighbours: contiguous shards work one at a time, apart they always work together."""
    load_LM = torch.zeros(4, 8, dtype=torch.int64)
    for layer in range(4):
        load_LM[layer, 2 * layer : 2 * layer + 2] = 10
    assert imbalance(load_LM, contiguous(8, 1, 2)) == Imbalance(2.0, 1.0)
    assert imbalance(load_LM, balanced(load_LM, 2)) == Imbalance(1.0, 1.0)


def test_balanced_evens_the_total() -> None:
    """One layer, loads 8 7 6 5 4 3 2 1: the only even halves are of 18."""
    load_LM = torch.tensor([[8, 7, 6, 5, 4, 3, 2, 1]])
    assert imbalance(load_LM, contiguous(8, 1, 2)).mixed == 26 / 18
    assert imbalance(load_LM, balanced(load_LM, 2)) == Imbalance(1.0, 1.0)


def test_a_move_must_be_worth_it() -> None:
    """From contiguous it is; from where it leads it is not, even if other text changes the load a little."""
    load_LM = skewed(6, 24, seed=3)
    moved = more_even(load_LM, contiguous(24, 1, 4))
    assert moved == balanced(load_LM, 4) != contiguous(24, 1, 4)
    noise_LM = torch.randint(0, 3, load_LM.shape, generator=torch.Generator().manual_seed(0))
    later_LM = load_LM + noise_LM
    assert balanced(later_LM, 4) != moved, "the noise is too small to test anything"
    assert more_even(load_LM, moved) is moved and more_even(later_LM, moved) is moved
    other = more_even(load_LM.flip(1), moved)
    assert objective(load_LM.flip(1), other) < 0.98 * objective(load_LM.flip(1), moved)


def key(trunk_rank: int, lane: int, layer: int) -> RequestKey:
    return RequestKey(trunk_rank, lane, 0, layer, Kind.FORWARD)


def test_moments_by_hand() -> None:
    """Two trunk ranks with two lanes at two replicas: each replica has two requests in flight."""
    slots = [
        (key(0, 0, 0), key(1, 0, 0)),
        (key(0, 1, 0),),
        (),
        (key(0, 0, 1), key(1, 1, 2)),
        (key(0, 1, 1), key(1, 0, 1)),
    ]
    # Replica 0 has 0 0, 0 1, 1 1 in flight, replica 1 has 0 2, 2 1.
    assert moments(slots, Topology(2, 2, 1), 3).tolist() == [[0, 1, 1], [0, 2, 0], [1, 0, 1], [1, 1, 0], [2, 0, 0]]


def test_moments_of_lock_step_are_the_layers() -> None:
    """Forward and backward of four trunk ranks: each layer is in flight eight times."""
    slots = lockstep_schedule(4, 1, 3).slots
    assert moments(slots, Topology(4, 2, 2), 3).tolist() == [[0, 0, 8], [0, 8, 0], [8, 0, 0]]


def test_moments_of_a_long_schedule_are_sampled() -> None:
    layers = torch.arange(20_000) * 7919 % 50
    slots = [(key(0, lane, layer),) for lane, layer in zip([0, 1] * 10_000, layers.tolist(), strict=True)]
    moments_WL = moments(slots, Topology(1, 1, 1), 50)
    assert moments_WL.sum() == 2 * MOST_MOMENTS
    assert len(moments_WL) <= MOST_MOMENTS and (moments_WL.sum(0) > 0).all()


def test_balanced_for_what_is_in_flight() -> None:
    """Layers 0 and 1 prefer expert 0 or 1, and layers 2 and 3 the others; who is in flight together decides."""
    load_LM = torch.tensor([[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]])
    for together in ((0, 1), (0, 2), (0, 3)):
        moments_WL = torch.zeros(2, 4, dtype=torch.int64)
        moments_WL[0, list(together)] = 1
        moments_WL[1] = 1 - moments_WL[0]
        placement = balanced(load_LM, 2, moments_WL=moments_WL)
        assert in_flight(load_LM, placement, moments_WL) == 1.0
        assert in_flight(load_LM, Placement((*together, *({0, 1, 2, 3} - {*together})), 2), moments_WL) == 2.0


def test_in_flight_is_that_of_the_loop() -> None:
    load_LM = skewed(4, 12, seed=5)
    moments_WL = torch.randint(0, 3, (7, 4), generator=torch.Generator().manual_seed(0))
    placement = Placement(tuple(torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()), 3)
    largest = total = 0
    for moment in moments_WL.tolist():
        rows = [
            sum(requests * int(load_LM[layer, i]) for layer, requests in enumerate(moment) for i in experts)
            for experts in map(placement.experts_of, range(3))
        ]
        largest, total = largest + max(rows), total + sum(rows)
    assert in_flight(load_LM, placement, moments_WL) == pytest.approx(largest / (total / 3), rel=1e-12)
    spread = imbalance(load_LM, placement)
    assert in_flight(load_LM, placement) == pytest.approx((spread.lockstep + spread.mixed) / 2, rel=1e-12)


@pytest.mark.parametrize(("more", "moves"), [(1, False), (10, True)])
def test_a_small_gain_is_not_worth_a_move(more: int, moves: bool) -> None:
    """Evenly spread, the busiest shard would save half a percent of its work, or 4.5 %."""
    load_LM, placement = torch.tensor([[100 + more, 100 + more, 100, 100]]), contiguous(4, 1, 2)
    assert balanced(load_LM, 2) != placement
    assert (more_even(load_LM, placement) != placement) == moves


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 6, 12])
def test_balanced_is_a_placement(shards: int) -> None:
    """All experts once, in ascending order within a shard; the same for the same load."""
    load_LM = skewed(5, 12, seed=7)
    placement = balanced(load_LM, shards)
    assert placement.shards == shards
    assert sorted(placement.order) == list(range(12))
    assert all(list(placement.experts_of(s)) == sorted(placement.experts_of(s)) for s in range(shards))
    assert placement == balanced(load_LM.clone(), shards)
    assert placement == balanced(3 * load_LM, shards)  # the unit of the load plays no part


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("shards", [2, 4])
def test_balanced_is_never_under_contiguous_with_groups(groups: int, shards: int) -> None:
    better = 0
    for seed in range(10):
        load_LM = grouped(6, groups, 4, seed)
        before = objective(load_LM, contiguous(4 * groups, groups, shards))
        after = objective(load_LM, balanced(load_LM, shards, groups))
        assert after <= before
        better += after < before
    assert better >= 5


def test_balanced_with_nothing_to_gain_is_contiguous() -> None:
    for load_LM in (torch.zeros(3, 12, dtype=torch.int64), torch.ones(3, 12, dtype=torch.int64)):
        for shards in (1, 2, 12):
            assert balanced(load_LM, shards, groups=3) == contiguous(12, 3, shards)


def test_balanced_at_the_largest_recipe() -> None:
    load_LM = skewed(48, 384, seed=0, rows=100_000)
    placement = balanced(load_LM, 16)
    assert imbalance(load_LM, placement).lockstep < 0.85 * imbalance(load_LM, contiguous(384, 1, 16)).lockstep


def test_fewer_shards_are_more_even() -> None:
    load_LM = skewed(6, 24, seed=2)
    splits = recommend_shards(load_LM, 16)
    assert [(split.shards, split.replicas) for split in splits] == [(1, 16), (2, 8), (4, 4), (8, 2)]  # 16 not in 24
    assert splits[0].imbalance == Imbalance(1.0, 1.0)
    assert splits[2].imbalance == imbalance(load_LM, balanced(load_LM, 4))
    lockstep = [split.imbalance.lockstep for split in splits]
    assert lockstep == sorted(lockstep)


@pytest.mark.parametrize(
    "load_LM, shards, groups, message",
    [
        (torch.ones(8, dtype=torch.int64), 2, 1, r"load_LM has shape \(8,\): it must be \(layers, experts\)"),
        (torch.ones(2, 0, dtype=torch.int64), 1, 1, r"load_LM has shape \(2, 0\)"),
        (torch.ones(2, 8), 2, 1, "must hold counts"),
        (-torch.ones(2, 8, dtype=torch.int64), 2, 1, "must hold counts"),
        (torch.ones(2, 8, dtype=torch.int64), 3, 1, r"shards = 3: must be at least 1 and divide .* \(8\)"),
        (torch.ones(2, 8, dtype=torch.int64), 0, 1, "shards = 0"),
        (torch.ones(2, 8, dtype=torch.int64), 2, 3, "groups = 3"),
    ],
)
def test_wrong_loads(load_LM: Tensor, shards: int, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced(load_LM, shards, groups)


def test_load_of_another_pool() -> None:
    with pytest.raises(ValueError, match="load_LM has 8 experts, but the placement has 6"):
        imbalance(torch.ones(2, 8, dtype=torch.int64), contiguous(6, 1, 2))
