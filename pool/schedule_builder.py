"""The simulator that makes the service plan: trunk ranks with lanes on one side, the pool on the other.

It runs a step on nominal costs. A trunk rank works on the lane that has been ready longest; the pool, whenever it is
free, serves everything that waits in one slot. What comes out is an order that a real run can follow without a
deadlock, since it is the order of one possible run.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pool.schedule import Kind, PoolSchedule, RequestKey, Slot
from pool.topology import Topology


@dataclass(frozen=True)
class Costs:
    """Nominal times, in one unit of any size.

    Attributes:
        trunk_layer: a trunk rank's forward of one layer of a micro-batch; its backward takes twice that.
        head: forward of the head and the loss; forward and backward together take three times that.
        pool_layer: a shard's forward of one request; its input gradients take as long, its weight gradients too.
        slot: a launch, however small: the weights' way through memory.
        transfer: a request's or an answer's way over the wire.
    """

    trunk_layer: float
    head: float
    pool_layer: float
    slot: float
    transfer: float


@dataclass(frozen=True)
class Segment:
    """A piece of trunk work and the request that it ends with: None at a micro-batch's end."""

    cost: float
    kind: Kind | None
    layer: int


def training_segments(costs: Costs, layers: int) -> list[Segment]:
    """A micro-batch's way through forward and backward; segment `layers` is the head with the loss and its backward."""
    segments = [Segment(costs.trunk_layer, Kind.FORWARD, layer) for layer in range(layers)]
    cost = 3 * costs.head
    for layer in reversed(range(layers)):
        segments.append(Segment(cost, Kind.BACKWARD, layer))
        cost = 2 * costs.trunk_layer
    return [*segments, Segment(cost, None, 0)]


def _forward_only(costs: Costs, layers: int) -> list[Segment]:
    segments = [Segment(costs.trunk_layer, Kind.FORWARD_ONLY, layer) for layer in range(layers)]
    return [*segments, Segment(costs.head, None, 0)]


def training_plan(
    topology: Topology, layers: int, micro_batches: int, lanes: int, stagger: bool, costs: Costs
) -> PoolSchedule:
    """The plan of one optimizer step.

    With `stagger` trunk rank t starts t / T of a micro-batch later than trunk rank 0.
    """
    segments = training_segments(costs, layers)
    delay = sum(s.cost for s in segments) / topology.trunk_ranks if stagger else 0.0
    return _plan(topology, segments, micro_batches, lanes, delay, costs)


def evaluation_plan(topology: Topology, layers: int, micro_batches: int, lanes: int, costs: Costs) -> PoolSchedule:
    """The plan of forwards that the pool keeps nothing of."""
    return _plan(topology, _forward_only(costs, layers), micro_batches, lanes, 0.0, costs)


def _plan(
    topology: Topology, segments: list[Segment], micro_batches: int, lanes: int, delay: float, costs: Costs
) -> PoolSchedule:
    """Replicas serve different trunk ranks and know nothing of each other: one simulation each."""
    replicas = topology.replicas
    order: dict[int, list[int]] = {}
    slots: list[Slot] = []
    seconds = busy = 0.0
    for replica in range(replicas):
        trunk_ranks = range(replica, topology.trunk_ranks, replicas)
        run = _Simulation(trunk_ranks, segments, micro_batches, lanes, delay, costs)
        run.run()
        slots += run.slots
        seconds = max(seconds, run.now)
        busy += run.pool_busy / replicas
        order |= {t: trunk.order for t, trunk in run.trunks.items()}
    return PoolSchedule(
        slots=tuple(slots),
        lane_order=tuple(tuple(order[t]) for t in range(topology.trunk_ranks)),
        seconds=seconds,
        trunk_busy=micro_batches * sum(s.cost for s in segments) / seconds,
        pool_busy=busy / seconds,
    )


@dataclass
class _Trunk:
    """A trunk rank: what its lanes hold, and what it has done."""

    free_at: float
    ready: list[tuple[float, int, int]]  # (since when, micro-batch, lane): lanes that could run
    position: list[int]  # next segment, by lane
    next_micro_batch: int
    order: list[int] = field(default_factory=list)


