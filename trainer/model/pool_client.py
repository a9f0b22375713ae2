"""Clients of the pool: they run micro-batches in lanes and have their requests answered, wherever the pool is."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from pool.counts import Counts
from pool.schedule import SERVE, Kind, RequestKey, Slot
from pool.service import PoolService
from pool.shard import ExpertServer, ExpertShard
from pool.wire import Answer, TrunkWire
from pool.wire.clock import Waits, clock_of
from trainer.model.micro_batch import Request

T = TypeVar("T")
MicroBatch = Generator[Request, Tensor, T]


class PoolClient:
    """Runs micro-batches. This class serves the dense model, whose micro-batches make no requests.

    Args:
        device: Where micro-batches are computed.

    Attributes:
        waits: Time spent waiting for answers, and sending requests.
        bytes_sent, bytes_received: Traffic on the wire since the start.
    """

    bytes_sent = bytes_received = 0

    def __init__(self, device: torch.device | str = "cpu"):
        self.waits = Waits(clock_of(torch.device(device)))

    def run(
        self, micro_batches: Iterable[MicroBatch[T]], lane_order: Sequence[int], step: int, slots: Sequence[Slot] = ()
    ) -> list[T]:
        """Run micro-batches to completion in lanes, and return their values in the given order.

        Args:
            lane_order: Which lane runs next, one entry per segment (`PoolSchedule.lane_order` of this trunk rank).
            slots: What a rank that has both roles serves meanwhile (`PoolSchedule.slots`).
        """
        values = [_resume(micro_batch, None) for micro_batch in micro_batches]
        assert not any(isinstance(value, Request) for value in values), "a dense model made a request"
        return values  # type: ignore[return-value]


def _resume(micro_batch: MicroBatch[T], answer: Tensor | None) -> Request | T:
    """Resume a micro-batch, or start it with None; return its next request, or its value at its end."""
    try:
        return micro_batch.send(answer)  # type: ignore[arg-type]
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


class RemotePool(PoolClient):
    """The dedicated layout: the pool is behind the wire, and serves one lane while the trunk computes another."""

    def __init__(self, wire: TrunkWire, trunk_rank: int):
        super().__init__(wire.settings.device)
        self._wire = wire
        self._trunk_rank = trunk_rank

    def run(
        self, micro_batches: Iterable[MicroBatch[T]], lane_order: Sequence[int], step: int, slots: Sequence[Slot] = ()
    ) -> list[T]:
        fresh = enumerate(micro_batches)
        lanes: dict[int, tuple[int, MicroBatch[T], Answer]] = {}
        values: dict[int, T] = {}
        for lane in lane_order:
            if lane == SERVE:
                self._serve()
                continue
            rows_ND = None
            if lane in lanes:
                number, micro_batch, answer = lanes.pop(lane)
                rows_ND = self._wait(answer)
            else:
                number, micro_batch = next(fresh)
            result = _resume(micro_batch, rows_ND)
            if isinstance(result, Request):
                lanes[lane] = (number, micro_batch, self._request(result, lane, step))
            else:
                values[number] = result
        assert not lanes, "the schedule ends before the micro-batches"
        self._wire.settle()
        self.bytes_sent, self.bytes_received = self._wire.bytes_sent, self._wire.bytes_received
        return [values[number] for number in sorted(values)]

    def _serve(self) -> None:
        raise AssertionError("only a rank that has both roles serves")

    def _request(self, request: Request, lane: int, step: int) -> Answer:
        key = RequestKey(self._trunk_rank, lane, request.micro_batch, request.layer, request.kind)
        since = self.waits.clock.now()
        answer = self._wire.request(key, step, request.rows_ND, request.tokens_per_expert)
        self.waits.sent(since)
        return answer

    def _wait(self, answer: Answer) -> Tensor:
        since = self.waits.clock.now()
        rows_ND = answer.wait()
        self.waits.waited(since)
        return rows_ND


class SharedPool(RemotePool):
    """The layout in which every rank has both roles: between its own segments this one serves its shard.

    Attributes:
        service: What serves the shard.
        serving: Time spent serving, as waits. `service.waits` are within it, but not in `waits`.
    """

    def __init__(self, wire: TrunkWire, trunk_rank: int, service: PoolService):
        super().__init__(wire, trunk_rank)
        self.service = service
        self.serving = Waits(self.waits.clock)
        self._slots: Iterator[None] = iter(())

    def run(
        self, micro_batches: Iterable[MicroBatch[T]], lane_order: Sequence[int], step: int, slots: Sequence[Slot] = ()
    ) -> list[T]:
        with closing(self.service.serving(slots, step)) as self._slots:
            values = super().run(micro_batches, lane_order, step)
            for _ in self._slots:
                raise AssertionError("the schedule leaves slots that this rank does not serve")
        pool = self.service.wire
        pool.settle()
        self.bytes_sent += pool.bytes_sent
        self.bytes_received += pool.bytes_received
        return values

    def _serve(self) -> None:
        since = self.serving.clock.now()
        next(self._slots)
        self.serving.waited(since)

    def _wait(self, answer: Answer) -> Tensor:
        """Wait for an answer, computing deferred weight gradients until it comes."""
        deferred_dw = self.service.shard.deferred_dw
        if deferred_dw.waits:
            since = self.serving.clock.now()
            deferred_dw.drain_until(answer.future)
            self.serving.waited(since)
        return super()._wait(answer)


class LocalPool(PoolClient):
    """The colocated layout: the whole pool is in this process.

    No communication has to be hidden, so lanes advance together, and their requests to one layer become one launch.
    """

    def __init__(self, shard: ExpertShard):
        super().__init__(shard.w2_eDF.device)
        self._shard = shard
        self._server = ExpertServer(shard)

    def run(
        self, micro_batches: Iterable[MicroBatch[T]], lane_order: Sequence[int], step: int, slots: Sequence[Slot] = ()
    ) -> list[T]:
        lanes = max(lane_order) + 1
        fresh = iter(micro_batches)
        values: list[T] = []
        while together := list(islice(fresh, lanes)):
            answers: Sequence[Tensor | None] = [None] * len(together)
            while True:
                results = [_resume(m, rows_ND) for m, rows_ND in zip(together, answers, strict=True)]
                requests = [result for result in results if isinstance(result, Request)]
                if not requests:
                    break
                answers = self._answer(requests)
            values += results  # type: ignore[arg-type]
        return values

    def _answer(self, requests: list[Request]) -> list[Tensor]:
        """Answer requests of one kind and layer."""
        keys: list[object] = [(request.micro_batch, request.layer) for request in requests]
        kind = requests[0].kind
        if kind == Kind.BACKWARD:
            answers = self._server.backward(keys, [request.rows_ND for request in requests])
            self._shard.deferred_dw.drain_if_full()
            return answers
        batches = [(request.rows_ND, Counts(request.tokens_per_expert)) for request in requests]
        return self._server.forward(keys, batches, keep_for_backward=kind == Kind.FORWARD)
