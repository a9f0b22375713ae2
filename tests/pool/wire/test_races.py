"""Every access of a buffer of the device wire is ordered with all others, and its memory is free only after the last.

Each way of breaking the wire or its seam below is one that no number would have to show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pool.wire.watcher import Watcher
from tests.pool.fake_device.communicators import FakeWork
from tests.pool.fake_device.job import Step, step
from tests.pool.fake_device.plans import Case, every_rank, plan, reduced
from tests.pool.fake_device.streams import FakeEvent, FakeStreams

BOTH = "every rank"

WAYS: list[dict[str, Any]] = [
    {"policy": "host"},
    {"policy": "device", "buffered": True},
    {"policy": "random", "seed": 1},
    {"policy": "random", "seed": 2, "buffered": True},
]


def case_of(name: str) -> Case:
    """A recipe, or three ranks with both roles."""
    return every_rank(3, 3, 2, True, plan("quickstart", "h100").costs) if name == BOTH else reduced(name, "h100", 2)


def runs(name: str, ways: list[dict[str, Any]]) -> Iterator[Step]:
    for way in ways:
        run = step(case_of(name), races=True, **way)
        try:
            run.run()
        except Exception:  # numbers that nobody has written yet can be anything
            assert run.world.races is not None and run.world.races.found
        yield run


@pytest.mark.parametrize("name", ["quickstart", "unipool-182m", BOTH])
def test_all_accesses_are_ordered(name: str) -> None:
    for run in runs(name, WAYS):
        races = run.world.races
        assert races is not None
        assert races.found == []
        requests = sum(map(len, run.case.schedule.slots))
        assert races.accesses > 10 * requests and races.frees > 3 * requests


def found(name: str = "quickstart", ways: list[dict[str, Any]] = WAYS[1:3]) -> list[list[str]]:
    return [run.world.races.found for run in runs(name, ways) if run.world.races]


def test_a_stream_that_does_not_wait_for_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStreams, "wait", lambda self, event: None)
    for races in found():
        assert any("[experts' forward] on compute" in race and "nothing orders it with " in race for race in races)


def test_a_stream_that_does_not_wait_for_a_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWork, "synchronize", lambda self: None)
    for races in found():
        assert any("[combine]" in race and "[receive answers 1->0]" in race for race in races)


def test_a_sender_that_does_not_wait_for_the_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: None)
    for races in found():
        assert any("tolist by sender of rank 0" in race and "[copy]" in race for race in races)


def test_payloads_that_are_not_kept_until_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Watcher.launched
    monkeypatch.setattr(Watcher, "launched", lambda self, on, work, keep, failed: launched(self, on, work, [], failed))
    for races in found():
        assert any("[send requests 0->1]" in race and "free" in race for race in races)
        assert any("[send answers 1->0]" in race and "free" in race for race in races)


def test_memory_of_one_stream_that_another_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `record_stream` it would be used again while the experts still read it."""
    monkeypatch.setattr(FakeStreams, "used", lambda self, tensor: None)
    for races in found():
        assert any("[experts' backward]" in race and "free" in race for race in races)


def test_exchanges_that_break_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are kept until they are sent, and a rank's own rows until the exchange's stream has copied them."""
    launched, used = Watcher.launched, FakeStreams.used
    monkeypatch.setattr(Watcher, "launched", lambda self, on, work, keep, failed: launched(self, on, work, [], failed))
    for races in found(BOTH, WAYS[2:]):
        assert any("[send answers " in race and "free" in race for race in races)
    monkeypatch.setattr(Watcher, "launched", launched)
    own = lambda self, tensor: None if sys._getframe(1).f_code.co_name == "_copy" else used(self, tensor)  # noqa: E731
    monkeypatch.setattr(FakeStreams, "used", own)
    for races in found(BOTH, WAYS[2:]):
        assert any("[copy] on stream" in race and "free" in race for race in races)