class _Simulation:
    """One replica of every shard and the trunk ranks it serves, in simulated time."""

    def __init__(
        self,
        trunk_ranks: Sequence[int],
        segments: list[Segment],
        micro_batches: int,
        lanes: int,
        delay: float,
        costs: Costs,
    ):
        self._segments, self._micro_batches, self._costs = segments, micro_batches, costs
        self.now = 0.0
        self.slots: list[Slot] = []
        self.pool_busy = 0.0
        self._waiting: list[RequestKey] = []
        self._stashed = 0
        self._pool_free = True
        self._events: list[tuple[float, int, str, Any]] = []
        self._numbers = itertools.count()
        self._pool_free_at = 0.0
        self._backlog = 0.0  # of weight gradients, in units of time
        # Many requests' weight gradients in one product an expert, but two products a micro-batch.
        self._cut_at = max(1, len(trunk_ranks) * sum(s.kind == Kind.BACKWARD for s in segments) // 2)
        lanes = min(lanes, micro_batches)
        self.trunks = {}
        for t in trunk_ranks:
            ready = [(delay * t, lane, lane) for lane in range(lanes)]
            self.trunks[t] = _Trunk(delay * t, ready, [0] * lanes, lanes)
            self._at(delay * t, "trunk", t)

    def _at(self, time: float, what: str, subject: Any = None) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), what, subject))

    def run(self) -> None:
        """Simulate to the end. Events at the same time happen in the order in which they were foreseen."""
        while self._events:
            self.now, _, what, subject = heapq.heappop(self._events)
            if what == "trunk":
                self._run_trunk(subject)
            elif what == "answer":
                trunk = self.trunks[subject.trunk_rank]
                heapq.heappush(trunk.ready, (self.now, subject.micro_batch, subject.lane))
                self._run_trunk(subject.trunk_rank)
            elif what == "arrival":
                self._waiting.append(subject)
                self._at(self.now, "serve")  # after all arrivals of this moment
            else:
                self._pool_free |= what == "free"
                self._serve()
        self._cut()
        self.pool_busy += self._backlog
        ends = [trunk.free_at for trunk in self.trunks.values()]  # a replica may serve nobody
        self.now = max(*ends, self._pool_free_at + self._backlog) if ends else 0.0

    def _run_trunk(self, rank: int) -> None:
        """Run the segment of the lane that has been ready longest, if the rank is free and there is one."""
        trunk = self.trunks[rank]
        if self.now < trunk.free_at or not trunk.ready:
            return
        _, micro_batch, lane = heapq.heappop(trunk.ready)
        segment = self._segments[trunk.position[lane]]
        trunk.order.append(lane)
        trunk.position[lane] += 1
        trunk.free_at = self.now + segment.cost
        if segment.kind is not None:
            key = RequestKey(rank, lane, micro_batch, segment.layer, segment.kind)
            self._at(trunk.free_at + self._costs.transfer, "arrival", key)
        elif trunk.next_micro_batch < self._micro_batches:
            heapq.heappush(trunk.ready, (trunk.free_at, trunk.next_micro_batch, lane))
            trunk.position[lane] = 0
            trunk.next_micro_batch += 1
        self._at(trunk.free_at, "trunk", rank)

    def _serve(self) -> None:
        """Serve all that waits in one slot. Weight gradients are cut when there are enough, and made in the gaps."""
        if not self._pool_free or not self._waiting:
            return
        done = min(self._backlog, self.now - self._pool_free_at)
        self._backlog -= done
        requests, self._waiting = tuple(self._waiting), []
        seconds = self._costs.slot + len(requests) * self._costs.pool_layer
        self.pool_busy += done + seconds
        self._pool_free, self._pool_free_at = False, self.now + seconds
        self._at(self._pool_free_at, "free")
        for key in requests:
            self._at(self._pool_free_at + self._costs.transfer, "answer", key)
        self.slots.append(requests)
        self._stashed += sum(key.kind == Kind.BACKWARD for key in requests)
        if self._stashed >= self._cut_at:
            self.slots.append(())
            self._cut()

    def _cut(self) -> None:
        if self._stashed:
            self._backlog += self._costs.slot + self._stashed * self._costs.pool_layer
            self._stashed = 0
