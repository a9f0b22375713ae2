"""Messages between devices: communicators that behave as NCCL's do, and what is launched on them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from torch import Tensor

from tests.pool.fake_device.devices import Device, Operation, Part, Stream
from tests.pool.fake_device.world import Signal, World, current

Message = tuple[Tensor, int]
CTAS = 16
"""CTAs of a group of NCCL 2.30 on NVLink, for payloads of a megabyte and more, unless `max_ctas` says less."""


class Meeting:
    """Where ranks wait for each other to make a communicator."""

    def __init__(self, world: World):
        self._world, self._signal = world, Signal()
        self._here: dict[str, set[int]] = {}

    def join(self, name: str, rank: int, size: int) -> None:
        """Block the host until `size` ranks have come."""
        here = self._here.setdefault(name, set())
        here.add(rank)
        self._world.fire(self._signal)
        self._world.wait(lambda: len(here) == size, self._signal, f"the other ranks of communicator {name}")


class FakeWork:
    """`torch.distributed.Work` of NCCL."""

    def __init__(self, device: Device, operation: Operation):
        self._device, self.operation = device, operation

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Without a limit the current stream waits; with one the host does, see the docstring of torch's."""
        operation, world = self.operation, self._device.world
        if operation.aborted:
            raise RuntimeError("NCCL communicator was aborted on rank " + str(self._device.rank))
        if not operation.done or world.races:
            self._device.launch(f"wait for {operation}", after=[operation])
        if timeout is not None:
            limit = timeout.total_seconds()
            if not world.wait(lambda: operation.done, operation.signal, f"the end of [{operation}]", limit):
                raise RuntimeError(f"Work ran for {limit * 1000:g} milliseconds before timing out.")
        return True

    def is_completed(self) -> bool:
        """Whether it is done; a work of an aborted communicator has failed."""
        if self.operation.aborted:
            raise RuntimeError("NCCL communicator was aborted on rank " + str(self._device.rank))
        if self.operation.done and self._device.world.races:
            self._device.world.races.learn(current(), self.operation.clock)
        return self.operation.done


class FakeCommunicator:
    """See `pool.wire.streams.Communicator`: one communicator over all ranks, on one stream of each device.

    Args:
        meeting: Where it is made by all ranks at once; None for one that exists already.
    """

    def __init__(self, device: Device, name: str, ctas: int = CTAS, meeting: Meeting | None = None):
        self._device, self.name, self._ctas = device, name, ctas
        self._stream = device.new_stream(name)
        self._open: list[Operation] = []
        self._user: object = None
        self.aborted = False
        if meeting:
            meeting.join(name, device.rank, device.world.ranks)

    def send(self, messages: Sequence[Message]) -> FakeWork:
        """Launch sends as one group."""
        return self._launch([self._part(True, tensor, peer) for tensor, peer in messages])

    def receive(self, messages: Sequence[Message]) -> FakeWork:
        """Launch receives as one group."""
        return self._launch([self._part(False, tensor, peer) for tensor, peer in messages])

    def abort(self) -> None:
        """End all operations, whatever they wait for."""
        self.aborted = True
        for operation in self._open:
            self._device.finish(operation, aborted=True)

    def _part(self, sends: bool, tensor: Tensor, peer: int) -> Part:
        mine = self._device.rank
        channel = (self.name, mine, peer) if sends else (self.name, peer, mine)
        assert tensor.is_contiguous() and peer != mine
        return Part(sends, channel, self._device.inside(tensor))

    def _launch(self, parts: Sequence[Part]) -> FakeWork:
        assert parts, "a group of nothing"
        if self.aborted:
            raise RuntimeError("NCCL communicator was aborted on rank " + str(self._device.rank))
        # torch's maps of events are written without a lock: a communicator belongs to one thread.
        self._user = self._user or current()
        assert self._user is current(), f"{self.name} is used by {current().name} and another thread"
        work = FakeWork(self._device, group(self._device, self._stream, parts, self._ctas))
        self._open = [operation for operation in self._open if not operation.done] + [work.operation]
        return work


def group(device: Device, stream: Stream, parts: Sequence[Part], ctas: int) -> Operation:
    """Launch sends and receives as one group: after what the current stream holds, and on a stream of its own."""
    return device.launch(
        "",
        stream,
        after=[device.current().last],
        sms=ctas,
        parts=parts,
        reads=[part.tensor for part in parts if part.sends],
        writes=[part.tensor for part in parts if not part.sends],
    )
