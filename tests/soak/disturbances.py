"""What happens to the disturbed job: random faults at random moments."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from tests.soak.disk import SmallDisk
from tests.soak.watched import WatchedJob


@dataclass(frozen=True)
class Disturbance:
    """One kind of fault.

    Attributes:
        weight: How often it is chosen, relative to the others.
        begin: What happens; returns what it has hit.
        end: What happens after `seconds` (the least and the most), if anything.
        lasting: Whether the job ends because of it, so that its restart must come.
    """

    weight: float
    begin: Callable[[Victims], str]
    end: Callable[[Victims], None] | None = None
    seconds: tuple[float, float] = (0.0, 0.0)


class Victims:
    """What faults can hit.

    Attributes:
        job, disk: The disturbed job, and the disk of its folder.
        choose: Where random choices come from.
    """

    def __init__(self, job: WatchedJob, disk: SmallDisk, choose: random.Random):
        self.job, self.disk, self.choose = job, disk, choose
        self.paused: psutil.Process | None = None

    def rank(self) -> tuple[str, psutil.Process]:
        """Return a random rank's name and process.

        Raises:
            LookupError: There is none at the moment.
        """
        ranks = sorted((name, process) for name, process in self.job.processes().items() if name.startswith("rank"))
        if not ranks:
            raise LookupError("no rank runs")
        return self.choose.choice(ranks)

    def other(self, name: str) -> psutil.Process:
        """Return the supervisor's or the launcher's process; raises LookupError."""
        return self.job.processes()[name]


def _signal_rank(number: int) -> Callable[[Victims], str]:
    def begin(victims: Victims) -> str:
        name, process = victims.rank()
        process.send_signal(number)
        return name

    return begin


def _signal_other(who: str, number: int) -> Callable[[Victims], str]:
    def begin(victims: Victims) -> str:
        victims.other(who).send_signal(number)
        return who

    return begin


def _pause(victims: Victims) -> str:
    name, victims.paused = victims.rank()
    victims.paused.suspend()
    return name


def _resume(victims: Victims) -> None:
    if victims.paused:
        with suppress(psutil.Error):  # it has ended meanwhile
            victims.paused.resume()
        victims.paused = None


def _fill(victims: Victims) -> str:
    victims.disk.fill()
    return "disk"


def _slow(victims: Victims) -> str:
    megabytes = victims.choose.choice((1, 3, 8))
    victims.disk.slow(megabytes << 20)
    return f"{megabytes} MB/s"


def _kill_while_slow(victims: Victims) -> str:
    """A rank dies in the middle of a save that takes long."""
    _slow(victims)
    saved = victims.job.saved
    deadline = time.monotonic() + 60
    while victims.job.saved == saved and time.monotonic() < deadline:
        if any(victims.job.run.glob("checkpoints/.step_*.partial/*")):
            break
        time.sleep(0.1)
    return _signal_rank(signal.SIGKILL)(victims)


DISTURBANCES: dict[str, Disturbance] = {
    "kill -9 of a rank": Disturbance(6, _signal_rank(signal.SIGKILL)),
    "kill -9 of the launcher": Disturbance(1, _signal_other("launcher", signal.SIGKILL)),
    "kill -9 of the supervisor": Disturbance(1, _signal_other("supervisor", signal.SIGKILL)),
    "SIGTERM to a rank": Disturbance(1, _signal_rank(signal.SIGTERM)),
    "SIGTERM to the supervisor": Disturbance(1, _signal_other("supervisor", signal.SIGTERM)),
    "a rank stopped for good": Disturbance(2, _signal_rank(signal.SIGSTOP)),
    "a rank stopped for a while": Disturbance(2, _pause, _resume, (3.0, 25.0)),
    "disk full": Disturbance(2, _fill, lambda victims: victims.disk.empty(), (20.0, 60.0)),
    "disk slow": Disturbance(2, _slow, lambda victims: victims.disk.slow(0), (30.0, 90.0)),
    "disk slow, and kill -9 of a rank in a save": Disturbance(
        2, _kill_while_slow, lambda victims: victims.disk.slow(0), (10.0, 30.0)
    ),
}
