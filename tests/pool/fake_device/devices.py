"""A device: hardware queues that run operations in order, streams on them, SMs, and sends that meet receives.

What is modelled, after torch 2.13 and NCCL 2.30:

- An operation starts when it is the first of its queue, when what it depends on is done, and when the device has the
  SMs it needs. A compute kernel needs one; a group of sends and receives needs the communicator's CTAs, from its start
  to its end, even while it only waits for a peer. Event records and waits, copies and frees need none.
- Streams take the device's queues in turn, so that streams beyond their number share one, and wait for each other.
- A send and a receive of one communicator and direction meet in the order in which each side started them. The parts of
  a group progress independently. A buffered send ends when it starts; otherwise it ends when its receive has started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.pool.fake_device.clocks import Buffer, Clock, merge
from tests.pool.fake_device.world import NOTHING, Signal, World, current


class ModelError(AssertionError):
    """A use that a real device would answer with wrong values or worse."""


@dataclass(eq=False, slots=True)
class Part:
    """A send or a receive of a group."""

    sends: bool
    channel: tuple[str, int, int]  # communicator, from, to
    tensor: Tensor
    operation: Any = None
    done: bool = False
    data: Tensor | None = None  # of a buffered send
    clock: Clock | None = None

    def __str__(self) -> str:
        name, source, target = self.channel
        return f"{'send' if self.sends else 'receive'} {name} {source}->{target}"


class Operation:
    """Something launched on a stream."""

    __slots__ = (
        "aborted",
        "after",
        "clock",
        "done",
        "ended",
        "followers",
        "lost",
        "name",
        "not_before",
        "parts",
        "reads",
        "run",
    )
    __slots__ += ("running", "signal", "sms", "stream", "writes")

    def __init__(
        self,
        name: str,
        stream: Stream,
        after: Iterable[Operation | None] = (),
        sms: int = 0,
        run: Callable[[], None] | None = None,
        parts: Sequence[Part] = (),
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
    ):
        self.name, self.stream, self.sms, self.run, self.parts = name, stream, sms, run, parts
        self.reads, self.writes = reads, writes
        self.after = [other for other in after if other is not None]
        self.not_before = self.ended = 0.0
        self.running = self.done = self.aborted = self.lost = False
        self.followers: list[Queue] = []
        self.signal = Signal()
        self.clock = NOTHING
        for part in parts:
            part.operation = self

    def __str__(self) -> str:
        return self.name or ", ".join(map(str, self.parts))

    def state(self) -> str:
        """What it waits for."""
        if self.running:
            parts = ", ".join(str(part) for part in self.parts if not part.done)
            return "is lost" if self.lost else f"runs until the peer's starts: {parts}"
        waits = [other for other in self.after if not other.done]
        if waits:
            return f"waits for [{waits[0]}]"
        return f"waits for {self.sms} SMs of {self.stream.device.free_sms} free ones"


class Queue:
    """A hardware queue: operations run one after the other."""

    def __init__(self, device: Device, number: int):
        self.device, self.number = device, number
        self.operations: deque[Operation] = deque()
        self.scheduled = False

    def schedule(self) -> None:
        """Have the first operation looked at."""
        if not self.scheduled:
            self.scheduled = True
            self.device.world.ready_queues.append(self)

    def advance(self) -> None:
        """Start what can be started, and leave out what is done."""
        with torch._C.DisableTorchFunction():  # what a device does is not an access of the host
            self._advance()

    def _advance(self) -> None:
        while self.operations:
            first = self.operations[0]
            if not first.done and (first.running or not self._start(first) or not first.done):
                break
            self.operations.popleft()
        self.scheduled = False

    def _start(self, first: Operation) -> bool:
        """Start an operation; return False if it cannot start yet, in which case it is looked at again in time."""
        device = self.device
        if device.rank in device.world.dead_ranks:
            return False
        for other in first.after:
            if not other.done:
                other.followers.append(self)
                return False
        if first.not_before > device.world.now:
            device.world.at(first.not_before, self.schedule)
            return False
        if first.sms > device.free_sms:
            device.short_of_sms.append(self)
            return False
        device.free_sms -= first.sms
        device.most_sms = max(device.most_sms, device.sms - device.free_sms)
        first.running = True
        device.started(first)
        return True

    def describe(self) -> str:
        """The first operations, and what the very first waits for."""
        first, *others = list(self.operations)[:4]
        behind = "".join(f" <- [{o}]" for o in others)
        return f"rank {self.device.rank} queue {self.number}: [{first}] {first.state()}{behind}"


class Stream:
    """A stream: the order of what is launched on it."""

    def __init__(self, device: Device, queue: Queue, name: str):
        self.device, self.queue, self.name = device, queue, f"{name} of rank {device.rank}"
        self.last: Operation | None = None
        self.events = 0
        self.clock: Clock = {}


class Device:
    """A rank's device.

    Args:
        queues: Queues for streams other than the default one, which has a queue of its own.
        sms: Streaming multiprocessors.
        buffered: Whether sends end without their receives.
    """

    def __init__(self, world: World, rank: int, queues: int = 32, sms: int = 132, buffered: bool = False):
        self.world, self.rank, self.sms, self.buffered = world, rank, sms, buffered
        self.free_sms, self.most_sms = sms, 0
        self.queues = [Queue(self, number) for number in range(queues)]
        self.short_of_sms: list[Queue] = []
        self.streams: list[Stream] = []
        self.channels: dict[tuple[str, int, int], tuple[deque[Part], deque[Part]]] = {}
        self.buffers: dict[int, Buffer] = {}  # by address, where accesses are checked
        self.faults: list[Callable[[Operation], None]] = []  # what befalls operations when they are launched
        self.default = Stream(self, Queue(self, -1), "compute")
        self.queues.append(self.default.queue)
        world.devices.append(self)

    def new_stream(self, name: str) -> Stream:
        """Return a stream on the next queue."""
        stream = Stream(self, self.queues[len(self.streams) % (len(self.queues) - 1)], name)
        self.streams.append(stream)
        return stream

    def current(self) -> Stream:
        """The running thread's current stream."""
        return current().stream or self.default

    def use(self) -> None:
        """Check that the running thread has chosen this device: torch would make a context on the first one."""
        if not current().has_device:
            raise ModelError(f"{current().name} of rank {self.rank} uses a device that it has not chosen")

    def launch(self, name: str, stream: Stream | None = None, **keywords: Any) -> Operation:
        """Launch an operation on a stream; see `Operation`."""
        actor, world = current(), self.world
        world.check_alive(actor)
        world.give_way()
        stream = stream or self.current()
        operation = Operation(name, stream, **keywords)
        if world.races:
            operation.clock = world.races.stamp(actor)
        for fault in self.faults:
            fault(operation)
        stream.last = operation
        stream.queue.operations.append(operation)
        stream.queue.schedule()
        return operation

    def kernel(
        self,
        name: str,
        run: Callable[..., None] = lambda *tensors: None,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
    ) -> None:
        """Launch a compute kernel on the current stream: `run(*reads, *writes)` when it gets there."""
        reads, writes = [self.inside(tensor) for tensor in reads], [self.inside(tensor) for tensor in writes]
        self.launch(name, sms=1, run=lambda: run(*reads, *writes), reads=reads, writes=writes)

    def inside(self, tensor: Tensor) -> Tensor:
        """What an operation uses in a tensor's place: the same memory, which it does not keep."""
        buffer = self.buffer_of(tensor)
        if buffer is None:
            return tensor
        whole = torch.from_numpy(buffer.memory).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def host_accesses(self) -> HostAccesses:
        """A context in which accesses of the running thread are checked."""
        return HostAccesses(self)

    def buffer_of(self, tensor: Tensor) -> Buffer | None:
        return self.buffers.get(tensor.untyped_storage().data_ptr()) if self.world.races else None

    def started(self, operation: Operation) -> None:
        """Run an operation that has got its SMs."""
        races = self.world.races
        if races:
            stream = operation.stream
            stream.events += 1
            merge(stream.clock, operation.clock)
            for other in operation.after:
                merge(stream.clock, other.clock)
            known = dict(stream.clock)  # what the other end of a message learns: that it starts, not that it is done
            stream.clock[stream.name] = stream.events
            operation.clock = dict(stream.clock)
            self._check(operation)
        if operation.lost:
            return
        if operation.run:
            operation.run()
        if not operation.parts:
            self.finish(operation)
            return
        meetings = []
        for part in operation.parts:
            source = self.world.devices[part.channel[1]]
            sent, received = source.channels.setdefault(part.channel, (deque(), deque()))
            (sent if part.sends else received).append(part)
            if races:
                part.clock = known
            if part.sends and self.buffered:
                part.data, part.done = part.tensor.clone(), True
            meetings.append((sent, received))
        for sent, received in meetings:
            while sent and received:
                _meet(sent.popleft(), received.popleft())
        if all(part.done for part in operation.parts):
            self.finish(operation)

    def _check(self, operation: Operation) -> None:
        races, who = self.world.races, operation.stream.name
        assert races
        for tensors, writes in ((operation.reads, False), (operation.writes, True)):
            for tensor in tensors:
                if tensor.numel() and (buffer := self.buffer_of(tensor)):
                    what = f"[{operation}] on {who}"
                    races.access(buffer, *_range(tensor), writes, who, operation.clock, what)

    def finish(self, operation: Operation, aborted: bool = False) -> None:
        """End an operation: its SMs are free, and what depends on it is looked at."""
        if operation.done:
            return
        operation.done, operation.aborted, operation.ended = True, aborted, self.world.now
        if operation.running:
            self.free_sms += operation.sms
            short, self.short_of_sms = self.short_of_sms, []
            for queue in short:
                queue.schedule()
        if self.world.races:
            merge(operation.stream.clock, operation.clock)
        operation.after = []
        operation.stream.queue.schedule()
        for queue in operation.followers:
            queue.schedule()
        operation.signal.clock = operation.clock
        for waiting in operation.signal.waiting:
            self.world.wake(waiting)
        operation.signal.waiting = []
        operation.run = None


