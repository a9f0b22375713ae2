"""Threads, locks, queues, executors and clocks of a world, in the place of Python's own.

`installed` puts them into modules of the product, so that these run unchanged in a world.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.pool.fake_device.clocks import Clock
from tests.pool.fake_device.world import Signal, current


def _stamp() -> Clock:
    world = current().world
    return world.races.stamp(current()) if world.races else {}


def _learn(clock: Clock) -> None:
    world = current().world
    if world.races:
        world.races.learn(current(), clock)


class Lock:
    """`threading.Lock`, also in the place of an RLock."""

    def __init__(self) -> None:
        self._owner: Any = None
        self._depth = 0
        self._signal = Signal()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = current()
        if self._owner is not me:
            limit = None if timeout < 0 else timeout
            if not blocking or not me.world.wait(lambda: self._owner is None, self._signal, "a lock", limit):
                return False
            self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            current().world.fire(self._signal)

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *details: object) -> None:
        if self._owner is current():
            self.release()


class Condition:
    """`threading.Condition`."""

    def __init__(self, lock: Lock | None = None):
        self._lock = lock or Lock()
        self._signal = Signal()
        self._notified = 0
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> Condition:
        self._lock.acquire()
        return self

    def __exit__(self, *details: object) -> None:
        self._lock.__exit__()

    def wait(self, timeout: float | None = None) -> bool:
        before = self._notified
        self._lock.release()
        came = current().world.wait(lambda: self._notified > before, self._signal, "a condition", timeout)
        self._lock.acquire()
        return came

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        end = None if timeout is None else current().world.now + timeout
        while not predicate():
            left = None if end is None else end - current().world.now
            if not self.wait(left):
                return predicate()
        return True

    def notify(self, n: int = 1) -> None:
        self.notify_all()  # a thread may always wake up without a reason

    def notify_all(self) -> None:
        self._notified += 1
        current().world.fire(self._signal)


class Event:
    """`threading.Event`."""

    def __init__(self) -> None:
        self._set = False
        self._signal = Signal()

    def is_set(self) -> bool:
        if self._set:
            _learn(self._signal.clock)
        return self._set

    def set(self) -> None:
        self._set = True
        current().world.fire(self._signal)

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return current().world.wait(lambda: self._set, self._signal, "an event", timeout)


class Queue:
    """`queue.SimpleQueue` and `queue.Queue`."""

    def __init__(self, maxsize: int = 0):
        self._items: deque[tuple[Any, Clock]] = deque()
        self._signal = Signal()
        self._maxsize = maxsize

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if self._maxsize:
            room = current().world.wait(lambda: len(self._items) < self._maxsize, self._signal, "room", timeout)
            if not room:
                raise queue.Full
        self._items.append((item, _stamp()))
        current().world.fire(self._signal)

    put_nowait = put

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        ready = lambda: bool(self._items)  # noqa: E731
        what = "something in a queue"
        if not (current().world.wait(ready, self._signal, what, timeout, learns=False) if block else ready()):
            raise queue.Empty
        item, clock = self._items.popleft()
        _learn(clock)
        if self._maxsize:
            current().world.fire(self._signal)
        return item

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


class Thread:
    """`threading.Thread`; its rank is that of the thread which starts it."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., Any] = lambda: None,
        name: str = "thread",
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ):
        self.name, self.daemon = name, daemon
        self._run = lambda: target(*args, **(kwargs or {}))
        self._actor: Any = None

    def start(self) -> None:
        self._actor = current().world.start(current().rank, self.name, self._run)

    def join(self, timeout: float | None = None) -> None:
        world, actor = current().world, self._actor
        world.wait(lambda: actor.done, actor.finished, f"the end of {self.name}", timeout)

    def is_alive(self) -> bool:
        return self._actor is not None and not self._actor.done


class Future(concurrent.futures.Future):  # type: ignore[type-arg]
    """`concurrent.futures.Future`, whose threads are of a world."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = Condition()  # type: ignore[assignment]


class Executor:
    """`ThreadPoolExecutor` of one thread."""

    def __init__(self, max_workers: int = 1, thread_name_prefix: str = "worker", **others: Any):
        assert max_workers == 1 and not others
        self._name = thread_name_prefix
        self._work: Queue = Queue()
        self._thread: Thread | None = None
        self._cancelled = False

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future = Future()
        self._work.put((future, lambda: function(*args, **kwargs)))
        if self._thread is None:
            self._thread = Thread(target=self._run, name=self._name)
            self._thread.start()
        return future

    def _run(self) -> None:
        while True:
            work = self._work.get()
            if work is None:
                return
            future, function = work
            if self._cancelled or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                value = function()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(value)
            del work, future, function

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._cancelled = self._cancelled or cancel_futures
        self._work.put(None)
        if wait and self._thread:
            self._thread.join()


def _now() -> float:
    return current().world.now


def sleep(seconds: float) -> None:
    """`time.sleep`."""
    current().world.wait(lambda: False, Signal(), f"{seconds:g} s", seconds)


_time = SimpleNamespace(sleep=sleep, monotonic=_now, perf_counter=_now, time=_now)
_threading = SimpleNamespace(Thread=Thread, Lock=Lock, RLock=Lock, Condition=Condition, Event=Event)
_queue = SimpleNamespace(Queue=Queue, SimpleQueue=Queue, Empty=queue.Empty, Full=queue.Full)
_replaced = (
    *((time, _time), (threading, _threading), (queue, _queue), (time.sleep, sleep)),
    *((time.monotonic, _now), (time.perf_counter, _now), (threading.Thread, Thread), (threading.Lock, Lock)),
    *((threading.RLock, Lock), (threading.Condition, Condition), (threading.Event, Event)),
    *((queue.Queue, Queue), (queue.SimpleQueue, Queue), (concurrent.futures.Future, Future)),
    (concurrent.futures.ThreadPoolExecutor, Executor),
)


@contextmanager
def installed(*modules: ModuleType, **names: Any) -> Iterator[None]:
    """Give modules the threads and clocks of a world, and `names` where a module has them, for a while."""
    before = [(module, dict(vars(module))) for module in modules]
    for module in modules:
        for name, value in list(vars(module).items()):
            for real, ours in _replaced:
                if value is real:
                    setattr(module, name, ours)
            if name in names:
                setattr(module, name, names[name])
    try:
        yield
    finally:
        for module, values in before:
            vars(module).update(values)
