"""Which ranks have joined the job and which are lost: arrivals, heartbeats, and waits that notice a lost rank.

All of it goes through the job's store, which launcher rank 0 (or the launcher's agent) hosts. A call to the store does
not return while its host is stopped. Calls that may block therefore run in a thread, while the waiting rank watches the
others. Ranks here are the launcher's, because the job's ranks are known only once all have arrived.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from trainer.cluster.devices import Sight
from trainer.common.gpus import Gpu
from trainer.common.machine import process_namespace
from trainer.common.strict_json import dumps, loads

T = TypeVar("T")

BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2
_SETTLE_SECONDS = 2.0
"""A connection breaks some moments before its process is gone."""
_LAST_WORDS_SECONDS = 1.0
"""What a process has sent may be read some moments after it has ended."""

SOMEBODY_IS_LATE = "all ranks are alive, but at least one has not reached this point"


class PeerLost(RuntimeError):
    """A rank has died, does not respond, or has not joined."""


@dataclass(frozen=True)
class Arrival:
    """What a rank announces when it joins.

    Attributes:
        role: Its `UNIPOOL_ROLE`, or "".
        numbering: How its recipe numbers the ranks; it must be the same on all ranks.
        sight: The devices that it may use.
        address: Its address towards the host of the job's store.
    """

    role: str
    numbering: str
    sight: Sight
    address: str = ""
    machine: str = field(default_factory=process_namespace)
    pid: int = field(default_factory=os.getpid)

    @classmethod
    def from_json(cls, text: str | bytes) -> Arrival:
        """Read what `dumps(asdict(arrival))` wrote."""
        fields = loads(text)
        gpus = tuple(Gpu(**gpu) for gpu in fields["sight"]["gpus"])
        return cls(**fields | {"sight": Sight(**fields["sight"] | {"gpus": gpus})})


class Liveness:
    """What this rank knows about the other ranks of the job.

    Args:
        rank: Launcher rank of this process.
        names: How errors name each launcher rank.
        store: Where the ranks announce their arrivals.
        beats: The same store for heartbeats, over a connection of its own.

    Attributes:
        meetings: How often this rank has come to where ranks wait for each other. All of them come to the same places
            in the same order, so a rank for which others wait has a lower number, which its heartbeat tells.
    """

    def __init__(self, rank: int, names: Sequence[str], store: Any, beats: Any):
        self.names = names
        self.meetings = 0
        self._rank = rank
        self._store, self._beats = store, beats
        self._arrivals: list[Arrival] = []
        self._stopped = threading.Event()
        self._patience_ends = math.inf
        self._heartbeat = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def exchange_arrivals(self, own: Arrival) -> list[Arrival]:
        """Announce this rank, start its heartbeat, and return every rank's arrival once all have joined.

        Launcher rank 0 returns last: it hosts the store, and may end at once because of what it has read.
        """
        self._beats.set(str(self._rank), "0 0")
        self._heartbeat.start()
        self._store.set(f"arrival/{self._rank}", dumps(asdict(own)))
        for rank in self._ranks:  # one at a time, because a rank that has joined may die before others join
            self._arrivals.append(Arrival.from_json(self._store.get(f"arrival/{rank}")))
        self._store.set(f"read/{self._rank}", "")
        if self._rank == 0:
            self._store.wait([f"read/{rank}" for rank in self._ranks])
        return self._arrivals

    def stop(self) -> None:
        """Stop the heartbeat. A thread inside the store's code when the interpreter exits would abort the process."""
        self._stopped.set()
        self._heartbeat.join(10 * BEAT_SECONDS)

    def _beat(self) -> None:
        count = 0
        while not self._stopped.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beats.set(str(self._rank), f"{count} {self.meetings}")
            except RuntimeError:  # the store's host is gone, which whoever waits for it reports
                return

    def arrive(self, limit: timedelta | None = None) -> None:
        """Note that this rank has come to the next meeting.

        Args:
            limit: How long it waits there before `overdue` is true; None if what it waits with has a limit of its own.
        """
        self.meetings += 1
        self._patience_ends = math.inf if limit is None else time.monotonic() + limit.total_seconds()

    @property
    def overdue(self) -> bool:
        """Whether the limit of the last meeting has passed, and this rank has come to no other since."""
        return time.monotonic() > self._patience_ends

    def dead(self) -> list[int]:
        """Return the ranks of this machine whose process is gone."""
        me = process_namespace()
        return [rank for rank, peer in enumerate(self._arrivals) if peer.machine == me and not _alive(peer.pid)]

    def silent(self) -> list[int]:
        """Return the others whose heartbeat has stopped, after some seconds; the store's host if it does not answer."""
        future = _in_thread(self._without_heartbeat)
        answered = wait([future], 6 * BEAT_SECONDS).done and not future.exception()
        return future.result() if answered else [0]

    def late(self) -> list[int]:
        """Return the ranks that have not come to the last meeting of this one, by their last heartbeats."""
        future = _in_thread(self._behind)
        answered = wait([future], 6 * BEAT_SECONDS).done and not future.exception()
        return future.result() if answered else []

    def describe(self, ranks: Sequence[int]) -> str:
        """Return the names of some ranks."""
        return ", ".join(self.names[rank] for rank in ranks)

    def meet(self, call: Callable[[], T], limit: timedelta) -> T:
        """Return `call()`, which waits for other ranks. Give up when a rank of this machine dies, or at the limit.

        Raises:
            PeerLost: Ranks have died, do not respond or have not joined; the message names them.
        """
        future = _in_thread(call)
        deadline = time.monotonic() + limit.total_seconds()
        while not wait([future], _LOOK_SECONDS).done:
            if dead := self.dead():
                if wait([future], _LAST_WORDS_SECONDS).done:
                    break  # that rank had all it needed, and ended because of it
                raise PeerLost(f"{self.describe(dead)} died")
            if time.monotonic() > deadline:
                raise PeerLost(f"{self._who_is_late()}: waited for {limit.total_seconds():g} s (timed out)")
        try:
            return future.result()
        except RuntimeError as error:
            if lost := self._explain(error):
                raise PeerLost(f"{lost} ({error})") from error
            raise

    def _explain(self, error: RuntimeError) -> str:
        """Say which ranks caused an error of the store or of a process group; "" if none did."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not self.dead() and "onnect" in str(error) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        if dead := self.dead():
            return f"{self.describe(dead)} died"
        if not self._arrivals and "onnection" in str(error):
            return f"{self.describe([0])}, which hosts the job's store, is gone"
        return self._who_is_late() if "imed out" in str(error) or "imeout" in str(error) else ""

    def _who_is_late(self) -> str:
        """Say who has not joined or has stopped sending heartbeats."""
        future = _in_thread(self._missing)
        if not wait([future], 6 * BEAT_SECONDS).done:
            return f"{self.describe([0])}, which hosts the job's store, does not respond"
        return future.result()

    def _missing(self) -> str:
        # This uses the heartbeats' connection, because a call may be blocked on the other one.
        if absent := [rank for rank in self._ranks if not self._beats.check([str(rank)])]:
            return f"{self.describe(absent)} has not joined"
        if silent := self._without_heartbeat():
            return f"{self.describe(silent)} does not respond"
        return SOMEBODY_IS_LATE

    def _without_heartbeat(self) -> list[int]:
        before = self._last_beats()
        time.sleep(3 * BEAT_SECONDS)
        beats = enumerate(zip(before, self._last_beats(), strict=True))
        return [rank for rank, (a, b) in beats if a == b and rank != self._rank]

    def _behind(self) -> list[int]:
        meetings = [int(beat.split()[1]) for beat in self._last_beats()]
        return [rank for rank, number in enumerate(meetings) if number < self.meetings and rank != self._rank]

    def _last_beats(self) -> list[bytes]:
        """Return every rank's last heartbeat, by rank. Blocks while the store's host is stopped."""
        return self._beats.multi_get([str(rank) for rank in self._ranks])  # type: ignore[no-any-return]

    @property
    def _ranks(self) -> range:
        return range(len(self.names))


def reach(open_store: Callable[[], T], host: str, limit: timedelta) -> T:
    """Open the job's store, which the rank named `host` hosts.

    Raises:
        PeerLost: That rank has not joined, or does not respond.
    """
    future = _in_thread(open_store)
    reason = ""
    if wait([future], limit.total_seconds() + _SETTLE_SECONDS).done:
        error = future.exception()
        if error is None:
            return future.result()
        if "imed out" not in str(error):
            if "onnection" in str(error):
                raise PeerLost(f"{host}, which hosts the job's store, is gone: {error}") from error
            raise error
        reason = f": {error}"
    raise PeerLost(f"{host}, which hosts the job's store, has not joined within {limit.total_seconds():g} s{reason}")


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
