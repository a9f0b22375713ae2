"""The device wire where every rank has both roles, with the product's service and lanes, on a model of devices.

No plan deadlocks, whoever is fast or slow, and the numbers are those of the host transport, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest

from pool.schedule import lockstep_schedule
from pool.schedule_builder import Costs
from pool.topology import Topology
from pool.wire import WireError, watcher
from pool.wire.device import DeviceEnd
from pool.wire.nccl import MAX_CTAS
from pool.wire.streams import Communicator, Work
from tests.pool.fake_device.job import LIMIT, equal, step
from tests.pool.fake_device.order import order_of_exchanges
from tests.pool.fake_device.plans import DEDICATED, HARDWARE, Case, every_rank, plan

COSTS = Costs(trunk_layer=1.0, head=3.0, pool_layer=0.5, slot=0.1, transfer=0.1)


@pytest.mark.parametrize("name", DEDICATED)
def test_every_plan(name: str) -> None:
    """Of two to eight ranks and one to four lanes, by turns, with the costs of a recipe on some hardware."""
    turn = DEDICATED.index(name)
    spec = plan(name, HARDWARE[turn % 4])
    ranks, lanes, stagger = 2 + turn % 7, 1 + turn % 4, turn % 3 > 0
    few = every_rank(ranks, ranks, lanes, stagger, spec.costs)
    policy = ("host", "device", "random")[turn % 3]
    run = step(few, policy, seed=turn, queues=8, buffered=turn % 2 == 0)  # type: ignore[arg-type]
    assert equal(run.run(), step(few, on_device=False).run())
    for device in run.devices:
        assert 1 + len(device.streams) <= 8
        assert device.most_sms <= 2 * MAX_CTAS + 1
        assert device.free_sms == device.sms, "all that was launched is done"
    whole = every_rank(ranks, ranks, lanes, stagger, spec.costs, spec.recipe.model.layers)
    assert order_of_exchanges(whole.topology, whole.schedule).cycle() == []


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize(("ranks", "shards"), [(1, 1), (2, 1), (4, 2), (6, 3), (8, 8)])
def test_no_order_has_a_cycle(ranks: int, shards: int, lanes: int) -> None:
    for stagger in (False, True):
        one = every_rank(ranks, shards, lanes, stagger, COSTS)
        assert order_of_exchanges(one.topology, one.schedule).cycle() == []


def test_replicas() -> None:
    """Each group of ranks has communicators of its own; a rank that is alone in its group has nothing to send."""
    for ranks, shards in ((4, 2), (2, 1)):
        run = step(every_rank(ranks, shards, 2, True, COSTS), "random")
        assert equal(run.run(), step(run.case, on_device=False).run())
        assert (run.devices[0].most_sms > 1) == (shards > 1)


def test_checked_messages() -> None:
    one = every_rank(3, 3, 2, True, COSTS)
    assert equal(step(one, "random", check=True).run(), step(one, on_device=False).run())


def test_streams_that_share_a_hardware_queue_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for an exchange holds up the next one, which is why `check_queues` asks for as many as streams."""
    monkeypatch.setattr(watcher, "_ASK_SECONDS", 1.0)
    monkeypatch.setattr(watcher, "_TIME_SECONDS", 1.0)
    run = step(every_rank(2, 2, 4, True, COSTS), "random", queues=1)
    with pytest.raises(WireError, match="could not exchange tokens with rank .*timed out"):
        run.run()


def test_sends_and_receives_one_after_the_other_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The obvious protocol, in which each rank sends to the others before it receives from them."""
    launch = DeviceEnd._launch

    def one_by_one(self: Any, on: Communicator, sends: Any, receives: Any, doing: str) -> list[Work]:
        parts = [((part,), ()) for part in sends] + [((), (part,)) for part in receives]
        return [work for part in parts for work in launch(self, on, *part, doing)]

    one = Case(Topology(3, 3, 3, every_rank=True), lockstep_schedule(3, 1, 2, every_rank=True), 2, 1)
    graph = order_of_exchanges(one.topology, one.schedule, grouped=False)
    assert any("step of exchange" in what for what in graph.cycle())
    assert order_of_exchanges(one.topology, one.schedule).cycle() == []
    monkeypatch.setattr(watcher, "_ASK_SECONDS", 1.0)  # each look is simulated
    monkeypatch.setattr(watcher, "_TIME_SECONDS", 1.0)
    monkeypatch.setattr(DeviceEnd, "_launch", one_by_one)
    run = step(one)
    for actor in run.attempt():
        assert isinstance(actor.error, WireError)
        assert "could not exchange tokens with " in str(actor.error)
    assert LIMIT <= run.world.now <= LIMIT + 3
    assert equal(step(one, buffered=True).run(), step(one, on_device=False).run()), "small sends may end alone"
