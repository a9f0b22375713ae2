"""What a fault is: something done to a job from outside, and what must come of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from tests.faults.jobs import Pause, Setting, Start


@dataclass
class Scene:
    """A case under way, as its fault sees it.

    Attributes:
        victim: The process that the fault hits: see `Start.process`.
        limit: How long the others wait for a rank at this place, in seconds.
        start: The job, once it has been started.
        undo: What to do when the case is over, the last first.
    """

    setting: Setting
    victim: int | str
    limit: float
    random: random.Random
    start: Start | None = None
    undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def process(self) -> psutil.Process:
        assert self.start
        return self.start.process(self.victim)


def nothing(_: Scene) -> None:
    """Do nothing."""


def is_fault(status: int) -> bool:
    """Whether whoever started a job must start it again, and count that."""
    return status not in (0, 2, 75)


def is_fine(status: int) -> bool:
    """Whether the job did all its steps."""
    return status == 0


def is_refused(status: int) -> bool:
    """Whether the job says that its input is wrong."""
    return status == 2


def anything(_: int) -> bool:
    """Accept every status."""
    return True


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        prepare: Before the first start.
        act: When the paused process is at its place.
        heal: Before the second start, if there is one.
        goes_on: Whether the paused process continues after `act`.
        then: `Pause.then`.
        ends: Whether the status of the first attempt is as it should be.
        names: Whether the log must name the victim.
        says: What else the log must say: a regular expression.
        waits: Whether only a time limit reveals the fault.
        seconds: How long the fault itself lasts, at most.
        losses: "same": all records are those of an undisturbed run; "fewer": some may be missing; "record": one may be
            another as well; "other": values may differ from the fault on.
    """

    ends: Callable[[int], bool]
    act: Callable[[Scene], None] = nothing
    prepare: Callable[[Scene], None] = nothing
    heal: Callable[[Scene], None] = nothing
    goes_on: bool = True
    then: str = ""
    names: bool = False
    says: str = ""
    waits: bool = False
    seconds: float = 0.0
    losses: str = "same"


@dataclass(frozen=True)
class Case:
    """A fault at a place of a job.

    Attributes:
        fault: Its key in `tests.faults.catalogue.FAULTS`.
        phase: Its key in `tests.faults.catalogue.PLACES`, or what else the moment is called.
        victim: See `Scene`.
        pause: None: the fault is there before the job starts.
        resumes: Whether the job starts from `Reference.half`.
    """

    number: int
    layout: str
    fault: str
    phase: str
    victim: int | str
    pause: Pause | None
    resumes: bool = False
    keys: tuple[tuple[str, object], ...] = ()
