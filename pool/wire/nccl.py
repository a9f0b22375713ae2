"""A communicator over NCCL, with point-to-point messages that are always launched as a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pool.wire.streams import Message


class NcclWork:
    """A group that NCCL has launched; see `pool.wire.streams.Work`."""

    def __init__(self, work: Any):
        self._work = work

    def wait(self) -> None:
        """See `Work.wait`. Without a time limit, `wait` of torch's NCCL works blocks the stream and not the host."""
        self._work.wait()

    def is_completed(self) -> bool:
        """See `Work.is_completed`."""
        if not self._work.is_completed():
            return False
        self._work.wait()  # raises what NCCL has found, if the work has failed rather than completed
        return True


class NcclCommunicator:
    """See `pool.wire.streams.Communicator`.

    Args:
        group: A ProcessGroupNCCL over all ranks that has been connected eagerly.
    """

    def __init__(self, group: Any):
        self._group = group

    def send(self, messages: Sequence[Message]) -> NcclWork:
        """See `Communicator.send`."""
        return self._launch(self._group.send, messages)

    def receive(self, messages: Sequence[Message]) -> NcclWork:
        """See `Communicator.receive`."""
        return self._launch(self._group.recv, messages)

    def _launch(self, operation: Any, messages: Sequence[Message]) -> NcclWork:
        self._group._start_coalescing()
        for tensor, peer in messages:
            operation([tensor], peer, 0)
        return NcclWork(self._group._end_coalescing())

    def abort(self) -> None:
        """See `Communicator.abort`."""
        self._group.abort()
