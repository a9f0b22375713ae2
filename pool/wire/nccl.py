"""A communicator over NCCL.

Its group is connected eagerly and all messages are launched as groups, so they use the group's own communicator and
one stream. Without either, a single message would make a communicator and a stream for its pair of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pool.wire.streams import Message, Streams

MAX_CTAS = 8
"""SMs that a communicator holds at most, and channels between two ranks."""


class NcclWork:
    """A group that NCCL has launched; see `pool.wire.streams.Work`."""

    def __init__(self, work: Any):
        self._work = work

    def wait(self) -> None:
        """See `Work.wait`. torch's `wait` could block the host, if a time limit or TORCH_NCCL_BLOCKING_WAIT is set."""
        self._work.synchronize()

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

    def connect(self, peers: Sequence[int], sends: bool, streams: Streams) -> None:
        """Exchange a first message with all peers of this rank, which do the same, and wait for it.

        NCCL connects two ranks when the first message between them is launched, and until both have launched it, the
        host waits. A header that follows the launch would come too late.

        Args:
            sends: Whether this rank is one that sends on this communicator.
        """
        messages = [(streams.empty(1, dtype=torch.uint8), peer) for peer in peers]
        (self.send(messages) if sends else self.receive(messages)).wait()
        streams.record().synchronize()

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
