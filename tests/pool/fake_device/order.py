"""Whether a plan can deadlock, from the plan alone: a graph of all launches and runs, without threads and devices.

A node is something that happens once: a thread launches an operation or does something else, the operation starts on
its device, it ends. An edge says that one needs another. If there is no cycle, a step gets to its end, however fast or
slow anything is.

Shards whose messages a trunk rank sends and receives in the same groups are taken together, as one node each for what
happens on all of them. Every need between two such shards is then one of this smaller graph, so a cycle over shards
would be a cycle here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from pool.schedule import SERVE, Kind, PoolSchedule, RequestKey
from pool.topology import Topology

Nodes = NDArray[np.int64]

START, END = 1, 2
"""What is added to the launch of an operation, its first node. What only a host does is a launch without the others."""


class Graph:
    """What happens in a step, and what it needs."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, str]] = []
        self._edges: list[tuple[Nodes, Nodes]] = []
        self.size = 0

    def operations(self, what: str, count: int) -> Nodes:
        """Return the launches of some operations, which start after their launch and end after their start."""
        launches = self.size + 3 * np.arange(count)
        self._blocks.append((self.size, what))
        self.size += 3 * count
        self.need(launches + START, launches)
        self.need(launches + END, launches + START)
        return launches

    def need(self, later: Nodes, earlier: Nodes) -> None:
        """Each of `later` cannot happen before its `earlier`."""
        later, earlier = np.broadcast_arrays(later, earlier)
        self._edges.append((earlier.ravel(), later.ravel()))

    def thread(self, launches: Nodes) -> None:
        """A thread does these one after the other."""
        self.need(launches[1:], launches[:-1])

    def stream(self, launches: Nodes) -> None:
        """A stream runs these one after the other."""
        self.need(launches[1:] + START, launches[:-1] + END)

    def meet(self, sends: Nodes, receives: Nodes) -> None:
        """Sends and their receives end when both have started."""
        self.need(sends + END, receives + START)
        self.need(receives + END, sends + START)

    def cycle(self) -> list[str]:
        """What happens on some cycle, in order; empty if there is none."""
        earlier, later = (np.concatenate(ends) for ends in zip(*self._edges, strict=True))
        edges = csr_matrix((np.ones(len(earlier), np.int8), (earlier, later)), shape=(self.size, self.size))
        count, part_of = connected_components(edges, connection="strong")
        if count == self.size:
            return []
        inside = part_of == np.bincount(part_of).argmax()
        chosen = inside[earlier] & inside[later]
        after: dict[int, list[int]] = {}
        for one, other in zip(earlier[chosen].tolist(), later[chosen].tolist(), strict=True):
            after.setdefault(one, []).append(other)
        start = min(after)
        before: dict[int, int] = {}
        reached = [start]
        for node in reached:  # the shortest way back to the start
            for following in after[node]:
                if following not in before:
                    before[following] = node
                    reached.append(following)
        path = [before[start]]
        while path[-1] != start:
            path.append(before[path[-1]])
        return [self._name(node) for node in reversed(path)]

    def _name(self, node: int) -> str:
        base, what = max(block for block in self._blocks if block[0] <= node)
        return f"{('launch', 'start', 'end')[(node - base) % 3]} of {what} {(node - base) // 3}"


@dataclass
class Segments:
    """The segments of a trunk rank: their lanes, the requests whose answers they need, and which they make (or -1)."""

    lanes: list[int]
    answers: Nodes
    makes: Nodes


