"""The device wire, with the service, the lanes and the schedules of the product, on a model of devices.

No plan deadlocks, whoever is fast or slow, and the numbers are those of the host transport, bit for bit.
"""

from __future__ import annotations

import pytest

from pool.schedule import lockstep_schedule
from pool.topology import Topology
from pool.wire import device as device_wire
from pool.wire.nccl import MAX_CTAS
from tests.pool.fake_device.job import Step, equal, step
from tests.pool.fake_device.plans import DEDICATED, HARDWARE, Case, reduced, whole
from tests.pool.fake_device.world import Deadlock


def assert_modest(run: Step) -> None:
    """Streams have a hardware queue each, and the wire leaves most SMs to the computation."""
    for device in run.devices:
        assert 1 + len(device.streams) <= 8
        assert device.most_sms <= 2 * MAX_CTAS + 1
        assert device.free_sms == device.sms, "all that was launched is done"


@pytest.mark.parametrize("name", DEDICATED)
def test_every_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By turns on other hardware, and with slow devices and sends that end alone, or with anyone at random and sends
    that wait. `test_order` has all of them."""
    turn = DEDICATED.index(name)
    case = reduced(name, HARDWARE[turn % len(HARDWARE)])
    if turn % 3 == 0:
        run = step(case, "host", queues=8, buffered=True)
    else:
        monkeypatch.setattr(device_wire, "_GROUP", 1)  # as with more shards than a group may have messages
        run = step(case, "random", seed=turn, queues=8)
    assert equal(run.run(), step(case, on_device=False).run())
    assert_modest(run)


@pytest.mark.parametrize("policy", ["host", "device", "random"])
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
def test_all_shards_of_a_large_layout(policy: str, buffered: bool) -> None:
    """16 shards take two groups of messages."""
    full = whole("unipool-978m", "h100", 1)
    t = full.topology
    case = Case(t, lockstep_schedule(t.trunk_ranks, 1, 1), 1, 1)
    run = step(case, policy, buffered=buffered)  # type: ignore[arg-type]
    assert equal(run.run(), step(case, on_device=False).run())
    assert_modest(run)


def test_replicas() -> None:
    topology = Topology(4, 4, 2)
    case = Case(topology, lockstep_schedule(4, 2, 2), 2, 2)
    assert equal(step(case, "random").run(), step(case, on_device=False).run())


def test_a_step_is_repeatable() -> None:
    case = reduced("unipool-182m", "h100")
    wanted = step(case).run()
    for seed in range(3):
        assert equal(step(case, "random", seed=seed).run(), wanted)


def test_checked_messages() -> None:
    """`WireSettings.check`: headers with checksums, both ways."""
    case = reduced("quickstart", "h100")
    assert equal(step(case, check=True).run(), step(case, on_device=False).run())


def test_connections_are_made_beforehand() -> None:
    """A first message blocks its host until the peer launches its own, for which a header would come too late."""
    with pytest.raises(Deadlock, match="rank 0 sender: other ranks at requests 0->"):
        step(reduced("quickstart", "h100"), connects=False).run()
