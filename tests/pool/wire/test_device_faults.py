"""What the device wire says of messages that are lost or late and of ranks that die, on a model of devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pool.wire import WireError
from tests.pool.fake_device.devices import Operation
from tests.pool.fake_device.job import LIMIT, STEP, Step, equal, step
from tests.pool.fake_device.plans import reduced

CASE = reduced("unipool-182m", "h100", layers=2)
"""Four trunk ranks (0 to 3), two shards (4 and 5)."""


def nth(number: int, name: str, act: Callable[[Operation], None]) -> Callable[[Operation], None]:
    """A fault that befalls an operation, the given one of those with this name."""
    seen = 0

    def fault(operation: Operation) -> None:
        nonlocal seen
        if str(operation).startswith(name):
            seen += 1
            if seen == number:
                act(operation)

    return fault


def lose(operation: Operation) -> None:
    operation.lost = True


def late(seconds: float) -> Callable[[Operation], None]:
    def act(operation: Operation) -> None:
        operation.not_before = seconds

    return act


def errors(run: Step) -> dict[int, str]:
    """What each rank says at its end. All ranks end, and those that live leave nothing on their devices."""
    actors = run.attempt()
    assert all(actor.done for actor in actors)
    for device in run.devices:
        assert device.rank in run.world.dead_ranks or device.free_sms == device.sms
    assert all(isinstance(actor.error, WireError) for actor in actors if actor.error), [a.error for a in actors]
    return {actor.rank: str(actor.error) for actor in actors if actor.error}


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
def test_a_request_that_is_lost(buffered: bool) -> None:
    run = step(CASE, buffered=buffered)
    run.devices[1].faults.append(nth(3, "send requests 1->4", lose))
    said = errors(run)
    assert LIMIT <= run.world.now < 3 * LIMIT
    assert said[1].startswith("rank 1 (trunk 1) could not send tokens to rank 4 (pool 0, shard 0) or rank 5 (pool 1, shard 1)")
    assert f"within {LIMIT:g} s: FORWARD, lane " in said[1] and f"step {STEP}" in said[1]
    assert said[4].startswith("rank 4 (pool 0, shard 0) could not get tokens from rank 1 (trunk 1) within")
    assert set(said) == set(range(6)), "who waits for one of these says so too"


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
def test_an_answer_that_is_lost(buffered: bool) -> None:
    run = step(CASE, buffered=buffered)
    run.devices[5].faults.append(nth(2, "send answers 5->", lose))
    said = errors(run)
    assert LIMIT <= run.world.now < 3 * LIMIT
    assert said[5].startswith("rank 5 (pool 1, shard 1) could not send an answer to ")
    assert any("could not get the answer of rank 4 (pool 0, shard 0) or rank 5 (pool 1, shard 1)" in s for s in said.values())
    assert all("lane " in text and "layer " in text for text in said.values())


@pytest.mark.parametrize(
    ("source", "target", "says", "what"),
    [(1, 5, 5, "get a header from rank 1 (trunk 1)"), (5, 2, 2, "get the answer's header of rank 5 (pool 1, shard 1)")],
    ids=["request", "answer"],
)
def test_a_header_that_is_never_sent(source: int, target: int, says: int, what: str) -> None:
    run = step(CASE)
    run.mail.lose = lambda one, other, message: (one, other) == (source, target) and run.world.now == 0
    said = errors(run)
    assert LIMIT <= run.world.now < 3 * LIMIT
    assert f"could not {what} within {LIMIT:g} s: " in said[says]
    assert "lane " in said[says] and "layer 0" in said[says]


@pytest.mark.parametrize("rank", [2, 4], ids=["trunk", "pool"])
def test_a_rank_that_dies(rank: int) -> None:
    """Who waits for it knows at once, by its connections, or soon, because it has not been heard of."""
    run = step(CASE)
    run.devices[rank].faults.append(nth(5, "send", lambda operation: run.world.kill(rank)))
    said = errors(run)
    assert run.world.now < LIMIT
    name = run.topology.describe(rank)
    blames = [text for text in said.values() if name in text]
    assert blames
    assert all("because the connection broke" in text for text in blames)


def test_a_late_start_changes_nothing() -> None:
    wanted = step(CASE, on_device=False).run()
    for where, what in ((0, "send requests"), (4, "receive requests"), (5, "experts"), (3, "receive answers")):
        run = step(CASE)
        run.devices[where].faults.append(nth(2, what, late(0.9 * LIMIT)))
        assert equal(run.run(), wanted)
        assert 0.9 * LIMIT <= run.world.now < LIMIT


def test_a_start_that_is_too_late() -> None:
    run = step(CASE)
    run.devices[4].faults.append(nth(2, "receive requests", late(3 * LIMIT)))
    said = errors(run)
    assert f"could not get tokens from rank" in said[4] and f"within {LIMIT:g} s" in said[4]
    assert run.world.now < 3 * LIMIT, "an aborted communicator ends what waits on it"