class Plan:
    """A schedule in numbers: requests in the order of the pool's slots, and the segments of every trunk rank.

    Attributes:
        slots: (replica, requests) of each slot.
        batches: (slot, requests) of what is served in one launch: the requests of a slot of one kind.
    """

    def __init__(self, topology: Topology, schedule: PoolSchedule):
        self.requests = [key for slot in schedule.slots for key in slot]
        number = {key: place for place, key in enumerate(self.requests)}
        self.slots: list[tuple[int, list[int]]] = []
        for slot in schedule.slots:
            for replica in range(topology.replicas):
                mine = [number[key] for key in slot if topology.replica_for(key.trunk_rank) == replica]
                self.slots += [(replica, mine)] if mine else []
        self.batches: list[tuple[int, list[int]]] = []
        for place, (_, requests) in enumerate(self.slots):
            kinds = [self.requests[r].kind for r in requests]
            self.batches += [
                (place, [r for r, k in zip(requests, kinds, strict=True) if k == kind]) for kind in sorted(set(kinds))
            ]
        self.segments = [self._segments(rank, order) for rank, order in enumerate(schedule.lane_order)]

    def of_trunk(self, rank: int, requests: Iterable[int]) -> list[int]:
        return [r for r in requests if self.requests[r].trunk_rank == rank]

    def _segments(self, rank: int, lane_order: Sequence[int]) -> Segments:
        lane_order = [lane for lane in lane_order if lane != SERVE]
        coming: dict[int, list[int]] = {lane: [] for lane in lane_order}
        for r in self.of_trunk(rank, range(len(self.requests))):
            coming[self.requests[r].lane].append(r)
        for requests in coming.values():  # the last one first
            requests.sort(key=lambda r: _place(self.requests[r]), reverse=True)
        last = dict.fromkeys(coming, -1)
        answers, makes = [], []
        for lane in lane_order:
            answer, left = last[lane], coming[lane]
            more = left and (answer < 0 or self.requests[left[-1]].micro_batch == self.requests[answer].micro_batch)
            last[lane] = left.pop() if more else -1
            answers.append(answer)
            makes.append(last[lane])
        assert not any(coming.values()), "the schedule has requests that no segment makes"
        return Segments(list(lane_order), np.array(answers), np.array(makes))


def _place(key: RequestKey) -> tuple[int, bool, int]:
    """In which order a lane makes its requests: layers upwards in the forward, downwards in the backward."""
    backward = key.kind == Kind.BACKWARD
    return key.micro_batch, backward, -key.layer if backward else key.layer


