"""A rank's counters: their growth over its last steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.telemetry.time_breakdown import ACTIVITIES, shares
from trainer.view.pages import Samples, value

Shares = Mapping[str, float]
"""Shares of a rank's time by activity, which sum to 1; empty if they are not known."""

ROLES = ("trunk", "pool")

_DIGITS = 18

_COUNTERS = {
    "unipool_steps_total": "rank",
    "unipool_tokens_total": "rank",
    "unipool_activity_seconds_total": "activity",
    "unipool_expert_tokens_total": "expert",
    "unipool_service_tokens_total": "rank",
}
"""The label by which the samples of a counter are told apart on a rank's page."""


def whole(text: str) -> int | None:
    """Return the whole number that a label has; None if it has something else, or more digits than anything counted."""
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else None


def known_shares(seconds: Sequence[float]) -> Shares:
    """Return shares of seconds in the order of ACTIVITIES; empty if they are 0 or not known."""
    return shares(seconds) if sum(seconds) > 0 else {}


class Window:
    """The latest stretch of one rank's steps between two of its pages.

    Counters change once per step, so a page without a new step leaves the window as it is. At first, and after a
    restart of the rank, the window begins with the process, when all counters were 0.

    Attributes:
        role: `trunk` or `pool`; empty before the rank's first page.
        rank: Its number in the job.
        steps: Optimizer steps in the window.
        from_start: Whether it begins with the process.
    """

    def __init__(self) -> None:
        self.role, self.rank = "", 0
        self.steps = 0.0
        self.from_start = True
        self._started = self._done = 0.0
        self._before: dict[tuple[str, str], float] = {}
        self._now: dict[tuple[str, str], float] = {}

    def add(self, samples: Samples) -> None:
        """Add a newer page of the rank."""
        self.role, self.rank = _role_and_rank(samples)
        now = {
            (name, labels.get(label, "")): number
            for name, label in _COUNTERS.items()
            for labels, number in samples.get(name, ())
        }
        done, started = value(samples, "unipool_steps_total"), value(samples, "process_start_time_seconds")
        again = started != self._started or any(now.get(key, 0.0) < old for key, old in self._now.items())
        if again:
            self._now, self._done = {}, 0.0
        if again or done > self._done:
            self._before, self._now = self._now, now
            self.steps, self.from_start = done - self._done, not self._before
            self._started, self._done = started, done

    def growth(self, counter: str) -> dict[str, float]:
        """Return the growth of a counter, by the values of its label."""
        return {
            label: now - self._before.get((name, label), 0.0)
            for (name, label), now in self._now.items()
            if name == counter
        }

    def shares(self) -> Shares:
        """Return how the rank spent the time of the window; empty if it made no step."""
        seconds = self.growth("unipool_activity_seconds_total")
        return known_shares([seconds.get(activity, 0.0) for activity in ACTIVITIES])

    def per_step(self, counter: str) -> dict[str, float]:
        """Return the mean growth of a counter per step, by the values of its label; empty without a step."""
        return {label: amount / self.steps for label, amount in self.growth(counter).items()} if self.steps else {}


def _role_and_rank(samples: Samples) -> tuple[str, int]:
    """Return what the first sample with both labels says."""
    for found in samples.values():
        for labels, _ in found:
            rank = whole(labels.get("rank", ""))
            if labels.get("role") in ROLES and rank is not None:
                return labels["role"], rank
    return "trunk", 0