class HostAccesses(TorchFunctionMode):
    """Checks what a thread of the host does with buffers: it may touch pinned memory only.

    torch functions that look at a tensor's shape, or make views, touch nothing.
    """

    LOOKS = (
        *(
            "__get__",
            "__len__",
            "as_strided",
            "contiguous",
            "data_ptr",
            "dim",
            "element_size",
            "is_contiguous",
            "numel",
        ),
        *("reshape", "size", "split", "storage_offset", "stride", "to", "untyped_storage", "view"),
    )

    def __init__(self, device: Device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in self.LOOKS:
            for place, tensor in enumerate(args):
                if isinstance(tensor, Tensor) and (buffer := self._device.buffer_of(tensor)):
                    self._touch(buffer, tensor, place == 0 and name.endswith("_"), name)
        return func(*args, **(kwargs or {}))

    def _touch(self, buffer: Buffer, tensor: Tensor, writes: bool, name: str) -> None:
        races, actor = self._device.world.races, current()
        assert races
        if buffer.stream is not None:
            races.found.append(f"{actor.clock_key} does {name} with {buffer.name}, which is on the device")
        races.access(
            buffer, *_range(tensor), writes, actor.clock_key, races.stamp(actor), f"{name} by {actor.clock_key}"
        )


def _range(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its memory that a tensor is in."""
    start = tensor.storage_offset() * tensor.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + span * tensor.element_size()


def _meet(send: Part, receive: Part) -> None:
    """A send and its receive run: move the rows, and end what is done."""
    source: Tensor = send.tensor if send.data is None else send.data
    if source.shape != receive.tensor.shape or source.dtype != receive.tensor.dtype:
        raise ModelError(f"{send} has {tuple(source.shape)} {source.dtype}, its receive {tuple(receive.tensor.shape)}")
    if send.operation.aborted or receive.operation.aborted:
        return  # the other one waits on
    receive.tensor.copy_(source)
    send.data = None
    send.done = receive.done = True
    if send.clock:
        merge(receive.operation.clock, send.clock)
    for part in (send, receive):
        operation = part.operation
        if all(other.done for other in operation.parts):
            operation.stream.device.finish(operation)