def order_of_device_wire(topology: Topology, schedule: PoolSchedule, group: int = 8) -> Graph:
    """The order of `pool.wire.device`, with sends that end only when they are received.

    Args:
        group: Messages of a group at most.
    """
    g, plan = Graph(), Plan(topology, schedule)
    count = len(plan.requests)
    parts = range(-(-topology.expert_parallel // group))  # of the shards, one for each group of a trunk rank
    sends = [g.operations(f"the send to shards' part {part} of request", count) for part in parts]
    sent = g.operations("the headers of request", count)
    comes = [g.operations(f"shards' part {part}: the receive of request", count) for part in parts]
    sent_back = [g.operations(f"shards' part {part}: the header of the answer to", count) for part in parts]
    expects = g.operations("waiting for the headers of the answer to", count)
    answers = [g.operations(f"the receive from shards' part {part} of the answer to", count) for part in parts]

    batch_of, answered = np.zeros(count, np.int64), []
    for place, (_, requests) in enumerate(plan.batches):
        batch_of[requests] = place
        answered += requests
    slot_of_batch = np.array([slot for slot, _ in plan.batches])
    replica_of_batch = np.array([plan.slots[slot][0] for slot in slot_of_batch])
    groups = [(b, rs[i : i + group]) for b, (_, rs) in enumerate(plan.batches) for i in range(0, len(rs), group)]
    group_of = np.zeros(count, np.int64)
    for place, (_, requests) in enumerate(groups):
        group_of[requests] = place

    for rank, segments in enumerate(plan.segments):
        computes = g.operations(f"trunk rank {rank}: segment", len(segments.lanes))
        g.thread(computes)
        g.stream(computes)
        needs, makes = segments.answers >= 0, segments.makes >= 0
        made = segments.makes[makes]
        g.need(sends[0][made], computes[makes] + END)  # the sender waits for the event behind the payload
        g.thread(np.stack([*(send[made] for send in sends), sent[made]], 1).ravel())
        g.stream(np.stack([send[made] for send in sends], 1).ravel())
        for answer in answers:  # the main thread waits for their launch, its stream for their end
            g.need(computes[needs], answer[segments.answers[needs]])
            g.need(computes[needs] + START, answer[segments.answers[needs]] + END)
        received = np.array(plan.of_trunk(rank, answered))
        g.need(expects[received], sent[made])  # it waits for as many answers as requests have been sent
        g.thread(np.stack([expects[received], *(answer[received] for answer in answers)], 1).ravel())
        g.stream(np.stack([answer[received] for answer in answers], 1).ravel())
    before: dict[tuple[int, int], int] = {}
    for r in answered:
        lane = plan.requests[r].trunk_rank, plan.requests[r].lane
        before[lane], last = r, before.get(lane, -1)
        if last >= 0:  # the sender waits until the lane's last header has been taken
            for header in sent_back:
                g.need(header[r : r + 1], expects[last : last + 1])

    for part in parts:
        experts = g.operations(f"shards' part {part}: batch", len(plan.batches))
        back = g.operations(f"shards' part {part}: the sends of group", len(groups))
        g.need(comes[part], sent)  # a receive is launched when its header has come
        for answer in answers:
            g.need(answer, sent_back[part])  # and when the headers of all shards have
        g.meet(sends[part], comes[part])
        g.meet(back[group_of], answers[part])
        g.need(back, experts[[batch for batch, _ in groups]] + END)  # the sender waits for the event behind them
        for replica in range(topology.replicas):
            g.thread(comes[part][[r for place, rs in plan.slots if place == replica for r in rs]])
            g.stream(comes[part][[r for place, rs in plan.slots if place == replica for r in rs]])
            mine = replica_of_batch == replica
            g.thread(experts[mine])
            g.stream(experts[mine])
            chosen = [place for place, (batch, _) in enumerate(groups) if mine[batch]]
            steps = [node for place in chosen for node in (back[place], *sent_back[part][groups[place][1]])]
            g.thread(np.array(steps))
            g.stream(back[chosen])
        last_of_slot = np.array([requests[-1] for _, requests in plan.slots])[slot_of_batch]
        g.need(experts, comes[part][last_of_slot])  # the main thread waits for the launch of a slot's receives
        g.need(experts + START, comes[part][last_of_slot] + END)  # and its stream for their end
    return g


def order_of_exchanges(topology: Topology, schedule: PoolSchedule, grouped: bool = True) -> Graph:
    """The order of `pool.wire.exchange`, in which nothing depends on NCCL's running the messages of a group at once.

    Args:
        grouped: Whether a rank's messages of a slot run in NCCL's order, in rounds: in round d it sends to the rank
            that is d ranks ahead, and receives from the one that is d ranks behind. Else all its sends run before all
            its receives.
    """
    g, plan = Graph(), Plan(topology, schedule)
    for replica in range(topology.replicas):
        ranks = [rank for rank in range(topology.trunk_ranks) if topology.replica_for(rank) == replica]
        places = [place for place, (whose, _) in enumerate(plan.slots) if whose == replica]
        batches = [(places.index(place), rs) for place, rs in plan.batches if plan.slots[place][0] == replica]
        batch_of = {r: batch for batch, (_, rs) in enumerate(batches) for r in rs}
        requests, answers = (
            _Exchanges(g, len(ranks), len(places), grouped),
            _Exchanges(g, len(ranks), len(batches), grouped),
        )
        experts = g.operations(f"replica {replica}: a rank's batch", len(ranks) * len(batches)).reshape(len(ranks), -1)
        of_slot = [[batch for batch, (slot, _) in enumerate(batches) if slot == place] for place in range(len(places))]
        for here, rank in enumerate(ranks):
            segments = plan.segments[rank]
            computes = g.operations(f"rank {rank}: segment", len(segments.lanes))
            did: list[int] = []  # by the main thread, and on its stream
            headers: list[int] = []
            segment, slot = 0, 0
            for lane in schedule.lane_order[rank]:
                if lane == SERVE:
                    for batch in of_slot[slot]:
                        did.append(experts[here, batch])
                        requests.done(experts[here, batch], here, slot)
                        headers.append(answers.part(here, batch, experts[here, batch]))
                    slot += 1
                    continue
                did.append(computes[segment])
                if segments.answers[segment] >= 0:
                    answers.done(computes[segment], here, batch_of[segments.answers[segment]])
                if segments.makes[segment] >= 0:
                    made = batches[batch_of[segments.makes[segment]]][0]
                    headers.append(requests.part(here, made, computes[segment]))
                segment += 1
            assert slot == len(places), "the schedule has slots that a rank does not serve"
            g.thread(np.array(did))
            g.stream(np.array(did))
            g.thread(np.array(headers))
        requests.connect()
        answers.connect()
    return g


class _Exchanges:
    """The exchanges of a communicator, one after the other on each of its ranks."""

    def __init__(self, graph: Graph, ranks: int, count: int, grouped: bool):
        self._g, self._ranks, self._count, self._grouped = graph, ranks, count, grouped
        steps = max(ranks - 1, 1) if grouped else 2
        self._expects, self._launches, self._waits = (
            graph.operations(f"a rank's {what} exchange", ranks * count).reshape(ranks, count)
            for what in ("thread at", "launch of", "thread after")
        )
        parts = graph.operations("a rank's step of exchange", ranks * count * steps)
        self._parts = parts.reshape(ranks, count, steps)
        self._headers: dict[int, list[int]] = {}

    def part(self, rank: int, exchange: int, computed: int) -> int:
        """Return the sending of headers of a payload of an exchange."""
        (header,) = self._g.operations(f"rank {rank}'s header for exchange {exchange}", 1)
        self._g.need(header, computed + END)
        self._headers.setdefault(exchange, []).append(header)
        self._g.need(self._waits[rank, exchange], self._expects[:, exchange])  # they have taken the header
        return int(header)

    def done(self, work: int, rank: int, exchange: int) -> None:
        """Some work needs an exchange: its host waits for the launch, its stream for the end."""
        self._g.need(work, self._launches[rank, exchange])
        self._g.need(work + START, self._parts[rank, exchange] + END)

    def connect(self) -> None:
        """Add what an exchange needs, once all headers are known."""
        g = self._g
        for exchange in range(self._count):
            for header in self._headers[exchange]:
                g.need(self._launches[:, exchange], np.array(header))
        g.need(self._parts, self._launches[:, :, None])
        for rank in range(self._ranks):
            g.thread(np.stack([self._expects[rank], self._launches[rank], self._waits[rank]], 1).ravel())
            g.stream(self._parts[rank].ravel())
            for step in range(self._parts.shape[2] if self._ranks > 1 else 0):
                if self._grouped:
                    others = [(rank + step + 1) % self._ranks, (rank - step - 1) % self._ranks]
                    meets = self._parts[others, :, step]
                else:  # a send meets a receive
                    others = [other for other in range(self._ranks) if other != rank]
                    meets = self._parts[others, :, 1 - step]
                for met in meets:
                    g.need(self._parts[rank, :, step] + END, met + START)


def order_of_specimen(topology: Topology, schedule: PoolSchedule, lanes_apart: int, enough_sms: bool = True) -> Graph:
    """The order of `tests.pool.fake_device.specimen`, with sends that end only when they are received.

    Args:
        lanes_apart: How many lanes have streams of their own; others share them, in turn.
        enough_sms: Whether all that waits on a device can be on it at once; else it may have to run everything in the
            order of the launches.
    """
    g, plan = Graph(), Plan(topology, schedule)
    count = len(plan.requests)
    headers = g.operations("the header of request", count)
    sends, comes = g.operations("the send of request", count), g.operations("the receive of request", count)
    backs = g.operations("the send of the answer to", count)
    answers = g.operations("the receive of the answer to", count)
    g.meet(sends, comes)
    g.meet(backs, answers)
    for rank, segments in enumerate(plan.segments):
        computes = g.operations(f"trunk rank {rank}: segment", len(segments.lanes))
        needs = segments.answers >= 0
        g.need(computes[needs], answers[segments.answers[needs]] + END)  # the host waits
        did: list[int] = []
        streams: dict[int, list[int]] = {}
        for lane, compute, r in zip(segments.lanes, computes, segments.makes, strict=True):
            did += [compute, headers[r], sends[r], answers[r]] if r >= 0 else [compute]
            streams.setdefault(-1, []).append(compute)
            streams.setdefault(lane % lanes_apart, []).extend([sends[r], answers[r]] if r >= 0 else [])
            if r >= 0:
                g.need(sends[r : r + 1] + START, compute + END)
        g.thread(np.array(did))
        if not enough_sms:
            streams = {0: [node for node in did if node not in set(headers)]}
        for launches in streams.values():
            g.stream(np.array(launches))
    experts = g.operations("slot", len(plan.slots))
    g.need(comes, headers)
    for replica in range(topology.replicas):
        mine = [place for place, (whose, _) in enumerate(plan.slots) if whose == replica]
        receives = [comes[r] for place in mine for r in plan.slots[place][1]]
        g.thread(np.array(receives))
        g.thread(experts[mine])
        for slot, following in pairwise(mine):
            g.need(comes[plan.slots[following][1]], comes[plan.slots[slot][1][-1:]] + END)
    for place, (_, requests) in enumerate(plan.slots):
        g.need(experts[place : place + 1], comes[requests] + END)  # the receiver waits for each of them
        g.need(backs[requests] + START, experts[place : place + 1] + END)
    return g
