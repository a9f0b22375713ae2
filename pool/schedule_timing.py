"""How long an optimizer step takes when it follows a schedule; shards may have different amounts of work.

Each pool rank serves its slots in order at its own pace, an answer is complete when the last shard has answered, and a
trunk rank waits for the lane that is next. The times of a step can therefore be computed slot by slot, over all shards
of a replica at once. Where every rank has both roles, its trunk and its shard take turns on one processor.

Letters: L layers, M experts in the pool, S shards, T trunk ranks, P pool ranks, I intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pool.schedule import SERVE, Kind, PoolSchedule, RequestKey
from pool.schedule_builder import Costs, Processor, Segment, training_segments
from pool.topology import Topology

if TYPE_CHECKING:
    from pool.placement import Placement

Floats = NDArray[np.float64]


class Work(IntEnum):
    """What a rank does in an interval."""

    TRUNK_FORWARD = 0
    TRUNK_BACKWARD = 1
    HEAD = 2
    POOL_FORWARD = 3
    POOL_BACKWARD = 4
    WEIGHT_GRADIENTS = 5


@dataclass(frozen=True)
class Intervals:
    """When ranks work. The intervals of one rank are in order and do not overlap.

    Attributes:
        rank_I: World ranks.
        start_I, end_I: Times since the start of the step, in the unit of the costs.
        work_I: Values of `Work`.
    """

    rank_I: NDArray[np.int32]
    start_I: Floats
    end_I: Floats
    work_I: NDArray[np.int8]


@dataclass(frozen=True)
class StepTiming:
    """The times of one optimizer step. Rows are counted in requests: at an even load a shard gets 1 of each request.

    Attributes:
        seconds: Time until the last trunk rank and the last weight gradients are done, in the unit of the costs.
        trunk_busy_T, pool_busy_P: Share of the step during which each rank works in each of its roles.
        imbalance: Rows of the pool rank that gets most, over the mean of all pool ranks.
        peak_open_T: Most micro-batches that each trunk rank has in flight at a time.
        peak_kept_P: Most rows of forwards that each pool rank keeps for their backward.
        peak_deferred_P: Most rows whose weight gradients each pool rank has still to compute.
        intervals: When each rank works; empty unless asked for.
    """

    seconds: float
    trunk_busy_T: Floats
    pool_busy_P: Floats
    imbalance: float
    peak_open_T: NDArray[np.int64]
    peak_kept_P: Floats
    peak_deferred_P: Floats
    intervals: Intervals


def shard_loads(load_LM: NDArray[np.integer], placement: Placement) -> Floats:
    """Share of each layer's assignments that goes to each shard (L, S); even for a layer without assignments.

    Args:
        load_LM: Assignments by layer and global expert (L, M); 0 for experts that a layer cannot reach.
        placement: Which experts each shard holds.
    """
    layers, experts = load_LM.shape
    assert experts == placement.num_experts, f"counts of {experts} experts, a placement of {placement.num_experts}"
    load_LS: Floats = load_LM[:, placement.order].reshape(layers, placement.shards, -1).sum(axis=2, dtype=np.float64)
    load_LS[load_LS.sum(axis=1) == 0] = 1.0
    load_LS /= load_LS.sum(axis=1, keepdims=True)
    return load_LS


def time_schedule(
    schedule: PoolSchedule,
    topology: Topology,
    layers: int,
    costs: Costs,
    load_LS: Floats | None = None,
    record: bool = False,
    starts_T: Sequence[float] | None = None,
    most_deferred: float = math.inf,
) -> StepTiming:
    """Compute the times of an optimizer step that follows a schedule.

    A shard's launch takes `costs.slot` plus, for each request, S * load * `costs.pool_layer`; for those of one kind at
    least `costs.weights`. Sealed weight gradients are computed while a shard waits for requests, when more than
    `most_deferred` are kept, and at the end of the step.

    Args:
        schedule: The schedule of an optimizer step for the same topology and layers.
        topology: A layout with pool ranks.
        load_LS: Share of each layer's assignments that goes to each shard (L, S), rows sum to 1; None means even.
        record: Whether to return the intervals.
        starts_T: When each trunk rank starts; None means that all start at 0, as all do that have both roles.
        most_deferred: Rows whose weight gradients a shard defers at most, in requests at an even load.
    """
    shards = topology.expert_parallel
    rows_LS = np.ones((layers, shards)) if load_LS is None else shards * load_LS
    assert rows_LS.shape == (layers, shards) and not topology.colocated
    log: _Log | None = [] if record else None
    segments = training_segments(costs, layers)
    starts_T = starts_T or [0.0] * topology.trunk_ranks
    replicas = [
        _Replica(topology.first_pool_rank + r * shards, rows_LS, costs, most_deferred, log)
        for r in range(topology.replicas)
    ]
    replica_T = [topology.replica_for(t) for t in range(topology.trunk_ranks)]
    trunks: list[_Trunk] = []
    for t, order in enumerate(schedule.lane_order):
        both = topology.every_rank
        processor = _SharedProcessor(replicas[replica_T[t]], topology.shard(t)) if both else Processor(starts_T[t])
        trunks.append(_Trunk(t, order, segments, processor, costs.payload, log))
    members = [[trunk for trunk, r in zip(trunks, replica_T, strict=True) if r == n] for n in range(len(replicas))]
    transfer = 0.0 if topology.every_rank and shards == 1 else costs.transfer
    for trunk in trunks:
        trunk.advance()
    for slot in schedule.slots:
        if not slot:
            for replica in replicas:
                replica.seal()
        parts: dict[int, list[RequestKey]] = {}
        for key in slot:
            parts.setdefault(replica_T[key.trunk_rank], []).append(key)
        for r, keys in parts.items():
            arrival = max([trunks[key.trunk_rank].take(key) for key in keys]) + transfer
            answer = replicas[r].serve(keys, arrival) + transfer
            replicas[r].make_room()
            for key in keys:
                trunks[key.trunk_rank].answer(key.lane, answer)
            for trunk in members[r] if topology.every_rank else [trunks[key.trunk_rank] for key in keys]:
                trunk.advance(served=topology.every_rank)
    for replica in replicas:
        replica.finish()
    assert all(trunk.ended for trunk in trunks), "the schedule's slots end before its lane orders"
    rows_P = np.concatenate([replica.served_S for replica in replicas])
    seconds = max(*(float(replica.free_S.max()) for replica in replicas), *(trunk.free_at for trunk in trunks))
    return StepTiming(
        seconds=seconds,
        trunk_busy_T=np.array([trunk.busy for trunk in trunks]) / seconds,
        pool_busy_P=np.concatenate([replica.busy_S for replica in replicas]) / seconds,
        imbalance=float(rows_P.max() / rows_P.mean()),
        peak_open_T=np.array([trunk.peak_open for trunk in trunks]),
        peak_kept_P=np.concatenate([replica.peak_kept_S for replica in replicas]),
        peak_deferred_P=np.concatenate([replica.peak_deferred_S for replica in replicas]),
        intervals=_intervals(log or []),
    )


_Log = list[tuple[int, float, float, Work]]


def _intervals(log: _Log) -> Intervals:
    table = np.array([row for row in log if row[2] > row[1]], dtype="i4, f8, f8, i1")
    return Intervals(*(table[name] for name in ("f0", "f1", "f2", "f3")))


@dataclass
class _MicroBatch:
    """A micro-batch in flight; `time` is when its last request left or, once it is answered, when the answer came."""

    number: int
    segment: int = 0  # the next one
    time: float = 0.0
    answered: bool = True


class _Trunk:
    """A trunk rank, which follows its lane order."""

    def __init__(
        self,
        rank: int,
        lane_order: Sequence[int],
        segments: Sequence[Segment],
        processor: Processor | _SharedProcessor,
        payload: float,
        log: _Log | None,
    ):
        self._rank, self._lane_order, self._segments, self._log = rank, lane_order, segments, log
        self._processor, self._payload = processor, payload
        self._ran = 0  # entries of the lane order
        self._begun = 0  # micro-batches
        self._in_flight: dict[int, _MicroBatch] = {}  # by lane
        self.busy = 0.0
        self.peak_open = 0

    @property
    def free_at(self) -> float:
        return self._processor.free_at

    @property
    def ended(self) -> bool:
        return self._ran == len(self._lane_order)

    def take(self, key: RequestKey) -> float:
        """Return when the request that a slot names left."""
        micro_batch = self._in_flight.get(key.lane, _MicroBatch(-1))
        segment = self._segments[micro_batch.segment - 1]
        sent = (micro_batch.number, segment.layer, segment.kind, micro_batch.answered)
        assert sent == (key.micro_batch, key.layer, key.kind, False), f"{key} is served before it has been sent"
        return micro_batch.time

    def answer(self, lane: int, time: float) -> None:
        """Receive the answer for a lane."""
        micro_batch = self._in_flight[lane]
        micro_batch.time, micro_batch.answered = time, True

    def advance(self, served: bool = False) -> None:
        """Run segments in the lane order, up to the first that has to wait for an unknown answer, or to a slot.

        Args:
            served: Whether the rank has just served the slot that is next.
        """
        if served:
            assert self._lane_order[self._ran] == SERVE, f"rank {self._rank} serves a slot out of turn"
            self._ran += 1
        head = len(self._segments) // 2
        while not self.ended:
            lane = self._lane_order[self._ran]
            if lane == SERVE:
                return
            micro_batch = self._in_flight.get(lane)
            if micro_batch is None:
                micro_batch = self._in_flight[lane] = _MicroBatch(self._begun)
                self._begun += 1
                self.peak_open = max(self.peak_open, len(self._in_flight))
            elif not micro_batch.answered:
                return
            number = micro_batch.segment
            segment = self._segments[number]
            self._ran += 1
            header = micro_batch.time - self._payload if number else 0.0
            start, taken = self._processor.run(header, micro_batch.time, segment.launch, segment.cost)
            self.busy += taken
            micro_batch.segment, micro_batch.time, micro_batch.answered = number + 1, self.free_at, False
            if segment.kind is None:
                del self._in_flight[lane]
            if self._log is not None:
                work = Work.HEAD if number == head else Work.TRUNK_FORWARD if number < head else Work.TRUNK_BACKWARD
                self._log.append((self._rank, start, self.free_at, work))


class _Replica:
    """The pool ranks that hold one replica of every shard; they serve the same requests, each at its own pace."""

    def __init__(self, first_rank: int, rows_LS: Floats, costs: Costs, most_deferred: float, log: _Log | None):
        shards = rows_LS.shape[1]
        self._first_rank, self._rows_LS, self._costs, self._log = first_rank, rows_LS, costs, log
        self._most_deferred = most_deferred
        self.launched_S = np.zeros(shards)  # when the hosts have launched everything
        self.free_S, self.busy_S = np.zeros(shards), np.zeros(shards)
        self.served_S, self._kept_S, self._deferred_S = np.zeros(shards), np.zeros(shards), np.zeros(shards)
        self.peak_kept_S, self.peak_deferred_S = np.zeros(shards), np.zeros(shards)
        self._backlog_S = np.zeros(shards)  # time that sealed weight gradients will take
        self._sealed_S = np.zeros(shards)  # their rows
        self._open_S = np.zeros(shards, dtype=bool)  # whether there has been a backward since the last seal

    def serve(self, keys: Sequence[RequestKey], arrival: float) -> float:
        """Serve requests that every shard has had since `arrival`, and return when the last shard is done."""
        forwards = [key.layer for key in keys if key.kind == Kind.FORWARD]
        backwards = [key.layer for key in keys if key.kind == Kind.BACKWARD]
        if forwards:
            rows_S = self._rows_LS[forwards].sum(axis=0)
            self.served_S += rows_S
            self._kept_S += rows_S
            np.maximum(self.peak_kept_S, self._kept_S, out=self.peak_kept_S)
            self._work(arrival, self._costs.slot, rows_S, Work.POOL_FORWARD)
        if backwards:
            rows_S = self._rows_LS[backwards].sum(axis=0)
            self._kept_S -= rows_S
            self._deferred_S += rows_S
            self._open_S[:] = True
            self._work(arrival, 0.0 if forwards else self._costs.slot, rows_S, Work.POOL_BACKWARD)
            np.maximum(self.peak_deferred_S, self._held_S(), out=self.peak_deferred_S)
        return float(self.free_S.max())

    def make_room(self) -> None:
        """Compute weight gradients on shards that defer too many: sealed ones first, as `DeferredWeightGradients`."""
        full_S = self._held_S() > self._most_deferred
        if full_S.any():
            self._compute_now(full_S)
            self._seal(self._deferred_S > self._most_deferred)
            self._compute_now(full_S)

    def seal(self) -> None:
        """Let the weight gradients that are deferred until now be computed in one launch."""
        self._seal(self._open_S)

    def finish(self) -> None:
        """Compute all weight gradients that are left."""
        self.seal()
        self._compute_now(np.ones_like(self._open_S))

    def wait(self, shard: int, until: float) -> None:
        """Compute sealed weight gradients on a shard whose rank has nothing else to do until a time."""
        if until > self.free_S[shard] and self._backlog_S[shard]:
            limit_S = np.zeros_like(self.free_S)
            limit_S[shard] = until - self.free_S[shard]
            self._compute_weight_gradients(limit_S)

    def _held_S(self) -> Floats:
        """Rows whose weight gradients are still to be computed."""
        return self._deferred_S + self._sealed_S

    def _seal(self, chosen_S: NDArray[np.bool_]) -> None:
        seconds_S = self._costs.slot + self._costs.flush + self._deferred_S * self._costs.pool_layer
        self._backlog_S = np.where(chosen_S, self._backlog_S + seconds_S, self._backlog_S)
        self._sealed_S = np.where(chosen_S, self._sealed_S + self._deferred_S, self._sealed_S)
        self._deferred_S = np.where(chosen_S, 0.0, self._deferred_S)
        self._open_S = self._open_S & ~chosen_S

    def _compute_now(self, chosen_S: NDArray[np.bool_]) -> None:
        self.free_S = self.free_S + self._compute_weight_gradients(np.where(chosen_S, self._backlog_S, 0.0))

    def _work(self, arrival: float, fixed: float, rows_S: Floats, work: Work) -> None:
        begun_S = np.maximum(self.launched_S, arrival - self._costs.payload)
        self.launched_S = begun_S + self._costs.slot_launch
        start_S = np.maximum(self.free_S, np.maximum(arrival, begun_S))
        self._compute_weight_gradients(start_S - self.free_S)
        cost_S = fixed + np.maximum(self._costs.weights, rows_S * self._costs.pool_layer)
        seconds_S = np.maximum(cost_S, self.launched_S - start_S)
        self.free_S = start_S + seconds_S
        self._record(start_S, seconds_S, work)

    def _compute_weight_gradients(self, limit_S: Floats) -> Floats:
        """Compute sealed weight gradients from when each shard is free, up to a limit; return the time it takes."""
        taken_S = np.minimum(self._backlog_S, limit_S)
        self._sealed_S = self._sealed_S * (1 - taken_S / np.where(self._backlog_S, self._backlog_S, 1.0))
        self._backlog_S = self._backlog_S - taken_S
        self._record(self.free_S, taken_S, Work.WEIGHT_GRADIENTS)
        return taken_S

    def _record(self, start_S: Floats, seconds_S: Floats, work: Work) -> None:
        self.busy_S += seconds_S
        if self._log is not None:
            for shard, (start, end) in enumerate(zip(start_S, start_S + seconds_S, strict=True)):
                self._log.append((self._first_rank + shard, start, end, work))


class _SharedProcessor:
    """What `Processor` is, for the trunk of a rank that also holds a shard."""

    def __init__(self, replica: _Replica, shard: int):
        self._replica, self._shard = replica, shard

    @property
    def free_at(self) -> float:
        return float(self._replica.free_S[self._shard])

    def run(self, header: float, payload: float, launch: float, cost: float) -> tuple[float, float]:
        """See `Processor.run`; while the rank waits it computes weight gradients."""
        replica, shard = self._replica, self._shard
        begun = max(float(replica.launched_S[shard]), header)
        launched = begun + launch
        start = max(self.free_at, payload, begun)
        replica.wait(shard, start)
        taken = max(cost, launched - start)
        replica.launched_S[shard], replica.free_S[shard] = launched, start + taken
        return start, taken
