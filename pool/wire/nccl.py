"""Communicators over NCCL, and which ranks they connect.

A communicator's group is connected eagerly and all messages are launched as groups, so they use the group's own
communicator and one stream. Without either, a single message would make a communicator and a stream for its pair of
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pool.topology import Topology
from pool.wire.streams import Message, Streams

MAX_CTAS = 8
"""SMs that a communicator holds at most, and channels between two ranks."""


def members(topology: Topology, rank: int) -> Sequence[int]:
    """Return the world ranks that share the communicators of `rank`, in order: all, or those that serve each other."""
    return topology.served_trunk_ranks(rank) if topology.every_rank else range(topology.world_size)


def peers(topology: Topology, rank: int) -> tuple[list[int], list[int]]:
    """Return the world ranks to which `rank` sends requests, and those from which it gets some, without itself."""
    shards = range(topology.expert_parallel if topology.is_trunk(rank) else 0)
    serve_it = [topology.pool_rank(shard, rank) for shard in shards]
    served = topology.served_trunk_ranks(rank) if topology.is_pool(rank) else ()
    return [other for other in serve_it if other != rank], [other for other in served if other != rank]


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
        group: A ProcessGroupNCCL that has been connected eagerly.
        ranks: The world ranks in it, in the order of their ranks in the group.
    """

    def __init__(self, group: Any, ranks: Sequence[int]):
        self._group = group
        self._rank_in_group = {rank: place for place, rank in enumerate(ranks)}

    def connect(self, streams: Streams, sends_to: Sequence[int] = (), receives_from: Sequence[int] = ()) -> None:
        """Exchange a first message with all peers of this rank, which do the same, and wait for it.

        NCCL connects two ranks when the first message between them is launched, and until both have launched it, the
        host waits. A header that follows the launch would come too late.
        """
        if not (sends_to or receives_from):
            return
        sends, receives = (
            [(streams.empty(1, dtype=torch.uint8), peer) for peer in peers] for peers in (sends_to, receives_from)
        )
        self.launch(sends, receives).wait()
        streams.record().synchronize()

    def launch(self, sends: Sequence[Message] = (), receives: Sequence[Message] = ()) -> NcclWork:
        """See `Communicator.launch`. `torch.distributed.batch_isend_irecv` makes the same calls."""
        self._group._start_coalescing()
        for operation, messages in ((self._group.send, sends), (self._group.recv, receives)):
            for tensor, peer in messages:
                operation([tensor], self._rank_in_group[peer], 0)
        return NcclWork(self._group._end_coalescing())

    def abort(self) -> None:
        """See `Communicator.abort`."""
        self._group.abort()
