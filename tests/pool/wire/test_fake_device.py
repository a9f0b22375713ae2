"""The model of devices behaves as what it stands for, where the wire depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.pool.fake_device.communicators import FakeNccl, Meeting
from tests.pool.fake_device.devices import Device, ModelError
from tests.pool.fake_device.streams import FakeStreams
from tests.pool.fake_device.threads import Queue, sleep
from tests.pool.fake_device.world import Deadlock, World


def run(*ranks: Callable[[Device, FakeNccl], Any], **device: Any) -> list[Any]:
    """What functions of ranks return; each gets its device and a communicator."""
    world = World(len(ranks))
    meeting = Meeting(world)
    devices = [Device(world, rank, **device) for rank in range(len(ranks))]

    def main(rank: int) -> Any:
        return ranks[rank](devices[rank], FakeNccl(devices[rank], "c", meeting))

    actors = world.run({rank: lambda rank=rank: main(rank) for rank in range(len(ranks))})
    if world.errors:
        raise world.errors[0]
    return [actor.value for actor in actors]


def exchange(group: FakeNccl, sends: bool, *messages: tuple[torch.Tensor, int]) -> Any:
    group._start_coalescing()
    for tensor, peer in messages:
        (group.send if sends else group.recv)([tensor], peer, 0)
    return group._end_coalescing()


def wait(device: Device, work: Any) -> None:
    work.synchronize()
    FakeStreams(device).record().synchronize()


def test_a_receive_gets_what_the_stream_computes_before_its_send() -> None:
    def sender(device: Device, group: FakeNccl) -> None:
        rows = torch.zeros(2)
        device.kernel("compute", lambda t: t.fill_(7), writes=[rows])
        wait(device, exchange(group, True, (rows, 1)))

    def receiver(device: Device, group: FakeNccl) -> list[float]:
        rows = torch.zeros(2)
        wait(device, exchange(group, False, (rows, 0)))
        return rows.tolist()

    assert run(sender, receiver)[1] == [7, 7]


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
def test_sends_without_receives(buffered: bool) -> None:
    def sender(device: Device, group: FakeNccl) -> None:
        exchange(group, True, (torch.ones(1), 1))
        wait(device, exchange(group, True, (torch.ones(1), 1)))

    def receiver(device: Device, group: FakeNccl) -> None:
        exchange(group, False, (torch.ones(1), 0))  # one of two

    if buffered:
        run(sender, receiver, buffered=True)
    else:
        with pytest.raises(Deadlock, match=r"\[send c 0->1\] runs until the peer's starts"):
            run(sender, receiver)


def test_a_waiting_receive_holds_its_sms() -> None:
    def receiver(device: Device, group: FakeNccl) -> None:
        exchange(group, False, (torch.ones(1), 1))
        device.kernel("compute")
        FakeStreams(device).record().synchronize()

    def late(device: Device, group: FakeNccl) -> None:
        exchange(group, True, (torch.ones(1), 0))
        device.kernel("never")

    def never(device: Device, group: FakeNccl) -> None:
        device.faults.append(lambda operation: setattr(operation, "lost", True))
        exchange(group, True, (torch.ones(1), 0))

    run(receiver, late, sms=16)
    run(receiver, never, sms=17)
    with pytest.raises(Deadlock, match=r"\[compute\] waits for 1 SMs of 0 free ones"):
        run(receiver, never, sms=16)


def test_parts_of_a_group_progress_independently() -> None:
    """The first part's peer sends only when it has heard that the second part's has sent."""
    told = Queue()

    def receiver(device: Device, group: FakeNccl) -> None:
        wait(device, exchange(group, False, (torch.ones(1), 1), (torch.ones(1), 2)))

    def first(device: Device, group: FakeNccl) -> None:
        told.get()
        wait(device, exchange(group, True, (torch.ones(1), 0)))

    def second(device: Device, group: FakeNccl) -> None:
        wait(device, exchange(group, True, (torch.ones(1), 0)))
        told.put("sent")

    with pytest.raises(Deadlock, match="rank 0 main: other ranks at c 1->0, c 2->0"):
        run(receiver, first, second)  # which connects pairs of ranks
    run(connected(receiver), connected(first), connected(second))


def connected(function: Callable[[Device, FakeNccl], Any]) -> Callable[[Device, FakeNccl], Any]:
    """Have ranks exchange a first message with rank 0 before."""

    def main(device: Device, group: FakeNccl) -> None:
        peers = range(1, device.world.ranks) if device.rank == 0 else [0]
        exchange(group, device.rank != 0, *((torch.ones(1), peer) for peer in peers))
        function(device, group)

    return main


def test_streams_that_share_a_queue_wait_for_each_other() -> None:
    def main(device: Device, group: FakeNccl) -> None:
        device.faults.append(lambda operation: setattr(operation, "lost", operation.name == "stuck"))
        streams = FakeStreams(device)
        with streams.on(streams.new()):
            device.kernel("stuck")
        with streams.on(streams.new()):
            device.kernel("compute")
            streams.record().synchronize()

    run(main, queues=2)
    with pytest.raises(Deadlock, match=r"\[stuck\] is lost <- \[compute\]"):
        run(main, queues=1)


def test_messages_of_other_shapes_are_an_error() -> None:
    with pytest.raises(ModelError, match="has \\(2,\\)"):
        run(
            lambda device, group: wait(device, exchange(group, True, (torch.ones(2), 1))),
            lambda device, group: wait(device, exchange(group, False, (torch.ones(3), 0))),
        )


def test_time_costs_no_time() -> None:
    def main(device: Device, group: FakeNccl) -> float:
        sleep(1e6)
        return device.world.now

    assert run(main) == [1e6]
