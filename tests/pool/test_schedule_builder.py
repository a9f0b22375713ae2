"""Built schedules are complete, and a real run can follow their order."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from pool.schedule import Kind, PoolSchedule, RequestKey, lockstep_schedule
from pool.schedule_builder import Costs, build_evaluation_schedule, build_training_schedule
from pool.topology import Topology

COSTS = Costs(trunk_layer=3.0, head=7.0, pool_layer=4.0, slot=0.5, transfer=0.3)
GRIDS = [(1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 4, 2), (1, 2, 1), (4, 5, 5)]
LANES = [(1, False), (1, True), (2, False), (2, True), (3, True), (7, False)]


def follow(schedule: PoolSchedule, topology: Topology, layers: int, micro_batches: int, training: bool) -> None:
    """Run the schedule as trunk ranks and pool would, without a clock; fail if somebody waits forever."""
    forward = [Kind.FORWARD if training else Kind.FORWARD_ONLY] * layers
    program = list(zip(forward, range(layers), strict=True))
    if training:
        program += [(Kind.BACKWARD, layer) for layer in reversed(range(layers))]
    orders = [list(order) for order in schedule.lane_order]
    lanes: list[dict[int, tuple[int, int]]] = [{} for _ in orders]  # lane -> (micro-batch, requests made)
    fresh = [itertools.count() for _ in orders]
    sent: set[RequestKey] = set()
    answered: set[RequestKey] = set()
    slots = {
        r: [s for s in schedule.slots if s and s[0].trunk_rank % topology.replicas == r]
        for r in range(topology.replicas)
    }
    moved = True
    while moved:
        moved = False
        for t, order in enumerate(orders):
            while order:
                lane = order[0]
                if lane in lanes[t]:
                    micro_batch, made = lanes[t][lane]
                    kind, layer = program[made - 1]
                    if RequestKey(t, lane, micro_batch, layer, kind) not in answered:
                        break
                else:
                    micro_batch, made = next(fresh[t]), 0
                order.pop(0)
                moved = True
                if made == len(program):
                    del lanes[t][lane]
                else:
                    kind, layer = program[made]
                    sent.add(RequestKey(t, lane, micro_batch, layer, kind))
                    lanes[t][lane] = (micro_batch, made + 1)
        for queue in slots.values():
            while queue and set(queue[0]) <= sent:
                answered |= set(queue.pop(0))
                moved = True
    assert all(not order for order in orders), "a trunk rank waits forever"
    assert not any(slots.values()), "the pool waits forever"
    assert not any(lanes), "a micro-batch does not end"
    assert len(sent) == topology.trunk_ranks * micro_batches * len(program)


@pytest.mark.parametrize(("lanes", "stagger"), LANES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_run_can_follow_the_schedule(grid: tuple[int, int, int], lanes: int, stagger: bool) -> None:
    topology = Topology(*grid)
    for layers, micro_batches in ((1, 1), (3, 4), (2, 5)):
        follow(
            build_training_schedule(topology, layers, micro_batches, lanes, stagger, COSTS),
            topology,
            layers,
            micro_batches,
            True,
        )
        follow(
            build_evaluation_schedule(topology, layers, micro_batches, lanes, COSTS),
            topology,
            layers,
            micro_batches,
            False,
        )


@pytest.mark.parametrize("trunk_ranks", [1, 3])
def test_one_lane_without_stagger_is_lock_step(trunk_ranks: int) -> None:
    schedule = build_training_schedule(Topology(trunk_ranks, 2, 2), 3, 2, 1, False, COSTS)
    assert [s for s in schedule.slots if s] == list(lockstep_schedule(trunk_ranks, 2, 3).slots)


def test_no_more_lanes_in_flight_than_asked() -> None:
    for lanes in (1, 2, 3):
        schedule = build_training_schedule(Topology(1, 1, 1), 4, 6, lanes, False, COSTS)
        assert set(schedule.lane_order[0]) == set(range(lanes))


def test_there_are_requests_between_seals() -> None:
    schedule = build_training_schedule(Topology(1, 1, 1), 4, 4, 2, True, COSTS)
    seals = [n for n, slot in enumerate(schedule.slots) if not slot]
    assert seals
    assert all(schedule.slots[n - 1] for n in seals)


def test_the_schedule_is_the_same_every_time() -> None:
    first, second = (build_training_schedule(Topology(3, 2, 2), 5, 4, 3, True, COSTS) for _ in range(2))
    assert first == second


def test_the_order_is_that_of_earlier_versions() -> None:
    """The order fixes the order of sums, so a new order would change the results of resumed runs."""
    digest = hashlib.sha256()
    for grid in GRIDS:
        for lanes, stagger in LANES:
            topology = Topology(*grid)
            for schedule in (
                build_training_schedule(topology, 3, 4, lanes, stagger, COSTS),
                build_evaluation_schedule(topology, 3, 4, lanes, COSTS),
            ):
                slots = [
                    [(k.trunk_rank, k.lane, k.micro_batch, k.layer, int(k.kind)) for k in slot]
                    for slot in schedule.slots
                ]
                digest.update(repr((slots, schedule.lane_order)).encode())
    assert digest.hexdigest() == "4598dd409034a55e4085f17a3c5edede0979d943570015278f7c8b9d40d5a9f0"
