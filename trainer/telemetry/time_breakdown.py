"""What the ranks of both roles spend the time of training steps on, and who waits for whom."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not above: its package imports torch, without which `watch` starts
    from pool.wire.clock import Moment, Waits

ACTIVITIES = ("computing", "waiting", "wire", "optimizer")


@dataclass(frozen=True)
class Usage:
    """Seconds of training steps by activity; together they are the steps' wall time.

    Attributes:
        computing: Everything not listed below: the trunk's segments, the experts.
        waiting: Waiting for the other role.
        wire: Sending tokens and, on a pool rank, receiving the payload of a request that has arrived.
        optimizer: Reducing gradients, their norm, the update.
    """

    computing: float = 0.0
    waiting: float = 0.0
    wire: float = 0.0
    optimizer: float = 0.0

    def since(self, before: Usage) -> Usage:
        """Return the difference to an earlier total."""
        return Usage(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    def plus(self, other: Usage) -> Usage:
        """Return the sum."""
        return Usage(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def shares(seconds: Sequence[float]) -> dict[str, float]:
    """Convert seconds in the order of `ACTIVITIES` into shares of their sum, by activity."""
    total = sum(seconds) or 1.0
    return {activity: spent / total for activity, spent in zip(ACTIVITIES, seconds, strict=True)}


@dataclass(frozen=True)
class Serving:
    """The pool's side of a rank that has both roles.

    Attributes:
        spans: The time that it takes altogether, as waits.
        waits: The waits within it.
    """

    spans: Waits
    waits: Waits


class UsageClock:
    """Adds up the usage of a rank's training steps, by the clock of the device that computes.

    Call `begin`, then `computed` once the gradients are complete, then `stepped`. On a GPU it never waits: what the
    stream has not come to by `stepped`, which is the optimizer at least, is added one step later.

    Args:
        waits: The waits of the rank's role, or of the trunk's side of a rank that has both.
        serving: The pool's side of a rank that has both roles.

    Attributes:
        total: Usage since the start, without the pool's side of a rank that has both roles.
        served: That of the pool's side.
    """

    def __init__(self, waits: Waits, serving: Serving | None = None):
        self._waits, self._clock, self._serving = waits, waits.clock, serving
        self.total = self.served = Usage()
        self._mark: Moment = self._clock.now()
        self._waited = self._read_waits()
        self._open: deque[tuple[bool, Moment, Moment]] = deque()  # whether it is an optimizer's, and from when to when

    def begin(self) -> None:
        """Start a step."""
        self._read()
        self._mark = self._clock.now()
        self._waited = self._read_waits()

    def _read_waits(self) -> tuple[float, ...]:
        """Return the seconds so far: waiting and on the wire, and on the pool's side serving, waiting, on the wire."""
        own = (self._waits.seconds_waiting, self._waits.seconds_on_wire)
        if self._serving is None:
            return (*own, 0.0, 0.0, 0.0)
        within = self._serving.waits
        return (*own, self._serving.spans.seconds_waiting, within.seconds_waiting, within.seconds_on_wire)

    def computed(self) -> None:
        """End the forward and backward of a step."""
        self._lap(optimizer=False)

    def stepped(self) -> None:
        """End a step."""
        self._lap(optimizer=True)

    def _lap(self, optimizer: bool) -> None:
        before, self._mark = self._mark, self._clock.now()
        self._open.append((optimizer, before, self._mark))
        self._read()

    def _read(self) -> None:
        while self._open:
            optimizer, since, until = self._open[0]
            seconds = self._clock.seconds(since, until)
            if seconds is None:
                return
            self._open.popleft()
            if optimizer:
                self.total = self.total.plus(Usage(optimizer=seconds))
                continue
            waited = self._read_waits()
            waiting, wire, serving, *within = (now - then for now, then in zip(waited, self._waited, strict=True))
            self._waited = waited
            self.total = self.total.plus(Usage(seconds - waiting - wire - serving, waiting, wire))
            self.served = self.served.plus(Usage(serving - sum(within), *within))
