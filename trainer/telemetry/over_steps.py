"""What only several steps tell: which rank is slower than its peers, and whether a value jumps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

STRAGGLER_STEPS = 20
"""Steps over which a rank's computing time is averaged, roughly."""

SPIKE_STEPS, _FEWEST = 100, 20
_DEVIATIONS, _LEAST_JUMP = 6.0, 0.02
_NORMAL = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@dataclass(frozen=True)
class Spike:
    """A value that is far above those before.

    Attributes:
        median: Of the values before.
        deviations: How many standard deviations lie between.
    """

    value: float
    median: float
    deviations: float


class Spikes:
    """Tells values of steps, such as losses or norms of gradients, that are far above those before.

    A value is a spike if it is at least `deviations` standard deviations, estimated by the median absolute deviation,
    and 2 % above the median of up to 100 values before it, of which there must be 20. A few spikes do not change a
    median; a value that stays high is no spike any more after 50 steps. A value that is not finite counts elsewhere.

    Attributes:
        values: The values of the last steps.
    """

    def __init__(self, deviations: float = _DEVIATIONS) -> None:
        self._deviations = deviations
        self.values: deque[float] = deque(maxlen=SPIKE_STEPS)

    def add(self, value: float) -> Spike | None:
        """Take the value of a step; return it if it is a spike."""
        if not math.isfinite(value):
            return None
        before = list(self.values)
        self.values.append(value)
        if len(before) < _FEWEST:
            return None
        middle = median(before)
        deviation = _NORMAL * median(abs(other - middle) for other in before)
        if value <= middle + max(self._deviations * deviation, _LEAST_JUMP * abs(middle)):
            return None
        return Spike(value, middle, (value - middle) / deviation if deviation else math.inf)


class Stragglers:
    """Compares a rank's own computing time with that of its peers, over recent steps.

    Args:
        peers: The ranks of the same role.
        rank: This rank, one of them.
    """

    def __init__(self, peers: range, rank: int):
        self._peers, self._place = peers, peers.index(rank)
        self._steps = 0
        self._seconds = np.zeros(len(peers))

    def add(self, seconds: Sequence[float]) -> float | None:
        """Add every rank's computing time in a step; return this one's mean over the median of its peers' means.

        Returns:
            1 for a rank like most others; None while nobody's time is known.
        """
        own = np.asarray(seconds)[self._peers.start : self._peers.stop]
        self._steps = min(self._steps + 1, STRAGGLER_STEPS)
        self._seconds += (own - self._seconds) / self._steps
        middle = float(np.median(self._seconds))
        return float(self._seconds[self._place]) / middle if middle > 0 else None
