"""Whether a plan can deadlock, from the plan alone: a graph of all launches and runs, without threads and devices.

A node is something that happens once: a thread launches an operation, it starts on its device, it ends. An edge says
that one needs another. If there is no cycle, a step gets to its end, however fast or slow anything is.

The shards of a pool are taken together, as one node each for what happens on all of them. Every need between two shards
is then one of this smaller graph, so a cycle over shards would be a cycle here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from pool.schedule import Kind, PoolSchedule, RequestKey
from pool.topology import Topology

Name = tuple[str, int]
"""What an operation is, and the number of its request, slot or segment."""

LAUNCH, START, END, DONE = range(4)  # the last for what a host does
MOMENTS = ("launch", "start", "end", "")


class Graph:
    """What happens in a step, and what it needs.

    Args:
        queues: Hardware queues of a device for its streams, which take them in turn.
        serial: Whether devices may have to run their operations one after the other, for want of SMs.
    """

    def __init__(self, queues: int = 32, serial: bool = False):
        self._queues, self._serial = queues, serial
        self._numbers: dict[Name, int] = {}
        self._from: list[int] = []
        self._to: list[int] = []
        self._last: dict[tuple[object, ...], int] = {}
        self.streams: dict[object, dict[str, str]] = {}  # of a device: which thread launches on each

    def at(self, moment: int, name: Name) -> int:
        """The node of a moment of an operation, or of what a host does."""
        return 4 * self._numbers.setdefault(name, len(self._numbers)) + moment

    def need(self, later: int, *earlier: int) -> None:
        """`later` cannot happen before all of `earlier`."""
        self._from += earlier
        self._to += [later] * len(earlier)

    def _next(self, which: tuple[object, ...], node: int, end: int) -> None:
        """`node` comes after the `end` of what was last in a row of things."""
        if which in self._last:
            self.need(node, self._last[which])
        self._last[which] = end

    def host(
        self, device: object, thread: str, name: Name, needs: Iterable[int] = (), moment: int = DONE
    ) -> int:
        """The next thing that a thread of a device's host does, once `needs` have happened."""
        node = self.at(moment, name)
        self.need(node, *needs)
        self._next((device, thread), node, node)
        return node

    def launch(
        self, device: object, thread: str, stream: str, name: Name, needs: Iterable[int] = (), after: Iterable[int] = ()
    ) -> None:
        """The next thing that a thread does is to launch an operation on a stream.

        Args:
            needs: What the host waits for before.
            after: What the device waits for.
        """
        launch = self.host(device, thread, name, needs, LAUNCH)
        start, end = launch - LAUNCH + START, launch - LAUNCH + END
        self.need(start, launch, *after)
        self.need(end, start)
        self._next((device, self._queue(device, thread, stream)), start, end)

    def _queue(self, device: object, thread: str, stream: str) -> int:
        streams = self.streams.setdefault(device, {"compute": "main"})
        streams.setdefault(stream, thread)
        if self._serial or stream == "compute":
            return -1  # the default stream has a queue of its own
        return list(streams).index(stream) % self._queues

    def cycle(self) -> list[str]:
        """What happens on some cycle, in order; empty if there is none."""
        size = 4 * len(self._numbers)
        edges = csr_matrix((np.ones(len(self._from), np.int8), (self._from, self._to)), shape=(size, size))
        count, part_of = connected_components(edges, connection="strong")
        if count == size:
            return []  # numbers that are not used are parts of their own
        largest = part_of == np.bincount(part_of).argmax()
        after: dict[int, list[int]] = {}
        for earlier, later in zip(self._from, self._to, strict=True):
            if largest[earlier] and largest[later]:
                after.setdefault(earlier, []).append(later)
        start = min(after)
        before: dict[int, int] = {}
        reached = [start]
        for node in reached:  # the shortest way back to the start
            for later in after[node]:
                if later not in before:
                    before[later] = node
                    reached.append(later)
        path = [before[start]]
        while path[-1] != start:
            path.append(before[path[-1]])
        names = list(self._numbers)
        return [f"{MOMENTS[node % 4]} {names[node // 4][0]} {names[node // 4][1]}".strip() for node in reversed(path)]

    def __len__(self) -> int:
        return len(self._numbers)


