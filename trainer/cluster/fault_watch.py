"""What a rank does when it, a peer, its launcher or the user ends it: say who failed first, and be gone in time.

A thread watches, because the main thread may be inside a blocking collective, where Python's handlers do not run.
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

from trainer.cluster.liveness import Peers
from trainer.cluster.rendezvous import Member
from trainer.common.credentials import redacted
from trainer.common.errors import START_AGAIN, JobError, SharedUserError, UserError

_COURTESY_SECONDS = 3.0
"""A rank that ends because of another lets the launcher notice the other first: its status becomes the job's."""

_STOP = (signal.SIGTERM, signal.SIGUSR1)
"""What Kubernetes and Slurm send before they take a node: save a checkpoint, then end."""

_WATCHED = (*_STOP, signal.SIGINT)

_OF_PEERS = ("imed out", "onnection", "roken pipe", "remote process exited")
"""What errors of gloo, NCCL and the store say when a rank of another machine has stopped or is gone."""


class FaultWatch:
    """Watches signals and the launcher from the moment it is made.

    `phase` is what the rank is doing, for messages; `joined_as` tells it which rank it is and of its peers. While
    `may_stop`, a signal that asks for a checkpoint only sets `stop_asked`; at other times it ends the process.

    Args:
        rank, name: the launcher's rank, and how messages name it until it is a member.
    """

    def __init__(self, rank: int, name: str):
        self.name = name
        self.phase = "start-up"
        self.joined = False
        """Whether the rank is part of the job: before, all ranks find the same mistakes in the input."""
        self.may_stop = False
        self.stop_asked = False
        self.saved = False
        """Whether a stop has been done: nothing is lost if the process ends now."""
        self._peers: Peers | None = None
        self._rank = rank
        self._end_said = False
        self._launchers = _launchers()
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        for number in _WATCHED:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._write_end)
        threading.Thread(target=self._watch, args=(read_end,), daemon=True, name="fault-watch").start()

    def joined_as(self, member: Member) -> None:
        """The rank knows which one it is, and its peers."""
        self.name, self._rank, self._peers = member.name, member.rank, member.peers

    def _watch(self, read_end: int) -> None:
        while True:
            ready, _, _ = select.select([read_end], [], [], 1.0)
            if ready:
                number = os.read(read_end, 1)[0]
                if number in _WATCHED:
                    self._on_signal(number)
            elif any(_gone(p) for p in self._launchers):
                self._leave("its launcher is gone", 1)

    def _on_signal(self, number: int) -> None:
        if self.saved:
            os._exit(START_AGAIN)
        dead = self._dead_peers()
        if number in _STOP and self.may_stop and not dead:
            self.stop_asked = True
            return
        got = f"got {signal.Signals(number).name}"
        self._leave(f"{got} after {dead} died" if dead else got, 128 + number)

    def _dead_peers(self) -> str:
        return self._peers.describe(self._peers.dead()) if self._peers else ""

    def _leave(self, reason: str, status: int) -> NoReturn:
        if not self._end_said:
            _say(f"unipool: {self.name} stops in {self.phase}: {reason}")
        os._exit(status)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of `error`: one line for the user's mistakes, else a traceback and one line."""
        if isinstance(error, UserError):
            if self._rank == 0 or (self.joined and not isinstance(error, SharedUserError)):
                _say(f"error: {error}")  # before they join all ranks find the same mistakes
            else:
                self._leave_last()
                _say(f"error: {self.name}: {error}")  # still here: rank 0 has not found it
            os._exit(2)
        if isinstance(error, JobError):
            if self._rank == 0:
                _say(f"unipool: {error}")
            else:
                self._leave_last()
            os._exit(1)
        dead = self._dead_peers()
        for _ in range(20):
            if dead or "onnection" not in str(error):
                break
            time.sleep(0.1)  # a connection breaks some moments before its process is gone
            dead = self._dead_peers()
        silent = ""
        if self._peers and not dead and any(word in str(error) for word in _OF_PEERS):
            silent = self._peers.describe(self._peers.silent())
        if dead or silent:
            fate = f"{dead} died first" if dead else f"{silent} does not respond"
            _say(f"unipool: {self.name} stops in {self.phase}: {fate} ({type(error).__name__}: {error})")
            self._leave_last()
        else:
            lines = "".join(traceback.format_exception(error))
            _say(f"{lines}unipool: {self.name} failed in {self.phase}: {type(error).__name__}: {error}")
        os._exit(1)

    def _leave_last(self) -> None:
        """Another rank says why, and is to be the first that the launcher notices."""
        self._end_said = True
        time.sleep(_COURTESY_SECONDS)


def _launchers() -> list[psutil.Process]:
    """This rank's parent, and above deepspeed's launchers also who started them: the one that a user may kill."""
    found = []
    process = psutil.Process().parent()
    while process is not None:
        found.append(process)
        above_too = "deepspeed.launcher" in " ".join(process.cmdline())
        process = process.parent() if above_too else None
    return found


def _gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _say(text: str) -> None:
    with suppress(OSError):  # a log on a full disk
        sys.stdout.flush()
        sys.stderr.write(redacted(text) + "\n")
        sys.stderr.flush()
