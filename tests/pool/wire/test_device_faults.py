"""What the device wire says of messages that are lost or late and of ranks that die, on a model of devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from pool.schedule import SERVE, Kind, PoolSchedule, RequestKey
from pool.schedule_builder import Costs, build_training_schedule
from pool.topology import Topology
from pool.wire import WireError, watcher
from tests.pool.fake_device import threads
from tests.pool.fake_device.devices import Operation
from tests.pool.fake_device.job import LIMIT, STEP, Step, equal, step
from tests.pool.fake_device.plans import Case, every_rank

COSTS = Costs(trunk_layer=1.0, head=3.0, pool_layer=0.5, slot=0.1, transfer=0.1)
TOPOLOGY = Topology(4, 2, 2)
CASE = Case(TOPOLOGY, build_training_schedule(TOPOLOGY, 2, 3, 2, True, COSTS), 2, 3)
"""Four trunk ranks (0 to 3), two shards (4 and 5)."""

BOTH = every_rank(3, 3, 2, True, COSTS)
"""Three ranks with both roles."""


@pytest.fixture(autouse=True)
def _fewer_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is a lot of milliseconds, each of which would be simulated."""
    monkeypatch.setattr(watcher, "_ASK_SECONDS", 1.0)
    monkeypatch.setattr(watcher, "_TIME_SECONDS", 1.0)


def nth(number: int, name: str, act: Callable[[Operation], None]) -> Callable[[Operation], None]:
    """A fault that befalls an operation, the given one of those whose names begin like this."""
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


def errors(run: Step, could_not: str = "could not") -> dict[int, str]:
    """What each rank says at its end. All ranks end, and those that live leave nothing on their devices."""
    actors = run.attempt()
    for device in run.devices:
        assert device.rank in run.world.dead_ranks or device.free_sms == device.sms
    said = {}
    for actor in actors:
        if actor.rank not in run.world.dead_ranks:
            assert isinstance(actor.error, WireError), "who waits for one of these says so too"
            said[actor.rank] = str(actor.error)
    exchange = rf"(FORWARD|BACKWARD), lane \d, layer \d, micro-batch \d, step {STEP}\b"
    for rank, text in said.items():
        assert text.startswith(f"{run.topology.describe(rank)} {could_not} ")
        assert re.search(exchange, text), text
    return said


def late_errors(run: Step) -> dict[int, str]:
    """`errors` of a run in which everybody waits as long as the time limit, and not much longer."""
    said = errors(run)
    assert LIMIT <= run.world.now <= LIMIT + 3
    assert all(f" within {LIMIT:g} s: " in text for text in said.values())
    return said


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
def test_a_request_that_is_lost(buffered: bool) -> None:
    run = step(CASE, buffered=buffered)
    run.devices[1].faults.append(nth(3, "send requests 1->4", lose))
    said = late_errors(run)
    assert "could not send tokens to rank 4 (pool 0, shard 0) within" in said[1]
    assert "could not get tokens from rank 1 (trunk 1) within" in said[4], "and not a header that comes no more"


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
def test_an_answer_that_is_lost(buffered: bool) -> None:
    """A group of messages names all peers that may be to blame."""
    run = step(CASE, buffered=buffered)
    run.devices[5].faults.append(nth(3, "send answers 5->0", lose))
    said = late_errors(run)
    assert "could not send an answer to rank 0 (trunk 0) within" in said[5]
    wanted = "could not get the answer of rank 4 (pool 0, shard 0) or rank 5 (pool 1, shard 1) within"
    assert any(wanted in text for text in said.values())


@pytest.mark.parametrize(
    ("source", "target", "what"),
    [(1, 5, "get a header from rank 1 (trunk 1)"), (5, 2, "get the answer's header of rank 5 (pool 1, shard 1)")],
    ids=["request", "answer"],
)
def test_a_header_that_is_never_sent(source: int, target: int, what: str) -> None:
    run = step(CASE)
    run.mail.lose = lambda one, other, message: (one, other) == (source, target)
    said = late_errors(run)
    assert f"could not {what} within {LIMIT:g} s: FORWARD, lane 0, layer 0, micro-batch 0" in said[target]


@pytest.mark.parametrize("rank", [2, 4], ids=["trunk", "pool"])
def test_a_rank_that_dies(rank: int) -> None:
    """Who waits for it knows at once, by its connections, or soon, because it is known to be gone."""
    run = step(CASE)
    run.devices[rank].faults.append(nth(5, "send", lambda operation: run.world.kill(rank)))
    said = errors(run)
    assert run.world.now < 5
    for text in said.values():
        assert "because the connection broke: " in text
        assert run.topology.describe(rank) in text


