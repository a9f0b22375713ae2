"""Who else is in the job, and which of them are gone: the roll call, their heartbeats, and waits that notice.

Everything goes over the job's store, which launcher rank 0 (or the launcher's agent) holds. A call to the store does
not return while its host is stopped, so calls that may wait run in a thread, and the waiting rank looks at its peers
meanwhile. Ranks here are the launcher's: which rank of the job each of them is, they find out at the roll call.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from trainer.common.strict_json import dumps, loads

T = TypeVar("T")

BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2
_SETTLE_SECONDS = 2.0
"""A connection breaks some moments before its process is gone."""


class PeerLost(RuntimeError):
    """A rank is gone, does not respond or has not come."""


def _machine() -> str:
    """Equal where process numbers mean the same processes: containers of one host may share its name."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


@dataclass(frozen=True)
class Arrival:
    """What a rank says of itself when it comes.

    Attributes:
        role: its `UNIPOOL_ROLE`, "" if it has none.
        device: type of its device.
        numbering: how its recipe numbers the ranks; the same on all of them.
    """

    role: str
    device: str
    numbering: str
    host: str = field(default_factory=socket.gethostname)
    machine: str = field(default_factory=_machine)
    pid: int = field(default_factory=os.getpid)


class Peers:
    """The other ranks of a job, as this one knows them.

    Args:
        rank: this process's launcher rank.
        names: how errors name each launcher rank.
        store: where the ranks leave their arrivals.
        beats: the same for heartbeats, on a connection of its own.
    """

    def __init__(self, rank: int, names: Sequence[str], store: Any, beats: Any):
        self.names = names
        self._rank = rank
        self._store, self._beats = store, beats
        self._arrivals: list[Arrival] = []
        self._left = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def call_roll(self, here: Arrival) -> list[Arrival]:
        """Tell the others that this rank is here; returns what all say, when all are. Heartbeats begin.

        Launcher rank 0 returns last: it may end at once because of what it has heard, and it holds the store.
        """
        self._beats.set(str(self._rank), "here")
        self._heartbeat.start()
        self._store.set(f"arrival/{self._rank}", dumps(asdict(here)))
        for rank in self._ranks:  # those who have come may die before the others come
            self._arrivals.append(Arrival(**loads(self._store.get(f"arrival/{rank}"))))
        self._store.set(f"heard/{self._rank}", "")
        if self._rank == 0:
            self._store.wait([f"heard/{rank}" for rank in self._ranks])
        return self._arrivals

    def leave(self) -> None:
        """No more heartbeats. One that is in the store's code at the interpreter's end would abort the process."""
        self._left.set()
        self._heartbeat.join(10 * BEAT_SECONDS)

    def _beat(self) -> None:
        count = 0
        while not self._left.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beats.set(str(self._rank), str(count))
            except RuntimeError:  # the store's host is gone: whoever waits for it says so
                return

    def _last_beats(self) -> list[bytes]:
        """Every rank's last heartbeat, by rank. Blocks while the store's host does not run."""
        return self._beats.multi_get([str(rank) for rank in self._ranks])  # type: ignore[no-any-return]

    def dead(self) -> list[int]:
        """Ranks of this machine whose process is gone."""
        me = _machine()
        return [rank for rank, peer in enumerate(self._arrivals) if peer.machine == me and not _alive(peer.pid)]

    def meet(self, call: Callable[[], T], limit: timedelta) -> T:
        """`call()`, in which all ranks meet: patiently, and an error that comes from another rank is a `PeerLost`."""
        try:
            return self.patiently(call, limit)
        except PeerLost:
            raise
        except RuntimeError as error:
            if lost := self._explain(error):
                raise PeerLost(f"{lost} ({error})") from error
            raise

    def patiently(self, call: Callable[[], T], limit: timedelta) -> T:
        """`call()`, given up when a peer of this machine is dead or at the time limit.

        Raises:
            PeerLost: with the ranks that are gone, do not respond or have not come.
        """
        future = _in_thread(call)
        deadline = time.monotonic() + limit.total_seconds()
        while not wait([future], _LOOK_SECONDS).done:
            if dead := self.dead():
                raise PeerLost(f"{self.describe(dead)} died")
            if time.monotonic() > deadline:
                raise PeerLost(f"{self._who_is_late()}: waited for {limit.total_seconds():g} s (timed out)")
        return future.result()

    def _explain(self, error: RuntimeError) -> str:
        """Which ranks an error of the start-up comes from; "" if none is to blame."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not self.dead() and "onnect" in str(error) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        if dead := self.dead():
            return f"{self.describe(dead)} died"
        if not self._arrivals and "onnection" in str(error):
            return f"{self.describe([0])}, which holds the job's store, is gone"
        return self._who_is_late() if "imed out" in str(error) or "imeout" in str(error) else ""

    def _who_is_late(self) -> str:
        """Who has not come, or else has stopped to send heartbeats, in words."""
        future = _in_thread(self._missing)
        if not wait([future], 6 * BEAT_SECONDS).done:
            return f"{self.describe([0])}, which holds the job's store, does not respond"
        return future.result()

    def _missing(self) -> str:
        # Asked for over the heartbeats' connection: on the other one somebody may be waiting.
        if absent := [rank for rank in self._ranks if not self._beats.check([str(rank)])]:
            return f"{self.describe(absent)} has not come"
        silent = self._compare()
        return f"{self.describe(silent)} does not respond" if silent else "all ranks run, but one is not done"

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
        return range(len(self.names))

    def describe(self, ranks: Sequence[int]) -> str:
        """Names of some ranks."""
        return ", ".join(self.names[rank] for rank in ranks)


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
            if "onnection" in str(error):
                raise PeerLost(f"{holder}, which holds the job's store, is gone: {error}") from error
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


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
