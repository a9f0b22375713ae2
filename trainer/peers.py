"""Who else is in the job, and which of them are gone: their places, their heartbeats, and waits that notice.

Everything goes over the job's store, which rank 0 (or the launcher's agent) holds. A call to the store does not return
while its host is stopped, so calls that may wait run in a thread, and the waiting rank looks at its peers meanwhile.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from pool.topology import Topology

T = TypeVar("T")

BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2
_SETTLE_SECONDS = 2.0
"""A connection breaks some moments before its process is gone."""


class PeerLost(RuntimeError):
    """A rank is gone, does not respond or has not come."""


class Peers:
    """The other ranks of a job, as this one knows them.

    Args:
        store: where the ranks leave their places.
        beats: the same for heartbeats, on a connection of its own.
    """

    def __init__(self, topology: Topology, rank: int, store: Any, beats: Any):
        self._topology, self._rank = topology, rank
        self._store, self._beats = store, beats
        self._places: list[dict[str, Any]] = []

    def call_roll(self) -> None:
        """Tell the others that this rank is here; returns when all are. Until `stop_starting` it sends heartbeats."""
        self.beat("start-up")
        self._starting = threading.Event()
        threading.Thread(target=self._beat_at_start, daemon=True, name="start-up heartbeat").start()
        self._store.set(f"peer/{self._rank}", json.dumps({"machine": _machine(), "pid": os.getpid()}))
        self._places = [json.loads(self._store.get(self._key(rank))) for rank in self._ranks]

    def stop_starting(self) -> None:
        """The start-up is over: whoever watches the rank sends its heartbeats from now on."""
        self._starting.set()

    def _beat_at_start(self) -> None:
        count = 0
        while not self._starting.wait(BEAT_SECONDS):
            count += 1
            try:
                self.beat(f"start-up {count}")
            except RuntimeError:  # the store's host is gone: whoever waits for it says so
                return

    def beat(self, text: str) -> None:
        """Tell the other ranks that this process runs: a text that changes."""
        self._beats.set(str(self._rank), text)

    def _last_beats(self) -> list[bytes]:
        """Every rank's last heartbeat, by rank. Blocks while the store's host does not run."""
        return self._beats.multi_get([str(rank) for rank in self._ranks])  # type: ignore[no-any-return]

    def dead(self) -> list[int]:
        """Ranks of this machine whose process is gone."""
        if not self._places:
            return []
        me = self._places[self._rank]["machine"]
        return [r for r, place in enumerate(self._places) if place["machine"] == me and not _alive(place["pid"])]

    def patiently(self, call: Callable[[], T], limit: timedelta) -> T:
        """`call()`, given up when a peer of this machine is dead or at the time limit.

        Raises:
            PeerLost: with the ranks that are gone, do not respond or have not come.
        """
        future = _in_thread(call)
        deadline = time.monotonic() + limit.total_seconds()
        while not wait([future], _LOOK_SECONDS).done:
            if dead := self.dead():
                raise PeerLost(f"{self._names(dead)} died")
            if time.monotonic() > deadline:
                raise PeerLost(f"{self.missing()}: waited for {limit.total_seconds():g} s (timed out)")
        return future.result()

    def explain(self, error: RuntimeError) -> str:
        """Which ranks an error of the start-up comes from; "" if none is to blame."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not self.dead() and "onnect" in str(error) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        if dead := self.dead():
            return f"{self._names(dead)} died"
        return self.missing() if "imed out" in str(error) or "imeout" in str(error) else ""

    def missing(self) -> str:
        """Who has not come, or else has stopped to send heartbeats, in words."""
        future = _in_thread(self._missing)
        if not wait([future], 6 * BEAT_SECONDS).done:
            return f"{self._names([0])}, which holds the job's store, does not respond"
        return future.result()

    def _missing(self) -> str:
        # Asked for over the heartbeats' connection: on the other one somebody may be waiting.
        if absent := [rank for rank in self._ranks if not self._beats.check([str(rank)])]:
            return f"{self._names(absent)} has not come"
        silent = self._compare()
        return f"{self._names(silent)} does not respond" if silent else "nobody is missing"

    def silent(self) -> list[int]:
        """Ranks that have stopped to send heartbeats, after some seconds; the store's host if it does not answer."""
        future = _in_thread(self._compare)
        answered = wait([future], 6 * BEAT_SECONDS).done and not future.exception()
        return future.result() if answered else [0]

    def _compare(self) -> list[int]:
        before = self._last_beats()
        time.sleep(3 * BEAT_SECONDS)
        return [rank for rank, (a, b) in enumerate(zip(before, self._last_beats(), strict=True)) if a == b]

    @property
    def _ranks(self) -> range:
        return range(self._topology.world_size)

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(self._topology.describe(rank) for rank in ranks)

    @staticmethod
    def _key(rank: int) -> str:
        return f"peer/{rank}"


def reach(open_store: Callable[[], T], holder: str, limit: timedelta) -> T:
    """Open the job's store, which the rank named `holder` holds.

    Raises:
        PeerLost: it has not come, or does not respond.
    """
    future = _in_thread(open_store)
    reason = ""
    if wait([future], limit.total_seconds() + _SETTLE_SECONDS).done:
        error = future.exception()
        if error is None:
            return future.result()
        if "imed out" not in str(error):
            raise error
        reason = f": {error}"
    raise PeerLost(f"{holder}, which holds the job's store, has not come within {limit.total_seconds():g} s{reason}")


def _in_thread(call: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="wait for peers").start()
    return future


def _machine() -> str:
    """Equal where process numbers mean the same processes: containers of one host may share its name."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
