"""The device wire where every rank has both roles, on a model of devices: as `test_device_wire`, faults and races."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from pool.schedule import lockstep_schedule
from pool.schedule_builder import Costs, build_training_schedule
from pool.topology import Topology
from pool.wire import watcher
from pool.wire.contract import Exchange
from pool.wire.device import DeviceEnd
from pool.wire.nccl import MAX_CTAS
from pool.wire.streams import Communicator, Work
from pool.wire.watcher import Watcher
from tests.pool.fake_device.communicators import FakeWork
from tests.pool.fake_device.job import LIMIT, STEP, Step, equal, step
from tests.pool.fake_device.order import order_of_exchanges
from tests.pool.fake_device.plans import DEDICATED, HARDWARE, Case, plan
from tests.pool.fake_device.streams import FakeEvent, FakeStreams
from tests.pool.fake_device.world import Deadlock

COSTS = Costs(trunk_layer=1.0, head=3.0, pool_layer=0.5, slot=0.1, transfer=0.1)


def case(ranks: int, shards: int, lanes: int, stagger: bool = True, layers: int = 2, costs: Costs = COSTS) -> Case:
    topology = Topology(ranks, ranks, shards, every_rank=True)
    schedule = build_training_schedule(topology, layers, lanes + 1, lanes, stagger, costs)
    return Case(topology, schedule, layers, lanes + 1)


@pytest.mark.parametrize("name", DEDICATED)
def test_every_plan(name: str) -> None:
    """Of two to eight ranks and one to four lanes, by turns, with the costs of a recipe on some hardware."""
    turn = DEDICATED.index(name)
    spec = plan(name, HARDWARE[turn % 4])
    ranks, lanes, stagger = 2 + turn % 7, 1 + turn % 4, turn % 3 > 0
    few = case(ranks, ranks, lanes, stagger, costs=spec.costs)
    policy = ("host", "device", "random")[turn % 3]
    run = step(few, policy, seed=turn, queues=8, buffered=turn % 2 == 0)  # type: ignore[arg-type]
    assert equal(run.run(), step(few, on_device=False).run())
    for device in run.devices:
        assert 1 + len(device.streams) <= 8
        assert device.most_sms <= 2 * MAX_CTAS + 1
        assert device.free_sms == device.sms, "all that was launched is done"
    whole = case(ranks, ranks, lanes, stagger, spec.recipe.model.layers, spec.costs)
    assert order_of_exchanges(whole.topology, whole.schedule).cycle() == []


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize(("ranks", "shards"), [(1, 1), (2, 1), (4, 2), (6, 3), (8, 8)])
def test_no_order_has_a_cycle(ranks: int, shards: int, lanes: int) -> None:
    for stagger in (False, True):
        one = case(ranks, shards, lanes, stagger)
        assert order_of_exchanges(one.topology, one.schedule).cycle() == []


def test_replicas() -> None:
    """Each group of ranks has communicators of its own; a rank that is alone in its group has nothing to send."""
    for ranks, shards in ((4, 2), (2, 1)):
        run = step(case(ranks, shards, 2), "random")
        assert equal(run.run(), step(run.case, on_device=False).run())
        assert (run.devices[0].most_sms > 1) == (shards > 1)


def test_checked_messages() -> None:
    one = case(3, 3, 2)
    assert equal(step(one, "random", check=True).run(), step(one, on_device=False).run())


# --- what the obvious protocol would do ---


def test_sends_and_receives_one_after_the_other_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank sends to the others before it receives from them."""
    launch = DeviceEnd._launch

    def one_by_one(self: Any, on: Communicator, sends: Any, receives: Any, doing: str) -> list[Work]:
        parts = [((part,), ()) for part in sends] + [((), (part,)) for part in receives]
        return [work for part in parts for work in launch(self, on, *part, doing)]

    one = Case(Topology(3, 3, 3, every_rank=True), lockstep_schedule(3, 1, 2, every_rank=True), 2, 1)
    graph = order_of_exchanges(one.topology, one.schedule, grouped=False)
    assert any("step of exchange" in what for what in graph.cycle())
    assert order_of_exchanges(one.topology, one.schedule).cycle() == []
    monkeypatch.setattr(watcher, "_TIME_SECONDS", 1e9)  # which would end it
    monkeypatch.setattr(watcher, "_ASK_SECONDS", 1e9)
    monkeypatch.setattr(DeviceEnd, "_launch", one_by_one)
    with pytest.raises(Deadlock, match=r"\[send requests 0->1\] runs until the peer's starts"):
        step(one).run()


# --- faults ---
