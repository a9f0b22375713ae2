"""The seam `pool.wire.streams` on a fake device: streams, events, pinned copies, memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tests.pool.fake_device.clocks import Buffer
from tests.pool.fake_device.devices import Device, Operation, Queue, Stream
from tests.pool.fake_device.world import current


class FakeEvent:
    """A point in a stream."""

    def __init__(self, device: Device, operation: Operation):
        self.device, self.operation = device, operation

    def synchronize(self) -> None:
        """Block the calling thread until the stream has come to this point."""
        operation = self.operation
        self.device.use()
        self.device.world.wait(lambda: operation.done, operation.signal, f"the end of [{operation}]")

    def query(self) -> bool:
        """Whether the stream has come to this point."""
        self.device.use()
        if self.operation.done and self.device.world.races:
            self.device.world.races.learn(current(), self.operation.clock)
        return self.operation.done


class TimedEvent:
    """`torch.cuda.Event` with timing."""

    def record(self) -> None:
        device = current().world.devices[current().rank]
        self._operation = device.launch(f"time of {device.current().name}")

    def query(self) -> bool:
        return self._operation.done

    def elapsed_time(self, other: TimedEvent) -> float:
        return 1000 * (other._operation.ended - self._operation.ended)


class FakeStreams:
    """See `pool.wire.streams.Streams`."""

    def __init__(self, device: Device):
        self.device = device
        self._buffers = 0

    def enter(self) -> None:
        current().has_device = True

    def new(self) -> Stream:
        return self.device.new_stream(f"stream {len(self.device.streams)}")

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.device.use()
        actor = current()
        before, actor.stream = actor.stream, stream
        try:
            yield
        finally:
            actor.stream = before

    def record(self) -> FakeEvent:
        self.device.use()
        stream = self.device.current()
        return FakeEvent(self.device, self.device.launch(f"event of {stream.name}"))

    def wait(self, event: FakeEvent) -> None:
        self.device.launch(f"wait for [{event.operation}]", after=[event.operation])

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._empty(shape, dtype, self.device.current())

    def used(self, tensor: Tensor) -> None:
        if buffer := self.device.buffer_of(tensor):
            buffer.used_on.append(self.device.current())

    def to_host(self, tensor: Tensor) -> Tensor:
        pinned = self._empty(tuple(tensor.shape), tensor.dtype, None)
        self.copy(pinned, tensor)
        return pinned

    def to_device(self, values: Sequence[int]) -> Tensor:
        tensor = self.empty(len(values), dtype=torch.int64)
        self.copy(tensor, torch.tensor(values))
        return tensor

    def copy(self, into: Tensor, source: Tensor) -> None:
        inside, outside = self.device.inside(into), self.device.inside(source)
        run = lambda: inside.copy_(outside)  # noqa: E731
        self.device.launch("copy", run=run, reads=[outside], writes=[inside])  # type: ignore[arg-type]

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, stream: Stream | None) -> Tensor:
        """Memory whose end is noticed when the last tensor is gone, if accesses are checked."""
        if not self.device.world.races or 0 in shape:
            return torch.empty(shape, dtype=dtype)
        self._buffers += 1
        memory = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        memory[:] = 0xFF  # floats are NaN until somebody writes
        place = "pinned" if stream is None else stream.name
        buffer = Buffer(f"buffer {self._buffers} {shape} of {place}", memory, stream)
        seen = memory[:]  # lives as long as the tensors
        tensor = torch.from_numpy(seen).view(dtype).view(shape)
        self.device.buffers[tensor.untyped_storage().data_ptr()] = buffer
        weakref.finalize(seen, _free, self.device, buffer).atexit = False
        return tensor


def _free(device: Device, buffer: Buffer) -> None:
    """Give memory back to the stream that it came from, once the streams named by record_stream are done with it."""
    races = device.world.races
    assert races
    try:
        actor = current()
    except AttributeError:
        return  # the run is over
    if device.world.over:
        return
    origin = buffer.stream
    streams = [*([origin] if origin else []), *buffer.used_on]
    aside = Stream(device, Queue(device, -1), "allocator")
    free = Operation("free", aside, [stream.last for stream in streams])
    free.clock = races.stamp(actor)
    free.run = lambda: races.free(buffer, free.clock, f"{actor.name} of rank {actor.rank}")
    aside.queue.operations.append(free)
    aside.queue.schedule()
