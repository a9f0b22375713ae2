"""What ends the device transport's waits: threads that look after all that has been launched.

NCCL's own waits either block a thread for good or, with a limit, keep it busy. So nobody waits for a message: one
thread asks messages whether they are done, and another keeps the time. When a message has failed, takes too long, or a
peer is gone, everybody who waits gets an error that names the message; then the communicators are aborted, so that
kernels that wait for a peer end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar

from pool.wire.streams import Communicator, Work

T = TypeVar("T")

_ASK_SECONDS = 0.002
_TIME_SECONDS = 0.1
_LOST_SECONDS = 1.0


@dataclass
class _Launched:
    """A group of messages on a communicator.

    Attributes:
        keep: Tensors that live until the group is done.
        failed: Turns what went wrong into the error that names the messages.
    """

    work: Work
    keep: Sequence[Any]
    failed: Callable[[BaseException], BaseException]
    since: float = field(default_factory=lambda: time.monotonic())


class Watcher:
    """See the module.

    Args:
        limit: Says how long a message may take from its launch on.
        communicators: What is aborted at the first error.
        lost: Says which peers are known to be gone; "" if none.
        enter: What a thread that uses the device does first (`Streams.enter`).
    """

    def __init__(
        self,
        limit: Callable[[], timedelta],
        communicators: Sequence[Communicator],
        lost: Callable[[], str],
        enter: Callable[[], None],
    ):
        self._limit, self._communicators, self._lost, self.enter = limit, communicators, lost, enter
        self._lock = threading.RLock()
        self._some, self._settled = threading.Condition(self._lock), threading.Condition(self._lock)
        self._launched: dict[Communicator, deque[_Launched]] = {c: deque() for c in communicators}
        self._promises: set[Future[Any]] = set()
        self._workers: list[Worker[Any]] = []
        self._in_hand = 0
        self._error: BaseException | None = None
        threading.Thread(target=self._ask, daemon=True, name="wire watcher").start()
        threading.Thread(target=self._keep_time, daemon=True, name="wire timer").start()

    def launched(
        self,
        communicator: Communicator,
        work: Work,
        keep: Sequence[Any],
        failed: Callable[[BaseException], BaseException],
    ) -> None:
        """Watch a group that has been launched; see `_Launched`."""
        with self._lock:
            self._launched[communicator].append(_Launched(work, keep, failed))
            self._some.notify_all()

    def promise(self) -> Future[Any]:
        """Return a future that gets the first error if it has no result by then."""
        future: Future[Any] = Future()
        with self._lock:
            self.check()
            self._promises.add(future)
        return future

    def keep_promise(self, future: Future[T], result: T) -> None:
        """Give a promise its result, unless it has an error."""
        with self._lock:
            if future in self._promises:
                self._promises.remove(future)
                future.set_result(result)

    def work_for(self, worker: Worker[Any]) -> None:
        """End a worker's thread at the first error."""
        self._workers.append(worker)

    def in_hand(self, change: int) -> None:
        """Count what workers still have to do."""
        with self._lock:
            self._in_hand += change
            if not self._in_hand:
                self._settled.notify_all()

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self._error:
            raise self._error

    def settle(self) -> None:
        """Wait until workers have nothing to do and all that was launched is done; raise the first error."""
        with self._lock:
            self._settled.wait_for(lambda: self._error or not (self._in_hand or any(self._launched.values())))
            self.check()

    def fail(self, error: BaseException) -> None:
        """End everything with this error, unless there was one before."""
        with self._lock:
            if self._error:
                return
            self._error = error
            promises, self._promises = self._promises, set()
            self._some.notify_all()
            self._settled.notify_all()
        for promise in promises:
            promise.set_exception(error)
        for worker in self._workers:
            worker.stop()
        for communicator in self._communicators:
            threading.Thread(target=communicator.abort, daemon=True, name="abort").start()

    def _wait_for_work(self, pause: float) -> bool:
        """Pause, and then until something has been launched; return whether the wire still works."""
        time.sleep(pause)
        with self._lock:
            self._some.wait_for(lambda: self._error or any(self._launched.values()))
        return self._error is None

    def _ask(self) -> None:
        """Let go of what is done. A communicator's groups end in the order of their launch."""
        self.enter()
        while self._wait_for_work(_ASK_SECONDS):
            for launched in self._launched.values():
                while launched:
                    try:
                        if not launched[0].work.is_completed():
                            break
                    except RuntimeError as error:
                        self.fail(launched[0].failed(error))
                        return
                    launched.popleft()
            with self._lock:
                self._settled.notify_all()

    def _keep_time(self) -> None:
        """Look for what takes too long, without a call to the device, which may block behind what is stuck."""
        last = time.monotonic()
        while self._wait_for_work(_TIME_SECONDS):
            now = time.monotonic()
            if error := self.late(now - self._limit().total_seconds()):
                self.fail(error)
            if (oldest := self._oldest()) and now - last > _LOST_SECONDS:
                last = now
                if lost := self._lost():
                    self.fail(oldest.failed(RuntimeError(f"{lost} died")))

    def late(self, since: float) -> BaseException | None:
        """Return the error of a message that was launched by `since` (time.monotonic) and is not done; None if none."""
        oldest = self._oldest()
        return oldest.failed(TimeoutError("timed out")) if oldest and oldest.since <= since else None

    def _oldest(self) -> _Launched | None:
        """Return what has been under way for longest."""
        firsts = [launched[0] for launched in map(list, self._launched.values()) if launched]
        return min(firsts, key=lambda first: first.since, default=None)


class Worker(Generic[T]):
    """A thread that handles things in the order in which they are put.

    Args:
        handle: What to do with each; an error ends the wire.
    """

    def __init__(self, name: str, handle: Callable[[T], None], watcher: Watcher):
        self._handle, self._watcher = handle, watcher
        self._items: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        watcher.work_for(self)
        threading.Thread(target=self._run, daemon=True, name=name).start()

    def put(self, item: T) -> None:
        """Have something handled."""
        self._watcher.in_hand(1)
        self._items.put(item)

    def stop(self) -> None:
        """End the thread after what has been put."""
        self._items.put(None)

    def _run(self) -> None:
        self._watcher.enter()
        while (item := self._items.get()) is not None:
            try:
                self._watcher.check()
                self._handle(item)
            except BaseException as error:
                self._watcher.fail(error)
                return
            del item  # it may hold the last reference to a tensor, which would live until the next item comes
            self._watcher.in_hand(-1)
