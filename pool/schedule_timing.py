"""What happens when a service plan is followed and the shards have different amounts of work.

The simulator makes its plan with an even load and takes all shards of a replica for one server. A run follows the plan
whatever the load: each pool rank serves its slots in order at its own pace, an answer is complete when the last shard
has answered, and a trunk rank waits for the lane that is next. So the times of one optimizer step can be computed slot
by slot, over all shards of a replica at once.

Letters: L layers, M experts in the pool, S shards, T trunk ranks, P pool ranks, I intervals.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pool.schedule import Kind, PoolSchedule, RequestKey
from pool.schedule_builder import Costs, Segment, training_segments
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
    """When ranks work; the intervals of one rank are in order and do not overlap.

    Attributes:
        rank_I: world ranks.
        start_I, end_I: in the unit of the costs, from the start of the step.
        work_I: `Work`.
    """

    rank_I: NDArray[np.int32]
    start_I: Floats
    end_I: Floats
    work_I: NDArray[np.int8]


@dataclass(frozen=True)
class Replay:
    """One optimizer step. A request's worth of rows is what a shard gets of one request if the load is even.

    Attributes:
        seconds: until the last trunk rank and the last weight gradients are done, in the unit of the costs.
        trunk_busy_T, pool_busy_P: share of the step in which each rank works.
        imbalance: rows of the pool rank that gets most of them in the step over the mean of all pool ranks.
        peak_open_T: most micro-batches that each trunk rank has begun and not ended at a time.
        peak_kept_P: most that each pool rank keeps of forwards whose backward is still to come, in requests' worth.
        peak_stash_P: most weight gradients that each pool rank has still to make, in requests' worth.
        ranks: the world ranks whose intervals there are, in order.
        intervals: of `ranks`.
    """

    seconds: float
    trunk_busy_T: Floats
    pool_busy_P: Floats
    imbalance: float
    peak_open_T: NDArray[np.int64]
    peak_kept_P: Floats
    peak_stash_P: Floats
    ranks: tuple[int, ...]
    intervals: Intervals


def shard_loads(load_LM: NDArray[np.integer], placement: Placement) -> Floats:
    """Share of each layer's assignments that goes to each shard (L, S); of a layer without assignments an even one.

    Args:
        load_LM: assignments by layer and global expert (L, M); 0 for experts that a layer does not reach.
    """
    layers, experts = load_LM.shape
    assert experts == placement.num_experts, f"counts of {experts} experts, a placement of {placement.num_experts}"
    load_LS: Floats = load_LM[:, placement.order].reshape(layers, placement.shards, -1).sum(axis=2, dtype=np.float64)
    load_LS[load_LS.sum(axis=1) == 0] = 1.0
    load_LS /= load_LS.sum(axis=1, keepdims=True)
    return load_LS


def replay(
    plan: PoolSchedule,
    topology: Topology,
    layers: int,
    costs: Costs,
    load_LS: Floats | None = None,
    ranks: Iterable[int] = (),
) -> Replay:
    """Follow the plan of an optimizer step.

    All trunk ranks begin at time 0: what stagger delays in the simulator is only the place of their requests in the
    plan. A shard's launch takes `costs.slot` and, a request, S * load * `costs.pool_layer`. An empty slot cuts the
    stash: a shard makes its weight gradients from there on while it waits for requests, and the rest at the end of the
    step. Flushes of a stash that has reached its byte limit are left out, as in the simulator.

    Args:
        plan: of `training_plan`, for the same topology and layers; or the lock-step plan's slots.
        topology: not colocated.
        load_LS: share of each layer's assignments that goes to each shard (L, S), rows add up to 1; even if None.
        ranks: world ranks whose intervals are wanted.
    """
    shards = topology.expert_parallel
    rows_LS = np.ones((layers, shards)) if load_LS is None else shards * load_LS
    assert rows_LS.shape == (layers, shards) and not topology.colocated
    log = _Log(ranks)
    segments = training_segments(costs, layers)
    trunks = [_Trunk(t, order, segments, log) for t, order in enumerate(plan.lane_order)]
    replicas = [_Replica(topology.pool_rank(0, r), rows_LS, costs, log) for r in range(topology.replicas)]
    replica_T = [topology.replica(topology.pool_rank(0, t)) for t in range(topology.trunk_ranks)]
    for trunk in trunks:
        trunk.advance()
    for slot in plan.slots:
        if not slot:
            for replica in replicas:
                replica.cut()
        parts: dict[int, list[RequestKey]] = {}
        for key in slot:
            parts.setdefault(replica_T[key.trunk_rank], []).append(key)
        for r, keys in parts.items():
            arrival = max(trunks[key.trunk_rank].take(key) for key in keys) + costs.transfer
            answer = replicas[r].serve(keys, arrival) + costs.transfer
            for key in keys:
                trunks[key.trunk_rank].answer(key.lane, answer)
    for replica in replicas:
        replica.finish()
    assert all(trunk.ended for trunk in trunks), "the plan's slots end before its lane orders"
    return _result(trunks, replicas, log)


def _result(trunks: Sequence[_Trunk], replicas: Sequence[_Replica], log: _Log) -> Replay:
    free_P = np.concatenate([replica.free_S for replica in replicas])
    rows_P = np.concatenate([replica.served_S for replica in replicas])
    seconds = max(float(free_P.max()), *(trunk.free_at for trunk in trunks))
    return Replay(
        seconds=seconds,
        trunk_busy_T=np.array([trunk.busy for trunk in trunks]) / seconds,
        pool_busy_P=np.concatenate([replica.busy_S for replica in replicas]) / seconds,
        imbalance=float(rows_P.max() / rows_P.mean()),
        peak_open_T=np.array([trunk.peak_open for trunk in trunks]),
        peak_kept_P=np.concatenate([replica.peak_kept_S for replica in replicas]),
        peak_stash_P=np.concatenate([replica.peak_stash_S for replica in replicas]),
        ranks=log.ranks,
        intervals=log.intervals(),
    )


class _Log:
    """Gathers the intervals of the ranks that are asked for."""

    def __init__(self, ranks: Iterable[int]):
        self.ranks = tuple(sorted(ranks))
        self._rank, self._start, self._end, self._work = array("i"), array("d"), array("d"), array("b")

    def add(self, ranks: Sequence[int], start: Iterable[float], end: Iterable[float], work: Work) -> None:
        self._rank.extend(ranks)
        self._start.extend(start)
        self._end.extend(end)
        self._work.extend(repeat(work, len(ranks)))

    def intervals(self) -> Intervals:
        arrays = (np.array(self._rank), np.array(self._start), np.array(self._end), np.array(self._work))
        return Intervals(*arrays)


class _Trunk:
    """A trunk rank on its way through its lane order."""

    def __init__(self, rank: int, lane_order: Sequence[int], segments: Sequence[Segment], log: _Log):
        self._rank, self._order, self._segments = rank, lane_order, segments
        self._log = log if rank in log.ranks else None
        self._ran = 0  # entries of the lane order
        self._begun = 0  # micro-batches
        self._next: dict[int, int] = {}  # lanes with an open micro-batch: its next segment
        self._number: dict[int, int] = {}  # and the number of this micro-batch
        self._sent_at: dict[int, float] = {}  # and when its request left
        self._answered_at: dict[int, float] = {}  # and when the answer came
        self.free_at = self.busy = 0.0
        self.peak_open = 0

    @property
    def ended(self) -> bool:
        return self._ran == len(self._order)

    def take(self, key: RequestKey) -> float:
        """Take the request that a slot names; returns when it left."""
        segment = self._segments[self._next.get(key.lane, 0) - 1]
        waiting = (self._number.get(key.lane), segment.layer, segment.kind)
        assert waiting == (key.micro_batch, key.layer, key.kind), f"{key} is not there when the plan serves it"
        return self._sent_at.pop(key.lane)

    def answer(self, lane: int, time: float) -> None:
        """The answer for `lane` is there at `time`."""
        self._answered_at[lane] = time
        self.advance()

    def advance(self) -> None:
        """Run segments in the lane order, up to the first whose answer is not known yet."""
        while not self.ended:
            lane = self._order[self._ran]
            number = self._next.get(lane, 0)
            if number and lane not in self._answered_at:
                return
            start = max(self.free_at, self._answered_at.pop(lane, 0.0))
            if not number:
                self._number[lane] = self._begun
                self._begun += 1
            self._run(lane, number, start)

    def _run(self, lane: int, number: int, start: float) -> None:
        segment = self._segments[number]
        self._ran += 1
        self.free_at = start + segment.cost
        self.busy += segment.cost
        self._next[lane] = number + 1
        self.peak_open = max(self.peak_open, len(self._next))
        if segment.kind is None:
            del self._next[lane]
        else:
            self._sent_at[lane] = self.free_at
        if self._log is not None:
            head = len(self._segments) // 2
            work = Work.HEAD if number == head else Work.TRUNK_FORWARD if number < head else Work.TRUNK_BACKWARD
            self._log.add((self._rank,), (start,), (self.free_at,), work)


class _Replica:
    """The pool ranks that hold one replica of every shard; they serve the same requests, each at its own pace."""

    def __init__(self, first_rank: int, rows_LS: Floats, costs: Costs, log: _Log):
        shards = rows_LS.shape[1]
        self._rows_LS, self._costs, self._log = rows_LS, costs, log
        self._logged_ranks = [rank for rank in log.ranks if first_rank <= rank < first_rank + shards]
        self._logged_shards = [rank - first_rank for rank in self._logged_ranks]
        self.free_S, self.busy_S = np.zeros(shards), np.zeros(shards)
        self.served_S, self._kept_S, self._stash_S = np.zeros(shards), np.zeros(shards), np.zeros(shards)
        self.peak_kept_S, self.peak_stash_S = np.zeros(shards), np.zeros(shards)
        self._backlog_S, self._made_S = np.zeros(shards), np.zeros(shards)  # weight gradients, in units of time
        self._stashed = 0  # requests

    def serve(self, keys: Sequence[RequestKey], arrival: float) -> float:
        """Serve what every shard has had since `arrival`; returns when the last shard is done."""
        forwards = [key.layer for key in keys if key.kind == Kind.FORWARD]
        backwards = [key.layer for key in keys if key.kind == Kind.BACKWARD]
        assert len(forwards) + len(backwards) == len(keys)
        if forwards:
            rows_S = self._rows_LS[forwards].sum(axis=0)
            self.served_S += rows_S
            self._kept_S += rows_S
            np.maximum(self.peak_kept_S, self._kept_S, out=self.peak_kept_S)
            self._work(arrival, self._costs.slot, rows_S, Work.POOL_FORWARD)
        if backwards:
            rows_S = self._rows_LS[backwards].sum(axis=0)
            self._kept_S -= rows_S
            self._stash_S += rows_S
            self._stashed += len(backwards)
            self._work(arrival, 0.0 if forwards else self._costs.slot, rows_S, Work.POOL_BACKWARD)
            held_S = self._stash_S + self._backlog_S / self._costs.pool_layer
            np.maximum(self.peak_stash_S, held_S, out=self.peak_stash_S)
        return float(self.free_S.max())

    def cut(self) -> None:
        """The weight gradients of what is stashed can be made."""
        if self._stashed:
            self._backlog_S += self._costs.slot + self._stash_S * self._costs.pool_layer
            self._stash_S = np.zeros_like(self._stash_S)
            self._stashed = 0

    def finish(self) -> None:
        """Make all weight gradients that are left."""
        self.cut()
        self._make_weight_gradients(self._backlog_S.copy())
        self.free_S = self.free_S + self._made_S

    def _make_weight_gradients(self, at_most_S: Floats) -> None:
        """For so long from when each shard is free, as far as there are any."""
        self._made_S = np.minimum(self._backlog_S, at_most_S)
        self._backlog_S -= self._made_S
        self.busy_S += self._made_S
        logged = [(rank, shard) for rank, shard in zip(self._logged_ranks, self._logged_shards, strict=True)]
        some = [(rank, shard) for rank, shard in logged if self._made_S[shard] > 0]
        if some:
            shards = [shard for _, shard in some]
            start_I = self.free_S[shards]
            self._log.add([rank for rank, _ in some], start_I, start_I + self._made_S[shards], Work.WEIGHT_GRADIENTS)

    def _work(self, earliest: float, launch: float, rows_S: Floats, work: Work) -> None:
        self._make_weight_gradients(np.maximum(earliest - self.free_S, 0.0))
        seconds_S = launch + rows_S * self._costs.pool_layer
        start_S = np.maximum(self.free_S, earliest)
        self.free_S = start_S + seconds_S
        self.busy_S += seconds_S
        if self._logged_shards:
            start_I, end_I = start_S[self._logged_shards], self.free_S[self._logged_shards]
            self._log.add(self._logged_ranks, start_I, end_I, work)
