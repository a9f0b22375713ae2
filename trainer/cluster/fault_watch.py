"""What a rank does when it fails, or when a peer, its launcher or a signal ends it: name the cause and exit in time.

A thread watches for signals, because Python's handlers do not run while the main thread blocks in a collective.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import NoReturn

import psutil

from pool.wire.reasons import from_peers, ran_out
from trainer.cluster.launch import has_ended
from trainer.cluster.liveness import SOMEBODY_IS_LATE, Liveness, PeerLost
from trainer.cluster.rendezvous import Member
from trainer.common.credentials import redacted
from trainer.common.errors import START_AGAIN, JobError, SharedUserError, UserError

_COURTESY_SECONDS = 3.0
"""Delay after which a rank ends because of another one. The launcher returns the status of the first that ends."""

_STOP = (signal.SIGTERM, signal.SIGUSR1)
"""What Kubernetes and Slurm send before they take a node away: save a checkpoint, then end."""

_WATCHED = (*_STOP, signal.SIGINT)


class FaultWatch:
    """Watches signals and the launcher from its construction on.

    Args:
        rank, name: The launcher rank, and how messages name it until `joined_as` is called.

    Attributes:
        phase: What the rank is doing, for messages.
        joined: Whether the rank is part of the job. Before, all ranks find the same mistakes in the input.
        may_stop: Whether SIGTERM and SIGUSR1 only set `stop_asked`; otherwise they end the process.
        stop_asked: Whether a signal has asked for a checkpoint and a stop.
        saved: Whether the checkpoint before a stop has been saved, so that the process may end at any time.
    """

    def __init__(self, rank: int, name: str):
        self.name = name
        self.phase = "start-up"
        self.joined = self.may_stop = self.stop_asked = self.saved = False
        self._liveness: Liveness | None = None
        self._rank = rank
        self._leaving = False
        self._launchers = _launchers()
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        for number in _WATCHED:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._write_end)
        threading.Thread(target=self._watch, args=(read_end,), daemon=True, name="fault-watch").start()

    def joined_as(self, member: Member) -> None:
        """Use the rank's number in the job, and watch its peers."""
        self.name, self._rank, self._liveness = member.name, member.rank, member.liveness

    def _watch(self, read_end: int) -> None:
        while True:
            ready, _, _ = select.select([read_end], [], [], 1.0)
            if ready:
                number = os.read(read_end, 1)[0]
                if number in _WATCHED:
                    self._on_signal(number)
            elif any(has_ended(p) for p in self._launchers):
                self._exit("its launcher is gone", 1)
            elif self._liveness and self._liveness.overdue and (missing := self._missing(self._liveness)):
                self._exit(missing, 1)

    def _on_signal(self, number: int) -> None:
        if self.saved:
            os._exit(START_AGAIN)
        dead = self._dead_peers()
        if number in _STOP and self.may_stop and not dead:
            self.stop_asked = True
            return
        received = f"received {signal.Signals(number).name}"
        self._exit(f"{received} after {dead} died" if dead else received, 128 + number)

    def _dead_peers(self) -> str:
        return self._liveness.describe(self._liveness.dead()) if self._liveness else ""

    def _exit(self, reason: str, status: int) -> NoReturn:
        if not self._leaving:
            _say(f"unipool: {self.name} stopped during {self.phase}: {reason}")
        os._exit(status)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of `error`, with one line for a user's mistake, else a traceback and one line."""
        if isinstance(error, UserError):
            if self._rank == 0 or (self.joined and not isinstance(error, SharedUserError)):
                _say(f"error: {error}")
            else:
                self._let_others_end_first()
                _say(f"error: {self.name}: {error}")  # this process still runs, so rank 0 has not found the mistake
            os._exit(error.status)
        if isinstance(error, JobError):
            if self._rank == 0:
                _say(f"unipool: {error}")
            else:
                self._let_others_end_first()
            os._exit(1)
        if cause := self._lost_peers(error):
            _say(f"unipool: {self.name} stopped during {self.phase}: {cause} ({type(error).__name__}: {error})")
            self._let_others_end_first()
        else:
            lines = "".join(traceback.format_exception(error))
            explained = isinstance(error, PeerLost)
            late = self._liveness and not explained and isinstance(error, RuntimeError) and ran_out(str(error))
            hint = f" ({SOMEBODY_IS_LATE})" if late else ""
            _say(f"{lines}unipool: {self.name} failed during {self.phase}: {type(error).__name__}: {error}{hint}")
            if explained:  # others, who wait for the same rank, would say that this one died
                self._let_others_end_first()
        os._exit(1)

    def _lost_peers(self, error: BaseException) -> str:
        """Say which lost peers caused the error; "" if none did."""
        dead = self._dead_peers()
        for _ in range(20):
            if dead or "onnection" not in str(error):
                break
            time.sleep(0.1)  # a connection breaks some moments before its process is gone
            dead = self._dead_peers()
        if dead:
            return f"{dead} died first"
        if self._liveness is None or not from_peers(str(error)):
            return ""
        return self._missing(self._liveness, ran_out(str(error)))

    @staticmethod
    def _missing(liveness: Liveness, ask_for_late: bool = True) -> str:
        """Say which ranks do not respond or, if asked, have not come to where this one waits; "" if none."""
        if silent := liveness.silent():
            return f"{liveness.describe(silent)} does not respond"
        if ask_for_late and (late := liveness.late()):
            return f"{liveness.describe(late)} has not reached this point"
        return ""

    def _let_others_end_first(self) -> None:
        """Give the rank that names the cause time to end first, which the launcher then reports."""
        self._leaving = True
        time.sleep(_COURTESY_SECONDS)


def _launchers() -> list[psutil.Process]:
    """Return this rank's parent and, above deepspeed's launchers, the process that started them."""
    found = []
    process = psutil.Process().parent()
    while process is not None:
        found.append(process)
        is_launcher = "deepspeed.launcher" in " ".join(process.cmdline())
        process = process.parent() if is_launcher else None
    return found


def _say(text: str) -> None:
    with suppress(OSError):  # the log may be on a full disk
        sys.stdout.flush()
        sys.stderr.write(redacted(text) + "\n")
        sys.stderr.flush()
