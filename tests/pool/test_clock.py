"""Clocks of a rank's computing: the host's, and that of a stream of made-up events which a GPU comes to later."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pool.wire import clock
from pool.wire.clock import Clock, HostClock, StreamClock, Waits, clock_of
from trainer.telemetry.time_breakdown import Usage, UsageClock


class Stream:
    """Events that have been recorded, and not come to yet."""

    def __init__(self) -> None:
        self.ahead: deque[Event] = deque()
        self.clock: Clock = StreamClock(lambda: Event(self))

    def come(self, *times: float) -> None:
        """Come to the next events at these times."""
        for at in times:
            self.ahead.popleft().at = at


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, float("nan")

    def record(self) -> None:
        self.stream.ahead.append(self)

    def query(self) -> bool:
        return self.at == self.at

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds, as of CUDA's events; CUDA refuses events that have not been come to."""
        assert self.query() and other.query()
        return 1000 * (other.at - self.at)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times that the host's clock shows, in turn."""
    times: list[float] = []
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: times.pop(0)))  # for this module only
    return times


def test_the_device_decides() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert isinstance(clock_of(torch.device("cuda", 0)), StreamClock)


@pytest.mark.parametrize(
    ("headers", "waiting", "on_wire"), [(7.0, 0.0, 3.0), (11.0, 1.0, 2.0), (13.0, 3.0, 0.0), (None, 3.0, 0.0)]
)
def test_a_wait_on_the_host(headers: float | None, waiting: float, on_wire: float, host: list[float]) -> None:
    """From 10 to 13; from when the headers are there it is the wire's."""
    waits = Waits(HostClock())
    host += [10.0, 13.0, 20.0, 20.5]
    waits.waited(waits.clock.now(), None if headers is None else waits.clock.latest(headers))
    assert (waits.seconds_waiting, waits.seconds_on_wire) == (waiting, on_wire)
    waits.sent(waits.clock.now())
    assert (waits.seconds_waiting, waits.seconds_on_wire) == (waiting, on_wire + 0.5)


def test_a_stream_waits_later_than_its_host() -> None:
    """Two waits are launched at once. The stream comes to the first at 10, to its headers at 12 and on at 12.5."""
    stream = Stream()
    waits = Waits(stream.clock)
    for _ in range(2):
        since = stream.clock.now()
        waits.waited(since, stream.clock.latest(host=-1.0))
    assert waits.seconds_waiting == waits.seconds_on_wire == 0
    stream.come(10.0, 12.0)
    assert waits.seconds_waiting == waits.seconds_on_wire == 0, "not whole yet"
    stream.come(12.5, 20.0)
    assert (waits.seconds_waiting, waits.seconds_on_wire) == (2.0, 0.5)
    stream.come(20.0, 21.0)
    assert (waits.seconds_waiting, waits.seconds_on_wire) == (2.0, 1.5), "whose headers had been there"


def test_usage_by_a_stream() -> None:
    """Computing for 9 with a wait of 2, an optimizer for 3; the next step computes for 5, and its optimizer for 1."""
    stream = Stream()
    waits = Waits(stream.clock)
    usage = UsageClock(waits)

    def step() -> None:
        usage.begin()
        waits.waited(stream.clock.now())
        usage.computed()

    step()
    stream.come(0.0, 1.0, 4.0, 6.0, 10.0)  # up to the gradients, whose norm the host reads
    usage.stepped()
    assert usage.total == Usage(computing=7.0, waiting=2.0)
    waits.waited(stream.clock.now())  # an evaluation
    stream.come(13.0, 13.0, 33.0)
    step()
    assert usage.total == Usage(computing=7.0, waiting=2.0, optimizer=3.0)
    stream.come(40.0, 41.0, 41.0, 45.0)
    usage.stepped()
    usage.begin()
    stream.come(46.0)
    assert usage.total == Usage(computing=12.0, waiting=2.0, optimizer=3.0)
    usage.begin()
    assert usage.total == Usage(computing=12.0, waiting=2.0, optimizer=4.0)


def test_a_step_whose_results_nobody_has_read_is_added_later() -> None:
    stream = Stream()
    waits: Any = Waits(stream.clock)
    usage = UsageClock(waits)
    for _ in range(2):
        usage.begin()
        waits.waited(stream.clock.now())
        usage.computed()
        usage.stepped()
    assert usage.total == Usage()
    stream.come(0.0, *(1.0, 1.0, 2.0, 4.0, 5.0), *(5.0, 5.0, 7.0, 8.0, 9.0))
    usage.begin()
    assert (usage.total.computing + usage.total.waiting, usage.total.optimizer) == (6.0, 2.0)
    assert usage.total.waiting == 3.0
