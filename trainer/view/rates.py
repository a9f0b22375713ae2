"""A rank's counters: their growth over its last steps."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.view.pages import Samples

Shares = Mapping[str, float]
"""Shares of a rank's time by activity, which sum to 1; empty if they are not known."""

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Window:
    """The latest stretch of one rank's steps between two of its pages.

    Counters change once per step, so a page without a new step leaves the window as it is. At first, and after a
    restart of the rank, the window begins with the process, when all counters were 0.

    Attributes:
        steps: Optimizer steps in the window.
        from_start: Whether it begins with the process.
    """

    def __init__(self) -> None:
        self.steps = 0.0
        self.from_start = True
        self._started = self._done = 0.0
        self._before: dict[_Key, float] = {}
        self._now: dict[_Key, float] = {}

    def add(self, samples: Samples) -> None:
        """Add a newer page of the rank."""
        now, done = _counters(samples), value(samples, "unipool_steps_total", 0.0)
        started = value(samples, "process_start_time_seconds", 0.0)
        again = started != self._started or any(now.get(key, 0.0) < old for key, old in self._now.items())
        if again:
            self._now, self._done = {}, 0.0
        if again or done > self._done:
            self._before, self._now = self._now, now
            self.steps, self.from_start = done - self._done, not self._before
            self._started, self._done = started, done

    def growth(self, name: str, label: str) -> dict[str, float]:
        """Return the growth of a counter, by the values of a label."""
        grown = ((key, now - self._before.get(key, 0.0)) for key, now in self._now.items() if key[0] == name)
        return {dict(labels).get(label, ""): amount for (_, labels), amount in grown}

    def shares(self) -> Shares:
        """Return how the rank spent the time of the window; empty if it made no step."""
        seconds = self.growth("unipool_activity_seconds_total", "activity")
        total = sum(seconds.get(activity, 0.0) for activity in ACTIVITIES)
        return {activity: seconds.get(activity, 0.0) / total for activity in ACTIVITIES} if total > 0 else {}

    def per_step(self, name: str, label: str) -> dict[str, float]:
        """Return the mean growth of a counter per step, by the values of a label."""
        grown = self.growth(name, label)
        return {key: amount / self.steps for key, amount in grown.items()} if self.steps else {}


def value(samples: Samples, name: str, default: float) -> float:
    """Return the first sample of a name."""
    found = samples.get(name)
    return found[0][1] if found else default


def _counters(samples: Samples) -> dict[_Key, float]:
    return {
        (name, tuple(sorted(labels.items()))): number
        for name, found in samples.items()
        if name.endswith("_total")
        for labels, number in found
    }
