"""Clients of the pool: they run micro-batches in lanes and send their requests to the pool, wherever it is."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from torch import Tensor

from pool.schedule import Kind, RequestKey
from pool.shard import ExpertServer, ExpertShard
from pool.wire import Answer, TrunkWire
from trainer.model.micro_batch import Request

T = TypeVar("T")
MicroBatch = Generator[Request, Tensor, T]


class PoolClient(Protocol):
    """Runs micro-batches and has their requests answered.

    Attributes:
        seconds_waiting, seconds_on_wire: time spent waiting for answers, and sending requests, since the start.
        bytes_sent, bytes_received: traffic on the wire since the start.
    """

    seconds_waiting: float
    seconds_on_wire: float

    @property
    def bytes_sent(self) -> int: ...

    @property
    def bytes_received(self) -> int: ...

    def run(self, micro_batches: Iterable[MicroBatch[T]], lane_order: Sequence[int], step: int) -> list[T]:
        """Run micro-batches to completion in lanes, and return their values in the given order.

        Args:
            lane_order: which lane runs next, one entry per segment (`PoolSchedule.lane_order` of this trunk rank).
        """
        ...


class RemotePool:
    """The dedicated layout: the pool is behind the wire, and serves one lane while the trunk computes another."""

    def __init__(self, wire: TrunkWire, trunk_rank: int):
        self._wire = wire
        self._trunk_rank = trunk_rank
        self.seconds_waiting = self.seconds_on_wire = 0.0

    @property
    def bytes_sent(self) -> int:
        return self._wire.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._wire.bytes_received

    def run(self, micro_batches: Iterable[MicroBatch[T]], lane_order: Sequence[int], step: int) -> list[T]:
        fresh = enumerate(micro_batches)
        lanes: dict[int, tuple[int, MicroBatch[T], Answer]] = {}
        values: dict[int, T] = {}
        for lane in lane_order:
            if lane in lanes:
                number, micro_batch, answer = lanes.pop(lane)
                rows_ND = self._wait(answer)
            else:
                number, micro_batch = next(fresh)
                rows_ND = None
            try:
                request = micro_batch.send(rows_ND)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as stop:
                values[number] = stop.value
            else:
                lanes[lane] = (number, micro_batch, self._request(request, lane, step))
        assert not lanes, "the schedule ends before the micro-batches"
        return [values[number] for number in sorted(values)]

    def _request(self, request: Request, lane: int, step: int) -> Answer:
        key = RequestKey(self._trunk_rank, lane, request.micro_batch, request.layer, request.kind)
        started = time.perf_counter()
        answer = self._wire.request(key, step, request.rows_ND, request.tokens_per_expert)
        self.seconds_on_wire += time.perf_counter() - started
        return answer

    def _wait(self, answer: Answer) -> Tensor:
        started = time.perf_counter()
        rows_ND = answer.wait()
        self.seconds_waiting += time.perf_counter() - started
        return rows_ND


class _NoWire:
    """Without a wire there is nothing to wait for."""

    seconds_waiting = seconds_on_wire = 0.0
    bytes_sent = bytes_received = 0


class LocalPool(_NoWire):
    """The colocated layout: the whole pool is in this process.

    No communication has to be hidden, so lanes advance together, and their requests to one layer become one launch.
    """

    def __init__(self, shard: ExpertShard):
        self._shard = shard
        self._server = ExpertServer(shard)

    def run(self, micro_batches: Iterable[MicroBatch[T]], lane_order: Sequence[int], step: int) -> list[T]:
        lanes = max(lane_order) + 1
        fresh = iter(micro_batches)
        values: list[T] = []
        while together := list(islice(fresh, lanes)):
            values += self._run_together(together)
        return values

    def _run_together(self, micro_batches: list[MicroBatch[T]]) -> list[T]:
        values: list[T] = []
        answers: list[Tensor | None] = [None] * len(micro_batches)
        while len(values) < len(micro_batches):
            requests = []
            for micro_batch, rows_ND in zip(micro_batches, answers, strict=True):
                try:
                    requests.append(micro_batch.send(rows_ND))  # type: ignore[arg-type]  # None starts a generator
                except StopIteration as stop:
                    values.append(stop.value)
            if requests:
                answers = list(self._answer(requests))
        return values

    def _answer(self, requests: list[Request]) -> list[Tensor]:
        """Answer requests of one kind and layer."""
        keys: list[object] = [(request.micro_batch, request.layer) for request in requests]
        kind = requests[0].kind
        if kind == Kind.BACKWARD:
            answers = self._server.backward(keys, [request.rows_ND for request in requests])
            self._shard.deferred_dw.drain_if_full()
            return answers
        batches = [(request.rows_ND, request.tokens_per_expert.tolist()) for request in requests]
        return self._server.forward(keys, batches, keep_for_backward=kind == Kind.FORWARD)


class NoPool(_NoWire):
    """A dense model, whose micro-batches make no requests."""

    def run(self, micro_batches: Iterable[MicroBatch[T]], lane_order: Sequence[int], step: int) -> list[T]:
        return [_value(micro_batch) for micro_batch in micro_batches]


def _value(micro_batch: MicroBatch[T]) -> T:
    try:
        request = next(micro_batch)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError(f"a dense model made a request: {request}")
