"""Times of a schedule, compared with an event simulation of every rank and message, and with arithmetic by hand."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pool.placement import Placement, contiguous
from pool.schedule import Kind, PoolSchedule, lockstep_schedule
from pool.schedule_builder import Costs, build_training_schedule, staggered_starts
from pool.schedule_timing import StepTiming, Work, shard_loads, time_schedule
from pool.topology import Topology

COSTS = Costs(trunk_layer=3.0, head=7.0, pool_layer=4.0, slot=0.5, transfer=0.3)
CHEAP_POOL = Costs(trunk_layer=3.0, head=7.0, pool_layer=0.4, slot=0.05, transfer=0.1)
GPU = replace(COSTS, payload=0.2, weights=5.0, flush=1.5, trunk_launch=1.1, head_launch=0.7, slot_launch=2.3)
SLOW_HOST = replace(CHEAP_POOL, payload=0.04, flush=0.3, trunk_launch=4.3, head_launch=2.0, slot_launch=0.6)
GRIDS = [(1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 4, 2), (1, 2, 1), (5, 6, 2), (4, 5, 5)]
LANES = [(1, False), (1, True), (2, True), (3, False), (4, True)]


def skewed(layers: int, shards: int, seed: int = 0) -> NDArray[np.float64]:
    """A load in which a shard may get nothing of a layer."""
    load_LS = np.random.default_rng(seed).gamma(0.5, 1.0, (layers, shards))
    if shards > 1:
        load_LS[0, 0] = 0.0
    return load_LS / load_LS.sum(axis=1, keepdims=True)


Bar = tuple[int, float, float, Work]


@dataclass
class Followed:
    """What the reference has seen: bars by world rank, and the peaks."""

    bars: list[Bar] = field(default_factory=list)
    open: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    kept: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    deferred: dict[int, float] = field(default_factory=lambda: defaultdict(float))


def follow(
    schedule: PoolSchedule,
    topology: Topology,
    layers: int,
    costs: Costs,
    load_LS: NDArray[np.float64],
    most_deferred: float = np.inf,
) -> Followed:
    """Every host does what it can at every moment, every header is an event of its own; devices follow their hosts."""
    seen = Followed()
    forward, backward = ((n * costs.trunk_layer, n * costs.trunk_launch) for n in (1, 2))
    program = [(forward, Kind.FORWARD, layer, Work.TRUNK_FORWARD) for layer in range(layers)]
    program += [(backward, Kind.BACKWARD, layer, Work.TRUNK_BACKWARD) for layer in range(layers)[::-1]]
    program.append((backward, None, -1, Work.TRUNK_BACKWARD))
    program[layers] = ((3 * costs.head, 3 * costs.head_launch), Kind.BACKWARD, layers - 1, Work.HEAD)
    trunks, pools = range(topology.trunk_ranks), range(topology.trunk_ranks, topology.world_size)
    orders = {t: list(schedule.lane_order[t]) for t in trunks}
    fresh = {t: itertools.count() for t in trunks}
    # lane -> [micro-batch, segment, headers there, when the last payload is there]
    lanes: dict[int, dict[int, list[float]]] = {t: {} for t in trunks}
    queues = {
        p: [[k for k in s if k.trunk_rank in topology.served_trunk_ranks(p)] for s in schedule.slots] for p in pools
    }
    for p in pools:  # slots of other ranks only are none of its business
        queues[p] = [keys for keys, slot in zip(queues[p], schedule.slots, strict=True) if keys or not slot] + [[]]
    inbox: dict[int, dict[object, float]] = {p: {} for p in pools}  # requests and when their payloads are there
    host_free_at: dict[int, float] = defaultdict(float)
    free_at: dict[int, float] = defaultdict(float)
    kept: dict[int, float] = defaultdict(float)
    deferred: dict[int, list[float]] = defaultdict(list)
    backlog: dict[int, float] = defaultdict(float)
    sealed: dict[int, float] = defaultdict(float)
    events: list[tuple[float, int, int, object]] = []
    number = itertools.count()

    def at(time: float, rank: int, message: object = None) -> None:
        heapq.heappush(events, (time, next(number), rank, message))

    def work(rank: int, now: float, payload: float, parts: list[tuple[float, float, Work]]) -> float:
        """Launch (cost, launch, kind of work) from now on, and return when the device is done."""
        for seconds, launch, kind in parts:
            start = max(free_at[rank], payload, now)
            now += launch
            free_at[rank] = max(start + seconds, now)
            seen.bars.append((rank, start, free_at[rank], kind))
        host_free_at[rank] = now
        at(now, rank)
        return free_at[rank]

    def run_trunk(t: int, now: float) -> None:
        if now < host_free_at[t] or not orders[t]:
            return
        lane = orders[t][0]
        if lane not in lanes[t]:
            lanes[t][lane] = [next(fresh[t]), 0, topology.expert_parallel, 0.0]
        state = lanes[t][lane]
        if state[2] < topology.expert_parallel:
            return
        orders[t].pop(0)
        seen.open[t] = max(seen.open[t], len(lanes[t]))
        (seconds, launch), kind, layer, what = program[int(state[1])]
        end = work(t, now, state[3], [(seconds, launch, what)])
        state[1:] = [state[1] + 1, 0, 0.0]
        if kind is None:
            del lanes[t][lane]
        else:
            for shard in range(topology.expert_parallel):
                at(end + costs.transfer - costs.payload, topology.pool_rank(shard, t), (t, lane, state[0], layer, kind))

    def compute_gradients(p: int, seconds: float) -> None:
        made = min(backlog[p], seconds)
        if made > 0:
            seen.bars.append((p, free_at[p], free_at[p] + made, Work.WEIGHT_GRADIENTS))
            sealed[p] -= sealed[p] * made / backlog[p]
            backlog[p] -= made

    def compute_all_gradients(p: int) -> None:
        seconds = backlog[p]
        compute_gradients(p, seconds)
        free_at[p] += seconds

    def seal(p: int) -> None:
        if deferred[p]:
            backlog[p] += costs.slot + costs.flush + costs.pool_layer * sum(deferred[p])
            sealed[p] += sum(deferred[p])
        deferred[p] = []

    def run_pool(p: int, now: float) -> None:
        if now < host_free_at[p] or not queues[p]:
            return
        keys = queues[p][0]
        names = [(k.trunk_rank, k.lane, k.micro_batch, k.layer, k.kind) for k in keys]
        if not set(names) <= inbox[p].keys():
            return
        queues[p].pop(0)
        rows = {k: topology.expert_parallel * load_LS[k.layer, topology.shard(p)] for k in keys}
        if not keys:
            seal(p)
            if not queues[p]:
                compute_all_gradients(p)
            at(now, p)
            return
        payload = max(inbox[p][name] for name in names)
        compute_gradients(p, max(0.0, max(payload, now) - free_at[p]))
        fixed, parts = costs.slot, []
        for kind, what in ((Kind.FORWARD, Work.POOL_FORWARD), (Kind.BACKWARD, Work.POOL_BACKWARD)):
            these = [rows[k] for k in keys if k.kind == kind]
            if these:
                cost = max(costs.weights, costs.pool_layer * sum(these))
                parts.append((fixed + cost, costs.slot_launch, what))
                fixed = 0.0
            if kind == Kind.FORWARD:
                kept[p] += sum(these)
                seen.kept[p] = max(seen.kept[p], kept[p])
            else:
                kept[p] -= sum(these)
                deferred[p] += these
                if these:
                    seen.deferred[p] = max(seen.deferred[p], sum(deferred[p]) + sealed[p])
        end = work(p, now, payload, parts)
        for key in keys:
            at(end + costs.transfer - costs.payload, key.trunk_rank, key.lane)
        if sum(deferred[p]) + sealed[p] > most_deferred:
            compute_all_gradients(p)
            if sum(deferred[p]) > most_deferred:
                seal(p)
                compute_all_gradients(p)

    for rank in range(topology.world_size):
        at(0.0, rank)
    while events:
        now, _, rank, message = heapq.heappop(events)
        if topology.is_trunk(rank):
            if message is not None:
                lanes[rank][message][2:] = [lanes[rank][message][2] + 1, now + costs.payload]  # type: ignore[index]
            run_trunk(rank, now)
        else:
            if message is not None:
                inbox[rank][message] = now + costs.payload
            run_pool(rank, now)
    assert not any(orders.values()) and not any(queues.values())
    return seen


def assert_same(got: StepTiming, seen: Followed, topology: Topology) -> None:
    i = got.intervals
    bars = sorted(zip(i.rank_I.tolist(), i.start_I.tolist(), i.end_I.tolist(), i.work_I.tolist(), strict=True))
    expected = sorted(bar for bar in seen.bars if bar[2] > bar[1])
    assert [(rank, work) for rank, _, _, work in bars] == [(rank, work) for rank, _, _, work in expected]
    times, expected_times = ([bar[1:3] for bar in these] for these in (bars, expected))
    np.testing.assert_allclose(times, expected_times, rtol=0, atol=1e-9)
    seconds = max(end for _, _, end, _ in expected)
    assert got.seconds == pytest.approx(seconds, abs=1e-9)
    busy = np.zeros(topology.world_size)
    for rank, start, end, _ in expected:
        busy[rank] += end - start
    np.testing.assert_allclose(np.concatenate((got.trunk_busy_T, got.pool_busy_P)), busy / seconds, rtol=0, atol=1e-9)
    pools = range(topology.trunk_ranks, topology.world_size)
    assert got.peak_open_T.tolist() == [seen.open[t] for t in range(topology.trunk_ranks)]
    np.testing.assert_allclose(got.peak_kept_P, [seen.kept[p] for p in pools], rtol=0, atol=1e-9)
    np.testing.assert_allclose(got.peak_deferred_P, [seen.deferred[p] for p in pools], rtol=0, atol=1e-9)


@pytest.mark.parametrize("costs", [COSTS, CHEAP_POOL, GPU, SLOW_HOST])
@pytest.mark.parametrize(("lanes", "stagger"), LANES)
@pytest.mark.parametrize("grid", GRIDS)
def test_as_every_rank_for_itself(grid: tuple[int, int, int], lanes: int, stagger: bool, costs: Costs) -> None:
    topology = Topology(*grid)
    for layers, micro_batches, most_deferred in ((1, 1, np.inf), (3, 4, np.inf), (2, 5, np.inf), (3, 4, 2.2)):
        schedule = build_training_schedule(topology, layers, micro_batches, lanes, stagger, costs)
        for load_LS in (np.full((layers, grid[2]), 1 / grid[2]), skewed(layers, grid[2])):
            got = time_schedule(schedule, topology, layers, costs, load_LS, record=True, most_deferred=most_deferred)
            assert_same(got, follow(schedule, topology, layers, costs, load_LS, most_deferred), topology)


@pytest.mark.parametrize("grid", GRIDS)
def test_lock_step_slots_that_cross_replicas(grid: tuple[int, int, int]) -> None:
    topology, layers, micro_batches = Topology(*grid), 3, 2
    schedule = lockstep_schedule(topology.trunk_ranks, micro_batches, layers)
    load_LS = skewed(layers, grid[2])
    got = time_schedule(schedule, topology, layers, COSTS, load_LS, record=True)
    assert_same(got, follow(schedule, topology, layers, COSTS, load_LS), topology)
    assert set(got.peak_open_T) == {1}


@pytest.mark.parametrize("grid", GRIDS)
def test_ranks_that_start_later(grid: tuple[int, int, int]) -> None:
    """A staggered step in which trunk ranks start late has the same bars, and is never shorter."""
    topology, layers = Topology(*grid), 4
    schedule = build_training_schedule(topology, layers, 5, 2, True, COSTS)
    starts_T = staggered_starts(topology, layers, COSTS)
    late, early = (
        time_schedule(schedule, topology, layers, COSTS, record=True, starts_T=starts) for starts in (starts_T, None)
    )
    i = late.intervals
    assert [i.start_I[i.rank_I == t].min() for t in range(topology.trunk_ranks)] == pytest.approx(starts_T)
    assert late.seconds == pytest.approx(i.end_I.max(), abs=1e-9)
    assert late.seconds >= early.seconds - 1e-9
    busy = late.trunk_busy_T * late.seconds
    np.testing.assert_allclose(busy, 5 * (3 * layers * COSTS.trunk_layer + 3 * COSTS.head), rtol=1e-12)


def test_lock_step_takes_the_sum_of_all_costs() -> None:
    layers, micro_batches, topology = 3, 2, Topology(1, 1, 1)
    trunk = layers * 3 * COSTS.trunk_layer + 3 * COSTS.head
    requests = 2 * layers * (COSTS.slot + COSTS.pool_layer + 2 * COSTS.transfer)
    got = time_schedule(lockstep_schedule(1, micro_batches, layers), topology, layers, COSTS, record=True)
    trunk_end = got.intervals.end_I[got.intervals.rank_I == 0].max()
    assert trunk_end == pytest.approx(micro_batches * (trunk + requests))
    assert got.seconds > trunk_end, "weight gradients at the end"


def test_launches_begin_with_the_header_and_end_before_the_device() -> None:
    """One lane, one layer, one micro-batch.

    The forward of 2 is launched until 3. Its request is served from 4 to 5, and that of its backward, after a head of
    0, from 7 to 8. The header of the answer comes at 8.5, half a unit before the payload; then launching takes 6 and
    computing 4.
    """
    costs = Costs(2.0, 0.0, pool_layer=1.0, slot=0.0, transfer=1.0, payload=0.5, trunk_launch=3.0)
    got = time_schedule(lockstep_schedule(1, 1, 1), Topology(1, 1, 1), 1, costs, record=True)
    assert got.seconds == 14.5
    assert got.intervals.start_I.tolist() == [0.0, 4.0, 7.0, 9.0, 8.0]
    assert got.intervals.end_I.tolist() == [3.0, 5.0, 8.0, 14.5, 9.0]
    assert got.trunk_busy_T.tolist() == [8.5 / 14.5]


def test_lanes_and_stagger_make_the_step_shorter() -> None:
    """Heads that all trunk ranks reach together starve the pool; staggered heads do not."""
    topology, layers = Topology(8, 10, 10), 12
    costs = Costs(trunk_layer=1.0, head=16.6, pool_layer=0.25, slot=0.03, transfer=0.1)
    steps = []
    for lanes, stagger in ((1, False), (2, False), (2, True)):
        schedule = build_training_schedule(topology, layers, 16, lanes, stagger, costs)
        starts_T = staggered_starts(topology, layers, costs) if stagger else None
        steps.append(time_schedule(schedule, topology, layers, costs, starts_T=starts_T))
    lockstep, two_lanes, both = steps
    assert two_lanes.seconds < 0.95 * lockstep.seconds
    assert both.seconds < 0.95 * two_lanes.seconds
    assert both.pool_busy_P.mean() > two_lanes.pool_busy_P.mean() > lockstep.pool_busy_P.mean()


def test_imbalance_is_of_rows_over_all_pool_ranks() -> None:
    layers, topology = 2, Topology(3, 4, 2)  # replica 0 serves two trunk ranks, replica 1 one
    load_LS = np.array([[0.9, 0.1], [0.7, 0.3]])
    schedule = build_training_schedule(topology, layers, 2, 2, False, COSTS)
    got = time_schedule(schedule, topology, layers, COSTS, load_LS)
    rows_P = [2 * 1.6, 2 * 0.4, 1.6, 0.4]
    assert got.imbalance == pytest.approx(max(rows_P) / np.mean(rows_P))
    assert time_schedule(schedule, Topology(3, 4, 2), layers, COSTS).imbalance == pytest.approx(4 / 3)


def test_intervals_are_recorded_on_request_only() -> None:
    topology, layers = Topology(4, 6, 3), 3
    schedule = build_training_schedule(topology, layers, 4, 2, True, COSTS)
    load_LS = skewed(layers, 3)
    recorded = time_schedule(schedule, topology, layers, COSTS, load_LS, record=True)
    silent = time_schedule(schedule, topology, layers, COSTS, load_LS)
    assert set(recorded.intervals.rank_I.tolist()) == set(range(topology.world_size))
    assert silent.intervals.rank_I.size == 0 and silent.seconds == recorded.seconds


def test_intervals_of_a_rank_are_in_order_and_apart() -> None:
    topology, layers = Topology(3, 4, 2), 3
    schedule = build_training_schedule(topology, layers, 4, 3, True, COSTS)
    i = time_schedule(schedule, topology, layers, COSTS, skewed(layers, 2), record=True).intervals
    for rank in range(topology.world_size):
        start_I, end_I = i.start_I[i.rank_I == rank], i.end_I[i.rank_I == rank]
        assert (end_I >= start_I).all() and (start_I[1:] >= end_I[:-1] - 1e-9).all()


def test_skew_makes_a_lock_step_as_long_as_its_hottest_shards() -> None:
    layers, topology = 2, Topology(1, 2, 2)
    load_LS = np.array([[0.75, 0.25], [0.4, 0.6]])
    schedule = build_training_schedule(topology, layers, 1, 1, False, COSTS)
    waits = sum(2 * (COSTS.slot + 2 * hot * COSTS.pool_layer + 2 * COSTS.transfer) for hot in (0.75, 0.6))
    trunk = 3 * layers * COSTS.trunk_layer + 3 * COSTS.head
    got = time_schedule(schedule, topology, layers, COSTS, load_LS, record=True)
    assert got.intervals.end_I[got.intervals.rank_I == 0].max() == pytest.approx(trunk + waits)


def test_a_schedule_that_cannot_be_followed() -> None:
    topology, layers = Topology(2, 1, 1), 2
    schedule = build_training_schedule(topology, layers, 2, 2, False, COSTS)
    with pytest.raises(AssertionError, match="is served before it has been sent"):
        time_schedule(replace(schedule, slots=schedule.slots[::-1]), topology, layers, COSTS)
    with pytest.raises(AssertionError, match="end before"):
        time_schedule(replace(schedule, slots=schedule.slots[:2]), topology, layers, COSTS)


@pytest.mark.parametrize("placement", [contiguous(12, 1, 3), contiguous(12, 4, 3), Placement((3, 1, 0, 2), 2)])
def test_shard_loads_are_sums_over_their_experts(placement: Placement) -> None:
    load_LM = np.random.default_rng(0).poisson(3, (5, placement.num_experts))
    load_LM[2] = 0
    got_LS = shard_loads(load_LM, placement)
    for layer, row in enumerate(load_LM.tolist()):
        for shard in range(placement.shards):
            mine = sum(row[expert] for expert in placement.experts_of(shard))
            assert got_LS[layer, shard] == pytest.approx(mine / sum(row) if sum(row) else 1 / placement.shards)


def test_counts_of_other_experts_than_the_placement_has() -> None:
    with pytest.raises(AssertionError, match="counts of 8 experts, a placement of 12"):
        shard_loads(np.ones((2, 8), dtype=np.int64), contiguous(12, 1, 3))
