"""A world of ranks in one process: threads that take turns, a clock that nobody waits for, and devices.

Exactly one thread runs at a time. It gives way where it waits for something, so a run depends on nothing but its seed,
and a deadlock is known at once: no thread can run, no device can advance, and no clock is awaited. Time limits cost
nothing, because the clock jumps when only they are left.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

from tests.pool.fake_device.clocks import Clock, Races

Policy = Literal["host", "device", "random"]
REAL_LIMIT = 300.0
"""Seconds of real time after which a run must have a thread that waits for something outside of this model."""

NOTHING: Clock = {}
"""What is known before anything has happened."""

_local = threading.local()


class Deadlock(AssertionError):
    """No thread can run, no device can advance."""


class Killed(BaseException):
    """Raised in threads whose rank has died, or whose run is over."""


class Signal:
    """What threads wait for; it also carries what happened before it (`pool.fake_device.clocks`)."""

    __slots__ = ("clock", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Actor] = []
        self.clock = NOTHING


class Actor:
    """A thread of a rank."""

    def __init__(self, world: World, rank: int, name: str, function: Callable[[], Any]):
        self.world, self.rank, self.name, self.function = world, rank, name, function
        self.baton = threading.Lock()
        self.baton.acquire()
        self.thread = threading.Thread(target=self._run, name=f"{name} of rank {rank}", daemon=True)
        self.finished = Signal()
        self.done = self.queued = False
        self.waits_for = ""
        self.since = 0
        self.value: Any = None
        self.error: BaseException | None = None
        self.stream: Any = None
        self.has_device = name == "main"  # other threads start on the first device
        self.clock: Clock = {}
        self.clock_key = f"{name} of rank {rank}"

    def _run(self) -> None:
        self.baton.acquire()
        _local.actor = self
        try:
            self.world.check_alive(self)
            with self.world.devices[self.rank].host_accesses() if self.world.races else nullcontext():
                self.value = self.function()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
            self.world.errors.append(error)
        self.done = True
        self.world.fire(self.finished)
        self.world.leave(self)


def current() -> Actor:
    """The thread of a rank that is running."""
    return _local.actor  # type: ignore[no-any-return]


class World:
    """Runs the threads of all ranks and their devices.

    Args:
        ranks: Number of ranks.
        policy: Who goes first where both could: the threads, so that devices lag as far as they can; the devices; or
            a choice at random, with threads that give way at random.
        seed: Of the choices at random.
        races: Whether to keep vector clocks and check every access of a buffer.
    """

    def __init__(self, ranks: int, policy: Policy = "host", seed: int = 0, races: bool = False):
        self.ranks, self.policy = ranks, policy
        self.now = 0.0
        self.dead_ranks: set[int] = set()
        self.errors: list[BaseException] = []  # of threads, in the order in which they ended
        self.races = Races() if races else None
        self.devices: list[Any] = []
        self.ready_queues: deque[Any] = deque()  # queues of devices whose first operation may be able to advance
        self._random = random.Random(seed)
        self._runnable: list[Actor] = []
        self._actors: list[Actor] = []
        self._mains: list[Actor] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._ended = threading.Lock()
        self._ended.acquire()
        self.over = self._ending = False
        self._failure: BaseException | None = None

    # --- what a test calls ---

    def run(self, functions: Mapping[int, Callable[[], Any]]) -> list[Actor]:
        """Run a function on each rank to its end, and return the threads in the order of the ranks.

        Raises:
            Deadlock: No thread can run and no device can advance; the message says who waits for what.
        """
        self._mains = [self.start(rank, "main", function) for rank, function in sorted(functions.items())]
        # Reference counts end everything that matters here, at a moment that does not depend on anything else.
        if self.races:
            gc.collect()
        gc.disable()
        self._pass_on()
        try:
            if not self._ended.acquire(timeout=REAL_LIMIT):
                raise AssertionError("a thread waits for something outside of the model")
        finally:
            gc.enable()
            self.over = True
            for actor in self._actors:  # also those that are started meanwhile
                if not actor.done:
                    actor.baton.release()
                actor.thread.join(REAL_LIMIT)
        if self._failure:
            raise self._failure
        return self._mains

    def kill(self, rank: int) -> None:
        """End a rank without a word: its threads stop, its device runs nothing more, its connections break."""
        self.dead_ranks.add(rank)
        for actor in self._actors:
            self.wake(actor)
        if current().rank == rank:
            raise Killed

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Do something when the clock gets to `time`."""
        heapq.heappush(self._timers, (time, next(self._numbers), act))

    # --- what the model calls ---

    def start(self, rank: int, name: str, function: Callable[[], Any]) -> Actor:
        """Start a thread."""
        actor = Actor(self, rank, name, function)
        if self.races and self._mains:
            actor.clock = self.races.stamp(current())
        self._actors.append(actor)
        actor.thread.start()
        self.wake(actor)
        return actor

    def fire(self, signal: Signal) -> None:
        """Let those who wait for a signal look again."""
        actor = getattr(_local, "actor", None)
        if self.races and actor is not None and not self.over:
            signal.clock = self.races.stamp(actor, signal.clock)
        for waiting in signal.waiting:
            self.wake(waiting)
        signal.waiting = []

    def wait(
        self, ready: Callable[[], bool], signal: Signal, what: str, timeout: float | None = None, learns: bool = True
    ) -> bool:
        """Wait until `ready()`, which `signal` tells to look at; return whether it is, or False after `timeout`.

        Args:
            learns: Whether the thread then knows all that happened before the signal.
        """
        actor = current()
        self.check_alive(actor)
        self.give_way()
        if not ready():
            deadline = None if timeout is None else self.now + timeout
            if deadline is not None:
                self.at(deadline, lambda: self.wake(actor))
            actor.waits_for, actor.since = what, next(self._numbers)
            while not ready():
                if deadline is not None and self.now >= deadline:
                    return False
                signal.waiting.append(actor)
                self._pass_on()
                self._sleep(actor)
            actor.waits_for = ""
        if self.races and learns:
            self.races.learn(actor, signal.clock)
        return True

    def give_way(self) -> None:
        """Let others run, sometimes."""
        if self.policy == "random" and self._random.random() < 0.2:
            actor = current()
            self.wake(actor)
            self._pass_on()
            self._sleep(actor)

    def check_alive(self, actor: Actor) -> None:
        if self.over or actor.rank in self.dead_ranks:
            raise Killed

    def leave(self, actor: Actor) -> None:
        """The end of a thread."""
        if self.over:
            return
        self._ending = all(main.done for main in self._mains)
        self._pass_on()

    def _sleep(self, actor: Actor) -> None:
        actor.baton.acquire()
        self.check_alive(actor)

    def wake(self, actor: Actor) -> None:
        """Let a thread look again at what it waits for."""
        if not actor.queued and not actor.done:
            actor.queued = True
            self._runnable.append(actor)

    def _pass_on(self) -> None:
        """Let devices advance and hand over to the next thread."""
        try:
            self._choose()
        except Exception as error:
            self._failure = error
            self.over = True
            self._ended.release()

    def _choose(self) -> None:
        while not self.over:
            queues = self.ready_queues
            device_first = self.policy == "device" or (self.policy == "random" and self._random.random() < 0.5)
            if queues and (device_first or not self._runnable):
                if self.policy == "random":
                    queues.rotate(self._random.randrange(len(queues)))
                queues.popleft().advance()
            elif self._runnable:
                place = self._random.randrange(len(self._runnable)) if self.policy == "random" else 0
                actor = self._runnable.pop(place)
                actor.queued = False
                if not actor.done:
                    actor.baton.release()
                    return
            elif self._ending:  # what other threads were about to do has been done
                self.over = True
                self._ended.release()
            elif self._timers:
                time, _, act = heapq.heappop(self._timers)
                self.now = max(self.now, time)
                act()
            else:
                raise Deadlock(self.report())

    def report(self, most: int = 30) -> str:
        """Who waits for what: threads, and the first operations of every queue of a device."""
        waiting = sorted((a for a in self._actors if a.waits_for and not a.done), key=lambda a: a.since)
        lines = [f"rank {a.rank} {a.name}: {a.waits_for}" for a in waiting[:most]]
        queues = [queue for device in self.devices for queue in device.queues if queue.operations]
        lines += [queue.describe() for queue in queues[:most]]
        return "\n".join([f"nothing can advance at {self.now:g} s", *lines])
