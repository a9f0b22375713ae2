"""What the ranks of both sides spend their training steps on: who waits for whom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

ACTIVITIES = ("computing", "waiting", "wire", "optimizer")


@dataclass(frozen=True)
class Usage:
    """Seconds of training steps by what a rank did; together their wall time.

    Attributes:
        computing: everything below does not cover: the trunk's segments, the experts.
        waiting: for the other role.
        wire: handing tokens over, and on the pool's side waiting for the payload of a request that has come.
        optimizer: reduction of gradients, their norm, the update.
    """

    computing: float = 0.0
    waiting: float = 0.0
    wire: float = 0.0
    optimizer: float = 0.0

    def since(self, before: Usage) -> Usage:
        return Usage(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


def shares(seconds: Sequence[float]) -> dict[str, float]:
    """Shares of time by activity, from seconds in the order of `ACTIVITIES`; 0 without any."""
    total = sum(seconds) or 1.0
    return {activity: spent / total for activity, spent in zip(ACTIVITIES, seconds, strict=True)}


class Waiter(Protocol):
    """Who knows what was spent on the other role and on the wire, in seconds since the start."""

    seconds_waiting: float
    seconds_on_wire: float


class UsageClock:
    """Adds up the usage of a rank's training steps: `begin`, `computed` when its gradients are there, `stepped`.

    Attributes:
        total: since the start.
    """

    def __init__(self, waiter: Waiter):
        self._waiter = waiter
        self.total = Usage()
        self._mark = 0.0
        self._before = (0.0, 0.0)

    def begin(self) -> None:
        self._mark = time.perf_counter()
        self._before = (self._waiter.seconds_waiting, self._waiter.seconds_on_wire)

    def computed(self) -> None:
        seconds = self._lap()
        waiting = self._waiter.seconds_waiting - self._before[0]
        wire = self._waiter.seconds_on_wire - self._before[1]
        t = self.total
        computing = t.computing + seconds - waiting - wire
        self.total = Usage(computing, t.waiting + waiting, t.wire + wire, t.optimizer)

    def stepped(self) -> None:
        t = self.total
        self.total = Usage(t.computing, t.waiting, t.wire, t.optimizer + self._lap())

    def _lap(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before
