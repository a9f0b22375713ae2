"""Drivers: they answer the requests of micro-batches, wherever the pool is."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Protocol, TypeVar

from torch import Tensor

from pool.experts import ExpertServer, ExpertShard
from pool.plan import Kind, RequestKey
from pool.wire import TrunkWire
from trainer.micro_batch import Request

T = TypeVar("T")


class PoolClient(Protocol):
    """Who answers requests."""

    seconds_waiting: float

    def answer(self, request: Request, step: int) -> Tensor:
        """The pool's answer to `request`, rows_ND in the order of the request's."""
        ...


class LocalPool:
    """The colocated layout: the whole pool in this process."""

    def __init__(self, shard: ExpertShard):
        self._server = ExpertServer(shard)
        self.seconds_waiting = 0.0

    def answer(self, request: Request, step: int) -> Tensor:
        forward = (request.micro_batch, request.layer)
        if request.kind == Kind.BACKWARD:
            return self._server.backward([forward], [request.rows_ND])[0]
        batch = (request.rows_ND, request.tokens_per_expert.tolist())
        return self._server.forward([forward], [batch], keep_for_backward=request.kind == Kind.FORWARD)[0]


class RemotePool:
    """A dedicated layout: the pool is behind the wire.

    Attributes:
        seconds_waiting: time spent waiting for answers since the start.
    """

    def __init__(self, wire: TrunkWire, trunk_rank: int):
        self._wire = wire
        self._trunk_rank = trunk_rank
        self.seconds_waiting = 0.0

    def answer(self, request: Request, step: int) -> Tensor:
        key = RequestKey(self._trunk_rank, 0, request.micro_batch, request.layer, request.kind)
        answer = self._wire.request(key, step, request.rows_ND, request.tokens_per_expert)
        started = time.perf_counter()
        rows_ND = answer.wait()
        self.seconds_waiting += time.perf_counter() - started
        return rows_ND


def drive(micro_batch: Generator[Request, Tensor, T], pool: PoolClient | None, step: int) -> T:
    """Run one micro-batch to its end in lock step: every request is answered before anything else happens.

    `pool` is None for a dense model, which asks for nothing.
    """
    try:
        request = next(micro_batch)
        while True:
            assert pool is not None, f"a dense model asked for {request.kind.name}"
            request = micro_batch.send(pool.answer(request, step))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
