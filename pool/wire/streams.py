"""The seam to the device: all calls that the device transport makes to streams, events and communicators.

`CudaStreams` and `NcclCommunicator` make these calls to a GPU. Tests replace both, and run the same transport on
streams of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Block the calling thread until the stream has come to this point. Other threads run meanwhile."""

    def query(self) -> bool:
        """Whether the stream has come to this point."""


class Streams(Protocol):
    """Streams of one device. Each thread has a current stream; at first it is the device's default stream."""

    def enter(self) -> None:
        """Make the device that of the calling thread, which must do so before anything else."""

    def new(self) -> Any:
        """Return a new stream, which does not wait for the default stream."""

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Make a stream the calling thread's current one for a while."""

    def record(self) -> Event:
        """Record an event behind everything that has been launched on the current stream."""

    def wait(self, event: Any) -> None:
        """Make the current stream, not the host, wait for an event of `record`."""

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return room on the device that belongs to the current stream."""

    def used(self, tensor: Tensor) -> None:
        """Keep a tensor of another stream from being reused before the current stream is done with it."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Launch a copy into pinned memory. An event recorded afterwards says when the values are there."""

    def to_device(self, values: Sequence[int]) -> Tensor:
        """Launch a copy of int64 values to the device, by way of pinned memory."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Launch a copy on the device."""


class CudaStreams:
    """The streams of a GPU; see `Streams`."""

    def __init__(self, device: torch.device):
        self._device = device

    def enter(self) -> None:
        """See `Streams.enter`. A thread starts on the first GPU, where even asking an event would make a context."""
        torch.cuda.set_device(self._device)

    def new(self) -> torch.cuda.Stream:
        """See `Streams.new`."""
        return torch.cuda.Stream(self._device)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        """See `Streams.on`. The stream's device becomes the thread's, too."""
        return torch.cuda.stream(stream)

    def record(self) -> torch.cuda.Event:
        """See `Streams.record`. A thread that waits for a blocking event sleeps instead of keeping a core busy."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """See `Streams.wait`."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """See `Streams.empty`."""
        return torch.empty(*shape, dtype=dtype, device=self._device)

    def used(self, tensor: Tensor) -> None:
        """See `Streams.used`."""
        tensor.record_stream(torch.cuda.current_stream(self._device))

    def to_host(self, tensor: Tensor) -> Tensor:
        """See `Streams.to_host`."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def to_device(self, values: Sequence[int]) -> Tensor:
        """See `Streams.to_device`. torch keeps pinned memory from being reused before the copy is done."""
        return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(self._device, non_blocking=True)

    def copy(self, into: Tensor, source: Tensor) -> None:
        """See `Streams.copy`."""
        into.copy_(source, non_blocking=True)


class Work(Protocol):
    """Sends and receives that have been launched in one group."""

    def wait(self) -> None:
        """Make the current stream, not the host, wait for them."""

    def is_completed(self) -> bool:
        """Whether the device is done with them, by asking, not waiting.

        Raises:
            RuntimeError: They have failed.
        """


Message = tuple[Tensor, int]
"""A contiguous tensor on the device, and the rank that it goes to or comes from."""


class Communicator(Protocol):
    """Point-to-point messages between some ranks, on one stream of each device.

    A rank uses a communicator from one thread. Messages from one rank to another match in the order of their launch. A
    launch returns at once. Messages of a group progress independently of each other, except that those from one rank to
    another are in order; a group begins when the group before it on this rank is done, and not before what the current
    stream held.
    """

    def launch(self, sends: Sequence[Message] = (), receives: Sequence[Message] = ()) -> Work:
        """Launch messages as one group. There must be at least one."""

    def abort(self) -> None:
        """End all operations, whatever they wait for. May be called from any thread; may block."""
