"""What the ranks of both roles spend the time of training steps on, and who waits for whom."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

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


def shares(seconds: Sequence[float]) -> dict[str, float]:
    """Convert seconds in the order of `ACTIVITIES` into shares of their sum, by activity."""
    total = sum(seconds) or 1.0
    return {activity: spent / total for activity, spent in zip(ACTIVITIES, seconds, strict=True)}


class UsageClock:
    """Adds up the usage of a rank's training steps, by the clock of the device that computes.

    Call `begin`, then `computed` once the gradients are complete, then `stepped`. On a GPU it never waits: what the
    stream has not come to by `stepped`, which is the optimizer at least, is added one step later.

    Attributes:
        total: Usage since the start.
    """

    def __init__(self, waits: Waits):
        self._waits, self._clock = waits, waits.clock
        self.total = Usage()
        self._mark: Moment = self._clock.now()
        self._waited = (0.0, 0.0)
        self._open: deque[tuple[bool, Moment, Moment]] = deque()  # whether it is an optimizer's, and from when to when

    def begin(self) -> None:
        """Start a step."""
        self._read()
        self._mark = self._clock.now()
        self._waited = (self._waits.seconds_waiting, self._waits.seconds_on_wire)

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
                self._add(optimizer=seconds)
                continue
            waited = (self._waits.seconds_waiting, self._waits.seconds_on_wire)
            waiting, wire = (now - then for now, then in zip(waited, self._waited, strict=True))
            self._waited = waited
            self._add(computing=seconds - waiting - wire, waiting=waiting, wire=wire)

    def _add(self, **seconds: float) -> None:
        totals = asdict(self.total)
        self.total = Usage(**{name: total + seconds.get(name, 0.0) for name, total in totals.items()})
