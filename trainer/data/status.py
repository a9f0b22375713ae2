"""How far a preparation is: lines on stderr, and a file in which processes that wait for it see that it goes on.

The lines are not tqdm's: they are also what the file says, so that a process that waits can quote them; the log of a
cluster gets a whole line now and then; and a stage may know its share of the whole without knowing a total.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.common.format import count, duration, percent
from trainer.common.safe_read import read_bytes
from trainer.common.strict_json import dumps, loads

LINE_SECONDS = 30.0
"""Time between two lines, where stderr is not a terminal."""

_WRITE_SECONDS = 5.0


class TakenOver(Exception):
    """Another process has gone on with this preparation, because this one showed no sign of life."""


@dataclass(frozen=True)
class Status:
    """What the file says.

    Attributes:
        owner: A random name of the process that prepares.
        done: What it has read so far, in any unit; it changes whenever the preparation has made progress.
        line: What it is doing and how far it is, for people.
    """

    owner: str
    host: str
    process: int
    done: int
    line: str

    @classmethod
    def read(cls, file: Path) -> Status | None:
        """Return what the file says; None if there is none, or another version wrote it."""
        try:
            return cls(**loads(read_bytes(file)))
        except (OSError, ValueError, TypeError):
            return None


def tell(text: str, end: str = "\n") -> None:
    """Write on stderr. A full disk under the log ends no preparation: a run may be training on what it makes."""
    with suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


class Report:
    """Reports the progress of the process that prepares one folder.

    Args:
        file: The status file of the folder.
        show: Whether to write lines on stderr.
        lost: Whether the process has lost the right to prepare the folder.
    """

    def __init__(self, file: Path, show: bool, lost: Callable[[], bool]):
        self._file, self._show, self._lost = file, show, lost
        self._owner = uuid.uuid4().hex
        self._terminal = show and sys.stderr.isatty()
        self._what = self._unit = ""
        self._begun = self._written = self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None
        with suppress(OSError):  # what a killed process has left: a full disk may keep it from being replaced
            file.unlink()
        self._put(0, "beginning")

    def begin(self, what: str, unit: str) -> None:
        """Begin a stage, as in `begin("tokenising books", "tokens")`."""
        self._what, self._unit, self._first = what, unit, None
        self._begun = time.monotonic()

    def at(self, done: int, share: float | None = None) -> None:
        """Say how far the stage is.

        Args:
            done: What has been done of it, including what an interrupted process had done.
            share: The same as a share of the whole stage, if that is known.
        """
        now = time.monotonic()
        self._first = self._first or (done, share or 0.0)
        show = self._show and now - self._shown >= (1.0 if self._terminal else LINE_SECONDS)
        write = now - self._written >= _WRITE_SECONDS
        if show or write:
            line = self._line(done, share, now - self._begun)
        if show:
            self._shown = now
            self._print(line)
        if write:
            self._written = now
            self._put(done, line)

    def end(self, done: int) -> None:
        """Say that the stage has ended."""
        if self._show:
            self._print(self._line(done, None, time.monotonic() - self._begun))
            if self._terminal:
                tell("")

    def note(self, line: str) -> None:
        """Write a line on stderr."""
        if self._show:
            tell(line)

    def taken_over(self) -> bool:
        """Return whether another process prepares the folder now, or has done so."""
        status = Status.read(self._file)
        return self._lost() or (status is not None and status.owner != self._owner)

    def refuse_if_taken_over(self) -> None:
        """Raise `TakenOver` if another process prepares the folder now, or has done so."""
        if self.taken_over():
            raise TakenOver

    def remove(self) -> None:
        """Remove the status file, unless it is another process's by now."""
        status = Status.read(self._file)
        if status is None or status.owner == self._owner:
            self._file.unlink(missing_ok=True)

    def _line(self, done: int, share: float | None, elapsed: float) -> str:
        first, first_share = self._first or (0, 0.0)
        parts = [f"{self._what}: "]
        if share is not None:
            parts.append(f"{percent(share, 1)}, ")
        parts.append(f"{count(done)} {self._unit}")
        if done > first:  # otherwise all of it was there when the stage began
            parts.append(f", {count((done - first) / max(elapsed, 1e-3))} {self._unit}/s")
        if share is not None and share > first_share:
            parts.append(f", {duration(elapsed * max(1 - share, 0) / (share - first_share))} left")
        return "".join(parts)

    def _print(self, line: str) -> None:
        if self._terminal:
            tell(f"\r{line:<79}", end="")
        else:
            tell(line)

    def _put(self, done: int, line: str) -> None:
        status = Status(self._owner, socket.gethostname(), os.getpid(), done, line)
        temporary = self._file.with_name(f"{self._file.name}-{self._owner[:8]}")
        with suppress(OSError):  # a full disk is met by what is prepared, too
            temporary.write_text(dumps(asdict(status)))
            temporary.replace(self._file)


class Waiting:
    """Watches another process prepare a folder, to be called now and then while waiting for it.

    Args:
        path: The folder.
        file: Its status file.
        show: Whether to write lines on stderr.
        patience: Seconds without progress after which to stop waiting.

    Attributes:
        status: What the file said last.
        gave_up: Whether the process has made no progress for so long.
    """

    def __init__(self, path: Path, file: Path, show: bool, patience: float):
        self._path, self._file, self._show, self._patience = path, file, show, patience
        self._since = time.monotonic()
        self._next_line = 0.0
        self.status: Status | None = None
        self.gave_up = False

    def __call__(self) -> bool:
        """Look; return whether to stop waiting, because the folder is there or nothing happens any more."""
        now = time.monotonic()
        status = Status.read(self._file)
        seen = self.status and (self.status.owner, self.status.done)
        if status is not None and (status.owner, status.done) != seen:
            self._since = now
        self.status = status or self.status
        if self._show and now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            tell(f"waiting for another process, {self.where()}")
        self.gave_up = now - self._since > self._patience
        return self.gave_up or self._path.is_dir()

    def where(self) -> str:
        """Return which process it is and what it was doing when it last said so."""
        if self.status is None:
            return f"which prepares {self._path}"
        return f"{self.status.process} on {self.status.host}, which prepares {self._path} ({self.status.line})"
