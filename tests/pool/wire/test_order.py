"""No plan of a shipped recipe can deadlock on the device wire: a proof by graphs (`tests.pool.fake_device.order`)."""

from __future__ import annotations

import pytest

from pool.schedule import PoolSchedule
from pool.wire.nccl import MAX_CTAS
from tests.pool.fake_device.order import order_of_device_wire, order_of_specimen
from tests.pool.fake_device.plans import DEDICATED, HARDWARE, old, plan, whole


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("name", DEDICATED)
def test_every_plan_gets_to_its_end(name: str, hardware: str | None) -> None:
    case = whole(name, hardware)
    graph = order_of_device_wire(case.topology, case.schedule)
    assert graph.size > 3 * sum(map(len, case.schedule.slots))
    assert graph.cycle() == []


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("name", ["quickstart", "unipool-182m"])
def test_parts_of_a_group_one_after_the_other(name: str, hardware: str | None) -> None:
    """Nothing depends on NCCL's running the messages of a group at the same time."""
    case = whole(name, hardware)
    assert order_of_device_wire(case.topology, case.schedule, group=1).cycle() == []


@pytest.mark.parametrize("name", ["quickstart", "unipool-182m", "unipool-978m"])
def test_evaluations_and_generations(name: str) -> None:
    spec = plan(name, None)
    generation = spec.generation(3)  # whose lane order is that of one token
    tokens = PoolSchedule(generation.slots, tuple(3 * order for order in generation.lane_order))
    for schedule in (spec.evaluation(3), tokens):
        assert order_of_device_wire(spec.recipe.grid, schedule).cycle() == []


def test_waiting_kernels_leave_room() -> None:
    """A device has one kernel of each of its two communicators at a time, so there is always room for computing."""
    assert 2 * MAX_CTAS < 132


def test_orders_of_the_old_wire_have_cycles() -> None:
    """Those that `tests.pool.wire.test_old_deadlocks` runs into."""
    small, large = old("unipool-182m"), old("unipool-978m")
    assert order_of_specimen(small.topology, small.schedule, lanes_apart=4).cycle() == []
    stuck = order_of_specimen(small.topology, small.schedule, lanes_apart=4, enough_sms=False).cycle()
    assert any("the receive of the answer" in step for step in stuck)
    assert order_of_specimen(large.topology, large.schedule, lanes_apart=4).cycle() == []
    stuck = order_of_specimen(large.topology, large.schedule, lanes_apart=2).cycle()
    assert any("the receive of the answer" in step for step in stuck)


def test_a_slot_too_early_is_a_cycle() -> None:
    """The pool expects a request that its trunk rank can only make with an answer that comes later."""
    case = whole("quickstart", None)
    slots = [slot for slot in case.schedule.slots if slot]
    lane = [place for place, slot in enumerate(slots) if slot[0].lane == 0][:2]
    slots[lane[0]], slots[lane[1]] = slots[lane[1]], slots[lane[0]]
    stuck = order_of_device_wire(case.topology, PoolSchedule(tuple(slots), case.schedule.lane_order)).cycle()
    assert stuck
    assert any("trunk rank 0: segment" in step for step in stuck)
