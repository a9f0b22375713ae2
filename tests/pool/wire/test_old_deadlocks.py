"""The model of devices sees the deadlocks of the wire that it was made for (`tests.pool.fake_device.specimen`)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool.fake_device.plans import plan
from tests.pool.fake_device.specimen import Specimen
from tests.pool.fake_device.world import Deadlock


def outcome(name: str, hardware: str | None, micro_batches: int, **model: Any) -> str:
    spec = plan(name, hardware, micro_batches)
    try:
        Specimen(spec.recipe.grid, spec.step, **model).run()
    except Deadlock as deadlock:
        return str(deadlock)
    return "the step ended"


def test_receives_that_wait_take_all_sms() -> None:
    """A slot merges two lanes of a trunk rank: the answer of one waits for the other's request, which finds no SM."""
    assert outcome("unipool-182m", "h100", 4) == "the step ended", "as many SMs as you like"
    stuck = outcome("unipool-182m", "h100", 4, sms=132)
    assert "rank 4 receiver: the end of [receive lane3 0->4]" in stuck, "the pool waits for the trunk's lane 3"
    assert "[send lane3 0->4] waits for 16 SMs of 4 free ones" in stuck, "which cannot be sent"
    assert "[receive lane2 4->0] runs until the peer's starts" in stuck, "because the answer to lane 2 is awaited"


def test_lanes_that_share_a_stream() -> None:
    """64 communicators of a trunk rank on 32 streams: lanes wait for each other, as they do on one."""
    assert outcome("unipool-978m", "h100", 4, streams=64) == "the step ended"
    stuck = outcome("unipool-978m", "h100", 4)
    assert "[receive lane0 8->0] runs until the peer's starts: receive lane0 8->0 <- [send lane2 0->8]" in stuck


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
def test_a_host_that_runs_ahead(lazy: bool, buffered: bool) -> None:
    """In the backward of layer l-1 the pool's receive is launched before the answer of layer l, on one stream."""
    common: dict[str, Any] = {"policy": "random", "lazy": lazy, "buffered": buffered}
    blocking = [outcome("quickstart", None, 2, seed=seed, **common) for seed in range(10)]
    assert set(blocking) == {"the step ended"}, "waits that block the host hide it"
    stuck = [outcome("quickstart", None, 2, seed=seed, host_waits=False, **common) for seed in range(10)]
    stuck = [text for text in stuck if text != "the step ended"]
    assert stuck
    assert all("1->0] runs until the peer's starts" in text for text in stuck), "the trunk waits for an answer"
    assert all("0->1] runs until the peer's starts" in text for text in stuck), "the pool for the next request"
