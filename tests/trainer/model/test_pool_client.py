"""Clients of the pool, on made-up micro-batches."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pool.schedule import Kind
from pool.wire import TrunkWire, clock
from tests.pool.shard_work import COUNTS, make_shard, make_work
from tests.pool.test_weight_gradients import deferred_bytes_of
from trainer.model.micro_batch import Request
from trainer.model.pool_client import LocalPool, MicroBatch, RemotePool


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
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    pool = RemotePool(cast(TrunkWire, Echo()), 0)
    found = pool.run([micro_batch(0, 2), micro_batch(1, 1), micro_batch(2, 1)], (0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0), 0)
    assert found == [0, 1, 2]
    assert pool.waits.seconds_waiting == pool.waits.seconds_on_wire == 8, "one tick each"