class Plan:
    """A schedule in numbers: requests in the order of the pool's slots, and the segments of every trunk rank."""

    def __init__(self, topology: Topology, schedule: PoolSchedule):
        self.requests = [key for slot in schedule.slots for key in slot]
        number = {key: place for place, key in enumerate(self.requests)}
        self.slots: list[tuple[int, list[int]]] = []  # (replica, requests)
        for slot in schedule.slots:
            for replica in range(topology.replicas):
                mine = [number[key] for key in slot if key.trunk_rank % topology.replicas == replica]
                self.slots += [(replica, mine)] if mine else []
        ranks = range(topology.trunk_ranks)
        self.segments = {rank: self._segments(rank, schedule.lane_order[rank], number) for rank in ranks}

    def _segments(
        self, rank: int, lane_order: tuple[int, ...], number: dict[RequestKey, int]
    ) -> list[tuple[int, int | None, int | None]]:
        """(lane, the request whose answer it needs, the request that it makes) of each segment."""
        coming: dict[int, list[int]] = {}
        for key in self.requests:
            if key.trunk_rank == rank:
                coming.setdefault(key.lane, []).append(number[key])
        for requests in coming.values():
            requests.sort(key=lambda r: (self.requests[r].micro_batch, _place(self.requests[r])))
            requests.reverse()
        last: dict[int, int | None] = {}
        segments = []
        for lane in lane_order:
            answer, left = last.get(lane), coming[lane]
            ends = answer is not None and (
                not left or self.requests[left[-1]].micro_batch != self.requests[answer].micro_batch
            )
            last[lane] = None if ends else left.pop()
            segments.append((lane, answer, last[lane]))
        assert not any(coming.values()), "the schedule has requests that no segment makes"
        return segments


def _place(key: RequestKey) -> int:
    """The place of a request in its micro-batch: layers up in the forward, and down in the backward."""
    return -key.layer if key.kind == Kind.BACKWARD else key.layer - 1_000_000


def order_of_specimen(topology: Topology, schedule: PoolSchedule, queues: int = 32, serial: bool = False) -> Graph:
    """The order of `tests.pool.fake_device.specimen`, with sends that end when they are received.

    Args:
        queues: Streams of a device for communicators, divided by the number of shards, which are taken together.
        serial: See `Graph`.
    """
    g, plan = Graph(queues, serial), Plan(topology, schedule)
    for rank, segments in plan.segments.items():
        number = 1_000_000 * rank
        for lane, answer, request in segments:
            number += 1
            segment = ("segment", number)
            waits = [] if answer is None else [g.at(END, ("answer's receive", answer))]
            g.launch(f"trunk {rank}", "main", "compute", segment, needs=waits)
            if request is None:
                continue
            pair, key = f"lane {lane}", plan.requests[request]
            computed = [g.at(END, segment)]
            g.host(f"trunk {rank}", "main", ("header", request), () if key.kind == Kind.BACKWARD else computed)
            g.launch(f"trunk {rank}", "main", pair, ("request's send", request), after=computed)
            g.launch(f"trunk {rank}", "main", pair, ("answer's receive", request))
    for number, (replica, requests) in enumerate(plan.slots):
        pool, experts = f"pool {replica}", ("experts", number)
        pairs = {r: f"trunk {plan.requests[r].trunk_rank} lane {plan.requests[r].lane}" for r in requests}
        for r in requests:
            headers = [g.at(DONE, ("header", r))]
            g.launch(pool, "receiver", pairs[r], ("request's receive", r), needs=headers)
        came = [g.at(END, ("request's receive", r)) for r in requests]
        g.host(pool, "receiver", ("slot", number), came)
        g.launch(pool, "main", "compute", experts, needs=[g.at(DONE, ("slot", number))])
        for r in requests:
            g.launch(pool, "main", pairs[r], ("answer's send", r), after=[g.at(END, experts)])
    _meet(g, len(plan.requests))
    return g


def _meet(g: Graph, requests: int) -> None:
    """A send and its receive end when both have started."""
    for r in range(requests):
        for what in ("request", "answer"):
            for one, other in (("send", "receive"), ("receive", "send")):
                g.need(g.at(END, (f"{what}'s {one}", r)), g.at(START, (f"{what}'s {other}", r)))
