"""What the ranks of both roles spend the time of training steps on, and who waits for whom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Protocol

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


def shares(seconds: Sequence[float]) -> dict[str, float]:
    """Convert seconds in the order of `ACTIVITIES` into shares of their sum, by activity."""
    total = sum(seconds) or 1.0
    return {activity: spent / total for activity, spent in zip(ACTIVITIES, seconds, strict=True)}


class Waiter(Protocol):
    """Counts the seconds spent on the other role and on the wire since the start."""

    seconds_waiting: float
    seconds_on_wire: float


class UsageClock:
    """Adds up the usage of a rank's training steps.

    Call `begin`, then `computed` once the gradients are complete, then `stepped`.

    Attributes:
        total: Usage since the start.
    """

    def __init__(self, waiter: Waiter):
        self._waiter = waiter
        self.total = Usage()
        self._mark = 0.0
        self._before = (0.0, 0.0)

    def begin(self) -> None:
        """Start a step."""
        self._mark = time.perf_counter()
        self._before = (self._waiter.seconds_waiting, self._waiter.seconds_on_wire)

    def computed(self) -> None:
        """End the forward and backward of a step."""
        waiting = self._waiter.seconds_waiting - self._before[0]
        wire = self._waiter.seconds_on_wire - self._before[1]
        self._add(computing=self._lap() - waiting - wire, waiting=waiting, wire=wire)

    def stepped(self) -> None:
        """End a step."""
        self._add(optimizer=self._lap())

    def _add(self, **seconds: float) -> None:
        totals = asdict(self.total)
        self.total = Usage(**{name: total + seconds.get(name, 0.0) for name, total in totals.items()})

    def _lap(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before
