"""Times of schedules in which every rank has both roles, compared with a reference rank by rank, and by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from pool.schedule import SERVE, Kind, PoolSchedule, RequestKey, Slot, lockstep_schedule
from pool.schedule_builder import Costs, Segment, build_training_schedule, training_segments
from pool.schedule_timing import Work, time_schedule
from pool.topology import Topology
from tests.pool.test_schedule_timing import COSTS, GPU, LANES, SLOW_HOST, skewed

GRIDS = [(1, 1), (2, 1), (2, 2), (6, 3), (4, 4)]  # ranks, shards


def every_rank(ranks: int, shards: int) -> Topology:
    return Topology(ranks, ranks, shards, every_rank=True)


@dataclass
class Rank:
    """One rank's clock, lanes and weight gradients; rows are counted in requests at an even load."""

    order: list[int]
    host: float = 0.0
    device: float = 0.0
    lanes: dict[int, tuple[int, int, float]] = field(default_factory=dict)  # micro-batch, segments run, last one's end
    begun: int = 0
    slot: int = 0
    deferred: list[float] = field(default_factory=list)
    sealed: list[float] = field(default_factory=list)  # seconds of each batch of weight gradients
    worked: dict[str, float] = field(default_factory=lambda: {"trunk": 0.0, "pool": 0.0})

    def work(self, role: str, header: float, payload: float, launch: float, cost: float) -> float:
        """Launch and compute something; fill the time before with weight gradients. Return when it is done."""
        begun = max(self.host, header)
        self.host = begun + launch
        start = max(self.device, payload, begun)
        self.compute_gradients(start - self.device)
        self.device = max(start + cost, self.host)
        self.worked[role] += self.device - start
        return self.device

    def compute_gradients(self, room: float) -> None:
        done = min(room, sum(self.sealed))
        self.worked["pool"] += done
        self.sealed = [sum(self.sealed) - done]

    def seal(self, costs: Costs) -> None:
        if self.deferred:
            self.sealed.append(costs.slot + costs.flush + costs.pool_layer * sum(self.deferred))
            self.deferred = []


class Reference:
    """Every rank goes on as far as it can, in any order; times depend on its own program and on messages only."""

    def __init__(self, schedule: PoolSchedule, topology: Topology, layers: int, costs: Costs, rows_LS: np.ndarray):
        self.topology, self.costs, self.rows_LS = topology, costs, rows_LS
        self.segments: list[Segment] = training_segments(costs, layers)
        self.transfer = costs.transfer if topology.expert_parallel > 1 else 0.0
        self.sent: dict[RequestKey, float] = {}
        self.served: dict[RequestKey, list[float]] = {}
        self.ranks = [Rank(list(order)) for order in schedule.lane_order]
        groups = [topology.served_trunk_ranks(r) for r in range(topology.world_size)]
        self.slots: list[list[Slot]] = [
            [keys for slot in schedule.slots if (keys := tuple(k for k in slot if k.trunk_rank in group)) or not slot]
            for group in groups
        ]
        waiting = list(range(topology.world_size))[::-1]
        while any(self.advance(r) for r in waiting):
            pass
        for r, rank in enumerate(self.ranks):
            assert not rank.order and not any(self.slots[r][rank.slot :])
            rank.seal(costs)
            rank.device += sum(rank.sealed)
            rank.worked["pool"] += sum(rank.sealed)

    def advance(self, r: int) -> bool:
        rank = self.ranks[r]
        if not rank.order:
            return False
        if not (self.serve(r) if rank.order[0] == SERVE else self.run(r, rank.order[0])):
            return False
        rank.order.pop(0)
        return True

    def serve(self, r: int) -> bool:
        rank, c = self.ranks[r], self.costs
        keys = next(slot for slot in self.slots[r][rank.slot :] if slot)
        if any(key not in self.sent for key in keys):
            return False
        while not self.slots[r][rank.slot]:
            rank.seal(c)
            rank.slot += 1
        rank.slot += 1
        arrival = max(self.sent[key] for key in keys) + self.transfer
        fixed = c.slot
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            rows = [self.rows_LS[key.layer, self.topology.shard(r)] for key in keys if key.kind == kind]
            if rows:
                cost = fixed + max(c.weights, c.pool_layer * sum(rows))
                rank.work("pool", arrival - c.payload, arrival, c.slot_launch, cost)
                fixed = 0.0
                rank.deferred += rows if kind == Kind.BACKWARD else []
        for key in keys:
            self.served.setdefault(key, []).append(rank.device)
        return True

    def run(self, r: int, lane: int) -> bool:
        rank = self.ranks[r]
        if lane not in rank.lanes:
            rank.lanes[lane] = (rank.begun, 0, 0.0)
            rank.begun += 1
        micro_batch, done, _ = rank.lanes[lane]
        there = header = 0.0
        if done:
            last = self.segments[done - 1]
            assert last.kind is not None
            answers = self.served.get(RequestKey(r, lane, micro_batch, last.layer, last.kind), [])
            if len(answers) < self.topology.expert_parallel:
                return False
            there = max(answers) + self.transfer
            header = there - self.costs.payload
        segment = self.segments[done]
        end = rank.work("trunk", header, there, segment.launch, segment.cost)
        rank.lanes[lane] = (micro_batch, done + 1, end)
        if segment.kind is None:
            del rank.lanes[lane]
        else:
            self.sent[RequestKey(r, lane, micro_batch, segment.layer, segment.kind)] = end
        return True


