"""Messages between devices: communicators that behave as NCCL's do, and what is launched on them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.pool.fake_device.devices import Device, Operation, Part, Stream
from tests.pool.fake_device.world import Actor, Signal, World, current

CTAS = 16
"""CTAs of a group of NCCL 2.30 on NVLink, for payloads of a megabyte and more, unless `max_ctas` says less."""


class Meeting:
    """Where ranks wait for each other to make communicators, and connections on them."""

    def __init__(self, world: World):
        self._world, self._signal = world, Signal()
        self._here: dict[str, set[int]] = {}

    def join(self, names: Sequence[str], rank: int, size: int) -> None:
        """Block the host until `size` ranks have come to each of some places."""
        for name in names:
            self._here.setdefault(name, set()).add(rank)
        self._world.fire(self._signal)
        here = [self._here[name] for name in names]
        what = f"other ranks at {', '.join(names)}"
        self._world.wait(lambda: all(len(ranks) == size for ranks in here), self._signal, what)


class FakeWork:
    """A work of NCCL, as torch makes it."""

    def __init__(self, device: Device, operation: Operation):
        self._device, self.operation = device, operation

    def synchronize(self) -> None:
        """Have the current stream wait, not the host."""
        self._device.launch(f"wait for [{self.operation}]", after=[self.operation])

    def wait(self) -> bool:
        """The same, but an error is raised."""
        if self.operation.aborted:
            raise RuntimeError(f"NCCL communicator was aborted on rank {self._device.rank}.")
        self.synchronize()
        return True

    def is_completed(self) -> bool:
        """Whether it is done, or has failed."""
        self._device.use()
        if self.operation.done and self._device.world.races:
            self._device.world.races.learn(current(), self.operation.clock)
        return self.operation.done


class FakeNccl:
    """`ProcessGroupNCCL`, connected eagerly: one communicator, on one stream of each device.

    The first message between two ranks, in each direction, blocks their hosts until both have launched it.

    Args:
        ranks: Those in the group; None for all.
    """

    def __init__(
        self, device: Device, name: str, meeting: Meeting, ctas: int = CTAS, ranks: Sequence[int] | None = None
    ):
        self._device, self._name, self._meeting, self._ctas = device, name, meeting, ctas
        self._ranks = range(device.world.ranks) if ranks is None else ranks
        self._stream = device.new_stream(name)
        self._parts: list[Part] | None = None
        self._open: list[Operation] = []
        self._connected: set[tuple[str, int, int]] = set()
        self._maker = current()
        self._user: Actor | None = None
        self._aborted = False
        meeting.join([name], device.rank, len(self._ranks))

    def _start_coalescing(self) -> None:
        self._device.use()
        # torch's maps of events are written without a lock: after its start a communicator belongs to one thread.
        if self._user or current() is not self._maker:
            self._user = self._user or current()
            assert self._user is current(), f"{self._name} is used by {self._user.name} and {current().name}"
        self._check()
        self._parts = []

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        self._add(True, tensors[0], self._ranks[peer])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        self._add(False, tensors[0], self._ranks[peer])

    def _add(self, sends: bool, tensor: Tensor, peer: int) -> None:
        assert self._parts is not None, "a single message makes a communicator for its pair of ranks"
        mine = self._device.rank
        assert tensor.is_contiguous() and tensor.numel() and peer != mine
        self._parts.append(Part(sends, (self._name, *((mine, peer) if sends else (peer, mine))), tensor))

    def _end_coalescing(self) -> FakeWork:
        parts, self._parts = self._parts, None
        assert parts, "a group of nothing"
        new = {part.channel for part in parts} - self._connected
        if new:
            self._connected |= new
            self._meeting.join([f"{name} {one}->{other}" for name, one, other in sorted(new)], self._device.rank, 2)
        self._check()
        work = FakeWork(self._device, group(self._device, self._stream, parts, self._ctas))
        self._open = [operation for operation in self._open if not operation.done] + [work.operation]
        return work

    def abort(self) -> None:
        """End all operations, whatever they wait for."""
        self._aborted = True
        for operation in self._open:
            self._device.finish(operation, aborted=True)

    def _check(self) -> None:
        if self._aborted:
            raise RuntimeError(f"NCCL communicator was aborted on rank {self._device.rank}.")


def group(device: Device, stream: Stream, parts: Sequence[Part], ctas: int) -> Operation:
    """Launch sends and receives as one group: after what the current stream holds, and on a stream of its own."""
    for part in parts:
        part.tensor = device.inside(part.tensor)
    return device.launch(
        "",
        stream,
        after=[device.current().last],
        sms=ctas,
        parts=parts,
        reads=[part.tensor for part in parts if part.sends],
        writes=[part.tensor for part in parts if not part.sends],
    )
