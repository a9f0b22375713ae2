"""Schedules of the layout in which every rank has both roles can be followed, and hide the wire."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from pool.schedule import SERVE, Kind, PoolSchedule, RequestKey, generation_schedule, lockstep_schedule
from pool.schedule_builder import Costs, build_evaluation_schedule, build_training_schedule
from pool.topology import Topology

COSTS = Costs(trunk_layer=3.0, head=7.0, pool_layer=4.0, slot=0.5, transfer=0.3)
GPU = Costs(3.0, 7.0, 0.5, 0.1, 2.0, 1.5, weights=1.0, trunk_launch=2.0, head_launch=1.0, slot_launch=0.7)
NO_WIRE = Costs(trunk_layer=1.0, head=0.0, pool_layer=1.0, slot=0.0, transfer=0.0)
GRIDS = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (6, 3), (4, 4), (8, 8)]  # ranks, shards
LANES = [(1, False), (1, True), (2, False), (2, True), (3, True), (7, False)]


def every_rank(ranks: int, shards: int) -> Topology:
    return Topology(ranks, ranks, shards, every_rank=True)


def program(layers: int, training: bool) -> list[tuple[Kind, int]]:
    """The requests of a micro-batch."""
    if not training:
        return [(Kind.FORWARD_ONLY, layer) for layer in range(layers)]
    return [(Kind.FORWARD, layer) for layer in range(layers)] + [
        (Kind.BACKWARD, layer) for layer in range(layers)[::-1]
    ]


class Rank:
    """A rank that follows its lane order; it waits for its requests' answers, and to serve a slot for all of it."""

    def __init__(self, number: int, topology: Topology, schedule: PoolSchedule, requests: list[tuple[Kind, int]]):
        self.number, self.requests = number, requests
        self.group = topology.served_trunk_ranks(number)
        self.order = list(schedule.lane_order[number])
        mine = ([k for k in slot if k.trunk_rank in self.group] for slot in schedule.slots)
        self.slots = [keys for keys in mine if keys]
        self.lanes: dict[int, tuple[int, int]] = {}  # lane -> (micro-batch, requests made)
        self.fresh = itertools.count()
        self.made: list[RequestKey] = []

    def step(self, sent: set[RequestKey], served: Counter[RequestKey]) -> bool:
        """Do the next thing, if it needs nothing that has not happened yet."""
        if not self.order:
            return False
        if self.order[0] == SERVE:
            if not set(self.slots[0]) <= sent:
                return False
            served.update(self.slots.pop(0))
        elif not self._run(self.order[0], sent, served):
            return False
        self.order.pop(0)
        return True

    def _run(self, lane: int, sent: set[RequestKey], served: Counter[RequestKey]) -> bool:
        if lane in self.lanes:
            micro_batch, made = self.lanes[lane]
            if served[RequestKey(self.number, lane, micro_batch, *self._request(made - 1))] < len(self.group):
                return False
        else:
            micro_batch, made = next(self.fresh), 0
        if made == len(self.requests):
            del self.lanes[lane]
            return True
        self.lanes[lane] = (micro_batch, made + 1)
        self.made.append(RequestKey(self.number, lane, micro_batch, *self._request(made)))
        sent.add(self.made[-1])
        return True

    def _request(self, number: int) -> tuple[int, Kind]:
        kind, layer = self.requests[number]
        return layer, kind


def follow(schedule: PoolSchedule, topology: Topology, layers: int, micro_batches: int, training: bool) -> None:
    """Let all ranks follow a schedule without a clock; fail if one waits forever, or anything is served twice."""
    requests = program(layers, training)
    ranks = [Rank(number, topology, schedule, requests) for number in range(topology.world_size)]
    sent: set[RequestKey] = set()
    served: Counter[RequestKey] = Counter()
    while any(rank.step(sent, served) for rank in ranks):
        pass
    for rank in ranks:
        assert not rank.order, f"rank {rank.number} waits forever"
        assert not rank.slots, f"rank {rank.number} leaves slots"
        assert not rank.lanes, f"rank {rank.number} leaves micro-batches"
        in_slots = [key for slot in schedule.slots for key in slot if key.trunk_rank == rank.number]
        assert in_slots == rank.made, "a rank's requests are served in another order than it makes them"
        assert len(rank.made) == micro_batches * len(requests)
    assert set(served) == sent
    assert set(served.values()) == {topology.expert_parallel}, "each request is served once by each shard"


