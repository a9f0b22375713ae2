"""The wire and the service between real processes: the same numbers as a local server, and errors that name the ranks.

Rank functions are at module level and return plain values; assertions stand in the tests.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pool.counts import Counts
from pool.schedule import Kind, RequestKey
from pool.shard import ExpertServer, ExpertShard
from pool.topology import Topology
from pool.wire import WireError, pool_wire, trunk_wire
from tests.distributed import run_ranks
from tests.pool.wire_job import (
    LONG,
    STEP,
    D,
    L,
    M,
    barrier,
    connect,
    counts_of,
    evaluation_plan,
    groups,
    make_service,
    make_shard,
    my_rank,
    placement_of,
    rows_of,
    settings,
    slots,
    train_plan,
)


def round_trip(topology: Topology, lanes: int, dtype: torch.dtype, on_device: bool) -> Any:
    """A step and an evaluation. A trunk rank returns its answers; a pool rank its gradients, load and what is open."""
    store = connect()
    joined = groups(store, "job", topology, lanes, on_device)
    ends = settings(topology, dtype, LONG)
    plans = [(train_plan(topology.trunk_ranks, lanes), STEP)]
    plans.append((evaluation_plan(topology.trunk_ranks), STEP + 1))
    if topology.is_trunk(my_rank()):
        wire = trunk_wire(ends, joined)
        answers: dict[RequestKey, Tensor] = {}
        for plan, step in plans:
            for requests in plan:
                keys = [key for key in requests if key.trunk_rank == my_rank()]
                sent = [wire.request(key, step, rows_of(key, dtype), counts_of(key)) for key in keys]
                answers.update((key, answer.wait()) for key, answer in zip(keys, sent, strict=True))
        wire.settle()
        barrier(store, "end")
        return answers, wire.bytes_sent, wire.bytes_received
    pool = pool_wire(ends, joined)
    service = make_service(topology, pool, dtype)
    for plan, step in plans:
        service.serve(slots(plan), step)
    service.shard.deferred_dw.drain()
    loads = [(served.tokens_Le, served.gradients_e) for served in (service.take_served(), service.take_served())]
    pool.settle()
    barrier(store, "end")
    return service.shard.w13_e2FD.grad, service.shard.w2_eDF.grad, loads, pool.bytes_sent, pool.bytes_received


def local(topology: Topology, lanes: int, dtype: torch.dtype) -> tuple[dict[RequestKey, Tensor], ExpertShard, Tensor]:
    """The same by one server of the whole pool in this process, request by request: answers, shard, load."""
    shard = make_shard(placement_of(topology).order, dtype)
    server = ExpertServer(shard)
    answers: dict[RequestKey, Tensor] = {}
    load_LM = torch.zeros(L, M, dtype=torch.int64)
    for requests in train_plan(topology.trunk_ranks, lanes):
        for key in requests:
            if key.kind == Kind.BACKWARD:
                answers[key] = server.backward([key.forward], [rows_of(key, dtype)])[0]
            else:
                batch = rows_of(key, dtype), Counts(counts_of(key))
                answers[key] = server.forward([key], [batch], keep_for_backward=True)[0]
                load_LM[key.layer] += counts_of(key)
    for requests in evaluation_plan(topology.trunk_ranks):
        for key in requests:
            batch = rows_of(key, dtype), Counts(counts_of(key))
            answers[key] = server.forward([key], [batch], keep_for_backward=False)[0]
    shard.deferred_dw.drain()
    return answers, shard, load_LM


@pytest.mark.parametrize(
    "topology, lanes, dtype",
    [
        (Topology(1, 1, 1), 2, torch.float32),
        (Topology(2, 1, 1), 1, torch.bfloat16),
        (Topology(1, 2, 2), 1, torch.float32),
        (Topology(2, 2, 1), 1, torch.float32),
        (Topology(2, 2, 2), 2, torch.float32),
    ],
    ids=["1+1-lanes2", "2+1-bf16", "1+2-EP2", "2+2-EP1", "2+2-EP2-lanes2"],
)
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_round_trip(topology: Topology, lanes: int, dtype: torch.dtype, on_device: bool) -> None:
    """Forward, backward and forward-only through processes: the numbers of a local server.

    The device transport runs with its own threads here, on tensors of the host.
    """
    values = run_ranks(topology.world_size, round_trip, topology, lanes, dtype, on_device)
    want, shard, load_LM = local(topology, lanes, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    got: dict[RequestKey, Tensor] = {}
    for trunk_rank in range(topology.trunk_ranks):
        got.update(values[trunk_rank][0])
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == dtype
        torch.testing.assert_close(got[key], want[key], rtol=tolerance, atol=tolerance)
    pool = [(topology.shard(rank), values[rank]) for rank in range(topology.trunk_ranks, topology.world_size)]
    for index, weight in enumerate((shard.w13_e2FD, shard.w2_eDF)):
        parts = [sum(v[index] for s, v in pool if s == shard) for shard in range(topology.expert_parallel)]
        torch.testing.assert_close(torch.cat(cast(Any, parts)), weight.grad, rtol=tolerance, atol=tolerance)
    for which, want_load in enumerate((load_LM, load_LM.sum(0))):  # forward by layer, backward over layers
        taken = [sum(v[2][0][which] for s, v in pool if s == shard) for shard in range(topology.expert_parallel)]
        assert torch.equal(torch.cat(cast(Any, taken), dim=-1), want_load)
        assert not any(v[2][1][which].any() for _, v in pool), "take_served starts again at 0"
    trunk_sent, trunk_received = (sum(v[i] for v in values[: topology.trunk_ranks]) for i in (1, 2))
    pool_sent, pool_received = (sum(v[i] for v in values[topology.trunk_ranks :]) for i in (3, 4))
    row_bytes = sum(rows_of(key, dtype).nbytes for key in want)
    assert (trunk_sent, trunk_received) == (pool_received, pool_sent)
    assert trunk_sent > row_bytes
    assert trunk_received == (trunk_sent if on_device else row_bytes), "on the host headers travel one way"


def test_counts_have_the_edges() -> None:
    """What the round trip is to cover: a shard without tokens, a request without, all tokens at one shard."""
    keys = [RequestKey(t, 0, b, layer, Kind.FORWARD) for t in (0, 1) for b in (0, 1) for layer in range(L)]
    by_shard = [tuple(counts_of(key).reshape(2, -1).sum(1).tolist()) for key in keys]
    assert (5, 0) in by_shard and (0, 0) in by_shard and (0, 5) in by_shard


WANTED = RequestKey(0, 0, 1, 1, Kind.FORWARD)
NOTHING = [0] * M
MISFITS: dict[str, tuple[list[tuple[RequestKey, int, list[int]]], list[RequestKey], str]] = {
    # name: (what the trunk sends: key, step, counts), (the plan's requests, one a slot), the error
    "step": (
        [(WANTED, STEP + 1, NOTHING)],
        [WANTED],
        "FORWARD, lane 0, layer 1, micro-batch 1, step 8; the schedule has FORWARD, lane 0, layer 1, micro-batch 1",
    ),
    "layer": (
        [(RequestKey(0, 0, 1, 0, Kind.FORWARD), STEP, NOTHING)],
        [WANTED],
        "FORWARD, lane 0, layer 0, micro-batch 1, step 7; the schedule has FORWARD, lane 0, layer 1, micro-batch 1",
    ),
    "micro-batch": (
        [(RequestKey(0, 0, 2, 1, Kind.FORWARD), STEP, NOTHING)],
        [WANTED],
        "FORWARD, lane 0, layer 1, micro-batch 2, step 7; the schedule has FORWARD, lane 0, layer 1, micro-batch 1",
    ),
    "kind": (
        [(RequestKey(0, 0, 1, 1, Kind.BACKWARD), STEP, NOTHING)],
        [WANTED],
        "BACKWARD, lane 0, layer 1, micro-batch 1, step 7; the schedule has FORWARD, lane 0, layer 1, micro-batch 1",
    ),
    "unknown kind": (
        [(RequestKey(0, 0, 1, 1, cast(Kind, 9)), STEP, NOTHING)],
        [WANTED],
        "kind 9, lane 0, layer 1, micro-batch 1, step 7; the schedule has FORWARD, lane 0, layer 1, micro-batch 1",
    ),
    "negative counts": (
        [(WANTED, STEP, [1, 0, 0, 0, 0, -1])],
        [WANTED],
        "negative token counts from rank 0 (trunk 0): FORWARD, lane 0, layer 1, micro-batch 1, step 7",
    ),
    "no forward": (
        [(RequestKey(0, 0, 1, 1, Kind.BACKWARD), STEP, [1, 0, 2, 0, 0, 0])],
        [RequestKey(0, 0, 1, 1, Kind.BACKWARD)],
        "a backward without its forward: trunk rank 0, lane 0, layer 1, micro-batch 1",
    ),
    "no forward of this layer": (
        [(RequestKey(0, 0, 1, 0, Kind.FORWARD), STEP, NOTHING), (RequestKey(0, 0, 1, 1, Kind.BACKWARD), STEP, NOTHING)],
        [RequestKey(0, 0, 1, 0, Kind.FORWARD), RequestKey(0, 0, 1, 1, Kind.BACKWARD)],
        "a backward without its forward: trunk rank 0, lane 0, layer 1, micro-batch 1",
    ),
    "a forward that keeps nothing": (
        [
            (RequestKey(0, 0, 1, 1, Kind.FORWARD_ONLY), STEP, NOTHING),
            (RequestKey(0, 0, 1, 1, Kind.BACKWARD), STEP, NOTHING),
        ],
        [RequestKey(0, 0, 1, 1, Kind.FORWARD_ONLY), RequestKey(0, 0, 1, 1, Kind.BACKWARD)],
        "a backward without its forward: trunk rank 0, lane 0, layer 1, micro-batch 1",
    ),
    "other counts": (
        [(WANTED, STEP, [1, 0, 2, 0, 0, 0]), (RequestKey(0, 0, 1, 1, Kind.BACKWARD), STEP, [2, 0, 1, 0, 0, 0])],
        [WANTED, RequestKey(0, 0, 1, 1, Kind.BACKWARD)],
        "a backward with other token counts: trunk rank 0, lane 0, layer 1, micro-batch 1",
    ),
}


def misfits() -> dict[str, str]:
    """The pool's error of every case of MISFITS, each with groups and a service of its own."""
    store, topology = connect(), Topology(1, 1, 1)
    errors: dict[str, str] = {}
    kept: list[Any] = []
    for name, (sent, planned, _) in MISFITS.items():
        joined = groups(store, name, topology, lanes=2)
        ends = settings(topology, torch.float32, LONG)
        if my_rank() == 0:
            trunk = trunk_wire(ends, joined)
            for key, step, counts in sent:
                kept.append(trunk.request(key, step, torch.ones(max(0, sum(counts)), D), torch.tensor(counts)))
        else:
            service = make_service(topology, pool_wire(ends, joined))
            try:
                # One plan of all slots, so that forwards may wait for their backwards.
                service.serve(slots((key,) for key in planned), STEP)
            except WireError as error:
                errors[name] = str(error)
            kept.append(service)
        barrier(store, name)
        kept.append(joined)
    return errors


def test_messages_that_do_not_fit_the_plan() -> None:
    errors = run_ranks(2, misfits)[1]
    for name, (_, _, wanted) in MISFITS.items():
        assert name in errors, f"{name}: no error"
        assert wanted in errors[name]
        assert errors[name].startswith("rank 1 (pool 0, shard 0) got ")
        assert "rank 0" in errors[name]
