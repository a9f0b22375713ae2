"""The model of devices sees the deadlocks of the wire that it was made for (`tests.pool.fake_device.specimen`)."""

from __future__ import annotations

from typing import Any

import pytest

from pool.schedule import lockstep_schedule
from pool.topology import Topology
from tests.pool.fake_device.plans import Case, old
from tests.pool.fake_device.specimen import Specimen
from tests.pool.fake_device.world import Deadlock


def outcome(case: Case, **model: Any) -> str:
    try:
        Specimen(case.topology, case.schedule, **model).run()
    except Deadlock as deadlock:
        return str(deadlock)
    return ENDED


ENDED = "the step ended"


def test_receives_that_wait_take_all_sms() -> None:
    """A slot merges two lanes of a trunk rank: the answer of one waits for the other's request, which finds no SM."""
    case = old("unipool-182m", micro_batches=4)
    assert outcome(case) == ENDED, "as many SMs as you like"
    stuck = outcome(case, sms=132)
    assert "rank 5 receiver: the end of [receive lane3 0->5]" in stuck, "the pool waits for the trunk's lane 3"
    assert "[send lane3 0->5] waits for 16 SMs of 4 free ones" in stuck, "which cannot be sent"
    assert "[receive lane2 5->0] runs until the peer's starts" in stuck, "because the answer to lane 2 is awaited"


def test_lanes_that_share_a_stream() -> None:
    """64 communicators of a trunk rank on 32 streams: lanes wait for each other, as they do on one."""
    stuck = outcome(old("unipool-978m"))
    assert "[receive lane0 8->0] runs until the peer's starts: receive lane0 8->0 <- [send lane2 0->8]" in stuck
    case = old("unipool-182m", micro_batches=4)
    assert outcome(case, streams=16) == ENDED, "a stream each"
    assert outcome(case, streams=8) != ENDED


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
def test_a_host_that_runs_ahead(lazy: bool, buffered: bool) -> None:
    """In the backward of layer l-1 the pool's receive is launched before the answer of layer l, on one stream."""
    case = Case(Topology(1, 1, 1), lockstep_schedule(1, 2, 8), 8, 2)
    common: dict[str, Any] = {"policy": "random", "lazy": lazy, "buffered": buffered}
    assert {outcome(case, seed=seed, **common) for seed in range(10)} == {ENDED}, "waits that block the host hide it"
    stuck = {outcome(case, seed=seed, host_waits=False, **common) for seed in range(10)} - {ENDED}
    assert stuck
    assert all("1->0] runs until the peer's starts" in text for text in stuck), "the trunk waits for an answer"
    assert all("0->1] runs until the peer's starts" in text for text in stuck), "the pool for the next request"
