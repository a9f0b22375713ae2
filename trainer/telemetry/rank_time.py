"""What a rank is doing, and what the time of its process has gone into: start-up, steps, evaluations, checkpoints."""

from __future__ import annotations

import threading
import time
from typing import Literal, get_args

Phase = Literal[
    "starting",
    "rendezvous",
    "preparing",
    "loading",
    "warming_up",
    "training",
    "evaluating",
    "saving",
    "stopping",
    "finished",
    "failed",
]
Cause = Literal["startup", "training", "skipped", "lost", "evaluation", "checkpoint", "shutdown"]

PHASES: tuple[Phase, ...] = get_args(Phase)
CAUSES: tuple[Cause, ...] = get_args(Cause)

_CAUSES: dict[Phase, Cause] = {
    "starting": "startup",
    "rendezvous": "startup",
    "preparing": "startup",
    "loading": "startup",
    "warming_up": "startup",
    "training": "training",
    "evaluating": "evaluation",
    "saving": "checkpoint",
    "stopping": "shutdown",
    "finished": "shutdown",
    "failed": "shutdown",
}


class RankTime:
    """Divides the time of a process by its cause.

    Args:
        age: Seconds since the process began.

    Attributes:
        phase: What the rank is doing.
    """

    def __init__(self, age: float = 0.0):
        self.phase: Phase = "starting"
        self._seconds: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)
        self._mark = time.monotonic() - age
        self._lock = threading.Lock()

    def enter(self, phase: Phase) -> None:
        """Begin a phase. The time since the last call belongs to the phase before; a step that fails is lost."""
        with self._lock:
            self._add("lost" if (self.phase, phase) == ("training", "failed") else _CAUSES[self.phase])
            self.phase = phase

    def stepped(self, cause: Literal["training", "skipped", "lost"]) -> None:
        """End a step. The time since the last call belongs to it."""
        with self._lock:
            self._add(cause)

    def _add(self, cause: Cause) -> None:
        now = time.monotonic()
        self._seconds[cause] += now - self._mark
        self._mark = now

    def seconds(self) -> dict[Cause, float]:
        """Return the seconds by cause. A step under way is not in them, for it may yet be skipped."""
        with self._lock:
            if self.phase != "training":
                self._add(_CAUSES[self.phase])
            return dict(self._seconds)
