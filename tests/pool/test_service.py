"""The service alone, on requests that have already arrived."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from pool.counts import Counts
from pool.schedule import Kind, RequestKey, Slot
from pool.service import PoolService
from pool.topology import Topology
from pool.wire import PoolWire
from tests.pool.shard_work import COUNTS, Work, assert_gradients, assert_near, make_shard, make_work, slow
from tests.pool.test_weight_gradients import deferred_bytes_of

LAYERS = 3
STEP = 4


class Mailbox:
    """In the place of a `PoolWire`: has every request from the start, and keeps the answers."""

    def __init__(self, works: dict[RequestKey, Work]):
        self.settings = SimpleNamespace(topology=Topology(1, 1, 1), rank=1)
        self._works = works
        self.answers: dict[RequestKey, Tensor] = {}

    def receive(self, keys: Sequence[RequestKey], step: int) -> Any:
        works = [(key, self._works[key.forward]) for key in keys]
        rows = [(work.dy_ND if key.kind == Kind.BACKWARD else work.x_ND, Counts.of(work.counts)) for key, work in works]
        now, done = time.perf_counter(), Future[None]()
        done.set_result(None)
        return SimpleNamespace(future=done, ready=lambda: rows, headers_came=now)

    def answer(self, keys: Sequence[RequestKey], step: int, rows: Sequence[Tensor], served: Any) -> None:
        self.answers.update(zip(keys, rows, strict=True))

    def stop(self) -> None:
        pass


def key_of(micro_batch: int, layer: int, kind: Kind = Kind.FORWARD) -> RequestKey:
    return RequestKey(0, 0, micro_batch, layer, kind)


def some_works(micro_batches: int) -> dict[RequestKey, Work]:
    keys = [key_of(micro_batch, layer) for micro_batch in range(micro_batches) for layer in range(LAYERS)]
    return {key: make_work(COUNTS[0], seed) for seed, key in enumerate(keys)}


def slots_of(works: dict[RequestKey, Work]) -> list[Slot]:
    """Each request in a slot of its own, all forwards first."""
    backwards = [RequestKey(0, 0, key.micro_batch, key.layer, Kind.BACKWARD) for key in reversed(works)]
    return [(key,) for key in [*works, *backwards]]


def serve(works: dict[RequestKey, Work], slots: list[Slot], **keywords: Any) -> PoolService:
    service = PoolService(make_shard(**keywords), cast(PoolWire, Mailbox(works)), LAYERS)
    service.serve(slots, STEP)
    return service


@pytest.mark.parametrize("requests", [1, 2, 100])
def test_deferred_work_stays_within_its_limit(requests: int) -> None:
    """At most one slot above it; the gradients are the same whatever the limit."""
    works = some_works(2)
    one = deferred_bytes_of([make_work(COUNTS[0], 0)])
    service = serve(works, slots_of(works), deferred_bytes=requests * one)
    assert service.take_served().deferred_bytes == min(requests + 1, len(works)) * one
    assert service.take_served().deferred_bytes == 0, "since the last time"
    service.shard.deferred_dw.drain()
    assert_gradients(service.shard, list(works.values()))


def test_an_empty_slot_seals_deferred_work() -> None:
    """From there on its weight gradients can be made while nothing else is to be done."""
    works = some_works(1)
    slots = slots_of(works)
    assert not serve(works, slots).shard.deferred_dw.drain_some()
    assert serve(works, [*slots[:-1], (), slots[-1]]).shard.deferred_dw.drain_some()


def test_what_was_served() -> None:
    works = some_works(2)
    served = serve(works, slots_of(works)).take_served()
    assert served.tokens_Le.tolist() == [[2 * count for count in COUNTS[0]]] * LAYERS
    assert served.gradients_e.tolist() == [2 * LAYERS * count for count in COUNTS[0]]
    assert 0 <= served.queue_depth <= 2 * len(works) - 1


def test_the_queue_depth_is_a_mean() -> None:
    service = serve({}, [])
    assert service.take_served().queue_depth == 0
    service._queue_depths += [1, 3, 5]
    assert service.take_served().queue_depth == 3


def test_requests_of_a_slot_in_any_order() -> None:
    """Each gets the answer to its own rows."""
    works = some_works(3)
    keys = [key_of(micro_batch, 0) for micro_batch in (2, 0, 1)]
    works = {key: works[key] for key in keys}
    mailbox = Mailbox(works)
    shard = make_shard()
    backwards = tuple(key_of(key.micro_batch, 0, Kind.BACKWARD) for key in keys)
    PoolService(shard, cast(PoolWire, mailbox), LAYERS).serve([tuple(keys), backwards], STEP)
    for key, backward in zip(keys, backwards, strict=True):
        wanted = slow(shard, works[key])
        assert_near(mailbox.answers[key], wanted.y_ND)
        assert_near(mailbox.answers[backward], wanted.dx_ND)