@pytest.mark.parametrize("costs", [COSTS, GPU, SLOW_HOST], ids=["cpu", "gpu", "slow host"])
@pytest.mark.parametrize(("lanes", "stagger"), LANES)
@pytest.mark.parametrize("grid", GRIDS)
def test_as_every_rank_for_itself(grid: tuple[int, int], lanes: int, stagger: bool, costs: Costs) -> None:
    topology = every_rank(*grid)
    for layers, micro_batches in ((1, 1), (3, 4)):
        schedule = build_training_schedule(topology, layers, micro_batches, lanes, stagger, costs)
        for load_LS in (None, skewed(layers, grid[1])):
            got = time_schedule(schedule, topology, layers, costs, load_LS)
            rows_LS = np.ones((layers, grid[1])) if load_LS is None else grid[1] * load_LS
            ranks = Reference(schedule, topology, layers, costs, rows_LS).ranks
            assert got.seconds == pytest.approx(max(rank.device for rank in ranks), abs=1e-9)
            for busy, role in ((got.trunk_busy_T, "trunk"), (got.pool_busy_P, "pool")):
                np.testing.assert_allclose(busy * got.seconds, [rank.worked[role] for rank in ranks], atol=1e-9)


def test_lock_step_takes_the_sum_of_all_costs() -> None:
    """A rank computes or waits for the wire; the weight gradients of the first layers fit into its waits."""
    layers, micro_batches, topology = 3, 2, every_rank(2, 2)
    trunk = layers * 3 * COSTS.trunk_layer + 3 * COSTS.head
    requests = 2 * layers * (COSTS.slot + 2 * COSTS.pool_layer + 2 * COSTS.transfer)
    gradients = COSTS.slot + 2 * micro_batches * layers * COSTS.pool_layer
    got = time_schedule(lockstep_schedule(2, micro_batches, layers, every_rank=True), topology, layers, COSTS)
    assert got.seconds == pytest.approx(micro_batches * (trunk + requests) + gradients)
    assert got.trunk_busy_T.tolist() == pytest.approx([micro_batches * trunk / got.seconds] * 2)


def test_the_second_lane_hides_the_wire() -> None:
    """With two lanes a rank waits for the wire only while too little is in flight: in the first and last layers."""
    costs, topology = replace(COSTS, pool_layer=0.5, slot=0.0, transfer=2.0), every_rank(4, 4)
    work = 4 * (3 * 6 * costs.trunk_layer + 3 * costs.head + 3 * 6 * 4 * costs.pool_layer)
    times = []
    for lanes in (1, 2):
        schedule = build_training_schedule(topology, 6, 4, lanes, False, costs)
        times.append(time_schedule(schedule, topology, 6, costs).seconds)
    assert times[0] > 1.3 * work
    assert times[1] < 1.01 * work


def test_intervals_of_a_rank_are_those_of_both_roles_in_order_and_apart() -> None:
    topology, layers = every_rank(6, 3), 3
    schedule = build_training_schedule(topology, layers, 4, 3, True, COSTS)
    got = time_schedule(schedule, topology, layers, COSTS, skewed(layers, 3), record=True)
    i = got.intervals
    for rank in range(6):
        start_I, end_I = i.start_I[i.rank_I == rank], i.end_I[i.rank_I == rank]
        assert (start_I[1:] >= end_I[:-1] - 1e-9).all()
        assert set(i.work_I[i.rank_I == rank].tolist()) == set(Work)
        busy = got.trunk_busy_T[rank] + got.pool_busy_P[rank]
        assert (end_I - start_I).sum() == pytest.approx(busy * got.seconds)


def test_nothing_travels_to_a_single_shard() -> None:
    schedule = build_training_schedule(every_rank(2, 1), 2, 3, 1, False, COSTS)
    slow, fast = (time_schedule(schedule, every_rank(2, 1), 2, replace(COSTS, transfer=t)).seconds for t in (9.0, 0.0))
    assert slow == fast
