"""Builds the schedule of a step in simulated time.

A trunk rank works on the lane that has been ready longest. Whenever the pool is free, it serves all waiting requests in
one slot. Where every rank has both roles, all ranks follow the same order: they run the lanes that are ready, then they
serve what waits. A real run can follow the resulting order without a deadlock, because it is the order of one possible
run. How long a step takes when it follows a schedule is computed by `pool.schedule_timing`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from pool.schedule import SERVE, Kind, PoolSchedule, RequestKey, Slot
from pool.topology import Topology


@dataclass(frozen=True)
class Costs:
    """Estimated times, all in the same unit; any unit will do.

    On a GPU the host launches work that the device does later. The host may launch a piece as soon as the header of the
    message that it needs has come; the device also waits for the payload, and is done with the piece no earlier than
    the host has launched all of it. On a CPU the host does the work itself: all launch times are 0.

    Attributes:
        trunk_layer: Forward of one layer of a micro-batch on a trunk rank; its backward takes twice as long.
        head: Forward of the head and the loss; forward and backward together take three times as long.
        pool_layer: Forward of one request on a shard; its input gradients and its weight gradients take as long each.
        slot: Fixed cost of a merged launch.
        transfer: Time that a request or an answer spends on the wire, up to the end of its payload.
        payload: The part of it from the arrival of the header on.
        weights: What the requests of one kind in a merged launch cost at least, as the launch reads all weights.
        flush: What a launch of weight gradients costs beyond `slot`, as it adds to all gradients of the shard.
        trunk_launch, head_launch: Host's time to launch what `trunk_layer` and `head` compute.
        slot_launch: Host's time to launch the merged requests of one kind.
    """

    trunk_layer: float
    head: float
    pool_layer: float
    slot: float
    transfer: float
    payload: float = 0.0
    weights: float = 0.0
    flush: float = 0.0
    trunk_launch: float = 0.0
    head_launch: float = 0.0
    slot_launch: float = 0.0


@dataclass(frozen=True)
class Segment:
    """A piece of trunk work and the request that ends it.

    Attributes:
        cost: Time that the device computes.
        launch: Time that the host needs to launch it.
        kind: None at the end of a micro-batch.
        layer: Layer of the request.
    """

    cost: float
    launch: float
    kind: Kind | None
    layer: int


class Processor:
    """A rank's host, which launches work, and its device, which does it in the order of the launches.

    Attributes:
        free_at: When the device has done all work.
    """

    def __init__(self, start: float):
        self.free_at = start
        self._launched_at = start

    def run(self, header: float, payload: float, launch: float, cost: float) -> tuple[float, float]:
        """Do a piece of work, and return when the device starts it and how long that takes.

        Args:
            header, payload: When the host, and when the device, has what the work needs.
            launch, cost: How long the host, and the device, needs for it.
        """
        begun = max(self._launched_at, header)
        self._launched_at = begun + launch
        start = max(self.free_at, payload, begun)
        taken = max(cost, self._launched_at - start)
        self.free_at = start + taken
        return start, taken


def training_segments(costs: Costs, layers: int) -> list[Segment]:
    """Forward and backward of a micro-batch; segment number `layers` is the head, the loss and their backward."""
    segments = [Segment(costs.trunk_layer, costs.trunk_launch, Kind.FORWARD, layer) for layer in range(layers)]
    cost, launch = 3 * costs.head, 3 * costs.head_launch
    for layer in reversed(range(layers)):
        segments.append(Segment(cost, launch, Kind.BACKWARD, layer))
        cost, launch = 2 * costs.trunk_layer, 2 * costs.trunk_launch
    return [*segments, Segment(cost, launch, None, 0)]


def staggered_starts(topology: Topology, layers: int, costs: Costs) -> list[float]:
    """When each trunk rank starts: rank t of T waits for t / T of the trunk's work on a micro-batch.

    Where every rank has both roles, all start at 0: inside its head, which takes long, a rank serves nobody.
    """
    if topology.every_rank:
        return [0.0] * topology.trunk_ranks
    work = sum(max(segment.cost, segment.launch) for segment in training_segments(costs, layers))
    delay = work / topology.trunk_ranks
    return [delay * trunk_rank for trunk_rank in range(topology.trunk_ranks)]


def build_training_schedule(
    topology: Topology, layers: int, micro_batches: int, lanes: int, stagger: bool, costs: Costs
) -> PoolSchedule:
    """Build the schedule of one optimizer step.

    Args:
        topology: A layout with pool ranks.
        layers: Number of layers.
        micro_batches: Micro-batches per trunk rank.
        lanes: Micro-batches that a trunk rank has in flight at most.
        stagger: Whether trunk ranks start one after the other, see `staggered_starts`.
        costs: Estimated times, which decide the order.
    """
    starts_T = staggered_starts(topology, layers, costs) if stagger else [0.0] * topology.trunk_ranks
    return _build(topology, training_segments(costs, layers), micro_batches, lanes, starts_T, costs)


def build_evaluation_schedule(
    topology: Topology, layers: int, micro_batches: int, lanes: int, costs: Costs
) -> PoolSchedule:
    """Build the schedule of forwards without backwards; the arguments are those of `build_training_schedule`."""
    segments = [Segment(costs.trunk_layer, costs.trunk_launch, Kind.FORWARD_ONLY, layer) for layer in range(layers)]
    segments.append(Segment(costs.head, costs.head_launch, None, 0))
    return _build(topology, segments, micro_batches, lanes, [0.0] * topology.trunk_ranks, costs)


def _build(
    topology: Topology, segments: list[Segment], micro_batches: int, lanes: int, starts_T: Sequence[float], costs: Costs
) -> PoolSchedule:
    """Replicas serve different trunk ranks and are independent of each other, so each is simulated on its own."""
    if topology.every_rank:
        return _build_every_rank(topology, segments, micro_batches, lanes, costs)
    slots: list[Slot] = []
    order: dict[int, tuple[int, ...]] = {}
    for replica in range(topology.replicas):
        starts = {t: starts_T[t] for t in range(replica, topology.trunk_ranks, topology.replicas)}
        simulation = _Dedicated(starts, segments, micro_batches, lanes, costs)
        simulation.run()
        slots += simulation.slots
        order |= {t: tuple(trunk.order) for t, trunk in simulation.trunks.items()}
    return PoolSchedule(tuple(slots), tuple(order[t] for t in range(topology.trunk_ranks)))


def _build_every_rank(
    topology: Topology, segments: list[Segment], micro_batches: int, lanes: int, costs: Costs
) -> PoolSchedule:
    """All ranks do the same at the same time, so one is simulated, and slots hold the same requests of all of them."""
    simulation = _EveryRank(topology.expert_parallel, segments, micro_batches, lanes, costs)
    simulation.run()
    slots = (
        tuple(
            RequestKey(rank, key.lane, key.micro_batch, key.layer, key.kind)
            for key in slot
            for rank in range(topology.trunk_ranks)
        )
        for slot in simulation.slots
    )
    return PoolSchedule(tuple(slots), (tuple(simulation.trunks[0].order),) * topology.trunk_ranks)


@dataclass
class _Trunk:
    """A trunk rank: the state of its lanes and the order in which it has run them."""

    processor: Processor
    ready: list[tuple[float, int, int, float]]  # of lanes that could run: since when, micro-batch, lane, header's time
    position: list[int]  # next segment of each lane
    next_micro_batch: int
    order: list[int] = field(default_factory=list)


class _Simulation:
    """One replica of every shard, and the trunk ranks that it serves.

    Attributes:
        senders: Number of ranks for which each of the simulated trunk ranks stands.
    """

    senders = 1

    def __init__(self, starts: dict[int, float], segments: list[Segment], micro_batches: int, lanes: int, costs: Costs):
        self._segments, self._micro_batches, self._costs = segments, micro_batches, costs
        self._now = 0.0
        self.slots: list[Slot] = []
        self._waiting: list[RequestKey] = []
        self._last_header = 0.0  # when that of the last request came
        self._deferred = 0  # backward requests since the last seal
        self._events: list[tuple[float, bool, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        # Twice per micro-batch: each weight gradient then covers many requests, and its buffers stay bounded.
        self._seal_at = max(1, len(starts) * sum(s.kind == Kind.BACKWARD for s in segments) // 2)
        lanes = min(lanes, micro_batches)
        self.trunks: dict[int, _Trunk] = {}
        for rank, start in starts.items():
            ready = [(start, lane, lane, start) for lane in range(lanes)]
            self.trunks[rank] = _Trunk(Processor(start), ready, [0] * lanes, lanes)

    def _at(self, time: float, event: Callable[[], None], last: bool = False) -> None:
        """Let something happen at a time; with `last` after everything else of that time."""
        heapq.heappush(self._events, (time, last, next(self._numbers), event))

    def run(self) -> None:
        """Simulate to the end. Events at the same time happen in the order in which they were scheduled."""
        while self._events:
            self._now, _, _, event = heapq.heappop(self._events)
            event()

    def _run_segment(self, rank: int) -> None:
        """Run a segment of the lane that has been ready longest."""
        trunk = self.trunks[rank]
        _, micro_batch, lane, header = heapq.heappop(trunk.ready)
        segment = self._segments[trunk.position[lane]]
        trunk.order.append(lane)
        trunk.position[lane] += 1
        trunk.processor.run(header, self._now, segment.launch, segment.cost)
        free_at = trunk.processor.free_at
        if segment.kind is not None:
            key = RequestKey(rank, lane, micro_batch, segment.layer, segment.kind)
            self._at(free_at + self._costs.transfer, partial(self._arrive, key))
        elif trunk.next_micro_batch < self._micro_batches:
            heapq.heappush(trunk.ready, (free_at, trunk.next_micro_batch, lane, self._now))
            trunk.position[lane] = 0
            trunk.next_micro_batch += 1

    def _arrive(self, key: RequestKey) -> None:
        self._waiting.append(key)
        self._last_header = self._now - self._costs.payload

    def _open_slot(self) -> tuple[Slot, float, float]:
        """Make a slot of all waiting requests, and seal weight gradients if there are enough.

        Returns:
            The slot, and the launch time and cost of serving it.
        """
        requests, self._waiting = tuple(self._waiting), []
        self.slots.append(requests)
        self._deferred += sum(key.kind == Kind.BACKWARD for key in requests)
        if self._deferred >= self._seal_at:
            self.slots.append(())
            self._deferred = 0
        c, kinds = self._costs, Counter(key.kind for key in requests)
        cost = c.slot + sum(max(c.weights, self.senders * number * c.pool_layer) for number in kinds.values())
        return requests, len(kinds) * c.slot_launch, cost

    def _answer(self, key: RequestKey) -> None:
        ready = (self._now, key.micro_batch, key.lane, self._now - self._costs.payload)
        heapq.heappush(self.trunks[key.trunk_rank].ready, ready)


class _Dedicated(_Simulation):
    """The shards are taken as one server, which is not one of the trunk ranks."""

    def __init__(self, starts: dict[int, float], segments: list[Segment], micro_batches: int, lanes: int, costs: Costs):
        super().__init__(starts, segments, micro_batches, lanes, costs)
        self._pool = Processor(0.0)
        self._pool_free = True
        for rank, start in starts.items():
            self._at(start, partial(self._run_trunk, rank))

    def _run_trunk(self, rank: int) -> None:
        """Run a segment if the rank is free and a lane is ready."""
        trunk = self.trunks[rank]
        if self._now >= trunk.processor.free_at and trunk.ready:
            self._run_segment(rank)
            self._at(trunk.processor.free_at, partial(self._run_trunk, rank))

    def _arrive(self, key: RequestKey) -> None:
        super()._arrive(key)
        self._at(self._now, self._serve)  # after all other arrivals of this moment

    def _serve(self) -> None:
        """Serve all waiting requests in one slot if the pool is free."""
        if not self._pool_free or not self._waiting:
            return
        self._pool_free = False
        requests, launch, cost = self._open_slot()
        self._pool.run(self._last_header, self._now, launch, cost)
        self._at(self._pool.free_at, self._finish_slot)
        for key in requests:
            self._at(self._pool.free_at + self._costs.transfer, partial(self._answer, key))

    def _finish_slot(self) -> None:
        self._pool_free = True
        self._serve()

    def _answer(self, key: RequestKey) -> None:
        super()._answer(key)
        self._run_trunk(key.trunk_rank)


class _EveryRank(_Simulation):
    """One rank, which runs its lanes and serves a shard. It stands for all ranks of the replica, which do the same."""

    def __init__(self, ranks: int, segments: list[Segment], micro_batches: int, lanes: int, costs: Costs):
        super().__init__({0: 0.0}, segments, micro_batches, lanes, costs)
        self.senders = ranks
        self._at(0.0, self._proceed)

    def _proceed(self) -> None:
        """If the rank is free, run a lane that is ready, else serve all waiting requests in one slot."""
        trunk = self.trunks[0]
        if self._now < trunk.processor.free_at:
            return
        if trunk.ready:
            self._run_segment(0)
        elif self._waiting:
            requests, launch, cost = self._open_slot()
            trunk.order.append(SERVE)
            trunk.processor.run(self._last_header, self._now, launch, cost)
            for key in requests:
                self._at(trunk.processor.free_at + self._costs.transfer, partial(self._answer, key))
        else:
            return
        self._at(trunk.processor.free_at, self._proceed, last=True)

    def _arrive(self, key: RequestKey) -> None:
        super()._arrive(key)
        self._at(self._now, self._proceed, last=True)

    def _answer(self, key: RequestKey) -> None:
        super()._answer(key)
        self._at(self._now, self._proceed, last=True)
