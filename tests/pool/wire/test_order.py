"""No plan of a shipped recipe can deadlock on the device wire: a proof by graphs (`tests.pool.fake_device.order`).

That the product launches what the graphs have is shown by a step of it.
"""

from __future__ import annotations

from functools import cache

import pytest

from pool.schedule import PoolSchedule
from pool.topology import Topology
from pool.wire.nccl import MAX_CTAS
from tests.pool.fake_device.devices import Operation
from tests.pool.fake_device.job import EXPERTS, Step, step
from tests.pool.fake_device.order import Plan, order_of_device_wire, order_of_specimen
from tests.pool.fake_device.plans import DEDICATED, HARDWARE, Case, every_rank, old, plan, reduced, whole


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("name", DEDICATED)
def test_every_plan_gets_to_its_end(name: str, hardware: str | None) -> None:
    case = whole(name, hardware)
    assert_gets_to_its_end(case.topology, case.schedule)


@cache
def assert_gets_to_its_end(topology: Topology, schedule: PoolSchedule) -> None:
    """Once for each plan: recipes that differ in data or lock have the same."""
    graph = order_of_device_wire(topology, schedule)
    assert graph.size > 3 * sum(map(len, schedule.slots))
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


Groups = dict[tuple[int, str], list[list[tuple[str, int, int]]]]
"""For a rank and a communicator, its groups in order, each of messages (send or receive, from, to)."""


def dedicated_groups(case: Case) -> Groups:
    """What `order_of_device_wire` takes for granted."""
    t, p = case.topology, Plan(case.topology, case.schedule)
    groups: Groups = {}
    for rank, segments in enumerate(p.segments):
        shards = [t.pool_rank(shard, rank) for shard in range(t.expert_parallel)]
        made = [r for r in segments.makes if r >= 0]
        answered = p.of_trunk(rank, [r for _, requests in p.batches for r in requests])
        groups[rank, "requests"] = [[("send", rank, shard) for shard in shards] for _ in made]
        groups[rank, "answers"] = [[("receive", shard, rank) for shard in shards] for _ in answered]
    for rank in range(t.trunk_ranks, t.world_size):
        served = [[p.requests[r].trunk_rank for r in rs] for place, rs in p.slots if place == t.replica(rank)]
        batches = [[p.requests[r].trunk_rank for r in rs] for s, rs in p.batches if p.slots[s][0] == t.replica(rank)]
        groups[rank, "requests"] = [[("receive", trunk, rank)] for slot in served for trunk in slot]
        groups[rank, "answers"] = [[("send", rank, trunk) for trunk in batch] for batch in batches]
    return groups


def every_rank_groups(case: Case) -> Groups:
    """What `order_of_exchanges` takes for granted."""
    t, p = case.topology, Plan(case.topology, case.schedule)
    groups: Groups = {}
    for rank in range(t.world_size):
        others = [other for other in t.served_trunk_ranks(rank) if other != rank]
        slots = [[p.requests[r].trunk_rank for r in rs] for place, rs in p.slots if place == t.replica(rank)]
        batches = [[p.requests[r].trunk_rank for r in rs] for s, rs in p.batches if p.slots[s][0] == t.replica(rank)]
        for which, exchanges in (("requests", slots), ("answers", batches)):
            own = [[("send", rank, o) for trunk in e if trunk == rank for o in others] for e in exchanges]
            of_others = [[("receive", trunk, rank) for trunk in e if trunk != rank] for e in exchanges]
            if which == "answers":
                own = [[("send", rank, trunk) for trunk in e if trunk != rank] for e in exchanges]
                of_others = [[("receive", o, rank) for trunk in e if trunk == rank for o in others] for e in exchanges]
            groups[rank, which] = [sends + receives for sends, receives in zip(own, of_others, strict=True)]
    return groups


@pytest.mark.parametrize("layout", ["dedicated", "every rank"])
def test_the_product_launches_in_these_orders(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank launches the same groups on each communicator as the graphs have, if every shard gets tokens."""
    costs = plan("unipool-182m", "h100").costs
    case = every_rank(4, 2, 2, True, costs) if layout == "every rank" else reduced("unipool-182m", "h100", layers=2)
    counts = [1] * (EXPERTS * case.topology.expert_parallel)
    monkeypatch.setattr(Step, "_counts", lambda self, *of: counts)
    run = step(case, "random")
    launched: Groups = {}

    def note(operation: Operation) -> None:
        if operation.parts:
            messages = [("send" if part.sends else "receive", *part.channel[1:]) for part in operation.parts]
            first = operation.parts[0]
            rank = first.channel[1] if first.sends else first.channel[2]
            launched.setdefault((rank, first.channel[0].rstrip("0123456789")), []).append(messages)

    for device in run.devices:
        device.faults.append(note)
    run.run()
    wanted = every_rank_groups(case) if case.topology.every_rank else dedicated_groups(case)
    assert wanted.keys() == launched.keys()
    for place, groups in wanted.items():
        assert launched[place][1:] == groups, f"behind the first message: {place}"


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
