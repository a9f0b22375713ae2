"""What the wire reports about peers that are silent, and about peers that are gone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pool.schedule import RequestKey
from pool.topology import Topology
from pool.wire import PoolWire, pool_wire, trunk_wire
from tests.distributed import RankFailed, run_ranks
from tests.pool.wire_job import LONG, STEP, D, barrier, connect, error_of, groups, my_rank, settings, train_plan

SHORT = {"trunk": 5.0, "pool": 2.0}
"""Time limits by who is silent. The pool also waits for a message that comes once another process gets to run."""
SETTLE = 0.5
"""Time in which the end of a process becomes known on all its connections."""

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
    ((rows_ND, counts),) = pool.receive([key], STEP).ready()
    pool.answer([key], STEP, [rows_ND], [counts.listed])
    pool.answer([key], STEP, [rows_ND], [counts.listed])
    pool.receive([key], STEP).ready()


def receive(pool: PoolWire, keys: Sequence[RequestKey]) -> None:
    pool.receive(keys, STEP).ready()


def silence() -> dict[str, str]:
    """What ranks 0 and 2 of 2+1 say of a silent rank 1 (a trunk) and a silent rank 2 (the pool).

    Barriers see to it that a rank starts its short wait when all that it does get is there.
    """
    store, topology = connect(), Topology(2, 1, 1)
    long = settings(topology, torch.float32, LONG)
    keys = next(train_plan(2, lanes=1))
    counts = torch.tensor([1, 0, 2, 0, 0, 0])
    errors: dict[str, str] = {}
    kept: list[Any] = []
    for case in SILENCES:
        joined = groups(store, case, topology, lanes=1)
        kept.append(joined)
        short = settings(topology, torch.float32, SHORT[case.split()[0]])
        if my_rank() == 0:
            kept.append(trunk_wire(short, joined).request(keys[0], STEP, torch.ones(3, D), counts))
        if my_rank() == 1 and case in ("trunk without its tokens", "trunk that takes no answer"):
            lane = NoReceives(joined.lanes[0]) if case == "trunk that takes no answer" else Mute()
            kept.append(
                trunk_wire(short, replace(joined, lanes=[lane])).request(keys[1], STEP, torch.ones(3, D), counts)
            )
        if my_rank() == 2 and case == "pool without an answer":
            pool_wire(long, joined).receive(keys[:1], STEP).ready()
        barrier(store, f"start {case}")
        if my_rank() == 0 and case.startswith("pool"):
            errors[case] = error_of(kept[-1].wait)
        if my_rank() == 2 and case.startswith("trunk"):
            pool = pool_wire(short, joined)
            if case == "trunk that takes no answer":
                errors[case] = error_of(partial(answer_twice, pool, keys[1]))
            else:
                errors[case] = error_of(partial(receive, pool, keys))
        barrier(store, f"end {case}")
    return errors


def test_silent_peers() -> None:
    trunk, _, pool = run_ranks(3, silence)
    message = "FORWARD, lane 0, layer 0, micro-batch 0, step 7 ("
    me, other = "rank 2 (pool 0, shard 0)", "rank 1 (trunk 1)"
    assert pool["trunk without a word"].startswith(f"{me} could not get a header from {other} within 5 s: {message}")
    assert pool["trunk without its tokens"].startswith(f"{me} could not get tokens from {other} within 5 s: {message}")
    assert pool["trunk that takes no answer"].startswith(
        f"{me} could not send an answer to {other} within 5 s: {message}"
    )
    me, other = "rank 0 (trunk 0)", "rank 2 (pool 0, shard 0)"
    assert trunk["pool without a word"].startswith(f"{me} could not send a header to {other} within 2 s: {message}")
    assert trunk["pool without an answer"].startswith(f"{me} could not get the answer of {other} within 2 s: {message}")


def deaths(folder: str) -> None:
    """1+2: shard 0 goes without a word, then the trunk rank; who is left writes down what it was told.

    Each is told in its wait for a message under way, and when it starts the next one. Groups "next" are for the latter.
    """

    def tell(name: str, act: Callable[[], object]) -> None:
        (Path(folder) / name).write_text(error_of(act))

    store, topology = connect(), Topology(1, 2, 2)
    ends = settings(topology, torch.float32, LONG)
    joined = groups(store, "first", topology, lanes=1)
    joined_next = groups(store, "next", topology, lanes=1)
    first, second = (requests[0] for requests in list(train_plan(1, lanes=1))[:2])
    barrier(store, "start")
    if my_rank() == 0:
        rows_ND, counts_M = torch.ones(4, D), torch.tensor([1, 0, 1, 0, 2, 0])
        answer = trunk_wire(ends, joined).request(first, STEP, rows_ND, counts_M)
        store.set("requested", "")
        tell("trunk waits", answer.wait)
        time.sleep(SETTLE)
        wire = trunk_wire(ends, joined_next)
        tell("trunk starts", lambda: wire.request(second, STEP, rows_ND, counts_M).wait())
        store.wait(["received"])
        time.sleep(SETTLE)
        os._exit(0)
    pool = pool_wire(ends, joined)
    ((rows_ND, counts),) = pool.receive([first], STEP).ready()
    if my_rank() == 1:
        store.wait(["requested"])
        os._exit(0)
    store.set("received", "")
    tell("pool waits", lambda: pool.receive([second], STEP).ready())
    time.sleep(SETTLE)
    tell("pool starts", lambda: pool.receive([second], STEP).ready())
    tell("pool answers", lambda: pool.answer([first], STEP, [rows_ND], [counts.listed]))


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
