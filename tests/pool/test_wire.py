"""The wire and the service between real processes: the same numbers as a local server, and errors that say who.

Rank functions are at module level and return plain values; assertions stand in the tests. Every job makes its groups
as `trainer.cluster.process_groups.Job` does: gloo by hand over one TCPStore.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pool.placement import Placement, contiguous
from pool.schedule import Kind, RequestKey, Slot
from pool.service import PoolService
from pool.shard import ExpertServer, ExpertShard
from pool.topology import Topology
from pool.wire import PoolWire, TrunkWire, WireError, WireSettings
from tests.distributed import RankFailed, run_ranks

M, D, F, L = 6, 5, 7, 2
MICRO_BATCHES = 2
STEP = 7
SHORT = 2.0
LONG = 60.0
SETTLE = 0.5
"""Time in which the end of a process becomes known on all its connections."""
GROUP = 600.0
"""Limit of the groups themselves, longer than a job may last: a wait that forgets the wire's own limit fails."""


# --- a rank's place in the job ---


def connect() -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    size = int(os.environ["WORLD_SIZE"])
    return dist.TCPStore(host, port, size, is_master=my_rank() == 0, timeout=timedelta(seconds=LONG))


def my_rank() -> int:
    return int(os.environ["RANK"])


def barrier(store: dist.Store, name: str) -> None:
    """Every rank leaves when every rank has come."""
    store.set(f"{name}/{my_rank()}", "here")
    store.wait([f"{name}/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))])


def groups(store: dist.Store, name: str, topology: Topology, lanes: int) -> tuple[Any, list[Any]]:
    """(host group, lane groups) of its own for every `name`: an error of gloo takes a group's connections with it."""

    def group(which: str) -> Any:
        prefix = dist.PrefixStore(f"{name}/{which}", store)
        return dist.ProcessGroupGloo(prefix, my_rank(), topology.world_size, timedelta(seconds=GROUP))

    return group("host"), [group(f"lane{lane}") for lane in range(lanes)]


def settings(topology: Topology, dtype: torch.dtype, timeout: float) -> WireSettings:
    cpu = torch.device("cpu")
    local = M // topology.expert_parallel
    return WireSettings(topology, my_rank(), local, D, dtype, cpu, cpu, timedelta(seconds=timeout))


def make_shard(expert_ids: tuple[int, ...], dtype: torch.dtype = torch.float32) -> ExpertShard:
    shard = ExpertShard(expert_ids, D, F, dtype)
    shard.reset_parameters(0.5, 0.4, seed=3)
    return shard


def placement_of(topology: Topology) -> Placement:
    return contiguous(M, 1, topology.expert_parallel)


def make_service(topology: Topology, wire: PoolWire, dtype: torch.dtype = torch.float32) -> PoolService:
    shard = make_shard(placement_of(topology).experts_of(topology.shard(my_rank())), dtype)
    return PoolService(shard, wire, L)


# --- round trip ---


def counts_of(key: RequestKey) -> Tensor:
    """Tokens of each expert. Trunk rank 0 leaves the second half of the pool without any in layer 0, all of it in
    micro-batch 1; every other request is random."""
    if key.trunk_rank == 0 and key.layer == 0:
        return torch.tensor([[2, 0, 3, 0, 0, 0], [0, 0, 0, 0, 0, 0]][key.micro_batch % 2])
    if key.trunk_rank == 1 and key.layer == 1:
        return torch.tensor([0, 0, 0, 0, 5, 0])
    seed = 100 * key.trunk_rank + 10 * key.micro_batch + key.layer
    return torch.randint(0, 4, (M,), generator=torch.Generator().manual_seed(seed))


def rows_of(key: RequestKey, dtype: torch.dtype) -> Tensor:
    seed = 1000 * key.trunk_rank + 100 * key.micro_batch + 10 * key.layer + key.kind
    rows = int(counts_of(key).sum())
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


Keys = tuple[RequestKey, ...]


def train_plan(trunk_ranks: int, lanes: int) -> Iterator[Keys]:
    """The requests of each slot of a step, in lock step; with two lanes the two micro-batches side by side."""
    for first in range(0, MICRO_BATCHES, lanes):
        for kind, layers in ((Kind.FORWARD, range(L)), (Kind.BACKWARD, reversed(range(L)))):
            for layer in layers:
                yield tuple(
                    RequestKey(t, lane, first + lane, layer, kind) for t in range(trunk_ranks) for lane in range(lanes)
                )


def evaluation_plan(trunk_ranks: int) -> Iterator[Keys]:
    for layer in range(L):
        yield tuple(RequestKey(t, 0, 0, layer, Kind.FORWARD_ONLY) for t in range(trunk_ranks))


def slots(plan: Iterable[Keys]) -> Iterator[Slot]:
    """`plan` as the service takes it."""
    return iter(plan)


def round_trip(topology: Topology, lanes: int, dtype: torch.dtype) -> Any:
    """A step and an evaluation. A trunk rank returns its answers; a pool rank its gradients, load and what is open."""
    store = connect()
    host, lane_groups = groups(store, "job", topology, lanes)
    ends = settings(topology, dtype, LONG)
    plans = [(train_plan(topology.trunk_ranks, lanes), STEP)]
    plans.append((evaluation_plan(topology.trunk_ranks), STEP + 1))
    if topology.is_trunk(my_rank()):
        wire = TrunkWire(ends, host, lane_groups)
        answers: dict[RequestKey, Tensor] = {}
        for plan, step in plans:
            for requests in plan:
                keys = [key for key in requests if key.trunk_rank == my_rank()]
                sent = [wire.request(key, step, rows_of(key, dtype), counts_of(key)) for key in keys]
                answers.update((key, answer.wait()) for key, answer in zip(keys, sent, strict=True))
        barrier(store, "end")
        return answers, wire.bytes_sent, wire.bytes_received
    pool_wire = PoolWire(ends, host, lane_groups)
    service = make_service(topology, pool_wire, dtype)
    for plan, step in plans:
        service.serve(slots(plan), step)
    service.shard.deferred_dw.drain()
    loads = [(served.tokens_Le, served.gradients_e) for served in (service.take_served(), service.take_served())]
    barrier(store, "end")
    return service.shard.w13_e2FD.grad, service.shard.w2_eDF.grad, loads, pool_wire.bytes_sent, pool_wire.bytes_received


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
                batch = rows_of(key, dtype), counts_of(key).tolist()
                answers[key] = server.forward([key], [batch], keep_for_backward=True)[0]
                load_LM[key.layer] += counts_of(key)
    for requests in evaluation_plan(topology.trunk_ranks):
        for key in requests:
            batch = rows_of(key, dtype), counts_of(key).tolist()
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
def test_round_trip(topology: Topology, lanes: int, dtype: torch.dtype) -> None:
    """Forward, backward and forward-only through processes: the numbers of a local server."""
    values = run_ranks(topology.world_size, round_trip, topology, lanes, dtype)
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
    assert (trunk_received, trunk_sent > row_bytes) == (row_bytes, True), "headers travel one way"


def test_counts_have_the_edges() -> None:
    """What the round trip is to cover: a shard without tokens, a request without, all tokens at one shard."""
    keys = [RequestKey(t, 0, b, layer, Kind.FORWARD) for t in (0, 1) for b in (0, 1) for layer in range(L)]
    by_shard = [tuple(counts_of(key).reshape(2, -1).sum(1).tolist()) for key in keys]
    assert (5, 0) in by_shard and (0, 0) in by_shard and (0, 5) in by_shard


# --- messages that do not match the schedule ---

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
        host, lanes = groups(store, name, topology, lanes=2)
        ends = settings(topology, torch.float32, LONG)
        if my_rank() == 0:
            trunk = TrunkWire(ends, host, lanes)
            for key, step, counts in sent:
                kept.append(trunk.request(key, step, torch.ones(max(0, sum(counts)), D), torch.tensor(counts)))
        else:
            service = make_service(topology, PoolWire(ends, host, lanes))
            try:
                # One plan of all slots, so that forwards may wait for their backwards.
                service.serve(slots((key,) for key in planned), STEP)
            except WireError as error:
                errors[name] = str(error)
            kept.append(service)
        barrier(store, name)
        kept += [host, *lanes]
    return errors


def test_messages_that_do_not_fit_the_plan() -> None:
    errors = run_ranks(2, misfits)[1]
    for name, (_, _, wanted) in MISFITS.items():
        assert name in errors, f"{name}: no error"
        assert wanted in errors[name]
        assert errors[name].startswith("rank 1 (pool 0, shard 0) got ")
        assert "rank 0" in errors[name]


# --- peers that say nothing ---


def error_of(wait: Callable[[], object]) -> str:
    try:
        wait()
    except WireError as error:
        return str(error)
    return "no error"


SILENCES = (
    "trunk without a word",
    "trunk without its tokens",
    "trunk that takes no answer",
    "pool without a word",
    "pool without an answer",
)


class Mute:
    """A lane that loses everything."""

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return None

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        return None


class NoReceives(Mute):
    """A lane that sends and takes nothing."""

    def __init__(self, lane: Any):
        self._lane = lane

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return self._lane.send(tensors, peer, tag)


def answer_twice(pool: PoolWire, key: RequestKey) -> None:
    """Whether the first answer came is known when the next message is due."""
    ((rows_ND, counts),) = pool.receive([key], STEP)
    pool.answer(key, STEP, rows_ND, counts)
    pool.answer(key, STEP, rows_ND, counts)
    pool.receive([key], STEP)


def silence() -> dict[str, str]:
    """What ranks 0 and 2 of 2+1 say of a silent rank 1 (a trunk) and a silent rank 2 (the pool).

    Barriers see to it that a rank starts its short wait when all that it does get is there.
    """
    store, topology = connect(), Topology(2, 1, 1)
    short, long = (settings(topology, torch.float32, seconds) for seconds in (SHORT, LONG))
    keys = next(train_plan(2, lanes=1))
    counts = torch.tensor([1, 0, 2, 0, 0, 0])
    errors: dict[str, str] = {}
    kept: list[Any] = []
    for case in SILENCES:
        host, lanes = groups(store, case, topology, lanes=1)
        kept += [host, *lanes]
        if my_rank() == 0:
            kept.append(TrunkWire(short, host, lanes).request(keys[0], STEP, torch.ones(3, D), counts))
        if my_rank() == 1 and case in ("trunk without its tokens", "trunk that takes no answer"):
            lane = NoReceives(lanes[0]) if case == "trunk that takes no answer" else Mute()
            kept.append(TrunkWire(short, host, [lane]).request(keys[1], STEP, torch.ones(3, D), counts))
        if my_rank() == 2 and case == "pool without an answer":
            PoolWire(long, host, lanes).receive(keys[:1], STEP)
        barrier(store, f"start {case}")
        if my_rank() == 0 and case.startswith("pool"):
            errors[case] = error_of(kept[-1].wait)
        if my_rank() == 2 and case.startswith("trunk"):
            pool = PoolWire(short, host, lanes)
            if case == "trunk that takes no answer":
                errors[case] = error_of(partial(answer_twice, pool, keys[1]))
            else:
                errors[case] = error_of(partial(pool.receive, keys, STEP))
        barrier(store, f"end {case}")
    return errors


def test_silent_peers() -> None:
    trunk, _, pool = run_ranks(3, silence)
    message = "FORWARD, lane 0, layer 0, micro-batch 0, step 7 ("
    me, other = "rank 2 (pool 0, shard 0)", "rank 1 (trunk 1)"
    assert pool["trunk without a word"].startswith(f"{me} could not get a header from {other} within 2 s: {message}")
    assert pool["trunk without its tokens"].startswith(f"{me} could not get tokens from {other} within 2 s: {message}")
    assert pool["trunk that takes no answer"].startswith(
        f"{me} could not send an answer to {other} within 2 s: {message}"
    )
    me, other = "rank 0 (trunk 0)", "rank 2 (pool 0, shard 0)"
    assert trunk["pool without a word"].startswith(f"{me} could not send a header to {other} within 2 s: {message}")
    assert trunk["pool without an answer"].startswith(f"{me} could not get the answer of {other} within 2 s: {message}")


# --- peers that are gone ---


def deaths(folder: str) -> None:
    """1+2: shard 0 goes without a word, then the trunk rank; who is left writes down what it was told.

    Each is told in its wait for a message under way, and when it starts the next one. Groups "next" are for the latter.
    """

    def tell(name: str, act: Callable[[], object]) -> None:
        (Path(folder) / name).write_text(error_of(act))

    store, topology = connect(), Topology(1, 2, 2)
    ends = settings(topology, torch.float32, LONG)
    host, lanes = groups(store, "first", topology, lanes=1)
    next_host, next_lanes = groups(store, "next", topology, lanes=1)
    first, second = (requests[0] for requests in list(train_plan(1, lanes=1))[:2])
    barrier(store, "start")
    if my_rank() == 0:
        rows_ND, counts_M = torch.ones(4, D), torch.tensor([1, 0, 1, 0, 2, 0])
        answer = TrunkWire(ends, host, lanes).request(first, STEP, rows_ND, counts_M)
        store.set("requested", "")
        tell("trunk waits", answer.wait)
        time.sleep(SETTLE)
        wire = TrunkWire(ends, next_host, next_lanes)
        tell("trunk starts", lambda: wire.request(second, STEP, rows_ND, counts_M).wait())
        store.wait(["received"])
        time.sleep(SETTLE)
        os._exit(0)
    pool = PoolWire(ends, host, lanes)
    ((rows_ND, counts),) = pool.receive([first], STEP)
    if my_rank() == 1:
        store.wait(["requested"])
        os._exit(0)
    store.set("received", "")
    tell("pool waits", lambda: pool.receive([second], STEP))
    time.sleep(SETTLE)
    tell("pool starts", lambda: pool.receive([second], STEP))
    tell("pool answers", lambda: pool.answer(first, STEP, rows_ND, counts))


def test_peers_that_are_gone(tmp_path: Path) -> None:
    """Nobody waits for the time limit (60 s here): a broken connection is an error at once, and it names the peer."""
    with pytest.raises(RankFailed):
        run_ranks(3, deaths, str(tmp_path))
    told = {file.name: file.read_text() for file in tmp_path.iterdir()}
    trunk, pool = "rank 0 (trunk 0)", "rank 2 (pool 1, shard 1)"
    gone = "rank 1 (pool 0, shard 0)"
    broke = "because the connection broke: FORWARD, lane 0"
    wanted = {
        "trunk waits": f"{trunk} could not get the answer of {gone} {broke}, layer 0, micro-batch 0, step 7 (",
        "trunk starts": f"{trunk} could not send a header to {gone} {broke}, layer 1, micro-batch 0, step 7 (",
        "pool waits": f"{pool} could not get a header from {trunk} {broke}, layer 1, micro-batch 0, step 7 (",
        "pool starts": f"{pool} could not get a header from {trunk} {broke}, layer 1, micro-batch 0, step 7 (",
        "pool answers": f"{pool} could not send an answer to {trunk} {broke}, layer 0, micro-batch 0, step 7 (",
    }
    assert told.keys() == wanted.keys()
    for name, text in wanted.items():
        assert told[name].startswith(text), told[name]
