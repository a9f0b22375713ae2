"""Clocks of a rank's computing, and what it waits for.

A GPU does later what its host launches, so the host's time says nothing about who waits for whom. On a GPU a moment is
therefore an event on the computing stream. Nobody waits for it; its time is read once the stream has come to it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Moment = Any
"""A point in a rank's computing, of the clock that made it."""


class Clock(Protocol):
    """Tells the time of the device that computes."""

    def now(self) -> Moment:
        """Return the moment when everything that the calling thread has launched is done."""

    def latest(self, host: float) -> Moment:
        """Return the moment of something outside, which has just been noticed and was at `host` (perf_counter)."""

    def seconds(self, since: Moment, until: Moment) -> float | None:
        """Return the time between two moments in order; None if the second has not come yet."""


class HostClock:
    """The clock of a CPU, which has done at once what it is told to do."""

    def now(self) -> float:
        """See `Clock.now`."""
        return time.perf_counter()

    def latest(self, host: float) -> float:
        """See `Clock.latest`."""
        return host

    def seconds(self, since: float, until: float) -> float:
        """See `Clock.seconds`."""
        return until - since


def _cuda_event() -> Any:
    import torch  # not above: `watch` starts without torch

    return torch.cuda.Event(enable_timing=True)


class StreamClock:
    """The clock of the calling thread's current stream.

    Args:
        new_event: Returns an event that can be timed; tests replace it.
    """

    def __init__(self, new_event: Callable[[], Any] = _cuda_event):
        self._new_event = new_event

    def now(self) -> Any:
        """See `Clock.now`."""
        event = self._new_event()
        event.record()
        return event

    def latest(self, host: float) -> Any:
        """See `Clock.latest`. A stream does not know the host's time, but what the host launches next comes later."""
        return self.now()

    def seconds(self, since: Any, until: Any) -> float | None:
        """See `Clock.seconds`."""
        return since.elapsed_time(until) / 1000 if until.query() else None


def clock_of(device: torch.device) -> Clock:
    """Return the clock of what a device computes."""
    return StreamClock() if device.type == "cuda" else HostClock()


class Waits:
    """Adds up the time for which a rank's computing waits.

    Attributes:
        seconds_waiting: Time spent waiting for the other role, since the start.
        seconds_on_wire: Time spent waiting for payloads whose headers have come and, on a CPU, sending.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self._waiting = self._on_wire = 0.0
        self._open: deque[tuple[Moment, Moment, Moment]] = deque()  # of a stream that has not come to their ends

    @property
    def seconds_waiting(self) -> float:
        self._read()
        return self._waiting

    @property
    def seconds_on_wire(self) -> float:
        self._read()
        return self._on_wire

    def waited(self, since: Moment, headers: Moment | None = None) -> None:
        """End a wait, whose headers came at some moment before or after it began. None: all of it was waiting."""
        until = self.clock.now()
        self._open.append((since, until if headers is None else headers, until))

    def sent(self, since: Moment) -> None:
        """End the sending of a message."""
        self._open.append((since, since, self.clock.now()))

    def _read(self) -> None:
        """Add up what the computing has come to, without waiting for it."""
        while self._open:
            since, headers, until = self._open[0]
            seconds, after_headers = (self.clock.seconds(begin, until) for begin in (since, headers))
            if seconds is None or after_headers is None:
                return
            on_wire = min(seconds, after_headers)
            self._waiting += seconds - on_wire
            self._on_wire += on_wire
            self._open.popleft()
