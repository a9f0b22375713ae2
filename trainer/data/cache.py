"""Folders of prepared data: each is made by one process, appears only when it is complete, and is found again later."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.common.atomic import partial_folder, publish_folder
from trainer.common.errors import PATH_ERRORS, START_AGAIN, Unavailable, UserError
from trainer.common.format import duration
from trainer.data.status import Report, TakenOver, Waiting, tell

if TYPE_CHECKING:
    from filelock import SoftFileLease

PROGRESS_FILE = "progress.npz"
"""The file in an unfinished folder from which a later start resumes."""

PREVIOUS_FILE = "progress-previous.npz"
"""What that file was before, in case that what it describes is damaged."""

LEASE_SECONDS = 120.0
"""Time without a sign of life after which a process on another machine is taken for dead.

The lock is not one of the system's (flock), because on file systems that machines share it often holds on one machine
only. The death of a process on the same machine is noticed at once.
"""

_BEAT_SECONDS = 15.0
_POLL_SECONDS = 0.5
_STOP = (signal.SIGTERM, signal.SIGUSR1)


class NotPrepared(Exception):
    """A folder is not there, and was only looked for."""


@dataclass(frozen=True)
class Conduct:
    """How a process behaves while it prepares data, or waits for another one that does.

    Attributes:
        show: Whether to write progress and notes on stderr.
        patience: Seconds to wait for another process that makes no progress.
        ends_on_signals: Whether SIGTERM and SIGUSR1 end the process with `START_AGAIN`, even if it has handlers.
        only_looks: Whether it prepares nothing, and finds missing data by `NotPrepared`.
    """

    show: bool = True
    patience: float = 1800.0
    ends_on_signals: bool = False
    only_looks: bool = False


def make_once(directory: Path, name: str, fill: Callable[[Path, Report], None], conduct: Conduct) -> Path:
    """Return the folder `directory`/`name`; if it is not there, `fill` makes its files.

    Processes that want the same folder at once, on any machine, wait for the first one as long as it makes progress. A
    process that is killed leaves a hidden folder; the next start resumes from its `PROGRESS_FILE`, or removes it.

    Args:
        directory: The folder to make it in; created if needed.
        fill: Called with a temporary folder, which may hold what an interrupted call has written.

    Raises:
        NotPrepared: It is not there, and `conduct.only_looks`.
        UserError: The folder cannot be written, or `fill` raised it.
        Unavailable: The disk is full or fails, or another process has made no progress for `conduct.patience`.
    """
    path = directory / name
    try:
        while not path.is_dir():
            if conduct.only_looks:
                raise NotPrepared(path)
            directory.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(directory, name, conduct.show)
            with suppress(TakenOver):
                _make(path, fill, conduct)
    except OSError as error:
        of_path = error.errno in PATH_ERRORS
        mend = "set another folder" if of_path else "free some space or set another folder"
        raise (UserError if of_path else Unavailable)(
            f"data.dir {directory}: prepared data cannot be written ({error}); {mend}"
            + ("; the next start resumes the preparation" if _resumable(partial_folder(path)) else "")
        ) from error
    return path


def _make(path: Path, fill: Callable[[Path, Report], None], conduct: Conduct) -> None:
    """Make the folder, or wait until another process has."""
    partial, status = partial_folder(path), path.with_name(f".{path.name}.status")
    with _held(path, status, conduct) as lease:
        if lease is None or path.is_dir():
            return
        report = Report(status, conduct.show, lambda: lease.compromise is not None or path.is_dir())
        with _ended_by_signals(partial, report, lease, conduct):
            if not _resumable(partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            try:
                fill(partial, report)
                for file in partial.glob(".*"):  # what a kill has left of a progress file
                    file.unlink()
                publish_folder(partial, path, report.refuse_if_taken_over)
            except BaseException as error:
                if isinstance(error, Exception) and report.taken_over():
                    report.note(f"another process has taken over from this one, which was not heard of: {path}")
                    raise TakenOver from error
                _leave(partial, report)
                raise
            for file in (path / PROGRESS_FILE, path / PREVIOUS_FILE):
                file.unlink(missing_ok=True)
            report.remove()


def _leave(partial: Path, report: Report) -> None:
    """Remove what a later start cannot resume, unless another process goes on with it."""
    if not report.taken_over() and not _resumable(partial):
        shutil.rmtree(partial, ignore_errors=True)
    report.remove()


def _resumable(partial: Path) -> bool:
    return (partial / PROGRESS_FILE).is_file()


@contextmanager
def _held(path: Path, status: Path, conduct: Conduct) -> Iterator[SoftFileLease | None]:
    """Wait for the right to make the folder, and hold it in the `with` block; None if the folder has appeared."""
    from filelock import Timeout

    lease = _lease(path)
    waiting = Waiting(path, status, conduct.show, conduct.patience)
    try:
        lease.acquire(poll_interval=_POLL_SECONDS, cancel_check=waiting)
    except Timeout:
        if waiting.gave_up:
            raise Unavailable(
                f"{path}: waited {duration(conduct.patience)} (parallel.start_timeout_seconds) for process "
                f"{waiting.where()} without any progress; end it, or raise the limit, and start again"
            ) from None
        yield None
        return
    try:
        yield lease
    finally:
        lease.release()


def _lease(path: Path) -> SoftFileLease:
    from filelock import SoftFileLease

    file = path.with_name(f"{path.name}.lease")
    return SoftFileLease(file, lease_duration=LEASE_SECONDS, heartbeat_interval=_BEAT_SECONDS, thread_local=False)


@contextmanager
def _ended_by_signals(partial: Path, report: Report, lease: SoftFileLease, conduct: Conduct) -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the process at once with `START_AGAIN`, so that another can go on at once.

    A thread does so, because the main thread may be in native code for a minute, as when it trains a tokenizer.
    """
    handlers = {number: signal.getsignal(number) for number in _STOP}
    ours = conduct.ends_on_signals or set(handlers.values()) == {signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def watch() -> None:
        while number := os.read(read_end, 1)[0]:
            if number in _STOP:
                with suppress(Exception):  # whatever happens to the files, the process ends
                    _leave(partial, report)
                    lease.release(force=True)
                os._exit(START_AGAIN)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(write_end)
    for number in _STOP:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous)
        os.write(write_end, b"\0")  # the end of the pipe may never come: a process forked meanwhile has it open too
        thread.join()
        os.close(write_end)
        os.close(read_end)


def _remove_abandoned(directory: Path, name: str, show: bool) -> None:
    """Remove unfinished folders that nobody holds and nobody can resume; mention those of other names that remain."""
    from filelock import Timeout

    for partial in sorted(directory.glob(".partial-*")):
        finished = partial.name.removeprefix(".partial-")
        if finished == name:
            continue
        try:
            with _lease(directory / finished).acquire(timeout=0):
                if not _resumable(partial):
                    shutil.rmtree(partial, ignore_errors=True)
                elif show:
                    tell(f"{partial}: an unfinished preparation; delete it if it is not needed")
        except Timeout:
            continue  # it is being made right now
