"""Clients of the pool, on made-up micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pool.counts import Counts
from pool.schedule import SERVE, Kind, RequestKey, Slot
from pool.service import PoolService
from pool.topology import Topology
from pool.wire import PoolWire, TrunkWire, clock
from tests.pool.shard_work import COUNTS, make_shard, make_work
from tests.pool.test_weight_gradients import deferred_bytes_of
from trainer.model.micro_batch import Request
from trainer.model.pool_client import LocalPool, MicroBatch, RemotePool, SharedPool


def micro_batch(number: int, layers: int) -> MicroBatch[int]:
    """Asks for so many layers, forward and backward; its value is its number."""
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        for layer in range(layers):
            work = make_work(COUNTS[0], layer)
            rows_ND = work.x_ND if kind == Kind.FORWARD else work.dy_ND
            answer_ND = yield Request(kind, number, layer, rows_ND, torch.tensor(work.counts))
            assert answer_ND.shape == rows_ND.shape
    return number


@pytest.mark.parametrize("requests", [1, 2, 100])
def test_deferred_work_of_a_local_pool_stays_within_its_limit(requests: int) -> None:
    """At most the requests of one launch above it."""
    one = deferred_bytes_of([make_work(COUNTS[0], 0)])
    shard = make_shard(deferred_bytes=requests * one)
    micro_batches, layers = 3, 2
    found = LocalPool(shard).run((micro_batch(n, layers) for n in range(micro_batches)), (0,), 0)
    assert found == [0, 1, 2]
    assert shard.deferred_dw.peak_bytes == min(requests + 1, micro_batches * layers) * one


@pytest.mark.parametrize(("lane_order", "launches"), [((0,), 3), ((0, 1), 2), ((0, 1, 2, 3), 1)])
def test_lanes_of_a_local_pool_share_launches(
    lane_order: tuple[int, ...], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, calls = make_shard(), []
    forward_rows = shard.forward_rows
    monkeypatch.setattr(shard, "forward_rows", lambda *arguments: calls.append(0) or forward_rows(*arguments))
    assert LocalPool(shard).run((micro_batch(n, 1) for n in range(3)), lane_order, 0) == [0, 1, 2]
    assert len(calls) == launches


class Echo:
    """A wire whose answers are the requests."""

    bytes_sent = bytes_received = 0
    settings = SimpleNamespace(device="cpu")

    def settle(self) -> None:
        pass

    def request(self, key: Any, step: int, rows_ND: torch.Tensor, tokens_per_expert: torch.Tensor) -> Any:
        return SimpleNamespace(wait=lambda: rows_ND)


def test_values_come_in_the_order_of_the_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the second, which is shorter, ends first; and what is waited for is counted."""
    ticks = itertools.count()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    pool = RemotePool(cast(TrunkWire, Echo()), 0)
    found = pool.run([micro_batch(0, 2), micro_batch(1, 1), micro_batch(2, 1)], (0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0), 0)
    assert found == [0, 1, 2]
    assert pool.waits.seconds_waiting == pool.waits.seconds_on_wire == 8, "one tick each"


class Alone:
    """Both ends of the wire of a single rank. An answer is late until there is nothing else to do."""

    bytes_sent = bytes_received = 0
    settings = SimpleNamespace(device="cpu", topology=Topology(1, 1, 1, every_rank=True), rank=0)

    def __init__(self) -> None:
        self.requests: dict[RequestKey, Any] = {}
        self.answers: dict[RequestKey, torch.Tensor] = {}

    def settle(self) -> None:
        pass

    def request(self, key: RequestKey, step: int, rows_ND: torch.Tensor, tokens_per_expert: torch.Tensor) -> Any:
        self.requests[key] = (rows_ND, Counts.of(tokens_per_expert.tolist()))
        return SimpleNamespace(future=Future(), wait=lambda: self.answers.pop(key))

    def receive(self, keys: Sequence[RequestKey], step: int) -> Any:
        now: Future[None] = Future()
        now.set_result(None)
        return SimpleNamespace(future=now, headers_came=0.0, ready=lambda: [self.requests.pop(key) for key in keys])

    def answer(self, keys: Sequence[RequestKey], step: int, rows: Sequence[torch.Tensor], served: Any) -> None:
        self.answers.update(zip(keys, rows, strict=True))

    def stop(self) -> None:
        pass


def shared(slots: list[Slot], lane_order: list[int]) -> PoolService:
    """One micro-batch of two layers on a rank that serves itself."""
    wire = Alone()
    service = PoolService(make_shard(), cast(PoolWire, wire), 2)
    pool = SharedPool(cast(TrunkWire, wire), 0, service)
    assert pool.run([micro_batch(0, 2)], lane_order, 0, slots) == [0]
    return service


def slots_of(*kinds_and_layers: tuple[Kind, int]) -> list[Slot]:
    return [(RequestKey(0, 0, 0, layer, kind),) for kind, layer in kinds_and_layers]


FOUR = slots_of((Kind.FORWARD, 0), (Kind.FORWARD, 1), (Kind.BACKWARD, 0), (Kind.BACKWARD, 1))
ORDER = [0, SERVE] * 4 + [0]


def test_a_shared_pool_computes_weight_gradients_while_an_answer_is_late() -> None:
    """What is sealed before the last two answers is done when the last one is used; the rest is done by nobody yet."""
    service = shared([*FOUR[:3], (), FOUR[3]], ORDER)
    assert not service.shard.deferred_dw.waits
    assert service.shard.w2_eDF.grad is not None, "that of one request"
    assert shared(FOUR, ORDER).shard.w2_eDF.grad is None, "nothing is sealed"


def test_a_shared_pool_seals_after_its_last_slot() -> None:
    assert shared([*FOUR, ()], ORDER).shard.deferred_dw.waits
