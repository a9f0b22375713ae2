"""Ranks that have both roles: both ends of the wire in a process, and what such a rank sends to itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pool.schedule import Kind, RequestKey
from pool.topology import Topology
from pool.wire import PoolWire, TrunkWire, WireGroups, WireSettings, both_ends
from tests.distributed import run_ranks
from tests.pool.test_wire import local
from tests.pool.wire_job import (
    LONG,
    STEP,
    D,
    M,
    barrier,
    connect,
    counts_of,
    error_of,
    evaluation_plan,
    groups,
    make_service,
    my_rank,
    rows_of,
    settings,
    slots,
    train_plan,
)


def round_trip(topology: Topology, lanes: int, dtype: torch.dtype, check: bool, on_device: bool) -> Any:
    """A step and an evaluation: in every slot a rank makes its requests, serves, and waits for its answers."""
    store = connect()
    joined = groups(store, "job", topology, lanes, on_device)
    trunk, pool = both_ends(replace(settings(topology, dtype, LONG), check=check), joined)
    service = make_service(topology, pool, dtype)
    answers: dict[RequestKey, Tensor] = {}
    for plan, step in ((train_plan, STEP), (lambda ranks, _: evaluation_plan(ranks), STEP + 1)):
        requests = list(plan(topology.trunk_ranks, lanes))
        serving = service.serving(slots(requests), step)
        for together in requests:
            keys = [key for key in together if key.trunk_rank == my_rank()]
            sent = [trunk.request(key, step, rows_of(key, dtype), counts_of(key)) for key in keys]
            next(serving)
            answers.update((key, answer.wait()) for key, answer in zip(keys, sent, strict=True))
        assert next(serving, "the end") == "the end"
    service.shard.deferred_dw.drain()
    trunk.settle()
    pool.settle()
    barrier(store, "end")
    gradients = [service.shard.w13_e2FD.grad, service.shard.w2_eDF.grad]
    traffic = [trunk.bytes_sent, trunk.bytes_received, pool.bytes_sent, pool.bytes_received]
    return answers, gradients, service.take_served().tokens_Le, traffic


@pytest.mark.parametrize(
    "topology, lanes, dtype, check, on_device",
    [
        (Topology(2, 2, 2, every_rank=True), 2, torch.float32, True, False),
        (Topology(4, 4, 2, every_rank=True), 1, torch.bfloat16, False, False),
        (Topology(4, 4, 2, every_rank=True), 2, torch.float32, True, True),
    ],
    ids=["EP2-lanes2-check", "EP2-replicas2-bf16", "EP2-replicas2-lanes2-check-device"],
)
def test_round_trip(topology: Topology, lanes: int, dtype: torch.dtype, check: bool, on_device: bool) -> None:
    """The numbers of a local server; what a rank sends to itself is not counted as traffic."""
    values = run_ranks(topology.world_size, round_trip, topology, lanes, dtype, check, on_device)
    answers, shard, load_LM = local(topology, lanes, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    got: dict[RequestKey, Tensor] = {}
    for own_answers, *_ in values:
        got |= own_answers
    assert got.keys() == answers.keys()
    for key, answer_ND in answers.items():
        torch.testing.assert_close(got[key], answer_ND, rtol=tolerance, atol=tolerance)
    by_shard = [[v for rank, v in enumerate(values) if topology.shard(rank) == s] for s in range(2)]
    for index, weight in enumerate((shard.w13_e2FD, shard.w2_eDF)):
        parts = [sum(v[1][index] for v in replicas) for replicas in by_shard]
        torch.testing.assert_close(torch.cat(cast(Any, parts)), weight.grad, rtol=tolerance, atol=tolerance)
    assert torch.equal(torch.cat([cast(Any, sum(v[2] for v in replicas)) for replicas in by_shard], 1), load_LM)
    to_others = 0
    for key in answers:
        counts_se = counts_of(key).view(2, -1)
        to_others += int(counts_se[1 - topology.shard(key.trunk_rank)].sum()) * D * dtype.itemsize
    trunk_sent, trunk_received, pool_sent, pool_received = torch.tensor([v[3] for v in values]).sum(0).tolist()
    headers = len(answers) * (5 + M // 2 + 2 * check) * 8
    assert trunk_sent == pool_received == to_others + headers
    assert trunk_received == pool_sent == to_others + headers * (check or on_device)


ALONE = Topology(1, 1, 1, every_rank=True)
KEY = RequestKey(0, 0, 1, 1, Kind.FORWARD)
COUNTS = [2, 0, 3, 0, 0, 0]
ME = "rank 0 (trunk 0, shard 0)"


def alone() -> tuple[TrunkWire, PoolWire]:
    """A rank with the whole pool: there is nobody to talk to, and there are no groups."""
    cpu = torch.device("cpu")
    ends = WireSettings(ALONE, 0, M, D, torch.float32, cpu, cpu, timedelta(seconds=LONG), check=True)
    return both_ends(ends, WireGroups(None, [None]))


def served(alter: Callable[[Tensor], Tensor], step: int = STEP, counts: list[int] = COUNTS) -> Tensor:
    """The answer to a request whose rows are altered on the way, or whose answer has another step or counts."""
    trunk, pool = alone()
    rows_ND = torch.ones(5, D)
    answer = trunk.request(KEY, STEP, rows_ND, torch.tensor(COUNTS))
    rows_ND.copy_(alter(rows_ND))
    ((x_ND, found),) = pool.receive([KEY], STEP).ready()
    assert found.listed == COUNTS
    pool.answer([KEY], step, [2 * x_ND], [counts])
    return answer.wait()


def test_nothing_is_copied_where_nothing_travels() -> None:
    trunk, pool = alone()
    rows_ND = torch.ones(5, D)
    answer = trunk.request(KEY, STEP, rows_ND, torch.tensor(COUNTS))
    ((x_ND, _),) = pool.receive([KEY], STEP).ready()
    y_ND = 2 * x_ND
    pool.answer([KEY], STEP, [y_ND], [COUNTS])
    assert x_ND.data_ptr() == rows_ND.data_ptr() and answer.wait().data_ptr() == y_ND.data_ptr()
    assert not any((trunk.bytes_sent, trunk.bytes_received, pool.bytes_sent, pool.bytes_received))


def test_nothing_is_queued_where_nothing_is_received(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    trunk, pool = alone()
    service = make_service(ALONE, pool, torch.float32)
    requests = list(evaluation_plan(1))
    serving = service.serving(slots(requests), STEP)
    pool.receive([], STEP).headers_came  # noqa: B018  # waits for the thread that receives
    for (key,) in requests:
        answer = trunk.request(key, STEP, rows_of(key, torch.float32), counts_of(key))
        next(serving)
        answer.wait()
    assert next(serving, "the end") == "the end"
    assert service.take_served().queue_depth == 0


def test_what_a_rank_sends_to_itself_is_checked() -> None:
    where = "FORWARD, lane 0, layer 1, micro-batch 1, step 7"
    wrong = error_of(lambda: served(lambda rows_ND: rows_ND + 1))
    assert wrong.startswith(f"{ME} checked the tokens of {ME}: the checksum was ") and wrong.endswith(where)
    wrong = error_of(lambda: served(lambda rows_ND: rows_ND, counts=[3, 0, 2, 0, 0, 0]))
    assert (
        wrong == f"{ME} checked the answer of {ME}: 2 tokens were sent to expert 0 of the shard, 3 were served: {where}"
    )
    assert error_of(lambda: served(lambda rows_ND: rows_ND * float("nan"))).startswith(f"{ME} checked the tokens of")
    assert error_of(lambda: served(lambda rows_ND: rows_ND)) == "no error"


def test_a_schedule_in_another_order_than_the_requests() -> None:
    """It would wait for itself, and says so instead."""
    trunk, pool = alone()
    where = "FORWARD, lane 0, layer 1, micro-batch 1, step 7"
    wrong = error_of(pool.receive([KEY], STEP).ready)
    assert wrong == f"{ME} is to serve a request of its own that it has not made: {where}"
    wrong = error_of(trunk.request(KEY, STEP, torch.ones(5, D), torch.tensor(COUNTS)).wait)
    assert wrong == f"{ME} needs the answer to a request of its own that it has not served: {where}"