@pytest.mark.parametrize(("lanes", "stagger"), LANES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("costs", [COSTS, GPU, NO_WIRE], ids=["cpu", "gpu", "no wire"])
def test_a_run_can_follow_the_schedule(grid: tuple[int, int], lanes: int, stagger: bool, costs: Costs) -> None:
    topology = every_rank(*grid)
    for layers, micro_batches in ((1, 1), (3, 4), (2, 5)):
        training = build_training_schedule(topology, layers, micro_batches, lanes, stagger, costs)
        follow(training, topology, layers, micro_batches, True)
        evaluation = build_evaluation_schedule(topology, layers, micro_batches, lanes, costs)
        follow(evaluation, topology, layers, micro_batches, False)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_run_can_follow_lock_step_and_a_generation(grid: tuple[int, int]) -> None:
    topology = every_rank(*grid)
    ranks = topology.trunk_ranks
    follow(lockstep_schedule(ranks, 2, 3, every_rank=True), topology, 3, 2, True)
    token = generation_schedule(ranks, 4, 3, every_rank=True)
    generation = PoolSchedule(token.slots, tuple(4 * order for order in token.lane_order))
    follow(generation, topology, 3, 4, False)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (4, 2)])
def test_one_lane_without_stagger_is_lock_step(grid: tuple[int, int]) -> None:
    schedule = build_training_schedule(every_rank(*grid), 3, 2, 1, False, COSTS)
    lockstep = lockstep_schedule(grid[0], 2, 3, every_rank=True)
    assert tuple(slot for slot in schedule.slots if slot) == lockstep.slots
    assert schedule.lane_order == lockstep.lane_order == ((*(0, SERVE) * 6, 0) * 2,) * grid[0]


def test_another_lane_hides_the_wire() -> None:
    """Of two lanes, one is computed or served while the other one's messages travel."""
    schedule = build_training_schedule(every_rank(2, 2), 2, 2, 2, False, COSTS)
    assert [[(k.trunk_rank, k.lane) for k in slot] for slot in schedule.slots if slot] == [
        [(0, n % 2), (1, n % 2)] for n in range(8)
    ]
    assert schedule.lane_order == ((0, 1, *(SERVE, SERVE, 0, 1) * 4),) * 2


def test_lanes_share_a_slot_when_they_wait_together() -> None:
    """The last lane's requests arrive while the others' are served; without a wire, all are served at once."""
    schedule = build_training_schedule(every_rank(2, 2), 2, 3, 3, False, COSTS)
    assert [[k.lane for k in slot] for slot in schedule.slots[:2]] == [[0, 0, 1, 1], [2, 2]]
    schedule = build_training_schedule(every_rank(2, 2), 2, 3, 3, False, NO_WIRE)
    assert [[k.lane for k in slot] for slot in schedule.slots[:2]] == [[0, 0, 1, 1, 2, 2]] * 2


@pytest.mark.parametrize("lanes", [1, 3])
def test_all_ranks_do_the_same(lanes: int) -> None:
    """Whatever the stagger, all ranks have one program, and a slot holds the same requests of each."""
    schedule = build_training_schedule(every_rank(6, 3), 2, 3, lanes, True, COSTS)
    assert schedule == build_training_schedule(every_rank(6, 3), 2, 3, lanes, False, COSTS)
    assert len(set(schedule.lane_order)) == 1
    for slot in schedule.slots:
        requests = {(k.lane, k.micro_batch, k.layer, k.kind) for k in slot}
        assert set(slot) == {RequestKey(rank, *request) for rank in range(6) for request in requests}


def test_weight_gradients_are_sealed_twice_per_micro_batch() -> None:
    schedule = build_training_schedule(every_rank(2, 2), 4, 3, 2, False, COSTS)
    assert [len(slot) for slot in schedule.slots].count(0) == 2 * 3
    assert all(before or after for before, after in itertools.pairwise(schedule.slots)), "a seal right after a seal"


def test_the_schedule_is_the_same_every_time() -> None:
    first, second = (build_training_schedule(every_rank(6, 3), 5, 4, 3, True, COSTS) for _ in range(2))
    assert first == second