def test_a_late_start_changes_nothing() -> None:
    wanted = step(CASE, on_device=False).run()
    for where, what in ((0, "send requests"), (4, "receive requests"), (5, "experts"), (3, "receive answers")):
        run = step(CASE)
        run.devices[where].faults.append(nth(2, what, late(0.9 * LIMIT)))
        assert equal(run.run(), wanted)
        assert 0.9 * LIMIT <= run.world.now < LIMIT


def test_a_start_that_is_too_late() -> None:
    """The limit does not wait for it."""
    run = step(CASE)
    run.devices[4].faults.append(nth(3, "receive requests", late(3 * LIMIT)))
    said = late_errors(run)
    assert "could not get tokens from rank " in said[4]


def test_an_answer_before_all_headers_of_its_request_are_sent() -> None:
    """The first shard has its header and answers at once, ahead of the earlier request, which is a backward."""
    topology = Topology(1, 2, 2)
    forwards, backwards = ([RequestKey(0, n, n, 0, kind) for n in range(2)] for kind in (Kind.FORWARD, Kind.BACKWARD))
    slots = ((forwards[0],), (backwards[0], forwards[1]), (backwards[1],))
    case = Case(topology, PoolSchedule(slots, ((0, 0, 1, 0, 1, 1),)), 1, 2)
    run = step(case)
    run.mail.lose = lambda one, other, message: bool((one, other) == (0, 2) and threads.sleep(1.0))
    assert equal(run.run(), step(case, on_device=False).run())


# --- where every rank has both roles ---


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "rendezvous"])
@pytest.mark.parametrize(("what", "doing"), [("requests", "exchange tokens"), ("answers", "exchange answers")])
def test_an_exchange_that_is_lost(what: str, doing: str, buffered: bool) -> None:
    run = step(BOTH, buffered=buffered)
    run.devices[1].faults.append(nth(3, f"send {what} 1->", lose))
    said = late_errors(run)
    assert f"could not {doing} with rank " in said[1]
    assert any(f"could not {doing} with rank " in said[rank] and "rank 1 (" in said[rank][6:] for rank in (0, 2))


@pytest.mark.parametrize(
    ("tag", "what"),
    [(0, "get a header from rank 1 (trunk 1, shard 1)"), (1, "get the answer's header of rank 1 (trunk 1, shard 1)")],
    ids=["request", "answer"],
)
def test_a_header_to_a_rank_with_both_roles_that_is_never_sent(tag: int, what: str) -> None:
    run = step(BOTH)
    run.mail.lose = lambda one, other, message: (one, other) == (1, 2) and run.mail.tag == tag
    said = late_errors(run)
    assert f"could not {what} within {LIMIT:g} s: FORWARD, lane 0, layer 0, micro-batch 0" in said[2]


def test_a_rank_with_both_roles_that_dies() -> None:
    run = step(BOTH)
    run.devices[2].faults.append(nth(5, "send", lambda operation: run.world.kill(2)))
    said = errors(run)
    assert run.world.now < 5
    for text in said.values():
        assert "because the connection broke: " in text and run.topology.describe(2) in text


def test_a_late_exchange_changes_nothing() -> None:
    wanted = step(BOTH, on_device=False).run()
    for where, what in ((0, "send requests"), (1, "experts"), (2, "send answers"), (0, "copy")):
        run = step(BOTH)
        run.devices[where].faults.append(nth(2, what, late(0.9 * LIMIT)))
        assert equal(run.run(), wanted)
        assert 0.9 * LIMIT <= run.world.now < LIMIT


def test_a_slot_before_its_request() -> None:
    """A rank that waited for a request of its own would do so for good."""
    order = tuple((SERVE, *ranks) for ranks in BOTH.schedule.lane_order)
    said = errors(step(replace(BOTH, schedule=replace(BOTH.schedule, lane_order=order))), could_not="is to serve")
    assert "is to serve a request of its own that it has not made: FORWARD, lane 0, layer 0, micro-batch 0" in said[0]


def test_an_answer_before_its_request_is_served() -> None:
    order = tuple(tuple(lane for lane in ranks if lane != SERVE) for ranks in BOTH.schedule.lane_order)
    said = errors(step(replace(BOTH, schedule=replace(BOTH.schedule, lane_order=order))), could_not="needs the answer")
    assert " to a request of its own that it has not served: FORWARD, lane 0, layer 0, micro-batch 0" in said[0]
